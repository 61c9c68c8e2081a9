// The kernels of the CUDA engine, as launchers that any C++ file may call: no CUDA header needed.
//
// Each rank of a call runs, on its own stream: Enter (handshake.h), what is below, Leave. Between
// the two, the peers' memory named in the table may be read. A launcher enqueues the same device
// work at every call with the same arguments, allocates nothing, waits for nothing, and returns
// null or a static sentence that says what CUDA refused. All pointers are to device memory, aligned
// to their elements at least; rows move faster where they are aligned to 16 bytes.
#ifndef JAX_FUSCO_ENGINE_CUDA_KERNELS_H_
#define JAX_FUSCO_ENGINE_CUDA_KERNELS_H_

#include <cstdint>

#include "xla_ffi/core/calls.h"
#include "xla_ffi/core/macros.h"
#include "xla_ffi/engine/cuda/handshake.h"

namespace jax_fusco::cuda {

using Stream = void*;       // cudaStream_t
using Error = const char*;  // null: none

// In place of a stream: the launcher loads what it would launch onto the current device, and
// launches nothing. Do this before a rank's first Enter: loading may wait for kernels that run.
inline const Stream kLoadOnly = reinterpret_cast<Stream>(~uintptr_t{0});

// ---- plan: Scratch, Count, Enter with operand 0 = scratch, Finish, Leave ----

struct PlanArgs {
  PlanShape shape;
  const int32_t* expert_ids = nullptr;  // [T, k]
  PlanResults results;
  // [C] or null. Rows that hold one token of one source rank form a chain in ascending order.
  // chain[c] is 0: row c has no source; n > 0: row c is its chain's first and n the next, C at the
  // end; n < 0: it is a later one, and -1 - n the next, C at the end.
  int32_t* chain = nullptr;
  void* scratch = nullptr;  // PlanScratchBytes(shape), 16-byte aligned; peers read parts of it
};
inline constexpr int64_t kMaxExperts = 2048;
int64_t PlanScratchBytes(const PlanShape& shape);
// Before Enter: counts this rank's assignments and sorts them by expert (stable), into scratch;
// results.slot holds intermediate values until Finish.
Error LaunchPlanCount(const PlanArgs& args, Stream stream);
// After Enter: lays out the buffers, writes all results. No device-to-host copy.
Error LaunchPlanFinish(const PlanArgs& args, const Table* table, Stream stream);

// ---- gather_rows ----

struct GatherRowsArgs {
  int64_t num_rows = 0;                  // M
  const int32_t* source_rank = nullptr;  // [M]
  const int32_t* source = nullptr;       // [M]
  const int32_t* chain = nullptr;        // [M] as in PlanArgs, or null: every row is read by itself
  int64_t fanout = 1;                    // row = source / fanout
  bool zero_tail = true;
  int64_t peer_rows = 0;  // N, rows of an operand on every rank
  int64_t row_bytes = 0;  // of this operand
  int32_t operand = 0;    // which of the table's operands is read
  void* out = nullptr;    // [M, row_bytes]
};
// One operand of the call (a pytree moves leaf by leaf). A source that does not exist marks the
// table as failed (kBadIndex) and reads nothing.
Error LaunchGatherRows(const GatherRowsArgs& args, Table* table, Stream stream);

// ---- gather_rows_weighted: operands 0 = g [T, d], 1 = weights [T, k] ----

struct GatherRowsWeightedArgs {
  int64_t num_rows = 0;                  // M
  const int32_t* source_rank = nullptr;  // [M]
  const int32_t* source = nullptr;       // [M], token * k + j
  const int32_t* chain = nullptr;        // [M] or null
  int64_t tokens = 0;                    // T, of every rank
  int64_t k = 1;
  int64_t length = 0;  // d
  Float g_type = Float::kF32;
  Float y_type = Float::kF32;
  Float weights_type = Float::kF32;  // kF32, or kF64 where y is
  const void* y = nullptr;           // [M, d]
  void* dy = nullptr;                // [M, d], type of y
  void* dots = nullptr;              // [M], float, or double where y is
};
Error LaunchGatherRowsWeighted(const GatherRowsWeightedArgs& args, Table* table, Stream stream);

// ---- reduce_rows: operand 0 = y [C, d] ----

struct ReduceRowsArgs {
  int64_t tokens = 0;  // T
  int64_t k = 1;
  const int32_t* slot_rank = nullptr;  // [T, k]
  const int32_t* slot = nullptr;       // [T, k]
  int64_t peer_rows = 0;               // C, rows of y on every rank
  int64_t length = 0;                  // d
  Float y_type = Float::kF32;
  Float out_type = Float::kF32;
  Float weights_type = Float::kF32;  // kF32, or kF64 where y is
  const void* weights = nullptr;     // [T, k], null: ones
  void* out = nullptr;               // [T, d]
};
Error LaunchReduceRows(const ReduceRowsArgs& args, Table* table, Stream stream);

// ---- ragged_all_to_all: operands 0 = operand [N, ...], 1..4 = the four tables of its rank ----

struct RaggedAllToAllArgs {
  int64_t slices_per_rank = 1;          // K / R
  const int32_t* recv_sizes = nullptr;  // [K], to be compared with what the senders say
  int64_t peer_rows = 0;                // N
  int64_t rows = 0;                     // M
  int64_t row_bytes = 0;
  void* result = nullptr;  // [M, ...], holds `output` already
};
// Each rank pulls what comes to it. Where one slice of it does not fit, or is not of the size that
// recv_sizes says, nothing moves to this rank and the call fails (kBadIndex, peer: the sender).
Error LaunchRaggedAllToAll(const RaggedAllToAllArgs& args, Table* table, Stream stream);

// ---- all calls ----

// Table::detail of kBadIndex: the index, and the rank that was to have it (for ragged_all_to_all
// the receiver). Table::peer is the rank whose arguments are bad.
JAX_FUSCO_HOST_DEVICE inline int64_t BadIndexDetail(int32_t rank, int32_t index) {
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(rank)) << 32 |
                              static_cast<uint32_t>(index));
}
JAX_FUSCO_HOST_DEVICE inline int32_t RankOfBadIndex(int64_t detail) {
  return static_cast<int32_t>(static_cast<uint64_t>(detail) >> 32);
}
JAX_FUSCO_HOST_DEVICE inline int32_t IndexOfBadIndex(int64_t detail) {
  return static_cast<int32_t>(static_cast<uint64_t>(detail) & 0xffffffffu);
}

struct Output {
  void* data;
  int64_t bytes;
};
inline constexpr int kMaxOutputs = 16;
// After Leave: where the table says that the call failed, fills the outputs, at most kMaxOutputs,
// with 0xff (NaN in every floating type, -1 in integers).
Error LaunchFillIfFailed(const Output* outputs, int num_outputs, const Table* table, Stream stream);

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_KERNELS_H_
