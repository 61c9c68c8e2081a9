// Kernels over single rows, for each instruction set.
//
// All instruction sets give the same bits: sums are fused multiply-adds in a fixed order, and every
// conversion rounds to nearest even. Which NaN a NaN result is, is not fixed.
#ifndef JAX_FUSCO_ENGINE_CPU_ROWS_H_
#define JAX_FUSCO_ENGINE_CPU_ROWS_H_

#include <cstdint>

#include "xla_ffi/core/calls.h"

namespace jax_fusco::cpu {

// In ascending order of preference; each has all of those before it.
enum class Isa { kGeneric, kAvx2, kAvx512, kAmx };
inline constexpr Isa kIsas[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

const char* IsaName(Isa isa);
// Whether this processor has it.
bool HasIsa(Isa isa);
Isa BestIsa();

struct RowKernels {
  // Copies n rows, each to its place, past the caches, for results that are larger than them: a
  // null source is a row of zeros. The next row is fetched while one is written.
  using StreamRows = void (*)(void* const* to, const void* const* from, int64_t n, int64_t bytes);
  // out[i] = round(sum over j < n, ascending from +0, of weights[j] * rows[j][i]), each step one
  // fused multiply-add, for i < length. `weights` are of the type of the sum. `next` are n rows
  // that will probably be read soon.
  using SumRows = void (*)(const void* const* rows, const void* weights, int64_t n, int64_t length,
                           void* out, const void* const* next);
  // dy[i] = round(weight * g[i]); *dot = <g, y>. `weight` and `dot` are of the type of the sum. The
  // dot has 16 partial sums, element i in sum i % 16, added up as a balanced tree whose first step
  // adds sum i + 8 to sum i. `next_g` will probably be read soon.
  using ScaleAndDot = void (*)(const void* g, const void* y, const void* weight, int64_t length,
                               void* dy, void* dot, const void* next_g);

  StreamRows stream_rows;
  SumRows sum_rows[kNumFloats][kNumFloats];           // [type of y][type of out]
  ScaleAndDot scale_and_dot[kNumFloats][kNumFloats];  // [type of g][type of y and dy]

  static const RowKernels& For(Isa isa);
};

// The tables that For chooses from. A table of another architecture is the generic one.
const RowKernels& GenericRowKernels();
const RowKernels& Avx2RowKernels();
const RowKernels& Avx512RowKernels();

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_ROWS_H_
