// jax_fusco._ffi: the engine of CPU devices.
#include <nanobind/nanobind.h>

#include "xla_ffi/bindings/targets.h"
#include "xla_ffi/engine/cpu/grouped_matmul.h"
#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/rows.h"
#include "xla_ffi/engine/cpu/settings.h"

namespace nb = nanobind;

namespace jax_fusco {
namespace {

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
  m.doc() = "The fused engine's custom calls on CPU devices, as capsules for jax.ffi.";
  DefineTargets(m, CpuTargets);
  m.def(
      "set_sgemm", [](uintptr_t address) { cpu::SetSgemm(reinterpret_cast<cpu::Sgemm>(address)); },
      nb::arg("address"),
      "The address of the cblas_sgemm (with 32-bit integers, on the calling thread alone) that "
      "grouped matmuls use; 0: none.");
  m.def("info", &Info,
        "What the engine would use now: instruction set, worker threads, timeout in seconds, "
        "strictness, and whether the system offers huge pages. Raises ValueError where an "
        "environment variable makes no sense.");
}

}  // namespace jax_fusco
