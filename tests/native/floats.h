// Floating-point types by their definition: exact values as double, rounding by std::nearbyint.
// Shares nothing with the engine's bit manipulation.
#ifndef JAX_FUSCO_TESTS_NATIVE_FLOATS_H_
#define JAX_FUSCO_TESTS_NATIVE_FLOATS_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "tests/native/check.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::testing {

using Bytes = std::vector<char>;

inline constexpr Float kFloats[] = {Float::kBf16, Float::kF16, Float::kF32, Float::kF64};

inline const char* Name(Float type) {
  constexpr const char* kNames[] = {"bf16", "f16", "f32", "f64"};
  return kNames[static_cast<int>(type)];
}

// Bits of the fraction with the implied one, and the exponent of the smallest normal number.
struct Format {
  int digits;
  int min_exponent;
};
inline Format FormatOf(Float type) {
  constexpr Format kFormats[] = {{8, -126}, {11, -14}, {24, -126}, {53, -1022}};
  return kFormats[static_cast<int>(type)];
}

// The value nearest to `value` in a 16-bit type, ties to even.
inline double Nearest(double value, Float type) {
  if (!std::isfinite(value) || value == 0) return value;
  const Format format = FormatOf(type);
  int exponent;
  std::frexp(value, &exponent);  // |value| in [2^(exponent - 1), 2^exponent)
  if (exponent - 1 < format.min_exponent) exponent = format.min_exponent + 1;
  const int unit = exponent - format.digits;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
  const double limit = std::ldexp(1.0, 2 - format.min_exponent);  // 2^(max_exponent + 1)
  return std::fabs(rounded) < limit ? rounded
                                    : std::copysign(std::numeric_limits<double>::infinity(), value);
}

inline double Decode16(uint16_t bits, Float type) {
  const Format format = FormatOf(type);
  const int fraction_bits = format.digits - 1;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int field = (bits & 0x7fff) >> fraction_bits;
  double value;
  if (field == 0x7fff >> fraction_bits) {
    value = fraction == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  } else if (field == 0) {
    value = std::ldexp(fraction, format.min_exponent - fraction_bits);
  } else {
    value = std::ldexp(fraction + (1 << fraction_bits),
                       field - 1 + format.min_exponent - fraction_bits);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

// The bits of a value that the type has; a NaN is 0x7fff.
inline uint16_t Encode16(double value, Float type) {
  if (std::isnan(value)) return 0x7fff;
  const Format format = FormatOf(type);
  const int fraction_bits = format.digits - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  if (std::isinf(value)) {
    return static_cast<uint16_t>(sign | ((0x7fff >> fraction_bits) << fraction_bits));
  }
  int exponent = 0;
  std::frexp(size, &exponent);
  const int field =
      size == 0 || exponent - 1 < format.min_exponent ? 0 : exponent - format.min_exponent;
  const int unit = (field == 0 ? 1 : field) - 1 + format.min_exponent - fraction_bits;
  const int fraction = static_cast<int>(std::ldexp(size, -unit));
  // The implied one of a normal number is already a unit of the exponent's field.
  return static_cast<uint16_t>(sign | (((field == 0 ? 0 : field - 1) << fraction_bits) + fraction));
}

// Element i of an array, exactly.
inline double Get(const void* data, int64_t i, Float type) {
  const char* const at = static_cast<const char*>(data) + i * SizeOf(type);
  if (type == Float::kF64) {
    double value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  if (type == Float::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return Decode16(bits, type);
}

// Rounds `value` once and stores it.
inline void Put(void* data, int64_t i, Float type, double value) {
  char* const at = static_cast<char*>(data) + i * SizeOf(type);
  if (type == Float::kF64) {
    std::memcpy(at, &value, sizeof(value));
  } else if (type == Float::kF32) {
    const auto narrow = static_cast<float>(value);
    std::memcpy(at, &narrow, sizeof(narrow));
  } else {
    const uint16_t bits = Encode16(Nearest(value, type), type);
    std::memcpy(at, &bits, sizeof(bits));
  }
}

// The same bits, or both NaN: which NaN is not fixed.
inline bool Same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, sizeof(a)) == 0;
}

// Whether two arrays hold the same; says where they first do not.
inline bool CheckSame(const void* a, const void* b, int64_t length, Float type,
                      const std::string& what) {
  for (int64_t i = 0; i < length; ++i) {
    const double x = Get(a, i, type), y = Get(b, i, type);
    if (Same(x, y)) continue;
    std::ostringstream out;
    out << what << ": element " << i << " of " << length << " is " << std::hexfloat << x << ", not "
        << y;
    Fail(__FILE__, __LINE__, out.str());
    return false;
  }
  return true;
}

// Numbers of all kinds. Specials (infinities, NaN, any bits) come where asked for.
inline Bytes RandomFloats(int64_t length, Float type, bool specials, Random& random) {
  Bytes bytes(static_cast<size_t>(length * SizeOf(type)));
  const int lowest = FormatOf(type).min_exponent;
  for (int64_t i = 0; i < length; ++i) {
    const double fraction = static_cast<double>(random.Int(-(1 << 20), 1 << 20)) / (1 << 20);
    double value = std::ldexp(fraction, static_cast<int>(random.Int(-4, 4)));
    if (random.OneIn(16)) value = std::ldexp(fraction, lowest - static_cast<int>(random.Int(0, 9)));
    if (random.OneIn(16)) value = static_cast<double>(random.Int(-4, 4)) / 2;
    if (specials && random.OneIn(40)) {
      constexpr double kInfinity = std::numeric_limits<double>::infinity();
      value = random.Of({kInfinity, -kInfinity, std::nan(""), -0.0, 65504.0, 3.3e38, 1e300});
    }
    Put(bytes.data(), i, type, value);
    if (specials && random.OneIn(20)) {
      const uint64_t bits = random.Bits();
      std::memcpy(bytes.data() + i * SizeOf(type), &bits, static_cast<size_t>(SizeOf(type)));
    }
  }
  return bytes;
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_FLOATS_H_
