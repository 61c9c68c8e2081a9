// Plan, dispatch, combine and their gradients in a row, each from what the one before left: against
// literal loops, then again and again, from CUDA graphs too, to the same bits. Included by .cu
// files only.
#ifndef JAX_FUSCO_TESTS_GPU_WHOLE_SHUFFLES_H_
#define JAX_FUSCO_TESTS_GPU_WHOLE_SHUFFLES_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tests/gpu/gpu_memory.h"
#include "tests/gpu/gpu_ranks.h"
#include "tests/gpu/gpu_shuffle.h"
#include "tests/native/check.h"
#include "tests/native/cuda/rank_cases.h"
#include "tests/native/floats.h"
#include "tests/native/naive_plan.h"

namespace jax_fusco::testing {

// The calls of a step, in their order: [call][rank].
inline std::vector<std::vector<RankCall>> CallsOf(const GpuShuffle& shuffle) {
  return {shuffle.All([&](size_t r) { return shuffle.Plan(r); }),
          shuffle.All([&](size_t r) { return shuffle.Dispatch(r); }),
          shuffle.All([&](size_t r) { return shuffle.Combine(r); }),
          shuffle.All([&](size_t r) { return shuffle.CombineGradient(r); }),
          shuffle.All([&](size_t r) { return shuffle.DispatchGradient(r); })};
}

// Enqueues the calls of rank r, each at its own site.
inline void EnqueueStep(GpuRanks* ranks, const std::vector<std::vector<RankCall>>& calls,
                        size_t r) {
  for (size_t i = 0; i < calls.size(); ++i) ranks->Enqueue(i, r, calls[i][r]);
}
inline void StartStep(GpuRanks* ranks, const std::vector<std::vector<RankCall>>& calls) {
  std::vector<RankCall> all;
  for (const auto& of_ranks : calls) all.insert(all.end(), of_ranks.begin(), of_ranks.end());
  ranks->StartRun(calls.size(), all);
}
inline void RunStep(GpuRanks* ranks, const std::vector<std::vector<RankCall>>& calls) {
  MUST(cudaDeviceSynchronize());
  if (ranks->by_hand()) {
    for (const auto& of_ranks : calls) {
      std::vector<cuda::Table> tables(ranks->count());
      ranks->Call(of_ranks, &tables);
    }
    return;
  }
  StartStep(ranks, calls);
  for (size_t r = 0; r < ranks->count(); ++r) EnqueueStep(ranks, calls, r);
  ranks->Wait();
}

// The same step, recorded once for each rank.
class Graphs {
 public:
  Graphs(GpuRanks* ranks, const std::vector<std::vector<RankCall>>& calls) : ranks_(ranks) {
    StartStep(ranks, calls);
    for (size_t r = 0; r < ranks->count(); ++r) {
      cudaGraph_t graph;
      MUST(cudaStreamBeginCapture(ranks->stream(r), cudaStreamCaptureModeThreadLocal));
      EnqueueStep(ranks, calls, r);
      MUST(cudaStreamEndCapture(ranks->stream(r), &graph));
      cudaGraphExec_t executable;
      MUST(cudaGraphInstantiate(&executable, graph, 0));
      MUST(cudaGraphUpload(executable, ranks->stream(r)));
      MUST(cudaGraphDestroy(graph));
      executables_.push_back(executable);
    }
    ranks->Wait();
  }
  ~Graphs() {
    for (cudaGraphExec_t executable : executables_) cudaGraphExecDestroy(executable);
  }
  Graphs(const Graphs&) = delete;

  void Launch(size_t r) const { MUST(cudaGraphLaunch(executables_[r], ranks_->stream(r))); }

 private:
  GpuRanks* ranks_;
  std::vector<cudaGraphExec_t> executables_;
};

static __global__ void CountDifferent(const uint32_t* a, const uint32_t* b, int64_t words,
                                      unsigned long long* count) {
  unsigned long long mine = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < words;
       i += step) {
    mine += a[i] != b[i];
  }
  if (mine > 0) atomicAdd(count, mine);
}

// What a step has written, to compare with later ones.
class Kept {
 public:
  explicit Kept(const GpuShuffle& shuffle) : shuffle_(shuffle) {
    for (size_t r = 0; r < shuffle.count(); ++r) {
      for (const cuda::Output& result : shuffle.results(r)) {
        copies_.emplace_back(result.bytes);
        MUST(cudaMemcpy(copies_.back().data(), result.data, static_cast<size_t>(result.bytes),
                        cudaMemcpyDeviceToDevice));
      }
    }
    MUST(cudaDeviceSynchronize());
  }
  // Overwrites what will be compared.
  void Poison() const {
    for (size_t r = 0; r < shuffle_.count(); ++r) {
      for (const cuda::Output& result : shuffle_.results(r)) {
        MUST(cudaMemsetAsync(result.data, 0xcd, static_cast<size_t>(result.bytes)));
      }
    }
    MUST(cudaDeviceSynchronize());
  }
  int64_t Different() const {
    MUST(cudaMemset(count_.data(), 0, sizeof(unsigned long long)));
    size_t i = 0;
    for (size_t r = 0; r < shuffle_.count(); ++r) {
      for (const cuda::Output& result : shuffle_.results(r)) {
        CHECK(result.bytes % 4 == 0);
        CountDifferent<<<1024, 256>>>(static_cast<const uint32_t*>(result.data),
                                      reinterpret_cast<const uint32_t*>(copies_[i++].data()),
                                      result.bytes / 4,
                                      reinterpret_cast<unsigned long long*>(count_.data()));
      }
    }
    MUST(cudaGetLastError());
    unsigned long long count = 0;
    Download(&count, count_.data(), sizeof(count));
    return static_cast<int64_t>(count);
  }

 private:
  const GpuShuffle& shuffle_;
  GpuBytes count_{sizeof(unsigned long long)};
  std::vector<GpuBytes> copies_;
};

// Rows of bf16, brought back.
using Bf16 = std::vector<uint16_t>;
inline std::vector<Bf16> DownloadRows(const GpuShuffle& shuffle, int result_from_end,
                                      int64_t count) {
  std::vector<Bf16> rows;
  for (size_t r = 0; r < shuffle.count(); ++r) {
    const auto& results = shuffle.results(r);
    const void* const from = results[results.size() - static_cast<size_t>(result_from_end)].data;
    rows.push_back(Downloaded(static_cast<const uint16_t*>(from), count * shuffle.length()));
  }
  return rows;
}

// out[t] = sum over j of weight * y[slot]: in float, each term one fma, in bf16 at last.
inline void CheckSums(const GpuShuffle& shuffle, const PlanArrays& plan,
                      const std::vector<float>& weights, const std::vector<Bf16>& y,
                      const Bf16& out, Random& random) {
  const int64_t k = shuffle.shape().k, length = shuffle.length();
  const int64_t tokens = std::min<int64_t>(shuffle.shape().tokens, 50);
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t t = random.Int(0, shuffle.shape().tokens - 1);
    Bf16 expected(static_cast<size_t>(length));
    for (int64_t c = 0; c < length; ++c) {
      float sum = 0;
      for (int64_t a = t * k; a < (t + 1) * k; ++a) {
        const int32_t slot = plan.slot[static_cast<size_t>(a)];
        if (slot < 0) continue;
        const Bf16& rows = y[static_cast<size_t>(plan.slot_rank[static_cast<size_t>(a)])];
        const auto value = static_cast<float>(Get(rows.data(), slot * length + c, Float::kBf16));
        sum = std::fma(weights.empty() ? 1.0f : weights[static_cast<size_t>(a)], value, sum);
      }
      Put(expected.data(), c, Float::kBf16, sum);
    }
    CheckSame(out.data() + t * length, expected.data(), length, Float::kBf16, "a sum");
  }
}

inline void CheckStep(const GpuShuffle& shuffle, const std::vector<Ints>& ids, Random& random) {
  const PlanShape& shape = shuffle.shape();
  const int64_t length = shuffle.length();
  const std::vector<PlanArrays> plans = NaivePlan(shape, ids);
  const std::vector<Bf16> rows = DownloadRows(shuffle, 5, shape.capacity);
  const std::vector<Bf16> out = DownloadRows(shuffle, 4, shape.tokens);
  const std::vector<Bf16> dy = DownloadRows(shuffle, 3, shape.capacity);
  const std::vector<Bf16> dx = DownloadRows(shuffle, 1, shape.tokens);
  std::vector<std::vector<char>> x;
  for (size_t r = 0; r < shuffle.count(); ++r) {
    x.push_back(Downloaded(shuffle.x(r), shape.tokens * shuffle.row_bytes()));
  }
  for (size_t r = 0; r < shuffle.count(); ++r) {
    CheckSamePlan(shuffle.DownloadPlan(r), plans[r]);
    CHECK_EQ(Downloaded(shuffle.chain(r), shape.capacity), NaiveChain(shape, plans[r]));
    int64_t wrong = 0;
    const std::vector<char> zeros(static_cast<size_t>(shuffle.row_bytes()), '\0');
    for (int64_t m = 0; m < shape.capacity; ++m) {
      const int64_t source = plans[r].source[static_cast<size_t>(m)];
      const char* from = zeros.data();
      if (source >= 0) {
        const auto s = static_cast<size_t>(plans[r].source_rank[static_cast<size_t>(m)]);
        from = x[s].data() + source / shape.k * shuffle.row_bytes();
      }
      wrong += std::memcmp(rows[r].data() + m * length, from, zeros.size()) != 0;
    }
    CHECK_EQ(wrong, 0);
    const std::vector<float> weights = Downloaded(shuffle.weights(r), shape.assignments());
    CheckSums(shuffle, plans[r], weights, rows, out[r], random);
    CheckSums(shuffle, plans[r], {}, dy, dx[r], random);
  }
}

inline void CheckWholeShuffle(GpuRanks* ranks, PlanShape shape, int64_t length,
                              const std::vector<Ints>& ids, int repeats, Random& random) {
  const GpuShuffle shuffle(shape, length, ids, random);
  const auto calls = CallsOf(shuffle);
  RunStep(ranks, calls);
  CheckStep(shuffle, ids, random);
  const Kept kept(shuffle);
  int64_t different = 0;
  for (int i = 0; i < repeats; ++i) {
    kept.Poison();
    RunStep(ranks, calls);
    different += kept.Different();
  }
  CHECK_EQ(different, 0);
  if (ranks->by_hand()) return;
  const Graphs graphs(ranks, calls);
  for (int i = 0; i < repeats; ++i) {
    kept.Poison();
    StartStep(ranks, calls);
    for (size_t r = 0; r < ranks->count(); ++r) {
      // Some launch one by one where the others replay.
      if (i % 4 == 3 && r == 1) {
        EnqueueStep(ranks, calls, r);
      } else {
        graphs.Launch(r);
      }
    }
    ranks->Wait();
    different += kept.Different();
  }
  CHECK_EQ(different, 0);
}

inline void CheckWholeShuffles(GpuRanks* ranks, bool small) {
  Random random(20);
  const auto count = static_cast<int64_t>(ranks->count());
  const int repeats = small ? 1 : 50;
  for (const int64_t tokens : {1, 8}) {  // decoding
    const PlanShape shape{count, tokens, 8, 128, count * tokens * 8, 1};
    CheckWholeShuffle(ranks, shape, small ? 1024 : 7168, DistinctIds(shape, false, random), repeats,
                      random);
  }
  PlanShape shape{count, small ? 20 : 300, 4, 32, 0, 8};
  shape.capacity = shape.tokens * 4;
  CheckWholeShuffle(ranks, shape, small ? 40 : 2880, RandomIds(shape, random), repeats, random);
  if (small) return;
  shape = {count, 4096, 8, 128, 0, 128};
  shape.capacity = shape.tokens * 10 + shape.experts_per_rank() * 64;
  for (const bool skew : {false, true}) {
    CheckWholeShuffle(ranks, shape, 2048, DistinctIds(shape, skew, random), repeats, random);
  }
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_GPU_WHOLE_SHUFFLES_H_
