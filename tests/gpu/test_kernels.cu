// Every launcher of kernels.h on one GPU, with 1, 2, 4 and 8 virtual ranks that meet in Enter and
// Leave, against the literal loops of the host's tests. `--small`: few and small cases, several
// ranks one after the other, for tools that watch each access; then names of tests, else all.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tests/gpu/gpu_cases.h"
#include "tests/gpu/gpu_memory.h"
#include "tests/gpu/gpu_ranks.h"
#include "tests/gpu/whole_shuffles.h"
#include "tests/native/check.h"
#include "tests/native/cuda/gather_case.h"
#include "tests/native/cuda/ragged_case.h"
#include "tests/native/cuda/rank_cases.h"
#include "tests/native/cuda/sums_cases.h"

namespace jax_fusco::testing {
namespace {

void PlanIsTheLiteralLoop() {
  Random random(1);
  for (int64_t ranks : Counts()) {
    for (int repeat = 0; repeat < (small ? 4 : 40); ++repeat) {
      const PlanShape shape = RandomShape(random, ranks);
      CheckPlan(shape, RandomIds(shape, random), !random.OneIn(4));
    }
  }
  const PlanShape shapes[] = {
      {1, 0, 1, 1, 0, 1},      {2, 3, 0, 2, 4, 8},        {2, 3, 2, 2, 0, 1},
      {2, 1, 6, 2, 12, 1},     {2, 4, 2, 96, 40, 1},      {1, 40, 4, 40, 3000, 64},
      {1, 5, 2, 2048, 200, 8}, {2, 700, 6, 2048, 900, 1},
  };
  for (const PlanShape& shape : shapes) CheckPlan(shape, RandomIds(shape, random), true);
}

// One token or some for each rank, and more rows than blocks have threads.
void PlansOfAllSizes() {
  Random random(2);
  const std::vector<int64_t> tokens =
      small ? std::vector<int64_t>{1, 33} : std::vector<int64_t>{1, 8, 64, 128, 1025, 4096};
  for (int64_t ranks : Counts()) {
    for (int64_t t : tokens) {
      const int64_t fair = t * 8 + 128 / ranks;
      for (const int64_t alignment : {1, 8, 128}) {
        if (t > 1000 && alignment != 128) continue;
        PlanShape shape{ranks, t, 8, 128, 0, alignment};
        // Enough for all; enough if routing is even; far too little.
        for (const int64_t capacity : {ranks * t * 8 + 128 * alignment, fair, fair / 3}) {
          shape.capacity = capacity;
          if (small && random.OneIn(2)) continue;
          const bool skew = random.OneIn(2);
          CheckPlan(shape, DistinctIds(shape, skew, random), true);
        }
        shape.capacity = fair;
        CheckPlan(shape, RandomIds(shape, random), false);
      }
    }
  }
}

void Check(const PlanShape& shape, const Way& way, Random& random) {
  Gather gather(shape, way, random);
  Run(&gather);
  gather.Check();
  gather.ranks.CheckNoFailure();
}

PlanShape MediumShape(Random& random, int64_t ranks) {
  PlanShape shape = RandomShape(random, ranks);
  shape.alignment = std::min<int64_t>(shape.alignment, 32);
  shape.capacity = std::min<int64_t>(shape.capacity, 600);
  return shape;
}

void GatherIsTheLiteralLoop() {
  Random random(3);
  for (int64_t ranks : Counts()) {
    // Rows of 1, 2 and 4 bytes for each of the usual features, and others.
    for (int64_t bytes :
         {1,    2,    3,    4,    8,    12,   16,   40,   100,  272,   1008,  1024,  1040,
          1041, 2048, 2064, 2880, 4096, 5760, 5762, 7168, 8192, 11520, 14336, 16384, 28672}) {
      if (small && bytes > 6000) continue;
      Check(MediumShape(random, ranks), {bytes, false, 0, 0}, random);
      if (small) continue;
      Check(MediumShape(random, ranks), {bytes, false, random.Int(0, 15), 0}, random);
      Check(MediumShape(random, ranks), {bytes, false, 0, random.Int(0, 15)}, random);
    }
  }
}

void LargeGathers() {
  if (small) return;
  Random random(4);
  for (int64_t ranks : {1, 8}) {
    PlanShape shape{ranks, 4096 / ranks, 8, 128, 40000 / ranks, 8};
    for (int64_t bytes : {2048, 4096, 5760, 1042}) Check(shape, {bytes, false, 0, 0}, random);
    shape.capacity = 9000 / ranks;
    Check(shape, {7168, false, 0, 0}, random);
  }
}

void ReduceIsTheOrderedSum() {
  Random random(5);
  for (const Types& types : AllTypes()) {
    for (int64_t length : {1, 8, 24, 72, 130, 2048, 2880, 4096, 7168}) {
      const int64_t ranks = Counts()[static_cast<size_t>(random.Int(0, small ? 2 : 3))];
      PlanShape shape = MediumShape(random, ranks);
      if (small && (length > 200 || random.OneIn(2))) continue;
      if (length > 200) shape.tokens = std::min<int64_t>(shape.tokens, 20);
      shape.k = random.Int(0, 9);
      Reduce reduce(shape, length, types, random.OneIn(3), random);
      Run(&reduce);
      reduce.Check();
      reduce.ranks.CheckNoFailure();
    }
  }
}

void LargeReductions() {
  if (small) return;
  Random random(6);
  for (int64_t ranks : {1, 8}) {
    const PlanShape shape{ranks, 4096 / ranks, 8, 128, 40000 / ranks, 8};
    for (int64_t length : {2880, 515}) {
      Reduce reduce(shape, length, {Float::kBf16, Float::kBf16}, false, random);
      Run(&reduce);
      reduce.Check();
      reduce.ranks.CheckNoFailure();
    }
  }
}

void WeightedIsTheLiteralLoop() {
  Random random(7);
  for (const Types& types : AllTypes()) {
    for (int64_t length : {1, 8, 40, 130, 2048, 2880, 4096, 7168}) {
      const int64_t ranks = Counts()[static_cast<size_t>(random.Int(0, small ? 2 : 3))];
      PlanShape shape = MediumShape(random, ranks);
      if (small && (length > 200 || random.OneIn(2))) continue;
      if (length > 200) shape.capacity = std::min<int64_t>(shape.capacity, 60);
      shape.tokens = std::min<int64_t>(shape.tokens, 16);
      shape.k = random.Int(1, 9);
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

void RaggedIsTheLiteralLoop() {
  Random random(8);
  for (int64_t row_bytes : {1, 2, 6, 8, 16, 48, 100, 1040, 4096, 5760, 14336}) {
    if (small && row_bytes > 2000) continue;
    for (int64_t ranks : Counts()) {
      for (int64_t per_rank : {1, 3, 16}) {
        Exchange exchange(ranks, per_rank, row_bytes, random.Of<int64_t>({0, 0, 1, 8}), random);
        Run(&exchange);
        for (size_t r = 0; r < exchange.tables.size(); ++r) {
          CHECK_EQ(exchange.result[r].Copy(), exchange.Expected(r));
          CHECK_EQ(exchange.tables[r].failure, 0);
        }
      }
    }
  }
}

constexpr struct {
  int32_t rank, index;
} kBad[] = {{0, 30}, {1, INT32_MAX}, {2, 0}, {-1, 0}, {INT32_MIN, 3}, {INT32_MAX, 3}};

// A rank with a bad peer: it has heard of it before it moved anything, or not.
void CheckPeer(const cuda::Table& table) {
  const auto heard = static_cast<int32_t>(cuda::Failure::kPeerFailed);
  CHECK(table.failure == 0 || (!apart && table.failure == heard));
}
template <typename Body>
void ApartAndTogether(const Body& body) {
  for (const bool one_by_one : {true, false}) {
    apart = one_by_one;
    body();
  }
}

// Indices that do not exist: the table tells, nothing outside is touched, and the next call works.
void BadIndicesOnce() {
  Random random(9);
  for (const auto& entry : kBad) {
    for (int64_t row_bytes : {24, 4096}) {
      Gather gather(Shape(2, 6, 2, 30), {row_bytes, false, 0, 0}, random);
      gather.fanned = true;
      gather.chained = false;
      gather.ranks.plans[1].source_rank[7] = entry.rank;
      gather.ranks.plans[1].source[7] = entry.index;
      Run(&gather);
      CheckBadIndex(gather.ranks.tables[1], 1, entry.rank, entry.index);
      CheckPeer(gather.ranks.tables[0]);
      const std::vector<char> out = gather.out[1].Copy();
      CHECK(std::count(out.begin() + 7 * row_bytes, out.begin() + 8 * row_bytes, '\0') ==
            row_bytes);
      Check(Shape(2, 6, 2, 30), {row_bytes, false, 0, 0}, random);
    }
    Reduce reduce(TwoRanks(), 16, {Float::kBf16, Float::kF32}, false, random);
    reduce.ranks.plans[1].slot_rank[5] = entry.rank;
    reduce.ranks.plans[1].slot[5] = entry.index;
    Run(&reduce);
    CheckBadIndex(reduce.ranks.tables[1], 1, entry.rank, entry.index);
    CheckPeer(reduce.ranks.tables[0]);
    for (const bool chained : {false, true}) {
      Weighted weighted(TwoRanks(), 16, {Float::kF32, Float::kBf16}, random);
      weighted.ranks.plans[1].source_rank[7] = entry.rank;
      weighted.ranks.plans[1].source[7] = entry.index;
      Run(&weighted, chained);
      CHECK_EQ(weighted.ranks.tables[1].failure, static_cast<int32_t>(cuda::Failure::kBadIndex));
      CheckPeer(weighted.ranks.tables[0]);
    }
  }
}

void BadIndices() { ApartAndTogether(BadIndicesOnce); }

// Chains that go back, round, or out of the buffer.
void BadChains() {
  Random random(10);
  for (const int64_t row_bytes : {24, 4096}) {
    for (const int32_t link : {INT32_MIN, -1, -5, -32, 31, INT32_MAX}) {
      Gather gather(Shape(2, 6, 2, 30), {row_bytes, false, 0, 0}, random);
      gather.fanned = gather.chained = true;
      PlanArrays& plan = gather.ranks.plans[0];
      std::fill(plan.source.begin(), plan.source.end(), 1);
      std::fill(plan.source_rank.begin(), plan.source_rank.end(), 1);
      Ints& chain = gather.ranks.chains[0];
      std::fill(chain.begin(), chain.end(), -31);
      chain[0] = link < 0 ? 5 : link;
      if (link < 0) chain[5] = link;
      Run(&gather);
      CHECK_EQ(gather.ranks.tables[0].failure, static_cast<int32_t>(cuda::Failure::kBadIndex));
    }
  }
}

// A slice that does not fit moves nothing to its receiver, and to nobody else less.
void BadSlicesOnce() {
  Random random(11);
  const struct {
    int32_t from, size, to, expected, detail;
  } bad[] = {{-1, 2, 0, 2, -1},
             {36, 2, 0, 2, 36},
             {INT32_MAX, 2, 0, 2, INT32_MAX},
             {0, -1, 0, -1, -1},
             {0, 2, -1, 2, -1},
             {0, 2, INT32_MAX, 2, INT32_MAX},
             {0, INT32_MAX, 0, INT32_MAX, 0},
             {0, 2, 0, 3, 2}};
  for (const auto& entry : bad) {
    Exchange exchange(4, 2, 24, 0, random);
    const size_t sent = 2 * 2 + 1;  // the second slice from rank 3 to rank 2
    exchange.input_offsets[3][sent] = entry.from;
    exchange.send_sizes[3][sent] = entry.size;
    exchange.output_offsets[3][sent] = entry.to;
    exchange.recv_sizes[2][3 * 2 + 1] = entry.expected;
    Run(&exchange);
    CheckBadIndex(exchange.tables[2], 3, 2, entry.detail);
    // All results are of one size.
    const std::vector<char> untouched(exchange.result[2].Copy().size(), 'x');
    CHECK_EQ(exchange.result[2].Copy(), untouched);
    for (size_t r : {0, 1, 3}) {
      CheckPeer(exchange.tables[r]);
      const bool moved = exchange.tables[r].failure == 0;
      CHECK_EQ(exchange.result[r].Copy(), moved ? exchange.Expected(r) : untouched);
    }
  }
}

void BadSlices() { ApartAndTogether(BadSlicesOnce); }

// Where the handshake failed nothing is read or written.
void WithoutPeers() {
  Random random(12);
  Gather gather(Shape(2, 6, 2, 30), {4096, false, 0, 0}, random);
  Reduce reduce(TwoRanks(), 16, {Float::kF32, Float::kF32}, false, random);
  Weighted weighted(TwoRanks(), 16, {Float::kF32, Float::kF32}, random);
  for (Ranks* ranks : {&gather.ranks, &reduce.ranks, &weighted.ranks}) {
    for (cuda::Table& table : ranks->tables) {
      table = {};
      table.failure = static_cast<int32_t>(cuda::Failure::kMismatch);
    }
  }
  const std::vector<char> rows = gather.out[0].Copy(), out = reduce.out[0].Copy();
  const std::vector<char> dy = weighted.dy[1].Copy();
  Run(&gather);
  Run(&reduce);
  Run(&weighted, true);
  CHECK_EQ(gather.out[0].Copy(), rows);
  CHECK_EQ(reduce.out[0].Copy(), out);
  CHECK_EQ(weighted.dy[1].Copy(), dy);
}

void FillsWhatFailed() {
  for (int64_t offset : {0, 1, 15}) {
    for (bool failed : {false, true}) {
      Mirror gpu(!small);
      std::vector<Memory> memory;
      std::vector<cuda::Output> outputs;
      memory.reserve(6);
      for (int64_t bytes : {0, 1, 14, 16, 17, 1 << 20}) {
        memory.emplace_back(bytes, offset);
        outputs.push_back({gpu.Out(memory.back().at(), bytes), bytes});
      }
      cuda::Table table{};
      table.failure = failed ? static_cast<int32_t>(cuda::Failure::kTimeout) : 0;
      const cuda::Table* const on_gpu = gpu.In(&table, sizeof(table));
      MUST(cudaDeviceSynchronize());
      MUST(cuda::LaunchFillIfFailed(outputs.data(), 6, on_gpu, nullptr));
      MUST(cudaDeviceSynchronize());
      gpu.Back();
      for (const Memory& output : memory) {
        const std::vector<char> expected(output.Copy().size(), failed ? '\xff' : 'x');
        CHECK_EQ(output.Copy(), expected);
      }
    }
  }
}

void WholeShuffles() {
  for (int64_t ranks : Counts()) CheckWholeShuffles(&Crew(ranks), small);
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  // Or streams would share a queue, and a rank wait behind the one that waits for it.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("JAX_FUSCO_TIMEOUT_S", "10", 1);
  if (argc > 1 && std::strcmp(argv[1], "--small") == 0) {
    small = true;
    argv[1] = argv[0];
    ++argv;
    --argc;
  }
  MUST(cudaSetDevice(0));
  MUST(cudaFree(nullptr));
  const int status = RunTests(argc, argv,
                              {{"PlanIsTheLiteralLoop", PlanIsTheLiteralLoop},
                               {"PlansOfAllSizes", PlansOfAllSizes},
                               {"GatherIsTheLiteralLoop", GatherIsTheLiteralLoop},
                               {"LargeGathers", LargeGathers},
                               {"ReduceIsTheOrderedSum", ReduceIsTheOrderedSum},
                               {"LargeReductions", LargeReductions},
                               {"WeightedIsTheLiteralLoop", WeightedIsTheLiteralLoop},
                               {"RaggedIsTheLiteralLoop", RaggedIsTheLiteralLoop},
                               {"BadIndices", BadIndices},
                               {"BadChains", BadChains},
                               {"BadSlices", BadSlices},
                               {"WithoutPeers", WithoutPeers},
                               {"FillsWhatFailed", FillsWhatFailed},
                               {"WholeShuffles", WholeShuffles}});
  AllCrews().clear();
  return status;
}
