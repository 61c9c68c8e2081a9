// Row kernels with AVX2, FMA and F16C. Compiled with those instructions switched on: nothing here
// may run, or be shared with other files, before the machine was asked for them.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "xla_ffi/engine/cpu/float_types.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {
namespace {

// The integer form of Round(float, Bf16*), one result in each 32-bit lane.
inline __m256i RoundToBf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}

inline __m256 WidenBf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

struct Line {
  __m256i low, high;

  static Line Zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Line Load(const char* from) {
    const auto* at = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  void Stream(char* to) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, high);
  }
  static void Fence() { _mm_sfence(); }
};

struct F32x16 {
  __m256 low, high;

  static F32x16 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F32x16 Set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static F32x16 Load(const Bf16* from) {
    const auto* bits = reinterpret_cast<const __m128i*>(from);
    return {WidenBf16(_mm_loadu_si128(bits)), WidenBf16(_mm_loadu_si128(bits + 1))};
  }
  static F32x16 Load(const F16* from) {
    const auto* bits = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(bits)), _mm256_cvtph_ps(_mm_loadu_si128(bits + 1))};
  }
  static F32x16 Load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  }
  static F32x16 Load(const double* from) { return {Narrow(from), Narrow(from + 8)}; }
  void Store(Bf16* to) const {
    const __m256i packed = _mm256_packus_epi32(RoundToBf16(low), RoundToBf16(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
  }
  void Store(F16* to) const {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    auto* bits = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(bits, _mm256_cvtps_ph(low, kNearest));
    _mm_storeu_si128(bits + 1, _mm256_cvtps_ph(high, kNearest));
  }
  void Store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  void Store(double* to) const {
    Widen(low, to);
    Widen(high, to + 8);
  }
  float Sum() const {
    const __m256 eight = _mm256_add_ps(low, high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

 private:
  static __m256 Narrow(const double* from) {
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(from + 4)),
                           _mm256_cvtpd_ps(_mm256_loadu_pd(from)));
  }
  static void Widen(__m256 from, double* to) {
    _mm256_storeu_pd(to, _mm256_cvtps_pd(_mm256_castps256_ps128(from)));
    _mm256_storeu_pd(to + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(from, 1)));
  }
};

inline F32x16 Fma(const F32x16& a, const F32x16& b, const F32x16& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F32x16 Mul(const F32x16& a, const F32x16& b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

struct F64x16 {
  __m256d v[4];

  static F64x16 Zero() { return Set(0.0); }
  static F64x16 Set(double value) {
    const __m256d all = _mm256_set1_pd(value);
    return {{all, all, all, all}};
  }
  static F64x16 Load(const double* from) {
    return {{_mm256_loadu_pd(from), _mm256_loadu_pd(from + 4), _mm256_loadu_pd(from + 8),
             _mm256_loadu_pd(from + 12)}};
  }
  template <typename T>
  static F64x16 Load(const T* from) {
    double lanes[16];
    F32x16::Load(from).Store(lanes);  // exact
    return Load(lanes);
  }
  void Store(double* to) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(to + 4 * i, v[i]);
  }
  template <typename T>
  void Store(T* to) const {
    double lanes[16];
    Store(lanes);
    for (int i = 0; i < 16; ++i) Round(lanes[i], &to[i]);
  }
  double Sum() const {
    const __m256d four = _mm256_add_pd(_mm256_add_pd(v[0], v[2]), _mm256_add_pd(v[1], v[3]));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

inline F64x16 Fma(const F64x16& a, const F64x16& b, const F64x16& c) {
  F64x16 out;
  for (int i = 0; i < 4; ++i) out.v[i] = _mm256_fmadd_pd(a.v[i], b.v[i], c.v[i]);
  return out;
}
inline F64x16 Mul(const F64x16& a, const F64x16& b) {
  F64x16 out;
  for (int i = 0; i < 4; ++i) out.v[i] = _mm256_mul_pd(a.v[i], b.v[i]);
  return out;
}

}  // namespace
}  // namespace jax_fusco::cpu

#include "xla_ffi/engine/cpu/rows_template.h"

namespace jax_fusco::cpu {

const RowKernels& Avx2RowKernels() {
  static const RowKernels kernels = MakeRowKernels();
  return kernels;
}

}  // namespace jax_fusco::cpu
