#include "xla_ffi/core/crossing.h"

#include <atomic>

#include "xla_ffi/engine/cpu/chunks.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

// The calls of all ranks, or an error where their shapes differ.
template <typename J, typename Call>
Status Agree(const char* name, const std::vector<const Job*>& ranks,
             std::vector<const Call*>* calls) {
  for (const J* job : As<J>(ranks)) {
    calls->push_back(job);
    const CrossingShape &a = calls->front()->shape, &b = job->shape;
    if (a.num_nodes != b.num_nodes || a.tokens != b.tokens || a.k != b.k ||
        a.experts_per_rank != b.experts_per_rank || a.capacity != b.capacity) {
      return Disagree(name, calls->size() - 1, "nodes, tokens, k, experts or capacity");
    }
  }
  return Status::Ok();
}

// Calls `body(rank)` for all ranks, which read and write about `bytes` in all; whether all are
// true.
template <typename Body>
bool ForRanks(int64_t ranks, int64_t bytes, const Settings& settings, const Body& body) {
  std::atomic<bool> all{true};
  Workers::ParallelFor(ThreadsFor(bytes, settings), ranks, [&](int64_t r) {
    if (!body(r)) all = false;
  });
  return all;
}

int64_t LetterBytes(const CrossingShape& shape) {
  return shape.local_ranks * shape.num_nodes * (shape.tokens + 1) * shape.letter() * 4;
}

}  // namespace

Status CrossingCountJob::Run(const std::vector<const Job*>& ranks, const Settings& settings) const {
  std::vector<const CrossingCountCall*> calls;
  const Status agreed = Agree<CrossingCountJob>("jax_fusco_crossing_count", ranks, &calls);
  if (!agreed.ok()) return agreed;
  const int64_t experts = shape.num_experts();
  std::vector<int32_t> counts(static_cast<size_t>(shape.local_ranks * experts));
  const int64_t bytes = shape.local_ranks * shape.tokens * shape.k * 4;
  ForRanks(shape.local_ranks, bytes, settings, [&](int64_t r) {
    const CrossingCountCall& call = *calls[static_cast<size_t>(r)];
    *call.num_invalid = CountForCrossing(call, counts.data() + r * experts);
    return true;
  });
  int32_t complaint[CrossingShape::kComplaint] = {-1, -1, -1, -1};
  for (int64_t r = shape.local_ranks - 1; settings.strict && r >= 0; --r) {
    const CrossingCountCall& call = *calls[static_cast<size_t>(r)];
    if (*call.num_invalid == 0) continue;
    const int64_t a = FindBadExpert(call.expert_ids, shape.tokens * shape.k, experts);
    complaint[0] = static_cast<int32_t>(r);
    complaint[1] = static_cast<int32_t>(a / shape.k);
    complaint[2] = static_cast<int32_t>(a % shape.k);
    complaint[3] = call.expert_ids[a];
  }
  for (int64_t r = 0; r < shape.local_ranks; ++r) {
    TellWanted(*calls[static_cast<size_t>(r)], r, counts.data(), complaint);
  }
  return Status::Ok();
}

Status CrossingLayOutJob::Run(const std::vector<const Job*>& /*ranks*/,
                              const Settings& /*settings*/) const {
  int64_t node = 0;
  if (const int32_t* complaint = FindComplaint(*this, &node)) {
    return BadExpert("jax_fusco_crossing_count", complaint[1], complaint[2],
                     node * shape.local_ranks + complaint[0], complaint[3], shape.num_experts());
  }
  LayOutForCrossing(*this);
  return Status::Ok();
}

Status CrossingPlaceJob::Run(const std::vector<const Job*>& ranks, const Settings& settings) const {
  std::vector<const CrossingPlaceCall*> calls;
  const Status agreed = Agree<CrossingPlaceJob>("jax_fusco_crossing_place", ranks, &calls);
  if (!agreed.ok()) return agreed;
  for (const CrossingPlaceCall* call : calls) {
    if (*call->node != *node || *node < 0 || *node >= shape.num_nodes) {
      return Status::InvalidArgument(Concat("jax_fusco_crossing_place: node is ", *call->node,
                                            " of ", shape.num_nodes,
                                            ", need the same one on all ranks."));
    }
  }
  std::vector<int32_t> visits(static_cast<size_t>(shape.local_ranks * shape.num_nodes));
  const bool placed = ForRanks(shape.local_ranks, LetterBytes(shape), settings, [&](int64_t r) {
    return PlaceForCrossing(calls, r, visits.data() + r * shape.num_nodes);
  });
  if (!placed) {
    return Status::InvalidArgument(
        Concat("jax_fusco_crossing_place: a granted row lies outside of its buffer of ",
               shape.capacity, " rows."));
  }
  ForRanks(shape.local_ranks, LetterBytes(shape), settings, [&](int64_t r) {
    DealToRails(calls, r, visits.data());
    return true;
  });
  return Status::Ok();
}

Status CrossingDeliverJob::Run(const std::vector<const Job*>& ranks,
                               const Settings& settings) const {
  std::vector<const CrossingDeliverCall*> calls;
  const Status agreed = Agree<CrossingDeliverJob>("jax_fusco_crossing_deliver", ranks, &calls);
  if (!agreed.ok()) return agreed;
  ForRanks(shape.local_ranks, shape.local_ranks * shape.capacity * 16, settings, [&](int64_t r) {
    MarkForCrossing(*calls[static_cast<size_t>(r)]);
    return true;
  });
  const bool delivered = ForRanks(shape.local_ranks, 3 * LetterBytes(shape), settings,
                                  [&](int64_t r) { return ReadLetters(calls, r); });
  if (!delivered) {
    return Status::InvalidArgument(
        Concat("jax_fusco_crossing_deliver: a letter names no row of the ", shape.local_ranks,
               " ranks of this node."));
  }
  return Status::Ok();
}

}  // namespace jax_fusco::cpu
