// Hands a platform's handlers to Python, in the form that jax.ffi registers.
#ifndef JAX_FUSCO_BINDINGS_TARGETS_H_
#define JAX_FUSCO_BINDINGS_TARGETS_H_

#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"
#include "xla_ffi/ffi/handlers.h"

namespace jax_fusco {

// Adds registrations(), types() and api_version() to a module.
inline void DefineTargets(nanobind::module_& m, TargetList (*targets)()) {
  namespace nb = nanobind;
  m.def(
      "registrations",
      [targets] {
        const TargetList list = targets();
        nb::list out;
        for (int i = 0; i < list.size; ++i) {
          const Target& target = list.targets[i];
          nb::dict stages;
          const auto add = [&](const char* stage, XLA_FFI_Handler* handler) {
            if (handler) stages[stage] = nb::capsule(reinterpret_cast<void*>(handler));
          };
          add("instantiate", target.instantiate);
          add("initialize", target.initialize);
          add("execute", target.execute);
          out.append(nb::make_tuple(target.name, stages));
        }
        return out;
      },
      "The custom calls: (target name, {stage: capsule}) each.");
  m.def(
      "types",
      [targets] {
        const TargetList list = targets();
        nb::dict entry;
        entry["type_id"] = nb::capsule(list.type_id);
        entry["type_info"] = nb::capsule(list.type_info);
        nb::list out;
        out.append(nb::make_tuple(list.type_name, entry));
        return out;
      },
      "The FFI types, to be registered before the calls: (name, {\"type_id\": capsule, "
      "\"type_info\": capsule}) each.");
  m.def(
      "api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the XLA FFI headers that this module was built against.");
}

}  // namespace jax_fusco

#endif  // JAX_FUSCO_BINDINGS_TARGETS_H_
