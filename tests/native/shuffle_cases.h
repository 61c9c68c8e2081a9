// Random shuffles for the tests of whole jobs: memory, indices and a call of each kind.
#ifndef JAX_FUSCO_TESTS_NATIVE_SHUFFLE_CASES_H_
#define JAX_FUSCO_TESTS_NATIVE_SHUFFLE_CASES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/floats.h"
#include "tests/native/meeting.h"
#include "tests/native/naive_plan.h"
#include "xla_ffi/engine/cpu/shuffle.h"

namespace jax_fusco::testing {

template <typename J>
using Jobs = std::vector<std::unique_ptr<J>>;

// An array of exactly its size (but never null), so that the sanitizers see what lies outside.
struct Array {
  Bytes data;
  Rows rows;

  Array(int64_t count, int64_t bytes, char value = 'x')
      : data(static_cast<size_t>(std::max<int64_t>(1, count * bytes)), value),
        rows{data.data(), count, bytes} {}
  Array(int64_t count, int64_t bytes, Random& random) : Array(count, bytes) {
    for (size_t i = 0; i < data.size(); i += 8) {
      const uint64_t bits = random.Bits();
      std::memcpy(data.data() + i, &bits, std::min<size_t>(8, data.size() - i));
    }
  }
  Array(int64_t count, int64_t length, Float type, Random& random)
      : Array(count, length * SizeOf(type)) {
    if (count * length > 0) {
      const Bytes values = RandomFloats(count * length, type, false, random);
      std::copy(values.begin(), values.end(), data.begin());
    }
  }
  Array(Array&& other) noexcept = default;  // the bytes stay where they are
  Array(const Array&) = delete;
};

// The plan of a random step, and its two layers of indices.
struct Step {
  PlanShape shape;
  std::vector<Ints> ids;
  std::vector<PlanArrays> plans;

  Step(Random& random, int64_t ranks)
      : shape(RandomShape(random, ranks)),
        ids(RandomIds(shape, random)),
        plans(NaivePlan(shape, ids)) {}
  int64_t ranks() const { return shape.num_ranks; }
};

// Makes `ranks` results of a function of the rank.
template <typename F>
auto EachRank(int64_t ranks, F make) {
  std::vector<decltype(make(int64_t{0}))> out;
  for (int64_t r = 0; r < ranks; ++r) out.push_back(make(r));
  return out;
}

inline Jobs<cpu::PlanJob> PlanJobs(const PlanShape& shape, const std::vector<Ints>& ids,
                                   std::vector<PlanArrays>* results) {
  Jobs<cpu::PlanJob> jobs;
  for (size_t r = 0; r < ids.size(); ++r) {
    auto job = std::make_unique<cpu::PlanJob>();
    job->shape = shape;
    job->expert_ids = ids[r].data();
    job->results = (*results)[r].Results();
    jobs.push_back(std::move(job));
  }
  return jobs;
}

// Gathers from `in` to `out`, both [rank][payload].
inline Jobs<cpu::GatherRowsJob> GatherJobs(const std::vector<PlanArrays>& plans, int64_t fanout,
                                           const std::vector<std::vector<Array>>& in,
                                           const std::vector<std::vector<Array>>& out) {
  Jobs<cpu::GatherRowsJob> jobs;
  for (size_t r = 0; r < plans.size(); ++r) {
    auto job = std::make_unique<cpu::GatherRowsJob>();
    job->num_rows = static_cast<int64_t>(plans[r].source.size());
    job->source_rank = plans[r].source_rank.data();
    job->source = plans[r].source.data();
    job->fanout = fanout;
    for (const Array& array : in[r]) job->in.push_back(array.rows);
    for (const Array& array : out[r]) job->out.push_back(array.rows);
    jobs.push_back(std::move(job));
  }
  return jobs;
}

// `weights` may be empty: every weight is one.
inline Jobs<cpu::ReduceRowsJob> ReduceJobs(const Step& step, int64_t length, Float y_type,
                                           Float out_type, Float weights_type,
                                           const std::vector<Array>& y,
                                           const std::vector<Array>& weights,
                                           const std::vector<Array>& out) {
  Jobs<cpu::ReduceRowsJob> jobs;
  for (size_t r = 0; r < step.plans.size(); ++r) {
    auto job = std::make_unique<cpu::ReduceRowsJob>();
    job->tokens = step.shape.tokens;
    job->k = step.shape.k;
    job->slot_rank = step.plans[r].slot_rank.data();
    job->slot = step.plans[r].slot.data();
    job->length = length;
    job->y_type = y_type;
    job->out_type = out_type;
    job->weights_type = weights_type;
    job->y = y[r].rows;
    job->weights = weights.empty() ? nullptr : weights[r].rows.data;
    job->out = out[r].rows;
    jobs.push_back(std::move(job));
  }
  return jobs;
}

// The slices of a ragged exchange: [rank][slice].
struct Ragged {
  int64_t ranks, slices;
  std::vector<Ints> input_offsets, send_sizes, output_offsets, recv_sizes;

  // Random sizes; the operands may overlap, the places in the results do not. Every `result_rows`
  // is just enough.
  Ragged(Random& random, int64_t ranks, int64_t slices, int64_t operand_rows,
         std::vector<int64_t>* result_rows)
      : ranks(ranks), slices(slices) {
    const Ints none(static_cast<size_t>(ranks * slices));
    input_offsets = send_sizes = output_offsets = recv_sizes =
        std::vector<Ints>(static_cast<size_t>(ranks), none);
    result_rows->assign(static_cast<size_t>(ranks), 0);
    for (size_t s = 0; s < input_offsets.size(); ++s) {
      for (size_t i = 0; i < none.size(); ++i) {
        const size_t p = i / static_cast<size_t>(slices);
        const int64_t size = random.OneIn(4) ? 0 : random.Int(0, operand_rows);
        int64_t& end = (*result_rows)[p];
        end += random.Int(0, 2);
        send_sizes[s][i] = static_cast<int32_t>(size);
        input_offsets[s][i] = static_cast<int32_t>(random.Int(0, operand_rows - size));
        output_offsets[s][i] = static_cast<int32_t>(end);
        recv_sizes[p][s * static_cast<size_t>(slices) + i % static_cast<size_t>(slices)] =
            static_cast<int32_t>(size);
        end += size;
      }
    }
  }

  Jobs<cpu::RaggedAllToAllJob> Make(const std::vector<Array>& operand,
                                    const std::vector<Array>& result) const {
    Jobs<cpu::RaggedAllToAllJob> jobs;
    for (size_t r = 0; r < operand.size(); ++r) {
      auto job = std::make_unique<cpu::RaggedAllToAllJob>();
      job->slices_per_rank = slices;
      job->input_offsets = input_offsets[r].data();
      job->send_sizes = send_sizes[r].data();
      job->output_offsets = output_offsets[r].data();
      job->recv_sizes = recv_sizes[r].data();
      job->operand = operand[r].rows;
      job->result = result[r].rows;
      jobs.push_back(std::move(job));
    }
    return jobs;
  }
};

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_SHUFFLE_CASES_H_
