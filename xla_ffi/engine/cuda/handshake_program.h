// The handshake as a program, for a block of a GPU and for a thread of the host.
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
//
// Enter   Nobody knows yet which device holds which rank, so a rank writes its message and then its
//         tag into its slot on every board, and waits until the slots of its peers on its own board
//         hold the tag. Then it copies their messages and looks again.
// Leave   The rank writes the tag into `left` on the boards of its peers and waits until all of
// them
//         have: nobody reads its operands any more, and nobody it has read from has given up.
// Failure Who gives up, for whatever reason, says so on every board before its call ends and its
//         operands are used for something else. A mark stays to the end of the run, and no later
//         call of the run on this device tries again: it fails at once, at this call site and at
//         the others. So a late rank hears of it at once, and one that is reading hears it in
//         Leave.
// Runs    A failure ends with its run: tags begin with the run, which the host knows. A rank that
//         sees a peer in a later run has been given up; one that sees it in an earlier run waits.
#ifndef JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_PROGRAM_H_
#define JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_PROGRAM_H_

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
    if (team.Now() - outcome->start > seat.timeout_ns) {
      return Stop(team, Failure::kTimeout, missing, 0);
    }
    team.Pause();
  }
}

// Tells everybody that this rank has failed, once a run, and writes down why. Called by all
// threads.
template <typename Team>
JAX_FUSCO_PROGRAM void Fail(const Team& team, const Seat& seat, Phase phase) {
  const Outcome outcome = *team.outcome();
  Board* board = seat.boards[seat.device];
  const bool mark = outcome.slot >= 0 && board->marked != board->run;
  team.Sync();
  if (mark) {
    for (int32_t b = team.thread(); b < seat.num_devices; b += team.num_threads()) {
      if (seat.boards[b] == nullptr) continue;
      team.Release(&seat.boards[b]->slot[outcome.slot].left, 2 * outcome.tag + 1);
    }
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
  team.Write(&record->phase, pack(static_cast<int32_t>(phase), table->num_ranks));
  team.Write(&record->detail, static_cast<uint64_t>(outcome.detail));
  team.Write(&record->waited_ns, team.Now() - outcome.start);
  team.Release(&record->sequence, sequence + 1);
  team.Release(seat.alarm, 1);
}

// Which call this is, and whether it may be tried. One thread.
template <typename Team>
JAX_FUSCO_PROGRAM void StartCall(const Team& team, const EnterArgs& args) {
  const Seat& seat = args.seat;
  Board* board = seat.boards[seat.device];
  if (args.run > board->run) {
    board->run = args.run;
    board->run_key = args.run_key;
    board->call = 0;
  }
  ++board->call;
  ++board->calls;
  const int32_t rank = *args.rank;
  const int32_t group = *args.group;
  Table* table = seat.table;
  table->rank = rank;
  table->group = group;
  table->num_ranks = args.num_ranks;
  table->failure = static_cast<int32_t>(Failure::kNone);
  table->phase = static_cast<int32_t>(Phase::kMove);
  table->peer = 0;
  table->detail = 0;
  const int64_t slot = static_cast<int64_t>(group) * args.num_ranks + rank;
  const bool valid = rank >= 0 && rank < args.num_ranks && group >= 0 && slot < seat.num_devices;
  Outcome* outcome = team.outcome();
  *outcome = {};
  outcome->tag = board->run << 32 | board->call;
  outcome->start = team.Now();
  outcome->slot = valid ? static_cast<int32_t>(slot) : -1;
  if (!valid) return Stop(team, Failure::kBadRank, rank, group);
  const bool failed_here = board->marked == board->run;
  const bool failed_elsewhere = board->run_key != 0 && team.Read(seat.failed_run) == board->run_key;
  if (failed_here || failed_elsewhere) return Stop(team, Failure::kFailedRun, rank, 0);
  // Only this rank writes here, and not yet for this call.
  const Slot* own = &board->slot[slot];
  const uint64_t entered = team.Acquire(&own->entered);
  const uint64_t device = team.Read(&own->device);
  if (entered >= outcome->tag || (entered != 0 && device != static_cast<uint64_t>(seat.device))) {
    Stop(team, Failure::kSameRank, rank, static_cast<int64_t>(device));
  }
}

// Takes over what the peers said. A peer that has given up in the meantime may have said something
// else half-way, so all of it counts only if the slot is still ready afterwards.
template <typename Team>
JAX_FUSCO_PROGRAM void CopyMessages(const Team& team, const EnterArgs& args) {
  const Seat& seat = args.seat;
  const Outcome* outcome = team.outcome();
  const uint64_t tag = outcome->tag;
  Table* table = seat.table;
  const int32_t rank = table->rank;
  const int32_t first = outcome->slot - rank;
  for (int32_t p = team.thread(); p < args.num_ranks; p += team.num_threads()) {
    const Slot* slot = &seat.boards[seat.device]->slot[first + p];
    const uint64_t device = team.Read(&slot->device);
    table->device[p] = static_cast<int32_t>(device);
    if (p == rank) {
      for (int32_t i = 0; i < args.num_operands; ++i) table->operand[p][i] = args.operand[i];
      if (device != static_cast<uint64_t>(seat.device)) {
        Stop(team, Failure::kSameRank, p, static_cast<int64_t>(device));
      }
      continue;
    }
    const uint64_t signature = team.Read(&slot->signature);
    for (int32_t i = 0; i < args.num_operands; ++i) {
      table->operand[p][i] = reinterpret_cast<const void*>(team.Read(&slot->operand[i]));
    }
    team.Fence();
    if (LookEnter(team, slot, tag) != Look::kReady) {
      Stop(team, Failure::kPeerFailed, p, 0);
    } else if (signature != args.signature) {
      Stop(team, Failure::kMismatch, p, static_cast<int64_t>(signature));
    }
  }
}

template <typename Team>
JAX_FUSCO_PROGRAM void Enter(const Team& team, const EnterArgs& args) {
  const Seat& seat = args.seat;
  if (team.thread() == 0) StartCall(team, args);
  team.Sync();
  const Outcome* outcome = team.outcome();
  if (outcome->failure == 0) {
    for (int32_t b = team.thread(); b < seat.num_devices; b += team.num_threads()) {
      if (seat.boards[b] == nullptr || (args.num_ranks == 1 && b != seat.device)) continue;
      Slot* slot = &seat.boards[b]->slot[outcome->slot];
      team.Write(&slot->device, static_cast<uint64_t>(seat.device));
      team.Write(&slot->signature, args.signature);
      for (int32_t i = 0; i < args.num_operands; ++i) {
        team.Write(&slot->operand[i], reinterpret_cast<uint64_t>(args.operand[i]));
      }
      team.Release(&slot->entered, outcome->tag);
    }
    team.Sync();
    Await(team, seat, Phase::kEnter);
    team.Sync();
    if (outcome->failure == 0) {
      team.Sync();
      CopyMessages(team, args);
      team.Sync();
    }
  }
  if (outcome->failure != 0) Fail(team, seat, Phase::kEnter);
}

// What Leave needs to know of the call that Enter started. One thread.
template <typename Team>
JAX_FUSCO_PROGRAM void EndCall(const Team& team, const Seat& seat) {
  const Board* board = seat.boards[seat.device];
  const Table* table = seat.table;
  Outcome* outcome = team.outcome();
  *outcome = {};
  outcome->tag = board->run << 32 | board->call;
  outcome->start = team.Now();
  outcome->slot = table->group * table->num_ranks + table->rank;
  if (table->failure != 0)
    Stop(team, static_cast<Failure>(table->failure), table->peer, table->detail);
}

template <typename Team>
JAX_FUSCO_PROGRAM void Leave(const Team& team, const Seat& seat) {
  const Table* table = seat.table;
  if (table->failure != 0 && table->phase == static_cast<int32_t>(Phase::kEnter)) return;
  if (team.thread() == 0) EndCall(team, seat);
  team.Fence();  // what the movers read was read before any look below
  team.Sync();
  const Outcome* outcome = team.outcome();
  const bool moved = outcome->failure == 0;
  team.Sync();
  if (!moved) return Fail(team, seat, Phase::kMove);
  for (int32_t p = team.thread(); p < table->num_ranks; p += team.num_threads()) {
    team.Release(&seat.boards[table->device[p]]->slot[outcome->slot].left, 2 * outcome->tag);
  }
  Await(team, seat, Phase::kLeave);
  team.Sync();
  if (outcome->failure != 0) Fail(team, seat, Phase::kLeave);
}

JAX_FUSCO_PROGRAM inline void StartRun(Board* board, uint64_t run, uint64_t run_key) {
  if (run <= board->run) return;
  board->run = run;
  board->run_key = run_key;
  board->call = 0;
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_PROGRAM_H_
