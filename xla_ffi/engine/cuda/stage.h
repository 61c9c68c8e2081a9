// Copies a rank's operands to where the ranks of other processes can read them.
#ifndef JAX_FUSCO_ENGINE_CUDA_STAGE_H_
#define JAX_FUSCO_ENGINE_CUDA_STAGE_H_

#include <cstdint>

#include "xla_ffi/engine/cuda/handshake.h"

namespace jax_fusco::cuda {

struct StagePart {
  void* to = nullptr;  // aligned to 16 bytes
  const void* from = nullptr;
  int64_t bytes = 0;
};
struct StageArgs {
  int32_t num_parts = 0;
  StagePart part[kMaxOperands];
};
// Before Enter. A launcher as those of handshake.h.
Error LaunchStage(const StageArgs& args, Stream stream);

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_STAGE_H_
