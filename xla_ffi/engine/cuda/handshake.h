// How the ranks of one call meet on their devices: what they tell each other, and when a peer's
// memory may be read. docs/gpu.md has the protocol; tests/protocol/ a model that is checked.
#ifndef JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_H_
#define JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_H_

#include <cstdint>

namespace jax_fusco::cuda {

inline constexpr int kMaxRanks = 128;
inline constexpr int kMaxOperands = 16;  // arrays of one call that peers may read

enum class Phase : int32_t { kNone, kEnter, kMove, kLeave };
enum class Failure : int32_t { kNone, kTimeout, kPeerFailed, kMismatch, kBadIndex };

// What a call knows of its peers, in this rank's device memory. Written by Enter, read by the
// kernels that move rows.
struct Table {
  int32_t rank;
  int32_t num_ranks;
  int32_t failure;  // Failure
  int32_t phase;    // where it failed
  int32_t peer;     // rank that failed or is missing, or the offender's own
  int32_t pad;
  int64_t detail;   // kBadIndex: the index; kMismatch: the peer's signature
  int32_t device[kMaxRanks];
  const void* operand[kMaxRanks][kMaxOperands];
};

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_H_
