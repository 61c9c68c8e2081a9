// What a rank does in Enter and in Leave alike: look at its peers' slots, wait for them, give up.
//
// A Team has:
//
//   thread(), num_threads()      who takes which board or peer
//   Sync()                       all threads of the block
//   outcome()                    an Outcome that the block shares
//   First(Outcome*)              true for one thread of those that call it
//   Stopped(Outcome*)            whether one has
//   Acquire(p), Release(p, v)    loads and stores that other devices see, and that order the others
//   Read(p), Write(p, v)         loads and stores that other devices see
//   Fence()                      orders Read and Write where Acquire and Release do not
//   Now()                        nanoseconds
//   Pause()                      between two looks
#ifndef JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_WAIT_H_
#define JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_WAIT_H_

#include "xla_ffi/engine/cuda/handshake.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

// What the threads of a block tell each other about the call.
struct Outcome {
  uint64_t tag;
  uint64_t start;
  int32_t slot;  // this rank's on every board; -1: it has none
  int32_t stop;
  int32_t failure;
  int32_t peer;
  int64_t detail;
};

enum class Look : int32_t { kWait, kReady, kFailed };

JAX_FUSCO_PROGRAM inline uint64_t RunOf(uint64_t tag) { return tag >> 32; }

template <typename Team>
JAX_FUSCO_PROGRAM void Stop(const Team& team, Failure failure, int32_t peer, int64_t detail) {
  Outcome* outcome = team.outcome();
  if (!team.First(outcome)) return;
  outcome->failure = static_cast<int32_t>(failure);
  outcome->peer = peer;
  outcome->detail = detail;
}

template <typename Team>
JAX_FUSCO_PROGRAM Look LookEnter(const Team& team, const Slot* slot, uint64_t tag) {
  const uint64_t entered = team.Acquire(&slot->entered);
  const uint64_t left = team.Acquire(&slot->left);
  const uint64_t run = RunOf(left / 2);
  if (entered > tag || run > RunOf(tag)) return Look::kFailed;
  if (left % 2 == 1 && run == RunOf(tag)) return Look::kFailed;
  return entered == tag ? Look::kReady : Look::kWait;
}

// A peer that failed in a later call of this run has left this one well.
template <typename Team>
JAX_FUSCO_PROGRAM Look LookLeave(const Team& team, const Slot* slot, uint64_t tag) {
  const uint64_t left = team.Acquire(&slot->left);
  const uint64_t run = RunOf(left / 2);
  if (run > RunOf(tag)) return Look::kFailed;
  if (left % 2 == 1 && run == RunOf(tag) && left / 2 <= tag) return Look::kFailed;
  return left / 2 >= tag ? Look::kReady : Look::kWait;
}

// Where rank 0 of a group has its slot on every board. Groups whose ranks are all on devices that
// do not meet these leave gaps in the numbers of those that do.
JAX_FUSCO_PROGRAM inline int64_t FirstSlotOf(const Seat& seat, int64_t group, int32_t num_ranks) {
  if (seat.has_others && num_ranks > 0 && num_ranks <= seat.num_devices) {
    group %= seat.num_devices / num_ranks;
  }
  return group * num_ranks;
}

// Waits for all peers but the rank itself, each thread for its own.
template <typename Team>
JAX_FUSCO_PROGRAM void Await(const Team& team, const Seat& seat, Phase phase) {
  const Outcome* outcome = team.outcome();
  const Slot* slots = seat.boards[seat.device]->slot;
  const int32_t rank = seat.table->rank;
  const int32_t num_ranks = seat.table->num_ranks;
  const int32_t first = outcome->slot - rank;
  for (;;) {
    int32_t missing = -1;
    for (int32_t p = team.thread(); p < num_ranks; p += team.num_threads()) {
      if (p == rank) continue;
      const Look look = phase == Phase::kEnter ? LookEnter(team, &slots[first + p], outcome->tag)
                                               : LookLeave(team, &slots[first + p], outcome->tag);
      if (look == Look::kFailed) return Stop(team, Failure::kPeerFailed, p, 0);
      if (look == Look::kWait && missing < 0) missing = p;
    }
    if (missing < 0 || team.Stopped(team.outcome())) return;
    // Signed: a clock that is set back must not look like a wait of centuries.
    if (static_cast<int64_t>(team.Now() - outcome->start) > static_cast<int64_t>(seat.timeout_ns)) {
      return Stop(team, Failure::kTimeout, missing, 0);
    }
    team.Pause();
  }
}

// The device of the peer that the outcome is about, -1 where it never came or is no rank.
template <typename Team>
JAX_FUSCO_PROGRAM int32_t DeviceOfPeer(const Team& team, const Seat& seat, const Outcome& outcome) {
  const Table* table = seat.table;
  if (outcome.slot < 0 || outcome.peer < 0 || outcome.peer >= table->num_ranks) return -1;
  const Slot* slot = &seat.boards[seat.device]->slot[outcome.slot - table->rank + outcome.peer];
  return team.Acquire(&slot->entered) == 0 ? -1 : static_cast<int32_t>(team.Read(&slot->device));
}

// Tells everybody that this rank has failed, once a run, and writes down why. Called by all
// threads.
template <typename Team>
JAX_FUSCO_PROGRAM void Fail(const Team& team, const Seat& seat, Phase phase) {
  const Outcome outcome = *team.outcome();
  Board* board = seat.boards[seat.device];
  const bool mark = outcome.slot >= 0 && board->marked != board->run;
  const uint64_t failed = board->run << 32 | static_cast<uint32_t>(seat.device);
  team.Sync();
  for (int32_t b = team.thread(); b < seat.num_devices; b += team.num_threads()) {
    if (seat.boards[b] == nullptr) continue;
    if (mark) team.Release(&seat.boards[b]->slot[outcome.slot].left, 2 * outcome.tag + 1);
    if (seat.news != nullptr && team.Read(seat.news[b]) < failed) team.Write(seat.news[b], failed);
  }
  team.Fence();
  team.Sync();
  if (team.thread() != 0) return;
  if (mark) board->marked = board->run;
  Table* table = seat.table;
  table->failure = outcome.failure;
  table->phase = static_cast<int32_t>(phase);
  table->peer = outcome.peer;
  table->detail = outcome.detail;
  if (outcome.failure == static_cast<int32_t>(Failure::kFailedRun)) return;
  team.Write(seat.failed_run, board->run_key);
  Record* record = seat.record;
  const uint64_t sequence = team.Read(&record->sequence);
  team.Release(&record->sequence, 0);
  team.Fence();
  const auto pack = [](int32_t low, int32_t high) {
    return static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low);
  };
  team.Write(&record->run, board->run);
  team.Write(&record->call, board->calls);
  team.Write(&record->rank, pack(table->rank, table->group));
  team.Write(&record->peer, pack(outcome.peer, outcome.failure));
  const int32_t device = DeviceOfPeer(team, seat, outcome);
  team.Write(&record->phase,
             pack(static_cast<int32_t>(phase) | (device + 1) << 8, table->num_ranks));
  team.Write(&record->detail, static_cast<uint64_t>(outcome.detail));
  team.Write(&record->waited_ns, team.Now() - outcome.start);
  team.Release(&record->sequence, sequence + 1);
  team.Release(seat.alarm, 1);
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_WAIT_H_
