// Row kernels, and products of float32, with AVX-512 (F, BW, VL, DQ). Compiled with those
// instructions switched on: nothing here may run, or be shared with other files, before the machine
// was asked for them.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "xla_ffi/engine/cpu/float_types.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {
namespace {

// The integer form of Round(float, Bf16*).
inline __m256i RoundToBf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet));
}

struct Line {
  __m512i v;

  static Line Zero() { return {_mm512_setzero_si512()}; }
  static Line Load(const char* from) { return {_mm512_loadu_si512(from)}; }
  void Stream(char* to) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v); }
  static void Fence() { _mm_sfence(); }
};

struct F32x16 {
  __m512 v;

  static F32x16 Zero() { return {_mm512_setzero_ps()}; }
  static F32x16 Set(float value) { return {_mm512_set1_ps(value)}; }
  static F32x16 Load(const Bf16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static F32x16 Load(const F16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static F32x16 Load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static F32x16 Load(const double* from) {
    const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(from));
    const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(from + 8));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  void Store(Bf16* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), RoundToBf16(v));
  }
  void Store(F16* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void Store(float* to) const { _mm512_storeu_ps(to, v); }
  void Store(double* to) const {
    _mm512_storeu_pd(to, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    _mm512_storeu_pd(to + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
  float Sum() const {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

inline F32x16 Fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32x16 Mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }

struct F64x16 {
  __m512d low, high;

  static F64x16 Zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static F64x16 Set(double value) { return {_mm512_set1_pd(value), _mm512_set1_pd(value)}; }
  static F64x16 Load(const double* from) {
    return {_mm512_loadu_pd(from), _mm512_loadu_pd(from + 8)};
  }
  template <typename T>
  static F64x16 Load(const T* from) {
    double lanes[16];
    F32x16::Load(from).Store(lanes);  // exact
    return Load(lanes);
  }
  void Store(double* to) const {
    _mm512_storeu_pd(to, low);
    _mm512_storeu_pd(to + 8, high);
  }
  template <typename T>
  void Store(T* to) const {
    double lanes[16];
    Store(lanes);
    for (int i = 0; i < 16; ++i) Round(lanes[i], &to[i]);
  }
  double Sum() const {
    const __m512d eight = _mm512_add_pd(low, high);
    const __m256d four =
        _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

inline F64x16 Fma(const F64x16& a, const F64x16& b, const F64x16& c) {
  return {_mm512_fmadd_pd(a.low, b.low, c.low), _mm512_fmadd_pd(a.high, b.high, c.high)};
}
inline F64x16 Mul(const F64x16& a, const F64x16& b) {
  return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)};
}

}  // namespace
}  // namespace jax_fusco::cpu

#include "xla_ffi/engine/cpu/products_template.h"
#include "xla_ffi/engine/cpu/rows_template.h"

namespace jax_fusco::cpu {
namespace {

struct Single {
  static __m512 Fma(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

void PackRows(const void* const* rows, int64_t k, int64_t n, uint32_t* packed) {
  for (int64_t r = 0; r < k; ++r) {
    const float* const from = static_cast<const float*>(rows[r]);
    float* to = reinterpret_cast<float*>(packed) + r * kPanelColumns;
    for (int64_t j = 0; j < n; j += kPanelColumns, to += k * kPanelColumns) {
      _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(Low16(n - j), from + j));
      _mm512_storeu_ps(to + 16, _mm512_maskz_loadu_ps(Low16(n - j - 16), from + j + 16));
    }
  }
}

}  // namespace

const RowKernels& Avx512RowKernels() {
  static const RowKernels kernels = MakeRowKernels();
  return kernels;
}

const Products& Avx512Products() {
  static constexpr Products kProducts = {
      Float::kF32, 1, 1, 256, 256, true, PackRows, PackColumns<1>, MultiplyWords<Single>};
  return kProducts;
}

}  // namespace jax_fusco::cpu
