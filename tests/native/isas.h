// The instruction sets that tests go through.
#ifndef JAX_FUSCO_TESTS_NATIVE_ISAS_H_
#define JAX_FUSCO_TESTS_NATIVE_ISAS_H_

#include <vector>

#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::testing {

// Those that this machine has.
inline std::vector<cpu::Isa> Isas() {
  std::vector<cpu::Isa> isas;
  for (const cpu::Isa isa : cpu::kIsas) {
    if (cpu::HasIsa(isa)) isas.push_back(isa);
  }
  return isas;
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_ISAS_H_
