// Random sums over rows of all ranks, and their gradients, and what they must give: literal loops.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_SUMS_CASES_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_SUMS_CASES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/rank_cases.h"
#include "tests/native/floats.h"
#include "xla_ffi/engine/cuda/kernels.h"

namespace jax_fusco::testing {

inline Float SumType(Float y) { return y == Float::kF64 ? Float::kF64 : Float::kF32; }

// A value as the type of a sum has it.
inline double ToSum(double value, Float sum) {
  return sum == Float::kF64 ? value : static_cast<double>(static_cast<float>(value));
}
inline double Fma(double a, double b, double c, Float sum) {
  if (sum == Float::kF64) return std::fma(a, b, c);
  return std::fma(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
}

// Elements at an address aligned to them, or `offset` elements behind a multiple of 16 bytes. Long
// arrays repeat what was drawn.
inline Memory Floats(int64_t count, Float type, int64_t offset, bool specials, Random& random) {
  constexpr int64_t kDrawn = 20011;  // a prime: rows differ
  const int64_t size = SizeOf(type);
  Memory memory(count * size, offset * size);
  const Bytes values = RandomFloats(std::min(count, kDrawn), type, specials, random);
  for (int64_t i = 0; i < count; i += kDrawn) {
    std::memcpy(memory.at(i * size), values.data(),
                static_cast<size_t>(std::min(count - i, kDrawn) * size));
  }
  return memory;
}

struct Types {
  Float a, b;
};
inline std::vector<Types> AllTypes() {
  std::vector<Types> all;
  for (Float a : kFloats) {
    for (Float b : kFloats) all.push_back({a, b});
  }
  return all;
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

  cuda::ReduceRowsArgs Args(size_t r) const {
    cuda::ReduceRowsArgs args;
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

  cuda::GatherRowsWeightedArgs Args(size_t r, bool chained) const {
    cuda::GatherRowsWeightedArgs args;
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
    return args;
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

inline PlanShape TwoRanks() {
  PlanShape shape;
  shape.num_ranks = 2;
  shape.tokens = 6;
  shape.k = 2;
  shape.num_experts = 4;
  shape.capacity = 30;
  return shape;
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_SUMS_CASES_H_
