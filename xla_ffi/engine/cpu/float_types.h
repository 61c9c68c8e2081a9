// bfloat16 and float16 in scalar code: the meaning that every instruction set reproduces.
//
// Everything here has internal linkage: the file is compiled once for each instruction set, and the
// linker must not pick one set's copy of a function for another.
#ifndef JAX_FUSCO_ENGINE_CPU_FLOAT_TYPES_H_
#define JAX_FUSCO_ENGINE_CPU_FLOAT_TYPES_H_

#include <cstdint>
#include <cstring>

namespace jax_fusco::cpu {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

static inline uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
static inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
static inline uint64_t Bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float ToFloat(Bf16 value) { return FromBits(uint32_t{value.bits} << 16); }
static inline float ToFloat(F16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00) {  // infinity or NaN, which becomes quiet
    return FromBits(sign | 0x7f800000u | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000u : 0));
  }
  if (rest >= 0x400) return FromBits(sign | ((rest << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;  // exact
  return FromBits(sign | Bits(subnormal));
}
static inline float ToFloat(float value) { return value; }
static inline float ToFloat(double value) { return static_cast<float>(value); }

static inline double ToDouble(Bf16 value) { return static_cast<double>(ToFloat(value)); }
static inline double ToDouble(F16 value) { return static_cast<double>(ToFloat(value)); }
static inline double ToDouble(float value) { return static_cast<double>(value); }
static inline double ToDouble(double value) { return value; }

// Rounds to the nearest, ties to even. NaN stays NaN.
static inline void Round(float value, Bf16* out) {
  const uint32_t bits = Bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
static inline void Round(float value, F16* out) {
  const uint32_t bits = Bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u | (rest >> 13 & 0x3ffu);
  } else if (rest >= 0x477ff000u) {  // rounds past the largest float16, or is infinity
    half = 0x7c00u;
  } else if (rest >= 0x38800000u) {  // normal
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
  } else {  // subnormal: the addition rounds to a multiple of 2^-24
    half = Bits(FromBits(rest) + 0.5f) - Bits(0.5f);
  }
  out->bits = static_cast<uint16_t>(sign | half);
}
static inline void Round(float value, float* out) { *out = value; }
static inline void Round(float value, double* out) { *out = static_cast<double>(value); }

// To float, towards zero with the last bit set where inexact: rounding that to a type with at least
// two bits fewer is the same as rounding the double once.
static inline float RoundToOdd(double value) {
  float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  if (back == value || value != value) return nearest;
  uint32_t bits = Bits(nearest);
  if ((back < 0 ? -back : back) > (value < 0 ? -value : value))
    --bits;  // also steps from infinity to the largest
  return FromBits(bits | 1u);
}
static inline void Round(double value, Bf16* out) { Round(RoundToOdd(value), out); }
static inline void Round(double value, F16* out) { Round(RoundToOdd(value), out); }
static inline void Round(double value, float* out) { *out = static_cast<float>(value); }
static inline void Round(double value, double* out) { *out = value; }

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_FLOAT_TYPES_H_
