// The row kernels, written once over 16-lane vectors that each instruction set defines.
//
// A file that includes this has defined, in its anonymous namespace, F32x16 and F64x16 with
//   Zero(), Set(scalar), Load(const T*), Store(T*), Fma(a, b, c) = a * b + c, Mul(a, b), Sum()
// for T of Bf16, F16, float, double. Internal linkage throughout, see float_types.h.
#ifndef JAX_FUSCO_ENGINE_CPU_ROWS_TEMPLATE_H_
#define JAX_FUSCO_ENGINE_CPU_ROWS_TEMPLATE_H_

namespace jax_fusco::cpu {
namespace {

constexpr int64_t kLanes = 16;

template <typename Y>
struct SumOf {
  using Scalar = float;
  using Vector = F32x16;
};
template <>
struct SumOf<double> {
  using Scalar = double;
  using Vector = F64x16;
};

// Loads n < 16 elements; the other lanes are zero.
template <typename Vector, typename T>
Vector LoadPart(const T* from, int64_t n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, from, static_cast<size_t>(n) * sizeof(T));
  return Vector::Load(lanes);
}
template <typename Vector, typename T>
void StorePart(const Vector& value, T* to, int64_t n) {
  T lanes[kLanes];
  value.Store(lanes);
  std::memcpy(to, lanes, static_cast<size_t>(n) * sizeof(T));
}

// Columns [i, i + 16 * kVectors) of a sum, kept in registers over all rows.
template <int kVectors, typename Y, typename Out>
void SumColumns(const Y* const* rows, const typename SumOf<Y>::Scalar* weights, int64_t n,
                int64_t i, Out* out) {
  using Vector = typename SumOf<Y>::Vector;
  Vector sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = Vector::Zero();
  for (int64_t j = 0; j < n; ++j) {
    const Vector weight = Vector::Set(weights[j]);
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = Fma(weight, Vector::Load(rows[j] + i + v * kLanes), sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) sums[v].Store(out + i + v * kLanes);
}

template <typename Y, typename Out>
void SumRows(const void* const* rows_in, const void* weights_in, int64_t n, int64_t length,
             void* out_in) {
  using Vector = typename SumOf<Y>::Vector;
  const Y* const* rows = reinterpret_cast<const Y* const*>(rows_in);
  const auto* weights = static_cast<const typename SumOf<Y>::Scalar*>(weights_in);
  Out* out = static_cast<Out*>(out_in);
  int64_t i = 0;
  for (; i + 4 * kLanes <= length; i += 4 * kLanes) SumColumns<4>(rows, weights, n, i, out);
  for (; i + kLanes <= length; i += kLanes) SumColumns<1>(rows, weights, n, i, out);
  if (i < length) {
    Vector sum = Vector::Zero();
    for (int64_t j = 0; j < n; ++j) {
      sum = Fma(Vector::Set(weights[j]), LoadPart<Vector>(rows[j] + i, length - i), sum);
    }
    StorePart(sum, out + i, length - i);
  }
}

template <typename G, typename Y>
void ScaleAndDot(const void* g_in, const void* y_in, const void* weight_in, int64_t length,
                 void* dy_in, void* dot_out) {
  using Vector = typename SumOf<Y>::Vector;
  using Scalar = typename SumOf<Y>::Scalar;
  const G* g = static_cast<const G*>(g_in);
  const Y* y = static_cast<const Y*>(y_in);
  Y* dy = static_cast<Y*>(dy_in);
  const Vector weight = Vector::Set(*static_cast<const Scalar*>(weight_in));
  Vector dot = Vector::Zero();
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    const Vector part = Vector::Load(g + i);
    dot = Fma(part, Vector::Load(y + i), dot);
    Mul(weight, part).Store(dy + i);
  }
  if (i < length) {
    const Vector part = LoadPart<Vector>(g + i, length - i);
    dot = Fma(part, LoadPart<Vector>(y + i, length - i), dot);
    StorePart(Mul(weight, part), dy + i, length - i);
  }
  *static_cast<Scalar*>(dot_out) = dot.Sum();
}

template <typename A>
void FillTables(RowKernels* kernels, int a) {
  RowKernels::SumRows* sums = kernels->sum_rows[a];
  sums[0] = SumRows<A, Bf16>;
  sums[1] = SumRows<A, F16>;
  sums[2] = SumRows<A, float>;
  sums[3] = SumRows<A, double>;
  RowKernels::ScaleAndDot* scales = kernels->scale_and_dot[a];
  scales[0] = ScaleAndDot<A, Bf16>;
  scales[1] = ScaleAndDot<A, F16>;
  scales[2] = ScaleAndDot<A, float>;
  scales[3] = ScaleAndDot<A, double>;
}

RowKernels MakeRowKernels() {
  RowKernels kernels;
  FillTables<Bf16>(&kernels, 0);
  FillTables<F16>(&kernels, 1);
  FillTables<float>(&kernels, 2);
  FillTables<double>(&kernels, 3);
  return kernels;
}

}  // namespace
}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_ROWS_TEMPLATE_H_
