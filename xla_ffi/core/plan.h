// The arithmetic of a plan: from expert ids to the row of every assignment.
//
// Four steps, each over the data of one rank, so that a caller may run the ranks of a step side by
// side: count the assignments of each source rank, lay out each receiving rank's buffer, place each
// source rank's assignments, mark the rows that nobody fills.
#ifndef JAX_FUSCO_CORE_PLAN_H_
#define JAX_FUSCO_CORE_PLAN_H_

#include <cstdint>

#include "xla_ffi/core/macros.h"
#include "xla_ffi/core/water_fill.h"

namespace jax_fusco {

inline constexpr int32_t kPadding = -1;  // a row between a group's end and its alignment
inline constexpr int32_t kTail = -2;     // a row past the last group

struct PlanShape {
  int64_t num_ranks = 1;    // R
  int64_t tokens = 0;       // T, of one rank
  int64_t k = 1;            // experts of a token
  int64_t num_experts = 1;  // E, a multiple of R
  int64_t capacity = 0;     // C, rows of a receive buffer
  int64_t alignment = 1;    // a group's rows are a multiple of it

  JAX_FUSCO_HOST_DEVICE int64_t experts_per_rank() const { return num_experts / num_ranks; }
  JAX_FUSCO_HOST_DEVICE int64_t assignments() const { return tokens * k; }
  // Cells of one receiving rank.
  JAX_FUSCO_HOST_DEVICE int64_t cells() const { return num_experts; }
};

// The results of one rank. Arrays as in docs/architecture.md.
struct PlanResults {
  int32_t* group_sizes = nullptr;    // [E_local]
  int32_t* expert_counts = nullptr;  // [E_local]
  int32_t* slot = nullptr;           // [T, k]
  int32_t* slot_rank = nullptr;      // [T, k]
  int32_t* source_rank = nullptr;    // [C]
  int32_t* source = nullptr;         // [C]
  int32_t* num_dropped = nullptr;    // []
  int32_t* num_invalid = nullptr;    // []
};

// Step 1. Counts the ids of `source_rank` into its column of `counts` [E, R]; returns how many ids
// lie outside [-1, E).
JAX_FUSCO_HOST_DEVICE inline int32_t CountAssignments(const PlanShape& shape, int64_t source_rank,
                                                      const int32_t* expert_ids, int32_t* counts) {
  int32_t invalid = 0;
  for (int64_t e = 0; e < shape.num_experts; ++e) counts[e * shape.num_ranks + source_rank] = 0;
  for (int64_t a = 0; a < shape.assignments(); ++a) {
    const int32_t expert = expert_ids[a];
    if (expert >= 0 && expert < shape.num_experts) {
      ++counts[expert * shape.num_ranks + source_rank];
    } else if (expert != -1) {
      ++invalid;
    }
  }
  return invalid;
}

// Step 2. Lays out the buffer of one receiving rank from its block of counts [E_local, R]. `first`
// and `last` [E_local, R] get the row range of each cell.
JAX_FUSCO_HOST_DEVICE inline void LayOutBuffer(const PlanShape& shape, const int32_t* counts,
                                               const PlanResults& results, int32_t* first,
                                               int32_t* last) {
  const int64_t groups = shape.experts_per_rank();
  const int64_t ranks = shape.num_ranks;
  int32_t* kept = last;  // holds the kept rows until it holds the ranges' ends
  WaterFill(counts, groups, ranks, shape.capacity, shape.alignment, kept);
  int64_t start = 0;
  int64_t dropped = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t row = start;
    for (int64_t s = 0; s < ranks; ++s) {
      const int64_t i = g * ranks + s;
      dropped += counts[i] - kept[i];
      first[i] = static_cast<int32_t>(row);
      row += kept[i];
      last[i] = static_cast<int32_t>(row);
    }
    const int64_t size = RoundUp(row - start, shape.alignment);
    results.expert_counts[g] = static_cast<int32_t>(row - start);
    results.group_sizes[g] = static_cast<int32_t>(size);
    start += size;
  }
  *results.num_dropped = static_cast<int32_t>(dropped);
}

// Step 3. Gives every assignment of `source_rank` its row and writes it into both ranks' results.
// `next` and `last` [E, R] are the cells' ranges; `next` moves to the end of what was placed.
JAX_FUSCO_HOST_DEVICE inline void PlaceAssignments(const PlanShape& shape, int64_t source_rank,
                                                   const int32_t* expert_ids,
                                                   const PlanResults* results, int32_t* next,
                                                   const int32_t* last) {
  const PlanResults& own = results[source_rank];
  // Narrow, for its division below is the loop's slowest step.
  const auto per_rank = static_cast<uint32_t>(shape.experts_per_rank());
  for (int64_t a = 0; a < shape.assignments(); ++a) {
    const int32_t expert = expert_ids[a];
    own.slot[a] = -1;
    own.slot_rank[a] = -1;
    if (expert < 0 || expert >= shape.num_experts) continue;
    const int64_t cell = expert * shape.num_ranks + source_rank;
    if (next[cell] >= last[cell]) continue;
    const int32_t row = next[cell]++;
    const auto owner = static_cast<int64_t>(static_cast<uint32_t>(expert) / per_rank);
    own.slot[a] = row;
    own.slot_rank[a] = static_cast<int32_t>(owner);
    results[owner].source_rank[row] = static_cast<int32_t>(source_rank);
    results[owner].source[row] = static_cast<int32_t>(a);
  }
}

// Step 4. Marks the padding and the tail of one receiving rank. Needs its group sizes only.
JAX_FUSCO_HOST_DEVICE inline void MarkEmptyRows(const PlanShape& shape,
                                                const PlanResults& results) {
  int64_t start = 0;
  for (int64_t g = 0; g < shape.experts_per_rank(); ++g) {
    const int64_t end = start + results.group_sizes[g];
    for (int64_t row = start + results.expert_counts[g]; row < end; ++row) {
      results.source_rank[row] = kPadding;
      results.source[row] = kPadding;
    }
    start = end;
  }
  for (int64_t row = start; row < shape.capacity; ++row) results.source_rank[row] = kTail;
  for (int64_t row = start; row < shape.capacity; ++row) results.source[row] = kTail;
}

}  // namespace jax_fusco

#endif  // JAX_FUSCO_CORE_PLAN_H_
