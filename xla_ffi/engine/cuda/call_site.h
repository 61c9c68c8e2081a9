// Where the ranks of one call in a compiled program meet.
//
// Each run of the program, on each device of this process: Prepare, before any of its work is
// enqueued; then, for each call, Begin, the movers, Finish, on the device's stream. A call that
// fails fills its results with NaN, is logged, and makes Prepare of a later run say why, on all
// devices; runs after that work again, with several processes as soon as each of them has said so.
#ifndef JAX_FUSCO_ENGINE_CUDA_CALL_SITE_H_
#define JAX_FUSCO_ENGINE_CUDA_CALL_SITE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cuda/arena.h"
#include "xla_ffi/engine/cuda/handshake.h"

namespace jax_fusco::cuda {

struct BeginArgs {
  int64_t run = 0;                 // XLA's id of the run, the same on all its devices
  const int32_t* rank = nullptr;   // [], device memory
  const int32_t* group = nullptr;  // [], device memory
  int64_t num_ranks = 0;
  uint64_t signature = 0;  // of the call's shapes and attributes; see Signature
  int num_operands = 0;    // that peers read
  const void* operand[kMaxOperands] = {};
  int64_t operand_bytes[kMaxOperands] = {};
};

// Collects what must be the same on all ranks of a call.
class CallSignature {
 public:
  CallSignature& Add(int64_t value) {
    bits_ = (bits_ ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
    bits_ ^= bits_ >> 29;
    return *this;
  }
  uint64_t bits() const { return bits_; }

 private:
  uint64_t bits_ = 0x6a61785f66757363u;
};

class CallSite {
 public:
  // Touches no device: programs are compiled on machines without any.
  static std::unique_ptr<CallSite> Create(std::string name);
  // On these devices instead of the process's; they must outlive it.
  static std::unique_ptr<CallSite> Create(std::string name, Arena* arena);
  ~CallSite();

  // Once a run and device, before its first Begin and not while a graph is recorded: allocates,
  // loads, enables peers the first time, reports what became of earlier runs, and tells calls in
  // CUDA graphs which run it is. Again in the same run: does nothing. Needs no addresses. The first
  // time with several processes, waits until all of them have come.
  Status Prepare(int device, const BeginArgs& args, Stream stream);
  // The same for a process that is alone.
  Status Prepare(int device, int64_t run, int64_t num_ranks, Stream stream);

  // Enqueues Enter, and before it, with several processes, copies of the operands. The table is for
  // the movers and LaunchFillIfFailed.
  Status Begin(int device, const BeginArgs& args, Stream stream, Table** table);
  // Enqueues Leave.
  Status Finish(int device, Stream stream);

 private:
  struct Impl;
  CallSite();
  std::unique_ptr<Impl> impl_;
};

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_CALL_SITE_H_
