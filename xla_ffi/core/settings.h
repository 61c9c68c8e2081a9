// What the user sets by environment variables, for every engine. Read at each execution.
#ifndef JAX_FUSCO_CORE_SETTINGS_H_
#define JAX_FUSCO_CORE_SETTINGS_H_

#include <cstdlib>
#include <cstring>
#include <string>

#include "xla_ffi/core/status.h"

namespace jax_fusco {

// The variable's value, or null where it is unset or empty.
inline const char* EnvironmentValue(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && *value != '\0' ? value : nullptr;
}

inline Status BadEnvironmentValue(const char* name, const std::string& need) {
  return Status::InvalidArgument(
      Concat(name, " is '", EnvironmentValue(name), "', it must be ", need, "."));
}

// Leaves `number` as it is where the variable is unset.
inline Status ReadEnvironmentNumber(const char* name, double low, double high,
                                    const std::string& need, double* number) {
  const char* value = EnvironmentValue(name);
  if (value == nullptr) return Status::Ok();
  char* end = nullptr;
  const double parsed = std::strtod(value, &end);
  if (*end != '\0' || !(parsed >= low && parsed <= high)) return BadEnvironmentValue(name, need);
  *number = parsed;
  return Status::Ok();
}

struct CallSettings {
  double timeout_s = 30;  // JAX_FUSCO_TIMEOUT_S
  bool strict = false;    // JAX_FUSCO_STRICT

  // Reads them; a value that makes no sense is an error that names it.
  static Status Read(CallSettings* settings) {
    const char* strict = EnvironmentValue("JAX_FUSCO_STRICT");
    settings->strict = strict != nullptr && std::strcmp(strict, "0") != 0;
    return ReadEnvironmentNumber("JAX_FUSCO_TIMEOUT_S", 1e-3, 1e6,
                                 "a number of seconds from 0.001 to 1000000", &settings->timeout_s);
  }
};

}  // namespace jax_fusco

#endif  // JAX_FUSCO_CORE_SETTINGS_H_
