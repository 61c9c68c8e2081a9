// Row kernels in portable C++.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "xla_ffi/engine/cpu/float_types.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {
namespace {

template <typename Scalar>
struct Lanes {
  Scalar lane[16];

  static Lanes Zero() { return {}; }
  static Lanes Set(Scalar value) {
    Lanes out;
    for (Scalar& lane : out.lane) lane = value;
    return out;
  }
  template <typename T>
  static Lanes Load(const T* from) {
    Lanes out;
    for (int i = 0; i < 16; ++i) {
      if constexpr (sizeof(Scalar) == sizeof(double)) {
        out.lane[i] = ToDouble(from[i]);
      } else {
        out.lane[i] = ToFloat(from[i]);
      }
    }
    return out;
  }
  template <typename T>
  void Store(T* to) const {
    for (int i = 0; i < 16; ++i) Round(lane[i], &to[i]);
  }
  Scalar Sum() const {
    Lanes sums = *this;
    for (int half = 8; half >= 1; half /= 2) {
      for (int i = 0; i < half; ++i) sums.lane[i] += sums.lane[i + half];
    }
    return sums.lane[0];
  }
};

template <typename Scalar>
Lanes<Scalar> Fma(const Lanes<Scalar>& a, const Lanes<Scalar>& b, const Lanes<Scalar>& c) {
  Lanes<Scalar> out;
  for (int i = 0; i < 16; ++i) out.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return out;
}
template <typename Scalar>
Lanes<Scalar> Mul(const Lanes<Scalar>& a, const Lanes<Scalar>& b) {
  Lanes<Scalar> out;
  for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] * b.lane[i];
  return out;
}

struct Line {
  char bytes[64];

  static Line Zero() { return {}; }
  static Line Load(const char* from) {
    Line line;
    std::memcpy(line.bytes, from, sizeof(line.bytes));
    return line;
  }
  void Stream(char* to) const { std::memcpy(to, bytes, sizeof(bytes)); }
  static void Fence() {}
};

using F32x16 = Lanes<float>;
using F64x16 = Lanes<double>;

}  // namespace
}  // namespace jax_fusco::cpu

#include "xla_ffi/engine/cpu/rows_template.h"

namespace jax_fusco::cpu {

const RowKernels& GenericRowKernels() {
  static const RowKernels kernels = MakeRowKernels();
  return kernels;
}

}  // namespace jax_fusco::cpu
