// What movers ask of the table of their call, and tell it.
#ifndef JAX_FUSCO_ENGINE_CUDA_PEERS_H_
#define JAX_FUSCO_ENGINE_CUDA_PEERS_H_

#include "xla_ffi/engine/cuda/handshake.h"
#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

// Whether the peers' pointers may be used. All threads get the same answer, whatever the others do
// meanwhile: movers record nothing but bad indices.
template <typename Team>
JAX_FUSCO_PROGRAM bool HasPeers(const Team& team, const Table* table) {
  const int32_t failure = team.Load(&table->failure);
  return failure == static_cast<int32_t>(Failure::kNone) ||
         failure == static_cast<int32_t>(Failure::kBadIndex);
}

// Records that the arguments of rank `of` name index `index` of rank `rank`, which does not exist.
// The first one stays.
template <typename Team>
JAX_FUSCO_PROGRAM void MarkBadIndex(const Team& team, Table* table, int32_t of, int32_t rank,
                                    int32_t index) {
  const auto none = static_cast<int32_t>(Failure::kNone);
  const auto bad = static_cast<int32_t>(Failure::kBadIndex);
  if (team.CompareExchange(&table->failure, none, bad) != none) return;
  table->phase = static_cast<int32_t>(Phase::kMove);
  table->peer = of;
  table->detail = BadIndexDetail(rank, index);
}

// Whether an operand of every rank may be read in such packs. All lanes of a warp together.
template <typename Pack, typename Team>
JAX_FUSCO_PROGRAM bool ArePeersAligned(const Team& team, const Table* table, int operand) {
  int32_t others = 0;
  for (int p = team.lane(); p < table->num_ranks; p += Team::kLanes) {
    others += !Pack::IsAlignedTo(table->operand[p][operand]);
  }
  return SumOfLanes(team, others) == 0;
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_PEERS_H_
