// reduce_rows and gather_rows_weighted on host teams against literal loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/host_team.h"
#include "tests/native/cuda/rank_cases.h"
#include "tests/native/cuda/sums_cases.h"
#include "xla_ffi/engine/cuda/gather_rows_weighted.h"
#include "xla_ffi/engine/cuda/reduce_rows.h"

namespace jax_fusco::testing {
namespace {

using cuda::GatherRowsWeightedArgs;
using cuda::ReduceRowsArgs;

// ---- reduce_rows ----

template <int kTerms, int kUnits>
void RunReduce(const ReduceRowsArgs& args, cuda::Table* table, int64_t parts) {
  cuda::WithFloat(args.y_type, [&](auto y) {
    cuda::WithFloat(args.out_type, [&](auto out) {
      Launch({2, 8, 0}, [&](const HostTeam& team) {
        cuda::ReduceRows<decltype(y), decltype(out), kTerms, kUnits>(team, args, table, parts);
      });
    });
  });
}

void Run(Reduce* reduce, int64_t parts, bool wide) {
  AllRanks(reduce->ranks.shape.num_ranks, [&](int64_t rank) {
    const auto r = static_cast<size_t>(rank);
    if (wide) {
      RunReduce<2, 2>(reduce->Args(r), &reduce->ranks.tables[r], parts);
    } else {
      RunReduce<4, 1>(reduce->Args(r), &reduce->ranks.tables[r], parts);
    }
  });
}

void ReduceIsTheOrderedSum() {
  Random random(1);
  for (const Types& types : AllTypes()) {
    for (int64_t length : {1, 8, 24, 40, 72}) {
      const int64_t ranks = random.Of<int64_t>({1, 2, 2, 4, 8});
      PlanShape shape = SmallShape(random, ranks);
      shape.tokens = std::min<int64_t>(shape.tokens, 16);
      shape.k = random.Int(0, 6);
      Reduce reduce(shape, length, types, random.OneIn(3), random);
      Run(&reduce, random.Int(1, 3), random.OneIn(2));
      reduce.Check();
      reduce.ranks.CheckNoFailure();
    }
  }
}

void BadSlots() {
  Random random(2);
  const struct {
    int32_t rank, slot;
  } bad[] = {{0, 30}, {1, INT32_MAX}, {2, 0}, {-1, 0}, {INT32_MIN, 3}, {INT32_MAX, 3}};
  for (const auto& entry : bad) {
    Reduce reduce(TwoRanks(), 16, {Float::kBf16, Float::kF32}, false, random);
    reduce.ranks.plans[1].slot_rank[5] = entry.rank;
    reduce.ranks.plans[1].slot[5] = entry.slot;
    Run(&reduce, 1, false);
    CheckBadIndex(reduce.ranks.tables[1], 1, entry.rank, entry.slot);
    CHECK_EQ(reduce.ranks.tables[0].failure, 0);
  }
}

// ---- gather_rows_weighted ----

void Run(Weighted* weighted, bool chained) {
  AllRanks(weighted->ranks.shape.num_ranks, [&](int64_t rank) {
    const auto r = static_cast<size_t>(rank);
    const GatherRowsWeightedArgs args = weighted->Args(r, chained);
    cuda::WithFloat(args.g_type, [&](auto g_element) {
      cuda::WithFloat(args.y_type, [&](auto y_element) {
        Launch({2, 8, 0}, [&](const HostTeam& team) {
          cuda::GatherRowsWeighted<decltype(g_element), decltype(y_element)>(
              team, args, &weighted->ranks.tables[r]);
        });
      });
    });
  });
}

void WeightedIsTheLiteralLoop() {
  Random random(3);
  for (const Types& types : AllTypes()) {
    for (int64_t length : {1, 8, 40, 72}) {
      const int64_t ranks = random.Of<int64_t>({1, 2, 2, 4, 8});
      PlanShape shape = SmallShape(random, ranks);
      shape.tokens = std::min<int64_t>(shape.tokens, 16);
      shape.k = random.Int(1, 7);  // longer chains than a warp has lanes
      Weighted weighted(shape, length, types, random);
      Run(&weighted, false);
      weighted.Check();
      std::vector<std::vector<char>> before;
      for (const Memory& dots : weighted.dots) before.push_back(dots.Copy());
      for (const Memory& dy : weighted.dy) std::fill_n(dy.at(), dy.Copy().size(), 'x');
      Run(&weighted, true);
      weighted.Check();
      for (size_t r = 0; r < before.size(); ++r) CHECK_EQ(weighted.dots[r].Copy(), before[r]);
      weighted.ranks.CheckNoFailure();
    }
  }
}

void BadSources() {
  Random random(4);
  const struct {
    int32_t rank, source;
  } bad[] = {{0, 12}, {1, INT32_MAX}, {2, 0}, {-1, 0}, {INT32_MIN, 3}, {INT32_MAX, 3}};
  for (const bool chained : {false, true}) {
    for (const auto& entry : bad) {
      Weighted weighted(TwoRanks(), 16, {Float::kF32, Float::kBf16}, random);
      weighted.ranks.plans[1].source_rank[7] = entry.rank;
      weighted.ranks.plans[1].source[7] = entry.source;
      Run(&weighted, chained);
      CHECK_EQ(weighted.ranks.tables[1].failure, static_cast<int32_t>(cuda::Failure::kBadIndex));
      CHECK_EQ(weighted.ranks.tables[0].failure, 0);
    }
  }
}

void SumsWithoutPeers() {
  Random random(5);
  Reduce reduce(TwoRanks(), 16, {Float::kF32, Float::kF32}, false, random);
  Weighted weighted(TwoRanks(), 16, {Float::kF32, Float::kF32}, random);
  for (Ranks* ranks : {&reduce.ranks, &weighted.ranks}) {
    for (cuda::Table& table : ranks->tables) {
      table = {};
      table.failure = static_cast<int32_t>(cuda::Failure::kMismatch);
    }
  }
  const std::vector<char> out = reduce.out[0].Copy(), dy = weighted.dy[1].Copy();
  Run(&reduce, 1, true);
  Run(&weighted, true);
  CHECK_EQ(reduce.out[0].Copy(), out);
  CHECK_EQ(weighted.dy[1].Copy(), dy);
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"ReduceIsTheOrderedSum", ReduceIsTheOrderedSum},
                   {"BadSlots", BadSlots},
                   {"WeightedIsTheLiteralLoop", WeightedIsTheLiteralLoop},
                   {"BadSources", BadSources},
                   {"SumsWithoutPeers", SumsWithoutPeers}});
}
