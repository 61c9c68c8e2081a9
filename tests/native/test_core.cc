// Water filling and the arithmetic of plans against literal loops.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/naive_plan.h"
#include "xla_ffi/core/plan.h"
#include "xla_ffi/core/status.h"
#include "xla_ffi/core/water_fill.h"

namespace jax_fusco::testing {
namespace {

Ints Flat(const std::vector<Ints>& cells) {
  Ints flat;
  for (const Ints& group : cells) flat.insert(flat.end(), group.begin(), group.end());
  return flat;
}

struct Filled {
  Ints kept;
  int64_t used;
};

Filled Fill(const std::vector<Ints>& counts, int64_t capacity, int64_t alignment) {
  const Ints flat = Flat(counts);
  Filled filled{Ints(flat.size(), -7), 0};
  const auto groups = static_cast<int64_t>(counts.size());
  const int64_t ranks = static_cast<int64_t>(flat.size()) / std::max<int64_t>(1, groups);
  filled.used = WaterFill(flat.data(), groups, ranks, capacity, alignment, filled.kept.data());
  return filled;
}

std::vector<Ints> RandomCounts(Random& random) {
  std::vector<Ints> counts(static_cast<size_t>(random.Int(1, 6)),
                           Ints(static_cast<size_t>(random.Int(1, 9))));
  const int64_t largest = random.Of<int64_t>({0, 1, 5, 40, 300});
  for (Ints& group : counts) {
    const bool empty = random.OneIn(6);
    for (int32_t& count : group) {
      count =
          static_cast<int32_t>(empty ? 0 : random.Int(0, random.OneIn(5) ? largest : largest / 4));
    }
  }
  return counts;
}

void WaterFillIsTheLiteralLoop() {
  Random random(1);
  for (int64_t alignment : {1, 8, 128}) {
    for (int repeat = 0; repeat < 400; ++repeat) {
      const std::vector<Ints> counts = RandomCounts(random);
      const int64_t all = NaivePaddedRows(counts, alignment);
      const int64_t capacity = std::max<int64_t>(
          0, random.Of<int64_t>({0, 1, all - 1, all, all + 1, random.Int(0, all)}));
      const Filled filled = Fill(counts, capacity, alignment);
      const std::vector<Ints> kept = NaiveWaterFill(counts, capacity, alignment);
      if (!CHECK_EQ(filled.kept, Flat(kept))) return;
      CHECK_EQ(filled.used, NaivePaddedRows(kept, alignment));
    }
  }
}

// What users are promised, whatever the way to compute it.
void WaterFillIsFair() {
  Random random(2);
  for (int repeat = 0; repeat < 1000; ++repeat) {
    const std::vector<Ints> counts = RandomCounts(random);
    const int64_t alignment = random.Of<int64_t>({1, 8, 128});
    const int64_t all = NaivePaddedRows(counts, alignment);
    const int64_t capacity = random.Int(0, all + 2);
    const Filled filled = Fill(counts, capacity, alignment);
    const Ints flat = Flat(counts);
    CHECK(filled.used <= capacity);
    if (all <= capacity) CHECK_EQ(filled.kept, flat);
    const int32_t most = *std::max_element(filled.kept.begin(), filled.kept.end());
    int64_t dropped = 0;
    for (size_t i = 0; i < flat.size(); ++i) {
      CHECK(filled.kept[i] >= 0 && filled.kept[i] <= flat[i]);
      dropped += flat[i] - filled.kept[i];
      // A cut cell has as many rows as any other, but for the one row of the second pass.
      if (filled.kept[i] < flat[i]) CHECK(most <= filled.kept[i] + 1);
    }
    if (dropped > 0) {
      // A row that fits without a new block of padding was not left empty.
      const int64_t ranks = static_cast<int64_t>(counts[0].size());
      int64_t groups_with_room = 0;
      for (size_t g = 0; g < counts.size(); ++g) {
        int64_t rows = 0;
        bool may_grow = false;
        for (int64_t s = 0; s < ranks; ++s) {
          const size_t i = g * static_cast<size_t>(ranks) + static_cast<size_t>(s);
          rows += filled.kept[i];
          may_grow |= filled.kept[i] < flat[i] && filled.kept[i] < most;
        }
        groups_with_room += may_grow && rows % alignment != 0;
      }
      CHECK_EQ(groups_with_room, 0);
    }
  }
}

void WaterFillByHand() {
  CHECK_EQ(Fill({{5, 5}}, 10, 1).kept, (Ints{5, 5}));
  CHECK_EQ(Fill({{5, 5}}, 9, 1).kept, (Ints{5, 4}));    // level 4, then one more to the first
  CHECK_EQ(Fill({{1, 9}}, 6, 1).kept, (Ints{1, 5}));    // the small cell is spared
  CHECK_EQ(Fill({{3}, {3}}, 8, 8).kept, (Ints{1, 0}));  // level 0: one block for two groups
  CHECK_EQ(Fill({{9}, {9}}, 17, 8).kept, (Ints{8, 8}));
  CHECK_EQ(Fill({{7, 2}, {0, 1}}, 0, 1).kept, (Ints{0, 0, 0, 0}));
  CHECK_EQ(Fill({{0, 0}}, 0, 128).used, int64_t{0});
  CHECK_EQ(Fill({{INT32_MAX}}, INT32_MAX, 1).kept, (Ints{INT32_MAX}));
  CHECK_EQ(Fill({{INT32_MAX, INT32_MAX}}, INT32_MAX, 1).kept, (Ints{1 << 30, (1 << 30) - 1}));
}

// The four steps, one rank after the other.
std::vector<PlanArrays> MakePlans(const PlanShape& shape, const std::vector<Ints>& ids) {
  std::vector<PlanArrays> plans(ids.size(), PlanArrays(shape, -7));
  const auto cells = static_cast<size_t>(shape.num_experts * shape.num_ranks);
  Ints counts(cells, -7), next(cells, -7), last(cells, -7);
  std::vector<PlanResults> results;
  for (size_t r = 0; r < ids.size(); ++r) {
    results.push_back(plans[r].Results());
    *results[r].num_invalid =
        CountAssignments(shape, static_cast<int64_t>(r), ids[r].data(), counts.data());
  }
  for (size_t r = 0; r < ids.size(); ++r) {
    const int64_t at = static_cast<int64_t>(r) * shape.experts_per_rank() * shape.num_ranks;
    LayOutBuffer(shape, counts.data() + at, results[r], next.data() + at, last.data() + at);
    MarkEmptyRows(shape, results[r]);
  }
  for (size_t r = 0; r < ids.size(); ++r) {
    PlaceAssignments(shape, static_cast<int64_t>(r), ids[r].data(), results.data(), next.data(),
                     last.data());
  }
  return plans;
}

void PlanIsTheLiteralLoop() {
  Random random(3);
  for (int64_t ranks : {1, 2, 4, 8}) {
    for (int repeat = 0; repeat < 150; ++repeat) {
      const PlanShape shape = RandomShape(random, ranks);
      const std::vector<Ints> ids = RandomIds(shape, random);
      const std::vector<PlanArrays> plans = MakePlans(shape, ids);
      const std::vector<PlanArrays> expected = NaivePlan(shape, ids);
      for (size_t r = 0; r < ids.size(); ++r) CheckSamePlan(plans[r], expected[r]);
    }
  }
}

void PlanByHand() {
  // Two ranks of one expert each, three tokens of two experts, groups in blocks of four.
  PlanShape shape;
  shape.num_ranks = 2;
  shape.tokens = 3;
  shape.k = 2;
  shape.num_experts = 2;
  shape.capacity = 9;
  shape.alignment = 4;
  const std::vector<PlanArrays> plans =
      MakePlans(shape, {{0, 1, 0, -1, 1, 1}, {0, 0, 5, 1, -2, 0}});
  CHECK_EQ(plans[0].group_sizes, (Ints{8}));
  CHECK_EQ(plans[0].expert_counts, (Ints{5}));
  CHECK_EQ(plans[0].source_rank, (Ints{0, 0, 1, 1, 1, -1, -1, -1, -2}));
  CHECK_EQ(plans[0].source, (Ints{0, 2, 0, 1, 5, -1, -1, -1, -2}));
  CHECK_EQ(plans[0].slot, (Ints{0, 0, 1, -1, 1, 2}));
  CHECK_EQ(plans[0].slot_rank, (Ints{0, 1, 0, -1, 1, 1}));
  CHECK_EQ(plans[0].num_invalid, (Ints{0}));
  CHECK_EQ(plans[1].source_rank, (Ints{0, 0, 0, 1, -2, -2, -2, -2, -2}));
  CHECK_EQ(plans[1].source, (Ints{1, 4, 5, 3, -2, -2, -2, -2, -2}));
  CHECK_EQ(plans[1].slot, (Ints{2, 3, -1, 3, -1, 4}));
  CHECK_EQ(plans[1].num_invalid, (Ints{2}));
  CHECK_EQ(plans[1].num_dropped, (Ints{0}));
}

void StatusAndConcat() {
  CHECK(Status::Ok().ok() && Status().ok());
  const Status status = Status::InvalidArgument(Concat("a ", std::string("b "), int64_t{-3}, "."));
  CHECK(!status.ok() && status.code == Code::kInvalidArgument);
  CHECK_EQ(status.message, std::string("a b -3."));
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"WaterFillByHand", WaterFillByHand},
                   {"WaterFillIsTheLiteralLoop", WaterFillIsTheLiteralLoop},
                   {"WaterFillIsFair", WaterFillIsFair},
                   {"PlanByHand", PlanByHand},
                   {"PlanIsTheLiteralLoop", PlanIsTheLiteralLoop},
                   {"StatusAndConcat", StatusAndConcat}});
}
