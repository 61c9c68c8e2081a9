// A random gather of all ranks, and what it must give: a literal loop.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_GATHER_CASE_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_GATHER_CASE_H_

#include <cstdint>
#include <cstring>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/rank_cases.h"
#include "xla_ffi/engine/cuda/kernels.h"

namespace jax_fusco::testing {

// How a case runs.
struct Way {
  int64_t row_bytes;
  bool bulk;
  int64_t in_offset;
  int64_t out_offset;
};

struct Gather {
  Ranks ranks;
  bool fanned;  // sources are assignments, else tokens
  bool chained;
  bool zero_tail;
  Way way;
  std::vector<Memory> in, out;

  Gather(const PlanShape& shape, const Way& way_in, Random& random)
      : ranks(shape, random),
        fanned(shape.k > 0 && !random.OneIn(3)),
        chained(fanned && !random.OneIn(3)),
        zero_tail(random.OneIn(2)),
        way(way_in) {
    for (size_t r = 0; r < ranks.size(); ++r) {
      in.emplace_back(rows() * way.row_bytes, way.in_offset, random);
      out.emplace_back(shape.capacity * way.row_bytes, way.out_offset);
      ranks.Publish(r, 3, in[r].at());
    }
  }
  int64_t rows() const { return fanned ? ranks.shape.tokens : ranks.shape.assignments(); }
  int64_t fanout() const { return fanned ? ranks.shape.k : 1; }

  cuda::GatherRowsArgs Args(size_t r) const {
    cuda::GatherRowsArgs args;
    args.num_rows = ranks.shape.capacity;
    args.source_rank = ranks.plans[r].source_rank.data();
    args.source = ranks.plans[r].source.data();
    args.chain = chained ? ranks.chains[r].data() : nullptr;
    args.fanout = fanout();
    args.zero_tail = zero_tail;
    args.peer_rows = rows();
    args.row_bytes = way.row_bytes;
    args.operand = 3;
    args.out = out[r].at();
    return args;
  }
  void Check() const {
    for (size_t r = 0; r < ranks.size(); ++r) {
      std::vector<char> expected(out[r].Copy().size(), 'x');
      for (int64_t m = 0; m < ranks.shape.capacity; ++m) {
        const int32_t source = ranks.plans[r].source[static_cast<size_t>(m)];
        char* const row = expected.data() + m * way.row_bytes;
        if (source >= 0) {
          const auto s = static_cast<size_t>(ranks.plans[r].source_rank[static_cast<size_t>(m)]);
          std::memcpy(row, in[s].at(source / fanout() * way.row_bytes),
                      static_cast<size_t>(way.row_bytes));
        } else if (zero_tail || source == kPadding) {
          std::memset(row, 0, static_cast<size_t>(way.row_bytes));
        }
      }
      CHECK_EQ(out[r].Copy(), expected);
    }
  }
};

inline PlanShape Shape(int64_t ranks, int64_t tokens, int64_t k, int64_t capacity) {
  PlanShape shape;
  shape.num_ranks = ranks;
  shape.tokens = tokens;
  shape.k = k;
  shape.num_experts = 2 * ranks;
  shape.capacity = capacity;
  return shape;
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_GATHER_CASE_H_
