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

  JAX_FUSCO_PROGRAM int64_t RowOf(int32_t source) const {
    if (fanout <= 1) return source;
    return fanout > INT32_MAX ? 0 : source / static_cast<int32_t>(fanout);
  }
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
  order.row = sources.RowOf(entry.source);
  const bool exists =
      entry.rank >= 0 && entry.rank < table->num_ranks && order.row < sources.peer_rows;
  if (!exists) MarkBadIndex(team, table, table->rank, entry.rank, entry.source);
  if (entry.chain < 0) return order;  // its chain's first does it
  order.task = exists ? Task::kTake : Task::kClear;
  if (entry.chain > 0) order.next = NextOfChain(team, sources, table, row, entry.chain);
  return order;
}

// So that not all ranks begin with rows from the same peer, rank r begins where the rows from rank
// r + 1 are if there is one expert.
JAX_FUSCO_PROGRAM inline int64_t FirstRow(int64_t num_rows, const Table* table) {
  return num_rows * ((table->rank + 1) % table->num_ranks) / table->num_ranks;
}

// Goes through the parts of all rows, `of_row` each, in steps of `step` parts from the `first`, and
// through the rows from `first_row` on and round. Divides once.
class Parts {
 public:
  JAX_FUSCO_PROGRAM Parts(int64_t num_rows, int64_t of_row, int64_t first_row, int64_t first,
                          int64_t step)
      : num_rows_(num_rows), of_row_(of_row), step_(step), left_(num_rows * of_row - first) {
    step_rows_ = of_row == 1 ? step : step / of_row;
    step_parts_ = step - step_rows_ * of_row;
    row_ = of_row == 1 ? first : first / of_row;
    part_ = first - row_ * of_row;
    row_ += first_row;
    if (row_ >= num_rows_) row_ -= num_rows_;
  }
  // Whether there is one: row() and part() say which.
  JAX_FUSCO_PROGRAM bool any() const { return left_ > 0; }
  JAX_FUSCO_PROGRAM int64_t row() const { return row_; }
  JAX_FUSCO_PROGRAM int64_t part() const { return part_; }
  JAX_FUSCO_PROGRAM void Next() {
    left_ -= step_;
    row_ += step_rows_;
    part_ += step_parts_;
    if (part_ >= of_row_) {
      part_ -= of_row_;
      ++row_;
    }
    if (row_ >= num_rows_) row_ -= num_rows_;
  }

 private:
  int64_t num_rows_, of_row_, step_, step_rows_, step_parts_;
  int64_t left_, row_, part_;
};

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_SOURCES_H_
