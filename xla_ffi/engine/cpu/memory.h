// Pages under XLA's buffers. Outputs are mostly fresh from the system, and faulting in their pages
// costs more than the copies: ask for huge pages, and never touch pages only to make them zero.
#ifndef JAX_FUSCO_ENGINE_CPU_MEMORY_H_
#define JAX_FUSCO_ENGINE_CPU_MEMORY_H_

#include <cstdint>

namespace jax_fusco::cpu {

inline constexpr int64_t kHugePage = int64_t{1} << 21;

// Whether the system gives huge pages to memory that asks for them.
bool HugePagesAvailable();

// Asks for huge pages under [data, data + bytes), where at least one fits inside.
void AdviseHugePages(void* data, int64_t bytes);

// Makes [data, data + bytes) zero. Whole huge pages inside a large range are given back to the
// system, which maps zeros there when they are next touched: so zero rows that nobody reads cost
// next to nothing. Memory that does not come back as zeros (a file, a shared mapping) is written.
void FillZero(void* data, int64_t bytes);

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_MEMORY_H_
