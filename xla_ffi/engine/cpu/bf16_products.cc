// Compiled with AVX-512 and its bfloat16 extension switched on: nothing here may run where
// HasBf16Products says no, nor be a copy of something that other files use too.
#include "xla_ffi/engine/cpu/bf16_products.h"

#include <cstring>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace jax_fusco::cpu {
namespace {

// Rows of `c` that are summed in registers: 28 of the 32 for two vectors each.
constexpr int kRows = 14;

__mmask32 Low(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
__mmask16 Low16(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

// words[r] of 16 rows becomes words[c] of 16 columns.
void Transpose(__m512i* words) {
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

template <int kHeight>
void Panel(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t pairs, int64_t n,
           bool first, float* c, int64_t stride) {
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
  for (int64_t k = 0; k < pairs; ++k) {
    const auto left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + k * kPanelColumns));
    const auto right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + k * kPanelColumns + 16));
#pragma GCC unroll 14
    for (int i = 0; i < kHeight; ++i) {
      int32_t word;
      std::memcpy(&word, rows[i] + k * step, sizeof(word));
      const auto pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
      sums[i][0] = _mm512_dpbf16_ps(sums[i][0], pair, left);
      sums[i][1] = _mm512_dpbf16_ps(sums[i][1], pair, right);
    }
  }
#pragma GCC unroll 14
  for (int i = 0; i < kHeight; ++i) {
    for (int h = 0; h < 2; ++h) {
      _mm512_mask_storeu_ps(c + i * stride + 16 * h, masks[h], sums[i][h]);
    }
  }
}

using PanelFunction = void (*)(const uint32_t* const*, int64_t, const uint32_t*, int64_t, int64_t,
                               bool, float*, int64_t);
template <int... kHeights>
PanelFunction PanelOf(int height, std::integer_sequence<int, kHeights...>) {
  static constexpr PanelFunction kTable[] = {Panel<kHeights + 1>...};
  return kTable[height - 1];
}

}  // namespace

void PackBf16Rows(const uint16_t* const* rows, int64_t k, int64_t n, uint32_t* packed) {
  alignas(64) int16_t low[32], high[32];
  for (int16_t i = 0; i < 16; ++i) {
    low[2 * i] = i;
    low[2 * i + 1] = static_cast<int16_t>(i + 32);
    high[2 * i] = static_cast<int16_t>(i + 16);
    high[2 * i + 1] = static_cast<int16_t>(i + 48);
  }
  const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
  for (int64_t r = 0; r < k; r += 2) {
    for (int64_t j = 0; j < n; j += kPanelColumns) {
      const __mmask32 mask = Low(n - j);
      const __m512i even = _mm512_maskz_loadu_epi16(mask, rows[r] + j);
      const __m512i odd = _mm512_maskz_loadu_epi16(mask, rows[r + 1] + j);
      uint32_t* const to = packed + j * k / 2 + r / 2 * kPanelColumns;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, lows, odd));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, highs, odd));
    }
  }
}

void PackBf16Columns(const uint16_t* const* rows, int64_t k, int64_t n, uint32_t* packed) {
  const int64_t pairs = k / 2;
  for (int64_t j = 0; j < n; j += 16) {
    uint32_t* const to = packed + j / kPanelColumns * kPanelColumns * pairs + j % kPanelColumns;
    for (int64_t p = 0; p < pairs; p += 16) {
      const __mmask16 mask = Low16(pairs - p);
      __m512i words[16];
      for (int i = 0; i < 16; ++i) {
        words[i] = j + i < n ? _mm512_maskz_loadu_epi32(mask, rows[j + i] + 2 * p)
                             : _mm512_setzero_si512();
      }
      Transpose(words);
      for (int64_t i = 0; i < 16 && i < pairs - p; ++i) {
        _mm512_storeu_si512(to + (p + i) * kPanelColumns, words[i]);
      }
    }
  }
  if (n % kPanelColumns != 0 && n % kPanelColumns <= 16) {
    uint32_t* const to = packed + n / kPanelColumns * kPanelColumns * pairs + 16;
    for (int64_t p = 0; p < pairs; ++p) {
      _mm512_storeu_si512(to + p * kPanelColumns, _mm512_setzero_si512());
    }
  }
}

void MultiplyBf16(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t m, int64_t n,
                  int64_t k, bool first, float* c, int64_t stride) {
  const int64_t pairs = k / 2;
  // Equal heights: 14 and 2 rows take longer than 8 and 8.
  const int64_t strips = (m + kRows - 1) / kRows;
  for (int64_t j = 0; j < n; j += kPanelColumns) {
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t i = m * s / strips, next = m * (s + 1) / strips;
      const PanelFunction panel =
          PanelOf(static_cast<int>(next - i), std::make_integer_sequence<int, kRows>());
      panel(a + i, step, b + j * pairs, pairs, n - j, first, c + i * stride + j, stride);
    }
  }
}

}  // namespace jax_fusco::cpu

#elif defined(__x86_64__)
#error "compile this file with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16"
#else

namespace jax_fusco::cpu {

void PackBf16Rows(const uint16_t* const*, int64_t, int64_t, uint32_t*) {}
void PackBf16Columns(const uint16_t* const*, int64_t, int64_t, uint32_t*) {}
void MultiplyBf16(const uint32_t* const*, int64_t, const uint32_t*, int64_t, int64_t, int64_t, bool,
                  float*, int64_t) {}

}  // namespace jax_fusco::cpu

#endif
