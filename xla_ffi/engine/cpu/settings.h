// What the user sets by environment variables. Read at each execution.
#ifndef JAX_FUSCO_ENGINE_CPU_SETTINGS_H_
#define JAX_FUSCO_ENGINE_CPU_SETTINGS_H_

#include "xla_ffi/core/settings.h"
#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {

struct Settings : CallSettings {
  int threads = 1;          // JAX_FUSCO_THREADS; default: cores this process may run on
  Isa isa = Isa::kGeneric;  // JAX_FUSCO_ISA; default: the best this machine has

  // Reads all of them; a value that makes no sense is an error that names it.
  static Status Read(Settings* settings);
};

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_SETTINGS_H_
