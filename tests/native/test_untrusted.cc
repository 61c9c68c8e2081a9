// Indices and shapes that make no sense are errors in one sentence, and nothing outside of the
// buffers is touched (the sanitizers see to that: every array has exactly its size).
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/shuffle_cases.h"

namespace jax_fusco::testing {
namespace {

using std::string;

constexpr int64_t kRanks = 2;
constexpr int32_t kMax = INT32_MAX;
constexpr int32_t kMin = INT32_MIN;

template <typename J>
void CheckError(Jobs<J> jobs, const string& message) {
  const Status status = Meet(std::move(jobs));
  CHECK(status.code == Code::kInvalidArgument);
  CHECK_EQ(status.message, message);
}

// Two ranks, four tokens of two experts, four experts.
PlanShape SmallShape() {
  PlanShape shape;
  shape.num_ranks = kRanks;
  shape.tokens = 4;
  shape.k = 2;
  shape.num_experts = 4;
  shape.capacity = 20;
  return shape;
}

std::vector<Array> Filled(int64_t count, int64_t bytes) {
  Random random(1);
  return EachRank(kRanks, [&](int64_t) { return Array(count, bytes, random); });
}

struct WeightedArrays {
  std::vector<Array> g = Filled(4, 24), weights = Filled(8, 4), y = Filled(20, 24),
                     dy = Filled(20, 24), dots = Filled(20, 4);
};

Jobs<cpu::GatherRowsWeightedJob> WeightedJobs(const std::vector<PlanArrays>& plans,
                                              const WeightedArrays& arrays) {
  Jobs<cpu::GatherRowsWeightedJob> jobs;
  for (size_t r = 0; r < kRanks; ++r) {
    auto job = std::make_unique<cpu::GatherRowsWeightedJob>();
    job->num_rows = 20;
    job->source_rank = plans[r].source_rank.data();
    job->source = plans[r].source.data();
    job->k = 2;
    job->length = 6;
    job->g = arrays.g[r].rows;
    job->weights = arrays.weights[r].rows.data;
    job->y = arrays.y[r].rows;
    job->dy = arrays.dy[r].rows;
    job->dots = arrays.dots[r].rows.data;
    jobs.push_back(std::move(job));
  }
  return jobs;
}

void GatherSources() {
  const PlanShape shape = SmallShape();
  Random random(2);
  const struct {
    int32_t source_rank, source;
  } bad[] = {{0, 8}, {1, 8}, {0, kMax}, {2, 0}, {-1, 0}, {kMin, 3}, {kMax, 3}, {-2, kMax}};
  for (const auto& entry : bad) {
    for (size_t row : {size_t{0}, size_t{7}, size_t{19}}) {
      std::vector<PlanArrays> plans = NaivePlan(shape, RandomIds(shape, random));
      plans[1].source_rank[row] = entry.source_rank;
      plans[1].source[row] = entry.source;
      const string where = Concat(
          "row ", static_cast<int64_t>(row), " of rank 1 comes from source ", int64_t{entry.source},
          " of rank ", int64_t{entry.source_rank}, ", which does not exist.");
      std::vector<std::vector<Array>> in(kRanks), out(kRanks);
      for (size_t r = 0; r < kRanks; ++r) {
        in[r].emplace_back(4, 24, random);
        out[r].emplace_back(20, 24);
      }
      CheckError(GatherJobs(plans, 2, in, out), "jax_fusco_gather_rows: " + where);

      const WeightedArrays arrays;
      CheckError(WeightedJobs(plans, arrays), "jax_fusco_gather_rows_weighted: " + where);
    }
  }
}

// Negative sources are rows of zeros, whatever their rank says.
void NegativeSourcesAreNoRows() {
  const PlanShape shape = SmallShape();
  std::vector<PlanArrays> plans(kRanks, PlanArrays(shape));
  const int32_t sources[] = {-1, -2, -3, kMin};
  const int32_t ranks[] = {-1, -2, 5, kMin, kMax};
  for (size_t m = 0; m < 20; ++m) {
    plans[0].source[m] = plans[1].source[m] = sources[m % 4];
    plans[0].source_rank[m] = plans[1].source_rank[m] = ranks[m % 5];
  }
  std::vector<std::vector<Array>> in(kRanks), out(kRanks);
  for (size_t r = 0; r < kRanks; ++r) {
    in[r].emplace_back(0, 24);
    out[r].emplace_back(20, 24);
  }
  CHECK(Meet(GatherJobs(plans, 1, in, out)).ok());
  for (const auto& arrays : out) CHECK(arrays[0].data == Bytes(20 * 24));
}

void ReduceSlots() {
  Random random(3);
  const struct {
    int32_t slot_rank, slot;
  } bad[] = {{0, 20}, {1, 20}, {0, kMax}, {2, 0}, {-1, 0}, {kMin, 3}, {kMax, kMax}};
  for (const auto& entry : bad) {
    for (size_t a : {size_t{0}, size_t{3}, size_t{7}}) {
      Step step(random, kRanks);
      step.shape = SmallShape();
      step.plans = NaivePlan(step.shape, RandomIds(step.shape, random));
      step.plans[1].slot_rank[a] = entry.slot_rank;
      step.plans[1].slot[a] = entry.slot;
      const auto y = Filled(20, 24), out = Filled(4, 24), weights = Filled(8, 4);
      CheckError(ReduceJobs(step, 6, Float::kF32, Float::kF32, Float::kF32, y, weights, out),
                 Concat("jax_fusco_reduce_rows: slot[", static_cast<int64_t>(a / 2), ", ",
                        static_cast<int64_t>(a % 2), "] of rank 1 is row ", int64_t{entry.slot},
                        " of rank ", int64_t{entry.slot_rank}, ", which does not exist."));
    }
  }
}

void RaggedSlices() {
  // Slice 1 of rank 0 goes to rank 1; operands of 10 rows, results of 12.
  const struct {
    int32_t begin, size, target, expected;
    const char* message;
  } bad[] = {
      {8, 3, 0, 3, "3 rows to rank 1 from row 8 of an operand of 10 rows."},
      {-1, 3, 0, 3, "3 rows to rank 1 from row -1 of an operand of 10 rows."},
      {kMax, 1, 0, 1, "1 rows to rank 1 from row 2147483647 of an operand of 10 rows."},
      {kMax, kMax, 0, kMax,
       "2147483647 rows to rank 1 from row 2147483647 of an operand of 10 rows."},
      {0, -1, 0, -1, "-1 rows to rank 1 from row 0 of an operand of 10 rows."},
      {0, kMin, 0, kMin, "-2147483648 rows to rank 1 from row 0 of an operand of 10 rows."},
      {0, 3, 10, 3, "3 rows to rank 1 at row 10 of an output of 12 rows."},
      {0, 3, -1, 3, "3 rows to rank 1 at row -1 of an output of 12 rows."},
      {0, 1, kMax, 1, "1 rows to rank 1 at row 2147483647 of an output of 12 rows."},
      {0, 3, 0, 2, "3 rows to rank 1, which expects 2 (recv_sizes)."},
      {0, 0, 0, 1, "0 rows to rank 1, which expects 1 (recv_sizes)."},
  };
  for (const auto& entry : bad) {
    Random random(4);
    std::vector<int64_t> counts;
    Ragged ragged(random, kRanks, 1, 0, &counts);
    ragged.input_offsets[0][1] = entry.begin;
    ragged.send_sizes[0][1] = entry.size;
    ragged.output_offsets[0][1] = entry.target;
    ragged.recv_sizes[1][0] = entry.expected;
    const auto operand = Filled(10, 24), result = Filled(12, 24);
    CheckError(ragged.Make(operand, result),
               Concat("jax_fusco_ragged_all_to_all: rank 0 sends ", entry.message));
    CHECK(result[0].data == Filled(12, 24)[0].data && result[1].data == Filled(12, 24)[1].data);
  }
  // An empty slice may lie anywhere.
  Random random(4);
  std::vector<int64_t> counts;
  Ragged ragged(random, kRanks, 1, 0, &counts);
  ragged.input_offsets[0][1] = kMax;
  ragged.output_offsets[0][1] = kMin;
  CHECK(Meet(ragged.Make(Filled(10, 24), Filled(12, 24))).ok());
}

// Rank 1's job is not like rank 0's, in each of the ways of `changes`.
template <typename J>
void CheckDisagreements(const string& call, const string& what,
                        const std::function<Jobs<J>()>& make,
                        const std::vector<std::function<void(J&)>>& changes) {
  for (const auto& change : changes) {
    Jobs<J> jobs = make();
    change(*jobs[1]);
    CheckError(std::move(jobs),
               call + ": ranks 0 and 1 disagree on " + what + ", all ranks need the same.");
  }
}

// Ranks of one call whose shapes differ.
void Disagreements() {
  const PlanShape shape = SmallShape();
  Random random(5);
  const std::vector<Ints> ids = RandomIds(shape, random);
  std::vector<PlanArrays> results(kRanks, PlanArrays(shape));
  CheckDisagreements<cpu::PlanJob>(
      "jax_fusco_plan", "tokens, k or capacity", [&] { return PlanJobs(shape, ids, &results); },
      {[](auto& job) { job.shape.tokens = 3; }, [](auto& job) { job.shape.k = 1; },
       [](auto& job) { job.shape.capacity = 19; }});

  Step step(random, kRanks);
  step.shape = shape;
  step.plans = NaivePlan(shape, ids);
  std::vector<std::vector<Array>> in(kRanks), out(kRanks);
  for (size_t r = 0; r < kRanks; ++r) {
    in[r].emplace_back(4, 24, random);
    out[r].emplace_back(20, 24);
  }
  CheckDisagreements<cpu::GatherRowsJob>(
      "jax_fusco_gather_rows", "fanout or the size of a row",
      [&] { return GatherJobs(step.plans, 2, in, out); },
      {[](auto& job) { job.fanout = 1; }, [](auto& job) { job.in[0].bytes = 16; },
       [](auto& job) { job.in.pop_back(); }});

  const WeightedArrays arrays;
  CheckDisagreements<cpu::GatherRowsWeightedJob>(
      "jax_fusco_gather_rows_weighted", "k, or the length or type of a row",
      [&] { return WeightedJobs(step.plans, arrays); },
      {[](auto& job) { job.k = 1; }, [](auto& job) { job.length = 5; },
       [](auto& job) { job.g_type = Float::kF16; }, [](auto& job) { job.y_type = Float::kF16; },
       [](auto& job) { job.weights_type = Float::kF64; }});

  std::vector<int64_t> counts;
  const Ragged wide(random, kRanks, 3, 4, &counts);
  const auto operand = Filled(4, 24), result = Filled(40, 24);
  CheckDisagreements<cpu::RaggedAllToAllJob>("jax_fusco_ragged_all_to_all", "the number of slices",
                                             [&] { return wide.Make(operand, result); },
                                             {[](auto& job) { job.slices_per_rank = 1; }});
  CheckDisagreements<cpu::RaggedAllToAllJob>(
      "jax_fusco_ragged_all_to_all", "the size of a row",
      [&] { return wide.Make(operand, result); },
      {[](auto& job) { job.operand.bytes = 16; }, [](auto& job) { job.result.bytes = 16; }});

  const auto y = Filled(20, 24), y_out = Filled(4, 24), weights = Filled(8, 4);
  CheckDisagreements<cpu::ReduceRowsJob>(
      "jax_fusco_reduce_rows", "k, weights, or the length or type of a row",
      [&] { return ReduceJobs(step, 6, Float::kF32, Float::kF32, Float::kF32, y, weights, y_out); },
      {[](auto& job) { job.k = 1; }, [](auto& job) { job.length = 5; },
       [](auto& job) { job.y_type = Float::kF16; }, [](auto& job) { job.out_type = Float::kF16; },
       [](auto& job) { job.weights = nullptr; }});
}

void StrictPlanNamesTheId() {
  const PlanShape shape = SmallShape();
  std::vector<Ints> ids(kRanks, Ints(8, -1));
  ids[1][5] = 4;
  std::vector<PlanArrays> results(kRanks, PlanArrays(shape));
  CHECK(Meet(PlanJobs(shape, ids, &results)).ok());
  CHECK_EQ(results[1].num_invalid, (Ints{1}));
  setenv("JAX_FUSCO_STRICT", "1", 1);
  CheckError(PlanJobs(shape, ids, &results),
             "jax_fusco_plan: expert_ids[2, 1] of rank 1 is 4, it must lie in [-1, 4) "
             "(JAX_FUSCO_STRICT is set).");
  ids[1][5] = 3;
  CHECK(Meet(PlanJobs(shape, ids, &results)).ok());
  unsetenv("JAX_FUSCO_STRICT");
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {{"GatherSources", GatherSources},
                   {"NegativeSourcesAreNoRows", NegativeSourcesAreNoRows},
                   {"ReduceSlots", ReduceSlots},
                   {"RaggedSlices", RaggedSlices},
                   {"Disagreements", Disagreements},
                   {"StrictPlanNamesTheId", StrictPlanNamesTheId}});
}
