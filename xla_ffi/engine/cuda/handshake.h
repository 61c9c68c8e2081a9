// How the ranks of one call meet on their devices: what they tell each other, and when a peer's
// memory may be read. handshake_program.h is the protocol; tests/protocol/ a model that is checked.
#ifndef JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_H_
#define JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_H_

#include <cstddef>
#include <cstdint>

namespace jax_fusco::cuda {

using Stream = void*;       // cudaStream_t
using Error = const char*;  // null: none

inline constexpr int kMaxRanks = 128;    // and devices
inline constexpr int kMaxOperands = 16;  // arrays of one call that peers may read

enum class Phase : int32_t { kNone, kEnter, kMove, kLeave };
enum class Failure : int32_t {
  kNone,
  kTimeout,     // `peer` did not come
  kPeerFailed,  // `peer` has given this call up, or gone on to a later run
  kMismatch,    // `peer` came to another call: `detail` is its signature
  kBadIndex,    // found by a mover
  kBadRank,     // the rank or group operand makes no sense; `detail` is the group
  kSameRank,    // another device came as this rank: `detail` is its index
  kFailedRun,   // an earlier call of this run failed on this device
  kUnsettled,   // device `detail` failed, and not all processes have heard of it
};

// What a call knows of its peers, in this rank's device memory. Written by Enter, read by the
// kernels that move rows. Only the first TableBytes(devices that can meet) exist.
struct Table {
  int32_t rank;
  int32_t num_ranks;
  int32_t failure;  // Failure
  int32_t phase;    // where it failed; kMove while it has not
  int32_t peer;     // rank that failed or is missing, or the offender's own
  int32_t group;
  int64_t detail;  // kBadIndex: the index; otherwise see Failure
  int32_t device[kMaxRanks];
  const void* operand[kMaxRanks][kMaxOperands];
};
inline int64_t TableBytes(int num_devices) {
  return static_cast<int64_t>(offsetof(Table, operand)) +
         num_devices * static_cast<int64_t>(sizeof(void* [kMaxOperands]));
}

// What one rank tells the owner of a board.
//
// A tag is the number of a run and of a call in it, `run << 32 | call`: the same on all ranks that
// are at the same call, and growing with every call of a rank.
struct Slot {
  uint64_t entered;  // tag of the call that the message belongs to
  uint64_t left;     // twice the tag of the call that was left last; plus one where it failed
  uint64_t device;   // message: index of the rank's device,
  uint64_t signature;
  uint64_t operand[kMaxOperands];  // and where its operands are, see Seat::stages
};

// Where a device hears from the others, for one call site; in the device's memory. Only the first
// BoardBytes(devices that can meet) exist. The first words are the owner's own.
struct Board {
  uint64_t run;      // number of the current run
  uint64_t run_key;  // who else is in it; 0: unknown
  uint64_t call;     // in this run
  uint64_t calls;    // in all
  uint64_t marked;   // run in which the rank told its peers that it has failed
  uint64_t settled;  // failures of later runs than this one end all calls, see Seat::news
  uint64_t unused[2];
  Slot slot[kMaxRanks];  // see SlotOf
};
inline int64_t BoardBytes(int num_devices) {
  return static_cast<int64_t>(offsetof(Board, slot)) +
         num_devices * static_cast<int64_t>(sizeof(Slot));
}

// The last failure of a call site on a device, in host memory that the device can write.
struct Record {
  uint64_t sequence;  // 0 while the others are written, else grows
  uint64_t run;
  uint64_t call;    // Board::calls
  uint64_t rank;    // and the group in the upper half
  uint64_t peer;    // and the failure in the upper half
  uint64_t phase;   // in the lowest byte; above it the peer's device, plus one, where it is known;
                    // and the number of ranks in the upper half
  uint64_t detail;  // of the table
  uint64_t waited_ns;
};

// One device's place at a call site.
struct Seat {
  Board* const* boards = nullptr;  // [num_devices], device memory; null: takes no part
  // [num_devices], device memory: where peers in other processes read a device's operands. A
  // message says how far behind it they are, since every process sees it elsewhere. Null: all are
  // in one process, and messages are pointers.
  char* const* stages = nullptr;
  // [num_devices], device memory: a word on each device where the others tell it of failures, at
  // whatever call site: the run, and in the lower half who failed. Null: all are in one process,
  // whose host sees to that.
  uint64_t* const* news = nullptr;
  int32_t num_devices = 0;
  int32_t device = 0;       // index of this one
  bool has_others = false;  // there are groups of ranks on devices that do not meet these
  uint64_t timeout_ns = 0;
  Table* table = nullptr;
  Record* record = nullptr;
  uint64_t* failed_run = nullptr;  // the device's, for all call sites: key of the last failed run
  uint64_t* alarm = nullptr;       // the device's, in host memory: set after a record is written
};

struct EnterArgs {
  Seat seat;
  const int32_t* rank = nullptr;   // []
  const int32_t* group = nullptr;  // []
  int32_t num_ranks = 0;
  int32_t num_operands = 0;
  uint64_t signature = 0;  // differs where the ranks' calls differ
  // The run that enqueues this, unless the board has been told of a later one: a CUDA graph is
  // recorded in one run and replayed in others.
  uint64_t run = 0;
  uint64_t run_key = 0;
  uint64_t settled = 0;
  const void* operand[kMaxOperands] = {};
};

// The launchers enqueue one block each, allocate nothing, wait for nothing, and return null or a
// static sentence that says what CUDA refused. With the stream kLoadOnly of kernels.h they only
// load what they would launch.
//
// Before the movers: tells all boards where this rank's operands are, and waits for its peers.
Error LaunchEnter(const EnterArgs& args, Stream stream);
// After them: waits until no peer reads this rank's operands any more.
Error LaunchLeave(const Seat& seat, Stream stream);
// Tells a device's board that a run starts, for calls that are replayed from a CUDA graph.
Error LaunchStartRun(Board* board, uint64_t run, uint64_t run_key, uint64_t settled, Stream stream);

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_H_
