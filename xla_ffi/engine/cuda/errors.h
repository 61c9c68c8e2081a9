// What devices write down of failed calls, and the sentences made of it.
#ifndef JAX_FUSCO_ENGINE_CUDA_ERRORS_H_
#define JAX_FUSCO_ENGINE_CUDA_ERRORS_H_

#include <cstdint>
#include <functional>
#include <string>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cuda/handshake.h"

namespace jax_fusco::cuda {

// A Record, taken apart.
struct CallFailure {
  uint64_t sequence = 0;
  uint64_t run = 0;
  uint64_t call = 0;
  int32_t rank = 0;
  int32_t group = 0;
  int32_t num_ranks = 0;
  int32_t peer = 0;
  int32_t peer_device = -1;  // where it is known
  Failure failure = Failure::kNone;
  Phase phase = Phase::kNone;
  int64_t detail = 0;
  double waited_s = 0;
};

// Reads a record that a device may be writing. False where there is none, or one that is being
// written: it will be there soon.
bool ReadRecord(const Record* record, CallFailure* failure);

// One sentence, and the code that fits. `process_of` names the process of a device, -1 where that
// is not known; null where there is one process.
Status Describe(const std::string& call_site, const CallFailure& failure,
                const std::function<int(int64_t)>& process_of = nullptr);

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_ERRORS_H_
