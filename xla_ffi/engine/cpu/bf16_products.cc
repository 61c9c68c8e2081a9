// Products of bfloat16, with AVX-512 and with AMX. Compiled with both switched on: nothing here may
// run before the machine was asked for them, nor be a copy of something that other files use too.
#include "xla_ffi/engine/cpu/products.h"

#if defined(__AVX512BF16__) && defined(__AMX_BF16__)
#include "xla_ffi/engine/cpu/products_template.h"

namespace jax_fusco::cpu {
namespace {

// Two elements of a sum.
struct Pair {
  static __m512 Fma(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

__mmask32 Low32(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }

void PackRows(const void* const* rows, int64_t k, int64_t n, uint32_t* packed) {
  alignas(64) int16_t low[32], high[32];
  for (int16_t i = 0; i < 16; ++i) {
    low[2 * i] = i;
    low[2 * i + 1] = static_cast<int16_t>(i + 32);
    high[2 * i] = static_cast<int16_t>(i + 16);
    high[2 * i + 1] = static_cast<int16_t>(i + 48);
  }
  const __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
  // Rows are short and far apart: the hardware fetches too late.
  constexpr int64_t kAhead = 16;
  for (int64_t r = 0; r < k; r += 2) {
    const bool fetch = r + kAhead + 1 < k;
    for (int64_t j = 0; j < n; j += kPanelColumns) {
      for (int64_t i = 0; fetch && i < 2; ++i) {
        __builtin_prefetch(static_cast<const uint16_t*>(rows[r + kAhead + i]) + j);
      }
      const __mmask32 mask = Low32(n - j);
      const __m512i even =
          _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows[r]) + j);
      const __m512i odd =
          _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(rows[r + 1]) + j);
      uint32_t* const to = packed + j * k / 2 + r / 2 * kPanelColumns;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, lows, odd));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, highs, odd));
    }
  }
}

// A tile register: 16 rows of a block of words each.
constexpr int64_t kTile = 16, kTileWords = kTile * kTile;
// Four sums are made at a time, 2 x 2 tiles of the result: a strip of rows and a panel of columns.
constexpr int64_t kStrip = 2 * kTile;
static_assert(kPanelColumns == 2 * kTile, "a panel is two tiles wide");
constexpr int64_t kDepth = 256;

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Compilers do not know what tile instructions read and write: nothing may move past this.
inline void Order() { asm volatile("" ::: "memory"); }

// A strip of `a`, as tiles: for each block of words the upper rows, then the lower; zeros past the
// last row and the last word.
void PackStrip(const uint32_t* const* a, int64_t step, int64_t height, int64_t words,
               uint32_t* strip) {
  if (step == 1) {
    for (int64_t r = 0; r < kStrip; ++r) {
      for (int64_t k = 0; k < words; k += kTile) {
        const __m512i row = r < height ? _mm512_maskz_loadu_epi32(Low16(words - k), a[r] + k)
                                       : _mm512_setzero_si512();
        _mm512_store_si512(strip + k * kStrip + r * kTile, row);
      }
    }
    return;
  }
  // Columns of a panel, whole and filled up with zeros.
  for (int64_t k = 0; k < words; k += kTile) {
    for (int64_t r = 0; r < kStrip; r += kTile) {
      __m512i tile[kTile];
      for (int64_t i = 0; i < kTile; ++i) tile[i] = _mm512_loadu_si512(a[0] + (k + i) * step + r);
      Transpose(tile);
      for (int64_t i = 0; i < kTile; ++i) {
        _mm512_store_si512(strip + k * kStrip + (r + i) * kTile, tile[i]);
      }
    }
  }
}

// The 2 x 2 tiles of one strip and one panel.
void MultiplyTiles(const uint32_t* strip, const uint32_t* panel, int64_t words, bool first,
                   float* c, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  float* const lower = c + kTile * stride;
  Order();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, bytes);
    _tile_loadd(1, c + kTile, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + kTile, bytes);
  }
  for (int64_t k = 0; k < words; k += kTile) {
    _tile_loadd(4, strip + k * kStrip, 64);
    _tile_loadd(6, panel + k * kPanelColumns, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + k * kPanelColumns + kTile, 128);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, strip + k * kStrip + kTileWords, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTile, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + kTile, bytes);
  Order();
}

void CopyRows(const float* from, int64_t from_stride, int64_t height, int64_t width, float* to,
              int64_t to_stride) {
  for (int64_t r = 0; r < height; ++r, from += from_stride, to += to_stride) {
    for (int64_t j = 0; j < width; j += 16) {
      const __mmask16 mask = Low16(width - j);
      _mm512_mask_storeu_ps(to + j, mask, _mm512_maskz_loadu_ps(mask, from + j));
    }
  }
}

void MultiplyInTiles(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t m,
                     int64_t n, int64_t words, bool first, float* c, int64_t stride) {
  alignas(64) uint32_t strip[kStrip * kDepth / 2];
  alignas(64) float edge[kStrip * kPanelColumns];
  alignas(64) static constexpr TileShapes kShapes;
  const int64_t height_of_b = RoundUp(words, kTile);
  _tile_loadconfig(&kShapes);
  for (int64_t i = 0; i < m; i += kStrip) {
    const int64_t height = m - i < kStrip ? m - i : kStrip, next = i + kStrip;
    PackStrip(a + i, step, height, words, strip);
    for (int64_t j = 0; j < n; j += kPanelColumns) {
      if (step == 1 && next < m) {
        Fetch(a + next, m - next < kStrip ? m - next : kStrip, words, j, n);
      }
      const int64_t width = n - j < kPanelColumns ? n - j : kPanelColumns;
      float* const to = c + i * stride + j;
      const uint32_t* const panel = b + j * height_of_b;
      if (height == kStrip && width == kPanelColumns) {
        MultiplyTiles(strip, panel, words, first, to, stride);
        continue;
      }
      if (!first) CopyRows(to, stride, height, width, edge, kPanelColumns);
      MultiplyTiles(strip, panel, words, first, edge, kPanelColumns);
      CopyRows(edge, kPanelColumns, height, width, to, stride);
    }
  }
  _tile_release();  // a thread with tiles in use takes longer to switch
}

}  // namespace

const Products& Avx512Bf16Products() {
  static constexpr Products kProducts = {
      Float::kBf16, 2, 1, 256, kMostDepth, true, PackRows, PackColumns<1>, MultiplyWords<Pair>};
  return kProducts;
}

const Products& AmxProducts() {
  static constexpr Products kProducts = {Float::kBf16,   2,     kTile,    kMostTileRows,
                                         kDepth,         false, PackRows, PackColumns<kTile>,
                                         MultiplyInTiles};
  return kProducts;
}

}  // namespace jax_fusco::cpu

#elif defined(__x86_64__)
#error "compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mamx-tile -mamx-bf16"
#endif
