// The plan's programs on host teams against literal loops.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/host_team.h"
#include "tests/native/cuda/rank_cases.h"
#include "tests/native/naive_plan.h"
#include "xla_ffi/engine/cuda/plan_count.h"
#include "xla_ffi/engine/cuda/plan_finish.h"

namespace jax_fusco::testing {
namespace {

using cuda::PlanArgs;
using cuda::PlanLayout;
using cuda::Table;

// Cells of random counts cut by a block of threads.
void CellsAreTheWaterFill() {
  Random random(1);
  for (int repeat = 0; repeat < 60; ++repeat) {
    const int64_t groups = random.Int(1, 7), ranks = random.Int(1, 9);
    const int64_t largest = random.Of<int64_t>({0, 1, 5, 40, 300, INT32_MAX / 64});
    const int64_t alignment = random.Of<int64_t>({1, 2, 8, 128});
    Ints counts(static_cast<size_t>(groups * ranks));
    for (int32_t& count : counts) {
      count = static_cast<int32_t>(random.OneIn(4) ? 0 : random.Int(0, largest));
    }
    const int64_t all = PaddedRows(counts.data(), groups, ranks, largest, alignment);
    const int64_t capacity = std::max<int64_t>(
        0, random.Of<int64_t>({0, 1, all - 1, all, all + 1, random.Int(0, all), all / 2}));
    Ints kept(counts.size());
    const int64_t used = WaterFill(counts.data(), groups, ranks, capacity, alignment, kept.data());
    Ints extra(static_cast<size_t>(groups)), starts(extra), firsts(counts.size()), mine(firsts);
    Launch({1, random.OneIn(2) ? 4 : 8, 0}, [&](const HostTeam& team) {
      cuda::Cells cells{groups,       ranks,         capacity, alignment, counts.data(),
                        extra.data(), starts.data(), 0,        0};
      cuda::FindLevel(team, &cells);
      cuda::DealExtraRows(team, &cells);
      const int64_t dropped = cuda::SumOfBlock(
          team, cuda::ForEachCell(team, cells, [&](int64_t g, int64_t s, int32_t first, int32_t n) {
            firsts[static_cast<size_t>(g * ranks + s)] = first;
            mine[static_cast<size_t>(g * ranks + s)] = n;
          }));
      if (team.thread() > 0) return;
      CHECK_EQ(cells.used, used);
      int64_t lost = 0;
      for (size_t i = 0; i < counts.size(); ++i) lost += counts[i] - kept[i];
      CHECK_EQ(dropped, lost);
    });
    if (!CHECK_EQ(mine, kept)) return;
    int64_t start = 0;
    for (int64_t g = 0; g < groups; ++g) {
      int64_t row = start;
      for (int64_t s = 0; s < ranks; ++s) {
        const auto i = static_cast<size_t>(g * ranks + s);
        CHECK_EQ(firsts[i], static_cast<int32_t>(row));
        row += kept[i];
      }
      start += RoundUp(row - start, alignment);
    }
  }
}

// One rank of a plan: its results and scratch, exactly of their size.
struct Planner {
  PlanArrays results;
  Ints chain;
  Ints scratch;
  Table table{};
  PlanArgs args;

  Planner(const PlanShape& shape, const PlanLayout& layout, const Ints& ids, int64_t rank,
          bool chained)
      : results(shape, -7),
        chain(static_cast<size_t>(shape.capacity), -7),
        scratch(static_cast<size_t>(layout.size), -7) {
    args.shape = shape;
    args.expert_ids = ids.data();
    args.results = results.Results();
    chain.reserve(1);  // never null
    args.chain = chained ? chain.data() : nullptr;
    args.scratch = scratch.data();
    table.rank = static_cast<int32_t>(rank);
    table.num_ranks = static_cast<int32_t>(shape.num_ranks);
  }
};

// The launches of plan.cu, with grids for the host.
void RunCount(const PlanArgs& args, const PlanLayout& layout) {
  const Grid grid{static_cast<int>(layout.num_tiles), layout.warps * kHostLanes,
                  CountSharedBytes(args.shape, layout)};
  if (layout.num_tiles == 1) {
    Launch(grid, [&](const HostTeam& team) { CountOneTile(team, args, layout); });
    return;
  }
  Launch(grid, [&](const HostTeam& team) { CountTiles(team, args, layout); });
  Launch({2, 8, 0}, [&](const HostTeam& team) { ScanTiles(team, args, layout); });
  Launch(grid, [&](const HostTeam& team) { SortTiles(team, args, layout); });
}

void RunFinish(const PlanArgs& args, const PlanLayout& layout, const Table* table, bool small) {
  const int64_t shared = cuda::FinishSharedBytes(args.shape);
  const Grid ranks{static_cast<int>(args.shape.num_ranks), 8, shared};
  if (small) {
    Launch(ranks, [&](const HostTeam& team) { FinishSmallPlan(team, args, layout, table); });
    return;
  }
  Launch(ranks, [&](const HostTeam& team) { LayOutRanks(team, args, layout, table); });
  Launch({2, 8, shared}, [&](const HostTeam& team) { PlaceAll(team, args, layout, table); });
  if (args.chain == nullptr) return;
  Launch({2, 4, 0}, [&](const HostTeam& team) { ChainAll(team, args, layout, table); });
}

cuda::PlanBlocks RandomBlocks(Random& random) {
  cuda::PlanBlocks blocks;
  blocks.lanes = kHostLanes;
  blocks.max_warps = static_cast<int>(random.Int(1, 3));
  blocks.rounds = random.Int(1, 3);
  blocks.max_tiles = random.Of<int64_t>({1, 2, 5, 1000});
  return blocks;
}

std::vector<std::unique_ptr<Planner>> Prepare(const PlanShape& shape, const PlanLayout& layout,
                                              const std::vector<Ints>& ids, bool chained) {
  std::vector<std::unique_ptr<Planner>> ranks;
  for (size_t r = 0; r < ids.size(); ++r) {
    ranks.push_back(
        std::make_unique<Planner>(shape, layout, ids[r], static_cast<int64_t>(r), chained));
  }
  for (auto& rank : ranks) {
    for (size_t p = 0; p < ranks.size(); ++p) {
      rank->table.operand[p][0] = ranks[p]->scratch.data();
    }
  }
  return ranks;
}

void CheckPlan(const PlanShape& shape, Random& random) {
  const std::vector<Ints> ids = RandomIds(shape, random);
  const PlanLayout layout = cuda::LayOutPlan(shape, RandomBlocks(random));
  const bool small = random.OneIn(2), chained = !random.OneIn(4);
  const auto ranks = Prepare(shape, layout, ids, chained);
  AllRanks(shape.num_ranks,
           [&](int64_t r) { RunCount(ranks[static_cast<size_t>(r)]->args, layout); });
  AllRanks(shape.num_ranks, [&](int64_t r) {
    Planner& rank = *ranks[static_cast<size_t>(r)];
    RunFinish(rank.args, layout, &rank.table, small);
  });
  const std::vector<PlanArrays> expected = NaivePlan(shape, ids);
  for (size_t r = 0; r < ranks.size(); ++r) {
    CheckSamePlan(ranks[r]->results, expected[r]);
    const Ints untouched(ranks[r]->chain.size(), -7);
    CHECK_EQ(ranks[r]->chain, chained ? NaiveChain(shape, expected[r]) : untouched);
    CHECK_EQ(ranks[r]->table.failure, 0);
  }
}

void PlanIsTheLiteralLoop() {
  Random random(2);
  for (int64_t ranks : {1, 2, 4, 8}) {
    for (int repeat = 0; repeat < 24 / ranks; ++repeat) {
      PlanShape shape = RandomShape(random, ranks);
      shape.tokens = std::min<int64_t>(shape.tokens, 80 / ranks);
      CheckPlan(shape, random);
    }
  }
}

// Shapes that a random one seldom meets.
void PlanAtTheEdges() {
  Random random(3);
  const PlanShape shapes[] = {
      {1, 0, 1, 1, 0, 1},                            // nothing at all
      {2, 3, 0, 2, 4, 8},                            // no experts of a token
      {2, 3, 2, 2, 0, 1},                            // no rows, one expert of a rank
      {2, 1, 6, 2, 12, 1},                           // every token many times in a buffer
      {2, 4, 2, 96, 40, 1},                          // more experts than threads
      {1, 40, 4, 40, 3000, 64}, {8, 1, 1, 8, 8, 1},  // a decode step
  };
  for (const PlanShape& shape : shapes) {
    for (int repeat = 0; repeat < 3; ++repeat) CheckPlan(shape, random);
  }
}

// As many ranks as there may be; each finds the others' lists.
void PlanOfManyRanks() {
  Random random(5);
  const PlanShape shape{cuda::kMaxRanks, 1, 2, cuda::kMaxRanks, 4, 1};
  const std::vector<Ints> ids = RandomIds(shape, random);
  const PlanLayout layout = cuda::LayOutPlan(shape, RandomBlocks(random));
  const auto ranks = Prepare(shape, layout, ids, true);
  for (const auto& rank : ranks) RunCount(rank->args, layout);
  const std::vector<PlanArrays> expected = NaivePlan(shape, ids);
  for (size_t r : {size_t{0}, ranks.size() - 1}) {
    RunFinish(ranks[r]->args, layout, &ranks[r]->table, r == 0);
    CheckSamePlan(ranks[r]->results, expected[r]);
    CHECK_EQ(ranks[r]->chain, NaiveChain(shape, expected[r]));
  }
}

// Where the handshake failed nothing of the peers is touched.
void PlanWithoutPeers() {
  const PlanShape shape{2, 5, 2, 4, 20, 1};
  Random random(4);
  const std::vector<Ints> ids = RandomIds(shape, random);
  const PlanLayout layout = cuda::LayOutPlan(shape);
  for (bool small : {false, true}) {
    Planner rank(shape, layout, ids[0], 0, true);
    rank.table.failure = static_cast<int32_t>(cuda::Failure::kTimeout);
    RunCount(rank.args, layout);
    RunFinish(rank.args, layout, &rank.table, small);
    CHECK_EQ(rank.results.source, Ints(20, -7));
    CHECK_EQ(rank.results.slot_rank, Ints(10, -7));
  }
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"CellsAreTheWaterFill", CellsAreTheWaterFill},
                   {"PlanIsTheLiteralLoop", PlanIsTheLiteralLoop},
                   {"PlanAtTheEdges", PlanAtTheEdges},
                   {"PlanOfManyRanks", PlanOfManyRanks},
                   {"PlanWithoutPeers", PlanWithoutPeers}});
}
