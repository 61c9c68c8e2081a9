// The handshake as a program, for a block of a GPU and for threads of the host; handshake_wait.h
// says what it asks of its team.
//
// Enter   Nobody knows yet which device holds which rank, so a rank writes its message and then its
//         tag into its slot on every board, and waits until the slots of its peers on its own board
//         hold the tag. Then it copies their messages and looks again.
// Leave   The rank writes the tag into `left` on its peers' boards and waits until all of them
//         have: nobody reads its operands any more, and nobody it has read from has given up.
// Failure Who gives up, for whatever reason, says so on every board before its call ends and its
//         operands are used for something else. A mark stays to the end of the run, and no later
//         call of the run on this device tries again: all fail at once, at every call site. So a
//         late rank hears of it at once, and one that is reading hears of it in Leave.
// Runs    A failure ends with its run: tags begin with the run, which the host knows. A rank that
//         sees a peer in a later run has been given up; one that sees it in an earlier run waits.
//         Where the hosts are several, one that reports a failure instead of starting a run does
//         not stop the others from starting it. So there nobody succeeds after a failure until all
//         processes have settled it, and what they start before fails without waiting.
#ifndef JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_PROGRAM_H_
#define JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_PROGRAM_H_

#include "xla_ffi/engine/cuda/handshake_wait.h"

namespace jax_fusco::cuda {

// Which call this is, and whether it may be tried. One thread.
template <typename Team>
JAX_FUSCO_PROGRAM void StartCall(const Team& team, const EnterArgs& args) {
  const Seat& seat = args.seat;
  Board* board = seat.boards[seat.device];
  if (args.run > board->run) {
    board->run = args.run;
    board->run_key = args.run_key;
    board->settled = args.settled;
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
  const int64_t slot = FirstSlotOf(seat, group, args.num_ranks) + rank;
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
  const uint64_t failed = seat.news == nullptr ? 0 : team.Read(seat.news[seat.device]);
  if (RunOf(failed) > board->settled) {
    return Stop(team, Failure::kUnsettled, rank, static_cast<int64_t>(failed & 0xffffffffu));
  }
  // Only this rank writes here, and not yet for this call.
  const Slot* own = &board->slot[slot];
  const uint64_t entered = team.Acquire(&own->entered);
  const uint64_t device = team.Read(&own->device);
  if (entered >= outcome->tag || (entered != 0 && device != static_cast<uint64_t>(seat.device))) {
    Stop(team, Failure::kSameRank, rank, static_cast<int64_t>(device));
  }
}

JAX_FUSCO_PROGRAM inline uint64_t StageOf(const Seat& seat, uint64_t device) {
  if (seat.stages == nullptr || device >= static_cast<uint64_t>(seat.num_devices)) return 0;
  return reinterpret_cast<uint64_t>(seat.stages[device]);
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
    const uint64_t base = StageOf(seat, device);
    for (int32_t i = 0; i < args.num_operands; ++i) {
      table->operand[p][i] = reinterpret_cast<const void*>(base + team.Read(&slot->operand[i]));
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
    const uint64_t base = StageOf(seat, static_cast<uint64_t>(seat.device));
    for (int32_t b = team.thread(); b < seat.num_devices; b += team.num_threads()) {
      if (seat.boards[b] == nullptr || (args.num_ranks == 1 && b != seat.device)) continue;
      Slot* slot = &seat.boards[b]->slot[outcome->slot];
      team.Write(&slot->device, static_cast<uint64_t>(seat.device));
      team.Write(&slot->signature, args.signature);
      for (int32_t i = 0; i < args.num_operands; ++i) {
        team.Write(&slot->operand[i], reinterpret_cast<uint64_t>(args.operand[i]) - base);
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
  outcome->slot =
      static_cast<int32_t>(FirstSlotOf(seat, table->group, table->num_ranks)) + table->rank;
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

JAX_FUSCO_PROGRAM inline void StartRun(Board* board, uint64_t run, uint64_t run_key,
                                       uint64_t settled = 0) {
  if (run <= board->run) return;
  board->settled = settled;
  board->run = run;
  board->run_key = run_key;
  board->call = 0;
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_HANDSHAKE_PROGRAM_H_
