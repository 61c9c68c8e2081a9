// reduce_rows and gather_rows_weighted on host teams against literal loops.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/host_team.h"
#include "tests/native/cuda/rank_cases.h"
#include "tests/native/floats.h"
#include "xla_ffi/engine/cuda/gather_rows_weighted.h"
#include "xla_ffi/engine/cuda/reduce_rows.h"

namespace jax_fusco::testing {
namespace {

using cuda::GatherRowsWeightedArgs;
using cuda::ReduceRowsArgs;

Float SumType(Float y) { return y == Float::kF64 ? Float::kF64 : Float::kF32; }

// A value as the type of a sum has it.
double ToSum(double value, Float sum) {
  return sum == Float::kF64 ? value : static_cast<double>(static_cast<float>(value));
}
double Fma(double a, double b, double c, Float sum) {
  if (sum == Float::kF64) return std::fma(a, b, c);
  return std::fma(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
}

// Elements at an address aligned to them, or `offset` elements behind a multiple of 16 bytes.
Memory Floats(int64_t count, Float type, int64_t offset, bool specials, Random& random) {
  Memory memory(count * SizeOf(type), offset * SizeOf(type));
  if (count > 0) {
    const Bytes values = RandomFloats(count, type, specials, random);
    std::copy(values.begin(), values.end(), memory.at());
  }
  return memory;
}

struct Types {
  Float a, b;
};
std::vector<Types> AllTypes() {
  std::vector<Types> all;
  for (Float a : kFloats) {
    for (Float b : kFloats) all.push_back({a, b});
  }
  return all;
}

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

struct Reduce {
  Ranks ranks;
  int64_t length;
  Types types;
  Float weights_type;
  bool weighted;
  std::vector<Memory> y, weights, out;

  Reduce(const PlanShape& shape, int64_t length_in, const Types& types_in, bool specials,
         Random& random)
      : ranks(shape, random),
        length(length_in),
        types(types_in),
        weights_type(types.a == Float::kF64 && random.OneIn(2) ? Float::kF64 : Float::kF32),
        weighted(!random.OneIn(4)) {
    const int64_t y_offset = random.OneIn(4), out_offset = random.OneIn(4);
    for (size_t r = 0; r < ranks.size(); ++r) {
      y.push_back(
          Floats(shape.capacity * length, types.a, r == 0 ? y_offset : 0, specials, random));
      weights.push_back(Floats(shape.assignments(), weights_type, 0, specials, random));
      out.push_back(Floats(shape.tokens * length, types.b, out_offset, false, random));
      ranks.Publish(r, 0, y[r].at());
    }
  }

  ReduceRowsArgs Args(size_t r) const {
    ReduceRowsArgs args;
    args.tokens = ranks.shape.tokens;
    args.k = ranks.shape.k;
    args.slot_rank = ranks.plans[r].slot_rank.data();
    args.slot = ranks.plans[r].slot.data();
    args.peer_rows = ranks.shape.capacity;
    args.length = length;
    args.y_type = types.a;
    args.out_type = types.b;
    args.weights_type = weights_type;
    args.weights = weighted ? weights[r].at() : nullptr;
    args.out = out[r].at();
    return args;
  }
  void Run(int64_t parts, bool wide) {
    AllRanks(ranks.shape.num_ranks, [&](int64_t rank) {
      const auto r = static_cast<size_t>(rank);
      if (wide) {
        RunReduce<2, 2>(Args(r), &ranks.tables[r], parts);
      } else {
        RunReduce<4, 1>(Args(r), &ranks.tables[r], parts);
      }
    });
  }
  double Expected(size_t r, int64_t t, int64_t i) const {
    const Float sum = SumType(types.a);
    double total = 0;
    for (int64_t a = t * ranks.shape.k; a < (t + 1) * ranks.shape.k; ++a) {
      const int64_t slot = ranks.plans[r].slot[static_cast<size_t>(a)];
      if (slot < 0) continue;
      const auto owner = static_cast<size_t>(ranks.plans[r].slot_rank[static_cast<size_t>(a)]);
      const double weight = weighted ? Get(weights[r].at(), a, weights_type) : 1.0;
      total = Fma(weight, Get(y[owner].at(), slot * length + i, types.a), total, sum);
    }
    return total;
  }
  void Check() const {
    for (size_t r = 0; r < ranks.size(); ++r) {
      Bytes expected(out[r].Copy().size());
      for (int64_t i = 0; i < ranks.shape.tokens * length; ++i) {
        Put(expected.data(), i, types.b, Expected(r, i / length, i % length));
      }
      const std::string what = std::string(Name(types.a)) + " to " + Name(types.b);
      if (!CheckSame(out[r].at(), expected.data(), ranks.shape.tokens * length, types.b, what)) {
        return;
      }
    }
  }
};

void ReduceIsTheOrderedSum() {
  Random random(1);
  for (const Types& types : AllTypes()) {
    for (int64_t length : {1, 8, 24, 40, 72}) {
      const int64_t ranks = random.Of<int64_t>({1, 2, 2, 4, 8});
      PlanShape shape = SmallShape(random, ranks);
      shape.tokens = std::min<int64_t>(shape.tokens, 16);
      shape.k = random.Int(0, 6);
      Reduce reduce(shape, length, types, random.OneIn(3), random);
      reduce.Run(random.Int(1, 3), random.OneIn(2));
      reduce.Check();
      reduce.ranks.CheckNoFailure();
    }
  }
}

PlanShape TwoRanks() {
  PlanShape shape;
  shape.num_ranks = 2;
  shape.tokens = 6;
  shape.k = 2;
  shape.num_experts = 4;
  shape.capacity = 30;
  return shape;
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
    reduce.Run(1, false);
    CheckBadIndex(reduce.ranks.tables[1], 1, entry.rank, entry.slot);
    CHECK_EQ(reduce.ranks.tables[0].failure, 0);
  }
}

// ---- gather_rows_weighted ----

struct Weighted {
  Ranks ranks;
  int64_t length;
  Types types;  // of g and y
  Float weights_type;
  std::vector<Memory> g, weights, y, dy, dots;

  Weighted(const PlanShape& shape, int64_t length_in, const Types& types_in, Random& random)
      : ranks(shape, random),
        length(length_in),
        types(types_in),
        weights_type(types.b == Float::kF64 && random.OneIn(2) ? Float::kF64 : Float::kF32) {
    const int64_t g_offset = random.OneIn(4), y_offset = random.OneIn(4);
    for (size_t r = 0; r < ranks.size(); ++r) {
      g.push_back(Floats(shape.tokens * length, types.a, g_offset, false, random));
      weights.push_back(Floats(shape.assignments(), weights_type, 0, false, random));
      y.push_back(Floats(shape.capacity * length, types.b, y_offset, false, random));
      dy.push_back(Floats(shape.capacity * length, types.b, 0, false, random));
      dots.push_back(Floats(shape.capacity, SumType(types.b), 0, false, random));
      // Rows that nobody filled are never read: a NaN there must not spread.
      for (int64_t m = 0; m < shape.capacity; ++m) {
        if (ranks.plans[r].source[static_cast<size_t>(m)] >= 0) continue;
        for (int64_t i = 0; i < length; ++i) {
          Put(y[r].at(), m * length + i, types.b, std::nan(""));
        }
      }
      ranks.Publish(r, 0, g[r].at());
      ranks.Publish(r, 1, weights[r].at());
    }
  }

  void Run(bool chained) {
    AllRanks(ranks.shape.num_ranks, [&](int64_t rank) {
      const auto r = static_cast<size_t>(rank);
      GatherRowsWeightedArgs args;
      args.num_rows = ranks.shape.capacity;
      args.source_rank = ranks.plans[r].source_rank.data();
      args.source = ranks.plans[r].source.data();
      args.chain = chained ? ranks.chains[r].data() : nullptr;
      args.tokens = ranks.shape.tokens;
      args.k = ranks.shape.k;
      args.length = length;
      args.g_type = types.a;
      args.y_type = types.b;
      args.weights_type = weights_type;
      args.y = y[r].at();
      args.dy = dy[r].at();
      args.dots = dots[r].at();
      cuda::WithFloat(types.a, [&](auto g_element) {
        cuda::WithFloat(types.b, [&](auto y_element) {
          Launch({2, 8, 0}, [&](const HostTeam& team) {
            cuda::GatherRowsWeighted<decltype(g_element), decltype(y_element)>(team, args,
                                                                               &ranks.tables[r]);
          });
        });
      });
    });
  }
  void Check() const {
    for (size_t r = 0; r < ranks.size(); ++r) {
      for (int64_t m = 0; m < ranks.shape.capacity; ++m) CheckRow(r, m);
    }
  }
  void CheckRow(size_t r, int64_t m) const {
    const Float sum = SumType(types.b);
    const int64_t a = ranks.plans[r].source[static_cast<size_t>(m)];
    const auto s = static_cast<size_t>(ranks.plans[r].source_rank[static_cast<size_t>(m)]);
    const double dot = Get(dots[r].at(), m, sum);
    Bytes expected(static_cast<size_t>(length * SizeOf(types.b)));
    double total = 0, size = 0;
    for (int64_t i = 0; i < length && a >= 0; ++i) {
      const double value = ToSum(Get(g[s].at(), a / ranks.shape.k * length + i, types.a), sum);
      const double weight = Get(weights[s].at(), a, weights_type);
      const double other = Get(y[r].at(), m * length + i, types.b);
      Put(expected.data(), i, types.b, ToSum(weight * value, sum));
      total += value * other;
      size += std::fabs(value * other);
    }
    CheckSame(dy[r].at(m * length * SizeOf(types.b)), expected.data(), length, types.b, "dy");
    const double unit = sum == Float::kF64 ? 0x1p-53 : 0x1p-24;
    CHECK(std::fabs(dot - total) <= static_cast<double>(length) * unit * size + 1e-37);
  }
};

void WeightedIsTheLiteralLoop() {
  Random random(3);
  for (const Types& types : AllTypes()) {
    for (int64_t length : {1, 8, 40, 72}) {
      const int64_t ranks = random.Of<int64_t>({1, 2, 2, 4, 8});
      PlanShape shape = SmallShape(random, ranks);
      shape.tokens = std::min<int64_t>(shape.tokens, 16);
      shape.k = random.Int(1, 7);  // longer chains than a warp has lanes
      Weighted weighted(shape, length, types, random);
      weighted.Run(false);
      weighted.Check();
      std::vector<std::vector<char>> before;
      for (const Memory& dots : weighted.dots) before.push_back(dots.Copy());
      for (const Memory& dy : weighted.dy) std::fill_n(dy.at(), dy.Copy().size(), 'x');
      weighted.Run(true);
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
      weighted.Run(chained);
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
  reduce.Run(1, true);
  weighted.Run(true);
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
