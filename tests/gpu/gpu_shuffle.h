// A whole shuffle of bf16 rows between virtual ranks, in memory of the GPU: plan, dispatch, combine
// and their gradients as calls. Experts do nothing: combine sums the dispatched rows.
#ifndef JAX_FUSCO_TESTS_GPU_GPU_SHUFFLE_H_
#define JAX_FUSCO_TESTS_GPU_GPU_SHUFFLE_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "tests/gpu/gpu_memory.h"
#include "tests/gpu/gpu_ranks.h"
#include "tests/native/naive_plan.h"

namespace jax_fusco::testing {

// k distinct experts a token; with `skew`, expert e is drawn in proportion to 1 / (1 + e).
inline std::vector<Ints> DistinctIds(const PlanShape& shape, bool skew, Random& random) {
  std::vector<double> until;  // running sums of weights
  double sum = 0;
  for (int64_t e = 0; e < shape.num_experts; ++e) {
    sum += skew ? 1.0 / static_cast<double>(1 + e) : 1.0;
    until.push_back(sum);
  }
  std::vector<Ints> ids(static_cast<size_t>(shape.num_ranks));
  for (Ints& of_rank : ids) {
    for (int64_t t = 0; t < shape.tokens; ++t) {
      const auto first = static_cast<int64_t>(of_rank.size());
      while (static_cast<int64_t>(of_rank.size()) < first + shape.k) {
        const double at = static_cast<double>(random.Bits() >> 11) * 0x1p-53 * sum;
        const auto expert = static_cast<int32_t>(
            std::min<int64_t>(std::upper_bound(until.begin(), until.end(), at) - until.begin(),
                              shape.num_experts - 1));
        if (std::find(of_rank.begin() + first, of_rank.end(), expert) == of_rank.end()) {
          of_rank.push_back(expert);
        }
      }
    }
  }
  return ids;
}

// bf16 values of moderate size, from a generator that is fast.
inline std::vector<uint16_t> Bf16Values(int64_t count, Random& random) {
  std::vector<uint16_t> values(static_cast<size_t>(count));
  uint64_t state = random.Bits() | 1;
  for (uint16_t& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const auto bits = static_cast<uint32_t>(state >> 40);
    value = static_cast<uint16_t>((bits & 0x807fu) | (0x7bu + (bits >> 8 & 3u)) << 7);
  }
  return values;
}

class GpuShuffle {
 public:
  GpuShuffle(const PlanShape& shape, int64_t length, const std::vector<Ints>& ids, Random& random)
      : shape_(shape), length_(length) {
    for (const Ints& of_rank : ids) {
      ranks_.push_back(std::make_unique<Rank>(shape, length));
      Rank& rank = *ranks_.back();
      Upload(rank.ids, of_rank.data(), 4 * shape.assignments());
      for (void* rows : {rank.x, rank.g}) {
        Upload(rows, Bf16Values(shape.tokens * length, random).data(), rank.token_bytes);
      }
      std::vector<float> weights(static_cast<size_t>(shape.assignments()));
      for (float& weight : weights) {
        weight = static_cast<float>(random.Int(1, 1 << 20)) * 0x1p-20f;
      }
      Upload(rank.weights, weights.data(), 4 * shape.assignments());
      for (const cuda::Output& result : rank.results) {
        MUST(cudaMemset(result.data, 0xee, static_cast<size_t>(result.bytes)));
      }
    }
  }

  const PlanShape& shape() const { return shape_; }
  int64_t length() const { return length_; }
  int64_t row_bytes() const { return 2 * length_; }
  size_t count() const { return ranks_.size(); }

  // Of rank r, in memory of the GPU.
  const int32_t* ids(size_t r) const { return ranks_[r]->ids; }
  const char* x(size_t r) const { return ranks_[r]->x; }
  const float* weights(size_t r) const { return ranks_[r]->weights; }
  const PlanResults& plan(size_t r) const { return ranks_[r]->plan; }
  const int32_t* chain(size_t r) const { return ranks_[r]->chain; }
  char* rows(size_t r) const { return ranks_[r]->rows; }  // [C, length]
  char* out(size_t r) const { return ranks_[r]->out; }    // [T, length]
  // Everything that the calls write.
  const std::vector<cuda::Output>& results(size_t r) const { return ranks_[r]->results; }

  PlanArrays DownloadPlan(size_t r) const {
    PlanArrays arrays(shape_);
    const PlanResults from = plan(r), to = arrays.Results();
    Download(to.group_sizes, from.group_sizes, 4 * shape_.experts_per_rank());
    Download(to.expert_counts, from.expert_counts, 4 * shape_.experts_per_rank());
    Download(to.slot, from.slot, 4 * shape_.assignments());
    Download(to.slot_rank, from.slot_rank, 4 * shape_.assignments());
    Download(to.source_rank, from.source_rank, 4 * shape_.capacity);
    Download(to.source, from.source, 4 * shape_.capacity);
    Download(to.num_dropped, from.num_dropped, 4);
    Download(to.num_invalid, from.num_invalid, 4);
    return arrays;
  }

  RankCall Plan(size_t r) const {
    const Rank& rank = *ranks_[r];
    cuda::PlanArgs args;
    args.shape = shape_;
    args.expert_ids = rank.ids;
    args.results = rank.plan;
    args.chain = rank.chain;
    args.scratch = rank.scratch;
    return {{rank.scratch},
            [args](cuda::Table* table, cuda::Stream stream) {
              return cuda::LaunchPlanFinish(args, table, stream);
            },
            [args](cuda::Stream stream) { return cuda::LaunchPlanCount(args, stream); },
            {{rank.plan.source, 4 * shape_.capacity}}};
  }
  RankCall Dispatch(size_t r, bool chained = true, bool zero_tail = true) const {
    const Rank& rank = *ranks_[r];
    cuda::GatherRowsArgs args;
    args.num_rows = shape_.capacity;
    args.source_rank = rank.plan.source_rank;
    args.source = rank.plan.source;
    args.chain = chained ? rank.chain : nullptr;
    args.fanout = shape_.k;
    args.zero_tail = zero_tail;
    args.peer_rows = shape_.tokens;
    args.row_bytes = row_bytes();
    args.out = rank.rows;
    return {{rank.x},
            [args](cuda::Table* table, cuda::Stream stream) {
              return cuda::LaunchGatherRows(args, table, stream);
            },
            nullptr,
            {{rank.rows, rank.rows_bytes}}};
  }
  RankCall Combine(size_t r) const {
    const Rank& rank = *ranks_[r];
    return Reduce(rank, rank.rows, rank.weights, rank.out);
  }
  RankCall CombineGradient(size_t r) const {
    const Rank& rank = *ranks_[r];
    cuda::GatherRowsWeightedArgs args;
    args.num_rows = shape_.capacity;
    args.source_rank = rank.plan.source_rank;
    args.source = rank.plan.source;
    args.chain = rank.chain;
    args.tokens = shape_.tokens;
    args.k = shape_.k;
    args.length = length_;
    args.g_type = args.y_type = Float::kBf16;
    args.y = rank.rows;
    args.dy = rank.dy;
    args.dots = rank.dots;
    return {{rank.g, rank.weights},
            [args](cuda::Table* table, cuda::Stream stream) {
              return cuda::LaunchGatherRowsWeighted(args, table, stream);
            },
            nullptr,
            {{rank.dy, rank.rows_bytes}, {rank.dots, 4 * shape_.capacity}}};
  }
  RankCall DispatchGradient(size_t r) const {
    const Rank& rank = *ranks_[r];
    return Reduce(rank, rank.dy, nullptr, rank.dx);
  }

  // A part of a call for every rank.
  template <typename Part>
  std::vector<RankCall> All(const Part& part) const {
    std::vector<RankCall> calls;
    for (size_t r = 0; r < count(); ++r) calls.push_back(part(r));
    return calls;
  }

 private:
  struct Rank {
    int64_t token_bytes, rows_bytes;
    int32_t *ids, *chain;
    float *weights, *dots;
    char *x, *g, *rows, *out, *dy, *dx, *scratch;
    PlanResults plan;
    std::vector<cuda::Output> results;
    std::vector<GpuBytes> memory;

    Rank(const PlanShape& shape, int64_t length)
        : token_bytes(2 * length * shape.tokens), rows_bytes(2 * length * shape.capacity) {
      const int64_t assignments = shape.assignments(), capacity = shape.capacity;
      ids = New<int32_t>(assignments);
      weights = New<float>(assignments);
      x = New<char>(token_bytes);
      g = New<char>(token_bytes);
      scratch = New<char>(cuda::PlanScratchBytes(shape));
      plan.group_sizes = Result<int32_t>(shape.experts_per_rank());
      plan.expert_counts = Result<int32_t>(shape.experts_per_rank());
      plan.slot = Result<int32_t>(assignments);
      plan.slot_rank = Result<int32_t>(assignments);
      plan.source_rank = Result<int32_t>(capacity);
      plan.source = Result<int32_t>(capacity);
      plan.num_dropped = Result<int32_t>(1);
      plan.num_invalid = Result<int32_t>(1);
      chain = Result<int32_t>(capacity);
      rows = Result<char>(rows_bytes);
      out = Result<char>(token_bytes);
      dy = Result<char>(rows_bytes);
      dots = Result<float>(capacity);
      dx = Result<char>(token_bytes);
    }
    template <typename T>
    T* New(int64_t count) {
      memory.emplace_back(count * static_cast<int64_t>(sizeof(T)));
      return reinterpret_cast<T*>(memory.back().data());
    }
    template <typename T>
    T* Result(int64_t count) {
      T* const at = New<T>(count);
      results.push_back({at, count * static_cast<int64_t>(sizeof(T))});
      return at;
    }
  };

  RankCall Reduce(const Rank& rank, const char* rows, const float* weights, char* out) const {
    cuda::ReduceRowsArgs args;
    args.tokens = shape_.tokens;
    args.k = shape_.k;
    args.slot_rank = rank.plan.slot_rank;
    args.slot = rank.plan.slot;
    args.peer_rows = shape_.capacity;
    args.length = length_;
    args.y_type = args.out_type = Float::kBf16;
    args.weights = weights;
    args.out = out;
    return {{rows},
            [args](cuda::Table* table, cuda::Stream stream) {
              return cuda::LaunchReduceRows(args, table, stream);
            },
            nullptr,
            {{out, rank.token_bytes}}};
  }

  PlanShape shape_;
  int64_t length_;
  std::vector<std::unique_ptr<Rank>> ranks_;
};

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_GPU_GPU_SHUFFLE_H_
