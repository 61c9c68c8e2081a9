// Where the rows of a gather come from. The indices come from the program and are not trusted.
#ifndef JAX_FUSCO_ENGINE_CUDA_SOURCES_H_
#define JAX_FUSCO_ENGINE_CUDA_SOURCES_H_

#include "xla_ffi/core/plan.h"
#include "xla_ffi/engine/cuda/handshake.h"
#include "xla_ffi/engine/cuda/peers.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

// The indices of a gather; `fanout` sources share a row, of which every rank has `peer_rows`.
struct Sources {
  int64_t num_rows;
  const int32_t* source_rank;
  const int32_t* source;
  const int32_t* chain;
  int64_t fanout;
  int64_t peer_rows;
};

// What the arrays say of one row.
struct Entry {
  int32_t rank;
  int32_t source;
  int32_t chain;
};
JAX_FUSCO_PROGRAM inline Entry EntryOf(const Sources& sources, int64_t row) {
  return {sources.source_rank[row], sources.source[row],
          sources.chain == nullptr ? 0 : sources.chain[row]};
}

// What is to be done for a row: nothing, clear it, or take a peer's row for it and those chained.
enum class Task : int32_t { kNone, kClear, kTake };
struct Order {
  Task task = Task::kNone;
  int32_t rank = 0;  // where to take from
  int64_t row = 0;
  int64_t next = 0;  // the next of the chain, num_rows at the end
};

// The row that follows `row` in a chain, when the chain says `next`. A chain that does not ascend
// is bad, and ends.
template <typename Team>
JAX_FUSCO_PROGRAM int64_t NextOfChain(const Team& team, const Sources& sources, Table* table,
                                      int64_t row, int32_t next) {
  if (next > row && next <= sources.num_rows) return next;
  MarkBadIndex(team, table, table->rank, table->rank, next);
  return sources.num_rows;
}
// The same for a row that is not its chain's first.
template <typename Team>
JAX_FUSCO_PROGRAM int64_t FollowChain(const Team& team, const Sources& sources, Table* table,
                                      int64_t row) {
  return NextOfChain(team, sources, table, row, -1 - sources.chain[row]);
}

template <typename Team>
JAX_FUSCO_PROGRAM Order OrderOf(const Team& team, const Sources& sources, Table* table, int64_t row,
                                const Entry& entry, bool zero_tail) {
  Order order;
  order.next = sources.num_rows;
  if (entry.source < 0) {
    if (zero_tail || entry.source != kTail) order.task = Task::kClear;
    return order;
  }
  order.rank = entry.rank;
  order.row = sources.fanout == 1 ? entry.source : entry.source / sources.fanout;
  const bool exists =
      entry.rank >= 0 && entry.rank < table->num_ranks && order.row < sources.peer_rows;
  if (!exists) MarkBadIndex(team, table, table->rank, entry.rank, entry.source);
  if (entry.chain < 0) return order;  // its chain's first does it
  order.task = exists ? Task::kTake : Task::kClear;
  if (entry.chain > 0) order.next = NextOfChain(team, sources, table, row, entry.chain);
  return order;
}

// So that not all ranks begin with rows from the same peer, rank r begins at the part of its buffer
// that comes from rank r + 1 if there is one expert: which of `count` pieces is the i-th.
JAX_FUSCO_PROGRAM inline int64_t Rotated(int64_t i, int64_t count, const Table* table) {
  const int64_t first = count * ((table->rank + 1) % table->num_ranks) / table->num_ranks;
  const int64_t at = first + i;
  return at < count ? at : at - count;
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_SOURCES_H_
