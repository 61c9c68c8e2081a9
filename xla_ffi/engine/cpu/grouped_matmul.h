// Grouped matrix products: each row times the kernel of its group, in tiles over a BLAS.
//
// The tiles depend on sizes alone, so the bits of a result do not depend on the number of threads.
#ifndef JAX_FUSCO_ENGINE_CPU_GROUPED_MATMUL_H_
#define JAX_FUSCO_ENGINE_CPU_GROUPED_MATMUL_H_

#include "xla_ffi/core/calls.h"
#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cpu/settings.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {

// cblas_sgemm with 32-bit integers. Called by several threads at a time.
using Sgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k,
                       float alpha, const float* a, int lda, const float* b, int ldb, float beta,
                       float* c, int ldc);

// The BLAS that the products use from now on. It must run on the thread that calls it.
void SetSgemm(Sgemm sgemm);

// Both check what the program computed (sizes, indices): what does not lie in its buffer is an
// error that names it. `schedule` brings helpers, see Workers::ParallelFor.
Status GroupedMatmul(const GroupedMatmulCall& call, const Settings& settings,
                     const Workers::Schedule& schedule = nullptr);
Status GroupedOuter(const GroupedOuterCall& call, const Settings& settings,
                    const Workers::Schedule& schedule = nullptr);

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_GROUPED_MATMUL_H_
