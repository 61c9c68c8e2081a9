// gather_rows on host teams, by words and in bulk, against literal loops.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/gather_case.h"
#include "tests/native/cuda/host_bulk.h"
#include "tests/native/cuda/host_team.h"
#include "tests/native/cuda/rank_cases.h"
#include "xla_ffi/engine/cuda/gather_rows.h"
#include "xla_ffi/engine/cuda/gather_rows_bulk.h"

namespace jax_fusco::testing {
namespace {

using cuda::GatherRowsArgs;
using cuda::Table;

void RunByWords(const GatherRowsArgs& args, Table* table) {
  cuda::WithWord(args.row_bytes, args.out, [&](auto word) {
    using Word = decltype(word);
    const cuda::WordShape shape =
        cuda::ShapeWords(args.row_bytes / static_cast<int64_t>(sizeof(Word)), HostTeam::kLanes);
    Launch({2, 8, 0}, [&](const HostTeam& team) {
      if (shape.is_long) {
        cuda::GatherRowsByWords<Word, 1, 4>(team, args, table, shape.width);
      } else {
        cuda::GatherRowsByWords<Word, 4, 1>(team, args, table, shape.width);
      }
    });
  });
}

void RunInBulk(const GatherRowsArgs& args, Table* table, int64_t warp_bytes) {
  const cuda::BulkShape shape = cuda::ShapeBulk(args.row_bytes, HostTeam::kLanes, warp_bytes);
  CHECK(shape.lanes > 0);
  Launch({2, 8, cuda::BulkSharedBytes(shape, 2)},
         [&](const HostTeam& team) { cuda::GatherRowsInBulk<HostBulk>(team, args, table, shape); });
}

void Run(Gather* gather) {
  AllRanks(gather->ranks.shape.num_ranks, [&](int64_t rank) {
    const auto r = static_cast<size_t>(rank);
    if (gather->way.bulk) {
      RunInBulk(gather->Args(r), &gather->ranks.tables[r], 4 * 2048 * (1 + rank % 3));
    } else {
      RunByWords(gather->Args(r), &gather->ranks.tables[r]);
    }
  });
}

void GatherIsTheLiteralLoop() {
  Random random(1);
  const Way ways[] = {
      {1, false, 0, 0},   {2, false, 0, 2},   {3, false, 1, 0},    {4, false, 0, 0},
      {4, false, 4, 1},   {8, false, 8, 8},   {12, false, 0, 4},   {16, false, 0, 0},
      {16, false, 5, 0},  {40, false, 0, 0},  {48, false, 0, 0},   {80, false, 1, 0},
      {100, false, 0, 0}, {272, false, 0, 0}, {1041, false, 0, 0}, {5762, false, 2, 0},
      {1024, true, 0, 0}, {1040, true, 0, 0}, {2048, true, 0, 0},  {2064, true, 0, 0},
      {5760, true, 0, 0}, {4112, true, 3, 0},
  };
  for (const Way& way : ways) {
    for (int64_t ranks : {1, 2, 4, 8}) {
      Gather gather(SmallShape(random, ranks), way, random);
      Run(&gather);
      gather.Check();
      gather.ranks.CheckNoFailure();
    }
  }
}

// Rows that are left as they are, most of them and anywhere: several calls fill one result.
void SlicesFillOneResult() {
  constexpr int64_t kSlices = 9;
  Random random(6);
  const Way ways[] = {{3, false, 1, 0},    {16, false, 0, 0},  {272, false, 0, 0},
                      {1041, false, 0, 0}, {1024, true, 0, 0}, {6160, true, 3, 0}};
  for (const Way& way : ways) {
    for (int64_t ranks : {1, 2, 4}) {
      Gather gather(Shape(ranks, 60, 3, 190), way, random);
      gather.chained = gather.zero_tail = false;
      const auto plans = gather.ranks.plans;
      std::vector<std::vector<int64_t>> slice_of(gather.ranks.size());
      for (auto& slices : slice_of) {
        for (int64_t m = 0; m < 190; ++m) slices.push_back(random.Int(0, kSlices));
      }
      for (int64_t slice = 0; slice <= kSlices; ++slice) {
        for (size_t r = 0; r < plans.size(); ++r) {
          Ints& source = gather.ranks.plans[r].source;
          for (size_t m = 0; m < source.size(); ++m) {
            source[m] = slice_of[r][m] == slice ? plans[r].source[m] : -2;
          }
        }
        if (slice < kSlices) Run(&gather);  // the last is never moved
      }
      for (size_t r = 0; r < plans.size(); ++r) {
        Ints& source = gather.ranks.plans[r].source;
        for (size_t m = 0; m < source.size(); ++m) {
          source[m] = slice_of[r][m] < kSlices ? plans[r].source[m] : -2;
        }
      }
      gather.Check();
      gather.ranks.CheckNoFailure();
    }
  }
}

// Many more pieces than lanes: every stage is used again and again.
void BulkRingsTurn() {
  Random random(2);
  for (int64_t row_bytes : {1024, 6160}) {
    for (int repeat = 0; repeat < 3; ++repeat) {
      Gather gather(Shape(2, 60, 3, 190), {row_bytes, true, 0, 0}, random);
      Run(&gather);
      gather.Check();
    }
    // Long chains: most rows move nothing by themselves, many in succession.
    for (const int64_t capacity : {480, 301}) {
      Gather gather(Shape(1, 60, 8, capacity), {row_bytes, true, 0, 0}, random);
      gather.chained = gather.fanned = true;
      Run(&gather);
      gather.Check();
      gather.ranks.CheckNoFailure();
    }
  }
}

// Indices that do not exist: the row is cleared, nothing else is touched, the table tells.
void BadSources() {
  Random random(3);
  const struct {
    int32_t rank, source;
  } bad[] = {{0, 12}, {1, INT32_MAX}, {2, 0}, {-1, 0}, {INT32_MIN, 3}, {INT32_MAX, 3}};
  for (const bool bulk : {false, true}) {
    for (const auto& entry : bad) {
      Gather gather(Shape(2, 6, 2, 30), {bulk ? 1024 : 24, bulk, 0, 0}, random);
      gather.fanned = true;
      gather.chained = false;
      gather.ranks.plans[1].source_rank[7] = entry.rank;
      gather.ranks.plans[1].source[7] = entry.source;
      Run(&gather);
      CheckBadIndex(gather.ranks.tables[1], 1, entry.rank, entry.source);
      CHECK_EQ(gather.ranks.tables[0].failure, 0);
      for (int64_t i = 0; i < gather.way.row_bytes; ++i) {
        CHECK_EQ(gather.out[1].at(7 * gather.way.row_bytes + i)[0], '\0');
      }
    }
  }
}

// Chains that go back, round, or out of the buffer.
void BadChains() {
  Random random(4);
  for (const bool bulk : {false, true}) {
    for (const int32_t link : {INT32_MIN, -1, -5, -32, 31, INT32_MAX}) {
      Gather gather(Shape(2, 6, 2, 30), {bulk ? 1024 : 24, bulk, 0, 0}, random);
      gather.fanned = gather.chained = true;
      std::fill(gather.ranks.plans[0].source.begin(), gather.ranks.plans[0].source.end(), 1);
      std::fill(gather.ranks.plans[0].source_rank.begin(), gather.ranks.plans[0].source_rank.end(),
                1);
      Ints& chain = gather.ranks.chains[0];
      std::fill(chain.begin(), chain.end(), -31);
      chain[0] = link < 0 ? 5 : link;
      if (link < 0) chain[5] = link;
      Run(&gather);
      CHECK_EQ(gather.ranks.tables[0].failure, static_cast<int32_t>(cuda::Failure::kBadIndex));
    }
  }
}

// Where the handshake failed nothing is read or written.
void GatherWithoutPeers() {
  Random random(5);
  for (const bool bulk : {false, true}) {
    Gather gather(Shape(1, 6, 2, 30), {bulk ? 1024 : 24, bulk, 0, 0}, random);
    gather.ranks.tables[0] = {};
    gather.ranks.tables[0].failure = static_cast<int32_t>(cuda::Failure::kPeerFailed);
    Run(&gather);
    CHECK_EQ(gather.out[0].Copy(), std::vector<char>(gather.out[0].Copy().size(), 'x'));
  }
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"GatherIsTheLiteralLoop", GatherIsTheLiteralLoop},
                   {"SlicesFillOneResult", SlicesFillOneResult},
                   {"BulkRingsTurn", BulkRingsTurn},
                   {"BadSources", BadSources},
                   {"BadChains", BadChains},
                   {"GatherWithoutPeers", GatherWithoutPeers}});
}
