// Pages under XLA's buffers. Outputs are mostly fresh from the system, and faulting in their pages
// costs more than the copies: ask for huge pages, and touch no page only to make it zero.
#ifndef JAX_FUSCO_ENGINE_CPU_MEMORY_H_
#define JAX_FUSCO_ENGINE_CPU_MEMORY_H_

#include <cstdint>

namespace jax_fusco::cpu {

inline constexpr int64_t kHugePage = int64_t{1} << 21;

// Whether the system gives huge pages to memory that asks for them.
bool HugePagesAvailable();

// Asks for huge pages under [data, data + bytes), where at least one fits inside.
void AdviseHugePages(void* data, int64_t bytes);

// Makes the end of [data, data + bytes) zero without writing to it, and returns how many bytes at
// the beginning are left to be written. Whole pages of a large range are given back to the system,
// which maps zeros there when they are next touched: zero rows that nobody reads cost next to
// nothing. Memory that does not come back as zeros (a file, a shared mapping) is left as it is.
//
// Call it before AdviseHugePages: it touches two pages of the range, large ones where asked for.
int64_t ReleaseAsZero(void* data, int64_t bytes);

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_MEMORY_H_
