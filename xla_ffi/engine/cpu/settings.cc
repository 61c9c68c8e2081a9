#include "xla_ffi/engine/cpu/settings.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

// The variable's value, or null where it is unset or empty.
const char* Get(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

Status Bad(const char* name, const char* value, const std::string& need) {
  return Status::InvalidArgument(Concat(name, " is '", value, "', it must be ", need, "."));
}

Status ReadNumber(const char* name, double low, double high, const std::string& need,
                  double* number) {
  const char* value = Get(name);
  if (value == nullptr) return Status::Ok();
  char* end = nullptr;
  const double parsed = std::strtod(value, &end);
  if (*end != '\0' || !(parsed >= low && parsed <= high)) return Bad(name, value, need);
  *number = parsed;
  return Status::Ok();
}

Status ReadIsa(Isa* isa) {
  const char* value = Get("JAX_FUSCO_ISA");
  if (value == nullptr) return Status::Ok();
  for (Isa candidate : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
    if (std::strcmp(value, IsaName(candidate)) != 0) continue;
    if (candidate > BestIsa()) {
      return Bad("JAX_FUSCO_ISA", value,
                 Concat("one that this machine has: its best is '", IsaName(BestIsa()), "'"));
    }
    *isa = candidate;
    return Status::Ok();
  }
  return Bad("JAX_FUSCO_ISA", value, "'generic', 'avx2' or 'avx512'");
}

}  // namespace

Status Settings::Read(Settings* settings) {
  double threads = Workers::Cores();
  Status status =
      ReadNumber("JAX_FUSCO_THREADS", 1, 1024, "a whole number from 1 to 1024", &threads);
  if (!status.ok()) return status;
  if (threads != std::floor(threads)) {
    return Bad("JAX_FUSCO_THREADS", Get("JAX_FUSCO_THREADS"), "a whole number from 1 to 1024");
  }
  settings->threads = static_cast<int>(threads);
  status = ReadNumber("JAX_FUSCO_TIMEOUT_S", 1e-3, 1e6, "a number of seconds from 0.001 to 1000000",
                      &settings->timeout_s);
  if (!status.ok()) return status;
  const char* strict = Get("JAX_FUSCO_STRICT");
  settings->strict = strict != nullptr && std::strcmp(strict, "0") != 0;
  settings->isa = BestIsa();
  return ReadIsa(&settings->isa);
}

}  // namespace jax_fusco::cpu
