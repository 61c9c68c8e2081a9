#include "xla_ffi/engine/cpu/settings.h"

#include <cmath>
#include <cstring>

#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

Status ReadIsa(Isa* isa) {
  const char* value = EnvironmentValue("JAX_FUSCO_ISA");
  if (value == nullptr) {
    *isa = BestIsa();
    return Status::Ok();
  }
  for (const Isa candidate : kIsas) {
    if (std::strcmp(value, IsaName(candidate)) != 0) continue;
    if (!HasIsa(candidate)) {
      return BadEnvironmentValue("JAX_FUSCO_ISA", Concat("one that this machine has: its best is '",
                                                         IsaName(BestIsa()), "'"));
    }
    *isa = candidate;
    return Status::Ok();
  }
  return BadEnvironmentValue("JAX_FUSCO_ISA", "'generic', 'avx2', 'avx512' or 'amx'");
}

}  // namespace

Status Settings::Read(Settings* settings) {
  constexpr char kThreads[] = "a whole number from 1 to 1024";
  double threads = Workers::Cores();
  Status status = ReadEnvironmentNumber("JAX_FUSCO_THREADS", 1, 1024, kThreads, &threads);
  if (!status.ok()) return status;
  if (threads != std::floor(threads)) return BadEnvironmentValue("JAX_FUSCO_THREADS", kThreads);
  settings->threads = static_cast<int>(threads);
  status = CallSettings::Read(settings);
  if (!status.ok()) return status;
  return ReadIsa(&settings->isa);
}

}  // namespace jax_fusco::cpu
