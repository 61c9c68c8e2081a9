// Compiled with AVX-512 and its bfloat16 extension switched on: nothing here may run where
// HasBf16Products says no, nor be a copy of something that other files use too.
#include "xla_ffi/engine/cpu/products.h"

#if defined(__AVX512BF16__)
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
  for (int64_t r = 0; r < k; r += 2) {
    for (int64_t j = 0; j < n; j += kPanelColumns) {
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

}  // namespace

const Products& Avx512Bf16Products() {
  static constexpr Products kProducts = {Float::kBf16, 2, PackRows, PackColumns,
                                         MultiplyWords<Pair>};
  return kProducts;
}

}  // namespace jax_fusco::cpu

#elif defined(__x86_64__)
#error "compile this file with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16"
#endif
