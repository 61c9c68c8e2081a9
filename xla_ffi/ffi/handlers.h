// The custom calls as XLA FFI handlers.
#ifndef JAX_FUSCO_FFI_HANDLERS_H_
#define JAX_FUSCO_FFI_HANDLERS_H_

#include <memory>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/engine/cpu/rendezvous.h"

namespace jax_fusco {

// What Instantiate makes, once for each call in a compiled program: the place where the ranks of
// that call meet.
struct CallState {
  static xla::ffi::TypeId id;
  static const xla::ffi::TypeInfo info;

  std::shared_ptr<cpu::CallSite> site;
};

struct Target {
  const char* name;
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* execute;
};

inline constexpr const char* kCallStateName = "jax_fusco_call";
inline constexpr int kNumTargets = 5;
extern const Target kTargets[kNumTargets];

}  // namespace jax_fusco

#endif  // JAX_FUSCO_FFI_HANDLERS_H_
