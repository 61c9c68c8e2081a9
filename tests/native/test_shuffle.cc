// Whole calls, from 1 to 8 ranks that meet on threads of their own, against literal loops.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/shuffle_cases.h"

namespace jax_fusco::testing {
namespace {

using cpu::GatherRowsJob;
using cpu::GatherRowsWeightedJob;

// Calls `body(random, ranks)` for many random cases of each number of ranks, with 1 to 4 threads.
template <typename Body>
void ForRandomCases(int repeats, Body body) {
  Random random(7);
  for (int64_t ranks : {1, 2, 3, 4, 8}) {
    for (int repeat = 0; repeat < repeats; ++repeat) {
      setenv("JAX_FUSCO_THREADS", std::to_string(1 + repeat % 4).c_str(), 1);
      body(random, ranks);
    }
  }
}

Float SumType(Float y) { return y == Float::kF64 ? Float::kF64 : Float::kF32; }

void PlanIsTheLiteralLoop() {
  const auto site = std::make_shared<CallSite>("plan");
  ForRandomCases(20, [&](Random& random, int64_t ranks) {
    PlanShape shape = RandomShape(random, ranks);
    if (random.OneIn(10)) shape.tokens = 40000 / (ranks * shape.k);  // enough for several threads
    const std::vector<Ints> ids = RandomIds(shape, random);
    std::vector<PlanArrays> results(ids.size(), PlanArrays(shape, -7));
    CHECK(Meet(site, PlanJobs(shape, ids, &results)).ok());
    const std::vector<PlanArrays> expected = NaivePlan(shape, ids);
    for (size_t r = 0; r < ids.size(); ++r) CheckSamePlan(results[r], expected[r]);
  });
}

// `expected` is what the call finds in its results before it writes them.
void GatherByHand(const Step& step, int64_t fanout, bool zero_tail,
                  const std::vector<std::vector<Array>>& in,
                  std::vector<std::vector<Array>>* expected) {
  for (size_t r = 0; r < in.size(); ++r) {
    for (size_t p = 0; p < in[r].size(); ++p) {
      const Rows& out = (*expected)[r][p].rows;
      for (int64_t m = 0; m < out.count; ++m) {
        const int32_t source = step.plans[r].source[static_cast<size_t>(m)];
        if (source == -2 && !zero_tail) continue;
        std::memset(out.At(m), 0, static_cast<size_t>(out.bytes));
        if (source < 0) continue;
        const auto peer = static_cast<size_t>(step.plans[r].source_rank[static_cast<size_t>(m)]);
        std::memcpy(out.At(m), in[peer][p].rows.At(source / fanout),
                    static_cast<size_t>(out.bytes));
      }
    }
  }
}

void GatherRowsIsTheLiteralLoop() {
  const auto site = std::make_shared<CallSite>("gather_rows");
  ForRandomCases(20, [&](Random& random, int64_t ranks) {
    Step step(random, ranks);
    for (PlanArrays& plan : step.plans) {  // not only past the last group, few or most
      const bool most = random.OneIn(3);
      for (int32_t& source : plan.source) {
        if (random.OneIn(9) != most) source = -2;
      }
    }
    const int64_t fanout = random.OneIn(2) ? step.shape.k : 1;
    const int64_t count = step.shape.assignments() / fanout;
    const bool zero_tail = random.OneIn(2);
    std::vector<int64_t> sizes;
    for (int64_t p = random.Int(0, 3); p > 0; --p) {
      sizes.push_back(random.Of<int64_t>({0, 1, 2, 4, 8, 13, 64, 3000}));
    }
    const auto make = [&](int64_t rows, bool filled) {
      return EachRank(ranks, [&](int64_t) {
        std::vector<Array> arrays;
        for (int64_t bytes : sizes) {
          filled ? arrays.emplace_back(rows, bytes, random) : arrays.emplace_back(rows, bytes);
        }
        return arrays;
      });
    };
    const auto in = make(count, true);
    const auto out = make(step.shape.capacity, false);
    auto expected = make(step.shape.capacity, false);
    GatherByHand(step, fanout, zero_tail, in, &expected);
    auto jobs = GatherJobs(step.plans, fanout, in, out);
    for (auto& job : jobs) job->zero_tail = zero_tail;
    CHECK(Meet(site, std::move(jobs)).ok());
    for (size_t r = 0; r < out.size(); ++r) {
      for (size_t p = 0; p < sizes.size(); ++p) CHECK(out[r][p].data == expected[r][p].data);
    }
  });
}

void GatherRowsWeightedIsTheLiteralLoop() {
  const auto site = std::make_shared<CallSite>("gather_rows_weighted");
  ForRandomCases(20, [&](Random& random, int64_t ranks) {
    const Step step(random, ranks);
    const Float g_type = random.Of({kFloats[0], kFloats[1], kFloats[2], kFloats[3]});
    const Float y_type = random.Of({kFloats[0], kFloats[1], kFloats[2], kFloats[3]});
    const Float sum = SumType(y_type);
    const Float weights_type = y_type == Float::kF64 && random.OneIn(2) ? Float::kF64 : Float::kF32;
    const int64_t length = random.Of<int64_t>({0, 1, 5, 16, 33, 200});
    const int64_t rows = step.shape.capacity;
    const auto array = [&](int64_t count, int64_t columns, Float type) {
      return EachRank(ranks, [&](int64_t) { return Array(count, columns, type, random); });
    };
    const auto g = array(step.shape.tokens, length, g_type), y = array(rows, length, y_type),
               weights = array(step.shape.assignments(), 1, weights_type),
               dy = array(rows, length, y_type), dots = array(rows, 1, sum);
    for (size_t r = 0; r < y.size(); ++r) {
      for (int64_t m = 0; m < rows; ++m) {  // NaN where nothing may be read
        if (step.plans[r].source[static_cast<size_t>(m)] >= 0) continue;
        std::memset(y[r].rows.At(m), 0xff, static_cast<size_t>(y[r].rows.bytes));
      }
    }
    Jobs<GatherRowsWeightedJob> jobs;
    for (size_t r = 0; r < g.size(); ++r) {
      auto job = std::make_unique<GatherRowsWeightedJob>();
      job->num_rows = rows;
      job->source_rank = step.plans[r].source_rank.data();
      job->source = step.plans[r].source.data();
      job->k = step.shape.k;
      job->length = length;
      job->g_type = g_type;
      job->y_type = y_type;
      job->weights_type = weights_type;
      job->g = g[r].rows;
      job->weights = weights[r].rows.data;
      job->y = y[r].rows;
      job->dy = dy[r].rows;
      job->dots = dots[r].rows.data;
      jobs.push_back(std::move(job));
    }
    CHECK(Meet(site, std::move(jobs)).ok());
    for (size_t r = 0; r < g.size(); ++r) {
      for (int64_t m = 0; m < rows; ++m) {
        const int32_t source = step.plans[r].source[static_cast<size_t>(m)];
        const int32_t from = step.plans[r].source_rank[static_cast<size_t>(m)];
        Bytes expected(static_cast<size_t>(length * SizeOf(y_type)));
        double dot = 0, size = 0;
        for (int64_t i = 0; source >= 0 && i < length; ++i) {
          const auto s = static_cast<size_t>(from);
          double a = Get(g[s].rows.At(source / step.shape.k), i, g_type);
          if (sum == Float::kF32) a = static_cast<float>(a);
          const double b = Get(y[r].rows.At(m), i, y_type);
          double product = a * Get(weights[s].data.data(), source, weights_type);
          if (sum == Float::kF32) product = static_cast<float>(product);
          Put(expected.data(), i, y_type, product);
          dot += a * b;
          size += std::fabs(a * b);
        }
        CheckSame(dy[r].rows.At(m), expected.data(), length, y_type, "dy");
        // The order of the sum is a matter of the kernels' test.
        const double tolerance = size * (sum == Float::kF64 ? 1e-13 : 1e-4) + 1e-40;
        const double got = Get(dots[r].data.data(), m, sum);
        CHECK(source >= 0 ? std::fabs(got - dot) <= tolerance : Same(got, 0.0));
      }
    }
  });
}

void ReduceRowsIsTheLiteralLoop() {
  const auto site = std::make_shared<CallSite>("reduce_rows");
  ForRandomCases(20, [&](Random& random, int64_t ranks) {
    const Step step(random, ranks);
    const Float y_type = random.Of({kFloats[0], kFloats[1], kFloats[2], kFloats[3]});
    const Float out_type = random.Of({kFloats[0], kFloats[1], kFloats[2], kFloats[3]});
    const Float weights_type = random.Of({Float::kF32, Float::kF64});
    const int64_t length = random.Of<int64_t>({0, 1, 5, 16, 33, 200});
    const auto y = EachRank(
        ranks, [&](int64_t) { return Array(step.shape.capacity, length, y_type, random); });
    const auto out = EachRank(
        ranks, [&](int64_t) { return Array(step.shape.tokens, length * SizeOf(out_type)); });
    std::vector<Array> weights;
    for (int64_t r = 0; r < ranks && step.shape.k != 1; ++r) {
      weights.emplace_back(step.shape.assignments(), 1, weights_type, random);
    }
    CHECK(
        Meet(site, ReduceJobs(step, length, y_type, out_type, weights_type, y, weights, out)).ok());
    for (size_t r = 0; r < y.size(); ++r) {
      const PlanArrays& plan = step.plans[r];
      for (int64_t t = 0; t < step.shape.tokens; ++t) {
        Bytes expected(static_cast<size_t>(length * SizeOf(out_type)));
        for (int64_t i = 0; i < length; ++i) {
          double total = 0;
          for (int64_t a = t * step.shape.k; a < (t + 1) * step.shape.k; ++a) {
            const int32_t slot = plan.slot[static_cast<size_t>(a)];
            if (slot < 0) continue;
            const auto peer = static_cast<size_t>(plan.slot_rank[static_cast<size_t>(a)]);
            const double value = Get(y[peer].rows.At(slot), i, y_type);
            const double w = weights.empty() ? 1 : Get(weights[r].data.data(), a, weights_type);
            total = y_type == Float::kF64
                        ? std::fma(w, value, total)
                        : std::fma(static_cast<float>(w), static_cast<float>(value),
                                   static_cast<float>(total));
          }
          Put(expected.data(), i, out_type, total);
        }
        if (!CheckSame(out[r].rows.At(t), expected.data(), length, out_type, "out")) return;
      }
    }
  });
}

void RaggedAllToAllIsTheLiteralLoop() {
  const auto site = std::make_shared<CallSite>("ragged_all_to_all");
  ForRandomCases(20, [&](Random& random, int64_t ranks) {
    const int64_t rows = random.Of<int64_t>({0, 1, 10, 60}), slices = random.Int(1, 3);
    const int64_t bytes = random.Of<int64_t>({0, 1, 2, 100, 3000});
    std::vector<int64_t> counts;
    const Ragged ragged(random, ranks, slices, rows, &counts);
    const auto operand = EachRank(ranks, [&](int64_t) { return Array(rows, bytes, random); });
    const auto make = [&](int64_t r) { return Array(counts[static_cast<size_t>(r)] + 1, bytes); };
    const auto result = EachRank(ranks, make), expected = EachRank(ranks, make);
    for (size_t s = 0; s < operand.size(); ++s) {
      for (size_t i = 0; i < ragged.send_sizes[s].size(); ++i) {
        const Rows& to = expected[i / static_cast<size_t>(slices)].rows;
        for (int64_t m = 0; m < ragged.send_sizes[s][i]; ++m) {
          std::memcpy(to.At(ragged.output_offsets[s][i] + m),
                      operand[s].rows.At(ragged.input_offsets[s][i] + m),
                      static_cast<size_t>(bytes));
        }
      }
    }
    CHECK(Meet(site, ragged.Make(operand, result)).ok());
    for (size_t r = 0; r < result.size(); ++r) CHECK(result[r].data == expected[r].data);
  });
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"PlanIsTheLiteralLoop", PlanIsTheLiteralLoop},
                   {"GatherRowsIsTheLiteralLoop", GatherRowsIsTheLiteralLoop},
                   {"GatherRowsWeightedIsTheLiteralLoop", GatherRowsWeightedIsTheLiteralLoop},
                   {"ReduceRowsIsTheLiteralLoop", ReduceRowsIsTheLiteralLoop},
                   {"RaggedAllToAllIsTheLiteralLoop", RaggedAllToAllIsTheLiteralLoop}});
}
