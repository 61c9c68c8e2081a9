// A plan by literal loops: what docs/architecture.md says, row by row, to compare with.
#ifndef JAX_FUSCO_TESTS_NATIVE_NAIVE_PLAN_H_
#define JAX_FUSCO_TESTS_NATIVE_NAIVE_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "tests/native/check.h"
#include "xla_ffi/core/plan.h"

namespace jax_fusco::testing {

using Ints = std::vector<int32_t>;

// One rank's results, each of exactly its size, so that the sanitizers see what lies outside.
struct PlanArrays {
  Ints group_sizes, expert_counts, slot, slot_rank, source_rank, source, num_dropped, num_invalid;

  explicit PlanArrays(const PlanShape& shape, int32_t value = 0)
      : group_sizes(static_cast<size_t>(shape.experts_per_rank()), value),
        expert_counts(group_sizes),
        slot(static_cast<size_t>(shape.assignments()), value),
        slot_rank(slot),
        source_rank(static_cast<size_t>(shape.capacity), value),
        source(source_rank),
        num_dropped(1, value),
        num_invalid(1, value) {}

  PlanResults Results() {
    return {group_sizes.data(), expert_counts.data(), slot.data(),        slot_rank.data(),
            source_rank.data(), source.data(),        num_dropped.data(), num_invalid.data()};
  }
};

inline void CheckSamePlan(const PlanArrays& a, const PlanArrays& b) {
  CHECK_EQ(a.group_sizes, b.group_sizes);
  CHECK_EQ(a.expert_counts, b.expert_counts);
  CHECK_EQ(a.slot, b.slot);
  CHECK_EQ(a.slot_rank, b.slot_rank);
  CHECK_EQ(a.source_rank, b.source_rank);
  CHECK_EQ(a.source, b.source);
  CHECK_EQ(a.num_dropped, b.num_dropped);
  CHECK_EQ(a.num_invalid, b.num_invalid);
}

// Rows of the groups, each padded to the alignment one row at a time.
inline int64_t NaivePaddedRows(const std::vector<Ints>& cells, int64_t alignment) {
  int64_t total = 0;
  for (const Ints& group : cells) {
    int64_t rows = 0;
    for (int32_t cell : group) rows += cell;
    while (rows % alignment != 0) ++rows;
    total += rows;
  }
  return total;
}

// `counts` and the result are [group][source rank].
inline std::vector<Ints> NaiveWaterFill(const std::vector<Ints>& counts, int64_t capacity,
                                        int64_t alignment) {
  int32_t largest = 0;
  for (const Ints& group : counts) {
    for (int32_t count : group) largest = std::max(largest, count);
  }
  std::vector<Ints> kept;
  for (int32_t level = largest;; --level) {
    kept = counts;
    for (Ints& group : kept) {
      for (int32_t& cell : group) cell = std::min(cell, level);
    }
    if (level == 0 || NaivePaddedRows(kept, alignment) <= capacity) break;
  }
  for (size_t g = 0; g < kept.size(); ++g) {
    for (size_t s = 0; s < kept[g].size(); ++s) {
      if (kept[g][s] == counts[g][s]) continue;
      ++kept[g][s];
      if (NaivePaddedRows(kept, alignment) > capacity) --kept[g][s];
    }
  }
  return kept;
}

// The plans of all ranks. `ids` are [source rank][assignment].
inline std::vector<PlanArrays> NaivePlan(const PlanShape& shape, const std::vector<Ints>& ids) {
  std::vector<PlanArrays> plans(ids.size(), PlanArrays(shape, -1));
  for (size_t s = 0; s < ids.size(); ++s) {
    plans[s].num_invalid[0] = 0;
    for (int32_t id : ids[s]) plans[s].num_invalid[0] += id < -1 || id >= shape.num_experts;
  }
  for (size_t owner = 0; owner < ids.size(); ++owner) {
    PlanArrays& plan = plans[owner];
    // The assignments of each cell, then those that are kept.
    std::vector<std::vector<Ints>> cells;
    std::vector<Ints> counts;
    for (int64_t g = 0; g < shape.experts_per_rank(); ++g) {
      const int64_t expert = static_cast<int64_t>(owner) * shape.experts_per_rank() + g;
      cells.emplace_back(ids.size());
      counts.emplace_back();
      for (size_t s = 0; s < ids.size(); ++s) {
        for (size_t a = 0; a < ids[s].size(); ++a) {
          if (ids[s][a] == expert) cells.back()[s].push_back(static_cast<int32_t>(a));
        }
        counts.back().push_back(static_cast<int32_t>(cells.back()[s].size()));
      }
    }
    const std::vector<Ints> kept = NaiveWaterFill(counts, shape.capacity, shape.alignment);
    Ints source_rank, source;
    plan.num_dropped[0] = 0;
    for (size_t g = 0; g < cells.size(); ++g) {
      const size_t start = source.size();
      for (size_t s = 0; s < ids.size(); ++s) {
        for (size_t i = 0; i < static_cast<size_t>(kept[g][s]); ++i) {
          const auto a = static_cast<size_t>(cells[g][s][i]);
          plans[s].slot[a] = static_cast<int32_t>(source.size());
          plans[s].slot_rank[a] = static_cast<int32_t>(owner);
          source_rank.push_back(static_cast<int32_t>(s));
          source.push_back(static_cast<int32_t>(a));
        }
        plan.num_dropped[0] += counts[g][s] - kept[g][s];
      }
      plan.expert_counts[g] = static_cast<int32_t>(source.size() - start);
      while ((source.size() - start) % static_cast<size_t>(shape.alignment) != 0) {
        source_rank.push_back(-1);
        source.push_back(-1);
      }
      plan.group_sizes[g] = static_cast<int32_t>(source.size() - start);
    }
    CHECK(static_cast<int64_t>(source.size()) <= shape.capacity);
    source_rank.resize(static_cast<size_t>(shape.capacity), -2);
    source.resize(static_cast<size_t>(shape.capacity), -2);
    plan.source_rank = source_rank;
    plan.source = source;
  }
  return plans;
}

// Ids that are skewed, doubled, missing (-1) and out of range.
inline std::vector<Ints> RandomIds(const PlanShape& shape, Random& random) {
  std::vector<Ints> ids(static_cast<size_t>(shape.num_ranks));
  const int64_t last =
      random.OneIn(2) ? shape.num_experts - 1 : random.Int(0, shape.num_experts - 1);
  for (Ints& of_rank : ids) {
    for (int64_t a = 0; a < shape.assignments(); ++a) {
      int64_t id = random.Int(0, last);
      if (a > 0 && random.OneIn(8)) id = of_rank.back();
      if (random.OneIn(16)) id = -1;
      if (random.OneIn(32)) id = random.Of<int64_t>({-2, shape.num_experts, INT32_MIN, INT32_MAX});
      of_rank.push_back(static_cast<int32_t>(id));
    }
  }
  return ids;
}

inline PlanShape RandomShape(Random& random, int64_t num_ranks) {
  PlanShape shape;
  shape.num_ranks = num_ranks;
  shape.tokens = random.Of<int64_t>({0, 1, 3, 16, 50});
  shape.k = random.Int(1, 4);
  shape.num_experts = num_ranks * random.Int(1, 4);
  shape.alignment = random.Of<int64_t>({1, 1, 2, 8, 128});
  const int64_t enough = num_ranks * shape.assignments() + shape.num_experts * shape.alignment;
  shape.capacity = random.OneIn(8) ? 0 : random.Int(1, random.OneIn(2) ? enough : enough / 4 + 1);
  return shape;
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_NAIVE_PLAN_H_
