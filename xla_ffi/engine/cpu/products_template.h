// Products over words with AVX-512, whatever a word is. Included by files that are compiled with
// those instructions switched on, and that have defined Fma for a struct of theirs:
//
//   static __m512 Fma(__m512 sum, __m512 a, __m512 b);  // sum + a * b, in each of 16 words
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "xla_ffi/engine/cpu/products.h"

namespace jax_fusco::cpu {
namespace {

// Rows of a result that are summed in registers.
constexpr int kStripRows = 14;

inline __mmask16 Low16(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

// words[r] of 16 rows becomes words[c] of 16 columns.
inline void Transpose(__m512i* words) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(words[i], words[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(words[i], words[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    // Lane l of b[i + 4 g] has column 4 l + i of rows 4 g to 4 g + 3.
    const __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    words[i] = _mm512_shuffle_i32x4(low, high, 0x88);
    words[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    words[i + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    words[i + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

template <int64_t kBlock>
void PackColumns(const void* const* rows, int64_t words, int64_t n, uint32_t* packed) {
  const int64_t height = RoundUp(words, kBlock);
  // Columns past the last become zeros, to the end of its panel.
  for (int64_t j = 0; j < RoundUp(n, kPanelColumns); j += 16) {
    uint32_t* const to = packed + j / kPanelColumns * kPanelColumns * height + j % kPanelColumns;
    for (int64_t p = 0; p < words; p += 16) {
      const __mmask16 mask = Low16(words - p);
      __m512i block[16];
      for (int i = 0; i < 16; ++i) {
        block[i] = j + i < n ? _mm512_maskz_loadu_epi32(
                                   mask, static_cast<const uint32_t*>(rows[j + i]) + p)
                             : _mm512_setzero_si512();
      }
      Transpose(block);
      for (int64_t i = 0; i < 16 && i < height - p; ++i) {
        _mm512_storeu_si512(to + (p + i) * kPanelColumns, block[i]);
      }
    }
  }
}

// Fetches the part [j, j + kPanelColumns) of n of the next strip's rows: its sums would wait for
// what nobody has read yet.
inline void Fetch(const uint32_t* const* rows, int64_t height, int64_t words, int64_t j,
                  int64_t n) {
  const int64_t end = j + kPanelColumns < n ? j + kPanelColumns : n;
  for (int64_t r = height * j / n; r < height * end / n; ++r) {
    for (int64_t k = 0; k < words; k += 16) __builtin_prefetch(rows[r] + k);
  }
}

template <typename Word, int kHeight>
void Strip(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t words, int64_t n,
           bool first, float* c, int64_t stride) {
  for (int i = 0; i < kHeight; ++i) {
    __builtin_prefetch(c + i * stride, 1);
    __builtin_prefetch(c + i * stride + 16, 1);
  }
  __m512 sums[kHeight][2];
  const __mmask16 masks[2] = {Low16(n), Low16(n - 16)};
#pragma GCC unroll 14
  for (int i = 0; i < kHeight; ++i) {
    for (int h = 0; h < 2; ++h) {
      sums[i][h] =
          first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(masks[h], c + i * stride + 16 * h);
    }
  }
  const uint32_t* rows[kHeight];
  for (int i = 0; i < kHeight; ++i) rows[i] = a[i];
  for (int64_t k = 0; k < words; ++k) {
    const __m512 left = _mm512_loadu_ps(b + k * kPanelColumns);
    const __m512 right = _mm512_loadu_ps(b + k * kPanelColumns + 16);
#pragma GCC unroll 14
    for (int i = 0; i < kHeight; ++i) {
      float word;
      std::memcpy(&word, rows[i] + k * step, sizeof(word));
      const __m512 all = _mm512_set1_ps(word);
      sums[i][0] = Word::Fma(sums[i][0], all, left);
      sums[i][1] = Word::Fma(sums[i][1], all, right);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kHeight; ++i) {
    for (int h = 0; h < 2; ++h) {
      _mm512_mask_storeu_ps(c + i * stride + 16 * h, masks[h], sums[i][h]);
    }
  }
}

using StripFunction = void (*)(const uint32_t* const*, int64_t, const uint32_t*, int64_t, int64_t,
                               bool, float*, int64_t);
template <typename Word, int... kHeights>
StripFunction StripOf(int64_t height, std::integer_sequence<int, kHeights...>) {
  static constexpr StripFunction kTable[] = {Strip<Word, kHeights + 1>...};
  return kTable[height - 1];
}

template <typename Word>
void MultiplyWords(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t m, int64_t n,
                   int64_t words, bool first, float* c, int64_t stride) {
  // Equal heights: 14 and 2 rows take longer than 8 and 8.
  const int64_t strips = (m + kStripRows - 1) / kStripRows;
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t i = m * s / strips, next = m * (s + 1) / strips, after = m * (s + 2) / strips;
    const auto strip = StripOf<Word>(next - i, std::make_integer_sequence<int, kStripRows>());
    for (int64_t j = 0; j < n; j += kPanelColumns) {
      if (step == 1 && s + 1 < strips) Fetch(a + next, after - next, words, j, n);
      strip(a + i, step, b + j * words, words, n - j, first, c + i * stride + j, stride);
    }
  }
}

}  // namespace
}  // namespace jax_fusco::cpu
