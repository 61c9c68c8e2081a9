// Elements of rows that are summed or scaled. Conversions mean what they mean in
// engine/cpu/float_types.h: to nearest even, rounded once, subnormals kept.
#ifndef JAX_FUSCO_ENGINE_CUDA_NUMBERS_H_
#define JAX_FUSCO_ENGINE_CUDA_NUMBERS_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "xla_ffi/core/calls.h"
#include "xla_ffi/engine/cuda/team.h"
#include "xla_ffi/engine/cuda/words.h"

#if !defined(__CUDACC__)
#include "xla_ffi/engine/cpu/float_types.h"
#endif

namespace jax_fusco::cuda {

#if defined(__CUDACC__)

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ inline float ToFloat(Bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ inline float ToFloat(F16 value) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
}
__device__ inline float ToFloat(float value) { return value; }
__device__ inline float ToFloat(double value) { return __double2float_rn(value); }

template <typename T>
__device__ double ToDouble(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return static_cast<double>(ToFloat(value));
  }
}

__device__ inline void Round(float value, Bf16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
}
__device__ inline void Round(float value, F16* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
}
__device__ inline void Round(float value, float* out) { *out = value; }
__device__ inline void Round(float value, double* out) { *out = static_cast<double>(value); }

// Towards zero, with the last bit set where inexact: to be rounded again to a narrower type.
__device__ inline float RoundToOdd(double value) {
  const float down = __double2float_rz(value);
  const bool exact = static_cast<double>(down) == value || value != value;
  return exact ? down : __uint_as_float(__float_as_uint(down) | 1u);
}
__device__ inline void Round(double value, Bf16* out) { Round(RoundToOdd(value), out); }
__device__ inline void Round(double value, F16* out) { Round(RoundToOdd(value), out); }
__device__ inline void Round(double value, float* out) { *out = __double2float_rn(value); }
__device__ inline void Round(double value, double* out) { *out = value; }

__device__ inline float Fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double Fma(double a, double b, double c) { return __fma_rn(a, b, c); }

#else

using cpu::Bf16;
using cpu::F16;
using cpu::Round;
using cpu::ToDouble;
using cpu::ToFloat;
inline float Fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double Fma(double a, double b, double c) { return std::fma(a, b, c); }

#endif  // __CUDACC__

// What elements of type Y are summed in.
template <typename Y>
using SumOf = std::conditional_t<std::is_same_v<Y, double>, double, float>;

template <typename Sum, typename T>
JAX_FUSCO_PROGRAM Sum To(T value) {
  if constexpr (std::is_same_v<Sum, double>) {
    return ToDouble(value);
  } else {
    return ToFloat(value);
  }
}

template <typename Sum>
JAX_FUSCO_PROGRAM Sum WeightAt(const void* weights, Float type, int64_t i) {
  return type == Float::kF64 ? static_cast<Sum>(static_cast<const double*>(weights)[i])
                             : static_cast<Sum>(static_cast<const float*>(weights)[i]);
}

// N neighbouring elements, N a power of two, moved in as few words as that takes. Wants alignment
// to the smaller of 16 bytes and their size.
template <typename T, int N>
struct Pack {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T));
  using Word = std::conditional_t<
      kBytes >= 16, Word16,
      std::conditional_t<kBytes == 8, uint64_t,
                         std::conditional_t<kBytes == 4, uint32_t,
                                            std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));

  Word words[kWords];

  JAX_FUSCO_PROGRAM static Pack Load(const void* from) {
    Pack pack;
    JAX_FUSCO_UNROLL
    for (int w = 0; w < kWords; ++w) {
      pack.words[w] = LoadWord<Word>(static_cast<const char*>(from) + w * sizeof(Word));
    }
    return pack;
  }
  JAX_FUSCO_PROGRAM void Store(void* to) const {
    JAX_FUSCO_UNROLL
    for (int w = 0; w < kWords; ++w) {
      StoreWord(static_cast<char*>(to) + w * sizeof(Word), words[w]);
    }
  }
  // In registers, once all is unrolled.
  JAX_FUSCO_PROGRAM T operator[](int i) const {
    T element;
    memcpy(&element, reinterpret_cast<const char*>(words) + i * sizeof(T), sizeof(T));
    return element;
  }
  JAX_FUSCO_PROGRAM void Set(int i, T element) {
    memcpy(reinterpret_cast<char*>(words) + i * sizeof(T), &element, sizeof(T));
  }
  JAX_FUSCO_PROGRAM static bool IsAlignedTo(const void* at) { return IsAligned<Word>(at); }
};

// Calls body(T{}) with the element type.
template <typename Body>
auto WithFloat(Float type, const Body& body) {
  if (type == Float::kBf16) return body(Bf16{});
  if (type == Float::kF16) return body(F16{});
  if (type == Float::kF32) return body(float{});
  return body(double{});
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_NUMBERS_H_
