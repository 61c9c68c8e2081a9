// The row kernels, written once over 16-lane vectors that each instruction set defines.
//
// A file that includes this has defined, in its anonymous namespace, F32x16 and F64x16 with
//   Zero(), Set(scalar), Load(const T*), Store(T*), Fma(a, b, c) = a * b + c, Mul(a, b), Sum()
// for T of Bf16, F16, float, double, and Line, 64 bytes with Zero(), Load(const char*),
// Stream(char*) to an aligned place, Fence(). Internal linkage throughout, see float_types.h.
#ifndef JAX_FUSCO_ENGINE_CPU_ROWS_TEMPLATE_H_
#define JAX_FUSCO_ENGINE_CPU_ROWS_TEMPLATE_H_

namespace jax_fusco::cpu {
namespace {

constexpr int64_t kLanes = 16;

constexpr int64_t kLineBytes = 64;
// How far ahead of the sums their rows are fetched: with eight rows, what memory delivers while one
// request is under way.
constexpr int64_t kAheadBytes = 2048;
// Columns summed at a time.
constexpr int64_t kColumns = 256;

inline void Prefetch(const void* at) { __builtin_prefetch(at); }

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

// Copies, or clears, one row.
void StreamRow(char* to, const char* from, int64_t bytes, const char* next) {
  int64_t i = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) % kLineBytes);
  if (bytes < 4 * kLineBytes) i = bytes;
  if (from == nullptr) {
    std::memset(to, 0, static_cast<size_t>(i));
    for (; i + kLineBytes <= bytes; i += kLineBytes) Line::Zero().Stream(to + i);
    std::memset(to + i, 0, static_cast<size_t>(bytes - i));
    return;
  }
  std::memcpy(to, from, static_cast<size_t>(i));
  Prefetch(next);
  for (; i + 4 * kLineBytes <= bytes; i += 4 * kLineBytes) {
    Line lines[4];
    for (int64_t line = 0; line < 4; ++line) {
      lines[line] = Line::Load(from + i + line * kLineBytes);
      Prefetch(next + i + line * kLineBytes);
    }
    for (int64_t line = 0; line < 4; ++line) lines[line].Stream(to + i + line * kLineBytes);
  }
  for (; i + kLineBytes <= bytes; i += kLineBytes) Line::Load(from + i).Stream(to + i);
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

void StreamRows(void* const* to, const void* const* from, int64_t n, int64_t bytes) {
  for (int64_t m = 0; m < n; ++m) {
    StreamRow(static_cast<char*>(to[m]), static_cast<const char*>(from[m]), bytes,
              static_cast<const char*>(from[m + 1 < n ? m + 1 : m]));
  }
  Line::Fence();
}

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

template <typename Y, typename Out>
void SumRows(const void* const* rows_in, const void* weights_in, int64_t n, int64_t length,
             void* out_in, const void* const* next_in) {
  using Vector = typename SumOf<Y>::Vector;
  using Scalar = typename SumOf<Y>::Scalar;
  constexpr auto kAhead = static_cast<int64_t>(kAheadBytes / sizeof(Y));
  constexpr auto kPerLine = static_cast<int64_t>(kLineBytes / sizeof(Y));
  const Y* const* rows = reinterpret_cast<const Y* const*>(rows_in);
  const Y* const* next = reinterpret_cast<const Y* const*>(next_in);
  const auto* weights = static_cast<const Scalar*>(weights_in);
  Out* out = static_cast<Out*>(out_in);
  // The sums of a block of columns stay in the nearest cache. In registers they would be no faster:
  // memory is the limit, and it likes short loops over long pieces of a row.
  alignas(kLineBytes) Scalar sums[kColumns];
  for (int64_t i = 0; i < length; i += kColumns) {
    const int64_t columns = length - i < kColumns ? length - i : kColumns;
    const int64_t whole = columns / kLanes * kLanes;
    const bool here = i + kAhead < length;
    const Y* const* const ahead = here ? rows : next;
    const int64_t ahead_at = here ? i + kAhead : i + kAhead - length;
    for (int64_t c = 0; c < columns; c += kLanes) Vector::Zero().Store(sums + c);
    for (int64_t j = 0; j < n; ++j) {
      const Vector weight = Vector::Set(weights[j]);
      const Y* const row = rows[j] + i;
#pragma GCC unroll 1
      for (int64_t c = 0; c < columns; c += kPerLine) Prefetch(ahead[j] + ahead_at + c);
#pragma GCC unroll 2
      for (int64_t c = 0; c < whole; c += kLanes) {
        Fma(weight, Vector::Load(row + c), Vector::Load(sums + c)).Store(sums + c);
      }
      if (whole < columns) {
        const Vector part = LoadPart<Vector>(row + whole, columns - whole);
        Fma(weight, part, Vector::Load(sums + whole)).Store(sums + whole);
      }
    }
    for (int64_t c = 0; c < whole; c += kLanes) Vector::Load(sums + c).Store(out + i + c);
    if (whole < columns) {
      StorePart(Vector::Load(sums + whole), out + i + whole, columns - whole);
    }
  }
}

template <typename G, typename Y>
void ScaleAndDot(const void* g_in, const void* y_in, const void* weight_in, int64_t length,
                 void* dy_in, void* dot_out, const void* next_g) {
  using Vector = typename SumOf<Y>::Vector;
  using Scalar = typename SumOf<Y>::Scalar;
  const G* g = static_cast<const G*>(g_in);
  const Y* y = static_cast<const Y*>(y_in);
  Y* dy = static_cast<Y*>(dy_in);
  const Vector weight = Vector::Set(*static_cast<const Scalar*>(weight_in));
  Vector dot = Vector::Zero();
  const G* next = static_cast<const G*>(next_g);
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    // A line holds at most 32 elements; y's rows follow one another.
    if (i % 32 == 0 || sizeof(G) > 2) Prefetch(next + i);
    if (i % 32 == 0 || sizeof(Y) > 2) Prefetch(y + i + kAheadBytes / sizeof(Y));
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
  kernels.stream_rows = StreamRows;
  FillTables<Bf16>(&kernels, 0);
  FillTables<F16>(&kernels, 1);
  FillTables<float>(&kernels, 2);
  FillTables<double>(&kernels, 3);
  return kernels;
}

}  // namespace
}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_ROWS_TEMPLATE_H_
