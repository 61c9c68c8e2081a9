#include "xla_ffi/engine/cuda/errors.h"

#include <cstdio>

#include "xla_ffi/engine/cuda/kernels.h"

namespace jax_fusco::cuda {
namespace {

uint64_t Load(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
int32_t Low(uint64_t word) { return static_cast<int32_t>(word & 0xffffffffu); }
int32_t High(uint64_t word) { return static_cast<int32_t>(word >> 32); }

std::string Seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", seconds);
  return text;
}

const char* Name(Phase phase) {
  switch (phase) {
    case Phase::kEnter:
      return "enter";
    case Phase::kMove:
      return "move";
    case Phase::kLeave:
      return "leave";
    case Phase::kNone:
      break;
  }
  return "start";
}

std::string Hex(int64_t bits) {
  char text[32];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(bits));
  return text;
}

}  // namespace

bool ReadRecord(const Record* record, CallFailure* failure) {
  const uint64_t sequence = Load(&record->sequence);
  if (sequence == 0) return false;
  failure->sequence = sequence;
  failure->run = Load(&record->run);
  failure->call = Load(&record->call);
  const uint64_t rank = Load(&record->rank);
  failure->rank = Low(rank);
  failure->group = High(rank);
  const uint64_t peer = Load(&record->peer);
  failure->peer = Low(peer);
  failure->failure = static_cast<Failure>(High(peer));
  const uint64_t phase = Load(&record->phase);
  failure->phase = static_cast<Phase>(Low(phase) & 0xff);
  failure->peer_device = (Low(phase) >> 8) - 1;
  failure->num_ranks = High(phase);
  failure->detail = static_cast<int64_t>(Load(&record->detail));
  failure->waited_s = static_cast<double>(Load(&record->waited_ns)) * 1e-9;
  return Load(&record->sequence) == sequence;
}

Status Describe(const std::string& call_site, const CallFailure& f,
                const std::function<int(int64_t)>& process_of) {
  const auto in_process = [&](int64_t device) {
    const int process = process_of == nullptr || device < 0 ? -1 : process_of(device);
    return process < 0 ? std::string() : Concat(" (process ", process, ")");
  };
  const std::string peer = Concat("rank ", f.peer, in_process(f.peer_device));
  const std::string who = Concat("jax_fusco: rank ", f.rank, " of group ", f.group);
  const std::string where =
      Concat(call_site, " (", Name(f.phase), ", call ", static_cast<int64_t>(f.call), ")");
  switch (f.failure) {
    case Failure::kTimeout:
      return Status::DeadlineExceeded(
          Concat(who, " waited ", Seconds(f.waited_s), " (JAX_FUSCO_TIMEOUT_S) for ", peer, " in ",
                 where, "; look for an earlier error on the device of rank ", f.peer,
                 ", or for a shuffle under a condition that ranks decide differently."));
    case Failure::kPeerFailed:
      return Status::Internal(Concat(who, " gave up ", where, " because ", peer,
                                     " had given it up, for a reason of its own."));
    case Failure::kMismatch:
      return Status::InvalidArgument(
          Concat(who, " and ", peer, " came to ", where, " with different shapes or ",
                 "attributes (", Hex(f.detail), "); all ranks must run the same program."));
    case Failure::kBadIndex:
      return Status::InvalidArgument(Concat(who, " met index ", IndexOfBadIndex(f.detail),
                                            " of rank ", RankOfBadIndex(f.detail), " in ", where,
                                            ", given by ", peer, "; it does not exist."));
    case Failure::kBadRank:
      return Status::InvalidArgument(
          Concat("jax_fusco: rank is ", f.rank, " and group is ", f.group, " in ", where,
                 "; rank must lie in [0, ", f.num_ranks,
                 ") and there must be a device for each rank of each group."));
    case Failure::kSameRank:
      return Status::InvalidArgument(
          Concat(who, " is also device ", f.detail, in_process(f.detail), " in ", where,
                 "; group must tell apart the devices along every other mesh axis."));
    case Failure::kUnsettled:
      return Status::Internal(Concat(who, " gave up ", where, " because device ", f.detail,
                                     in_process(f.detail),
                                     " had failed, and not all processes had reported it yet."));
    case Failure::kFailedRun:
    case Failure::kNone:
      break;
  }
  return Status::Internal(Concat(who, " failed in ", where, "."));
}

}  // namespace jax_fusco::cuda
