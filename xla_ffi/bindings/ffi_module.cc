// jax_fusco._ffi: hands the handlers to Python, which registers them with JAX.
#include <nanobind/nanobind.h>

#include "xla/ffi/api/c_api.h"
#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/rows.h"
#include "xla_ffi/engine/cpu/settings.h"
#include "xla_ffi/ffi/handlers.h"

namespace nb = nanobind;

namespace jax_fusco {
namespace {

template <typename F>
nb::capsule HandlerCapsule(F* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::list Registrations() {
  nb::list out;
  for (const Target& target : kTargets) {
    nb::dict stages;
    stages["instantiate"] = HandlerCapsule(target.instantiate);
    stages["execute"] = HandlerCapsule(target.execute);
    out.append(nb::make_tuple(target.name, stages));
  }
  return out;
}

nb::list Types() {
  nb::dict entry;
  entry["type_id"] = nb::capsule(&CallState::id);
  entry["type_info"] = nb::capsule(&CallState::info);
  nb::list out;
  out.append(nb::make_tuple(kCallStateName, entry));
  return out;
}

nb::dict Info() {
  cpu::Settings settings;
  const Status status = cpu::Settings::Read(&settings);
  if (!status.ok()) throw nb::value_error(status.message.c_str());
  nb::dict out;
  out["isa"] = cpu::IsaName(settings.isa);
  out["threads"] = settings.threads;
  out["timeout_s"] = settings.timeout_s;
  out["strict"] = settings.strict;
  out["huge_pages"] = cpu::HugePagesAvailable();
  return out;
}

}  // namespace

NB_MODULE(_ffi, m) {
  m.doc() = "The fused engine's custom calls, as capsules for jax.ffi.";
  m.def("registrations", &Registrations,
        "The custom calls: (target name, {\"instantiate\": capsule, \"execute\": capsule}) each.");
  m.def("types", &Types,
        "The FFI types, to be registered before the calls: (name, {\"type_id\": capsule, "
        "\"type_info\": capsule}) each.");
  m.def(
      "api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "(major, minor) of the XLA FFI headers that this module was built against.");
  m.def("info", &Info,
        "What the engine would use now: instruction set, worker threads, time-out in seconds, "
        "strictness, and whether the system offers huge pages. Raises ValueError where an "
        "environment variable makes no sense.");
}

}  // namespace jax_fusco
