// Times on a GPU: everybody in turn, each from a cold cache, with all launches queued before the
// clock starts. Included by .cu files only.
#ifndef JAX_FUSCO_BENCHMARKS_GPU_TIMING_H_
#define JAX_FUSCO_BENCHMARKS_GPU_TIMING_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/gpu_memory.h"

namespace jax_fusco::bench {

// Holds a stream until the host opens the gate, or for two seconds: a host that died must not hold
// the GPU.
static __global__ void HoldStream(const volatile int* open) {
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    __nanosleep(200);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (*open == 0 && now - start < 2000000000u);
}

// What is timed: work for each stream in phases; a phase starts when the one before it has ended on
// all streams. A stream's work is what `enqueue` puts on it.
struct Contestant {
  std::string name;
  std::vector<std::function<void(size_t, cudaStream_t)>> phases;
  std::vector<double> runs_us = {};
};

struct Quartiles {
  double low, median, high;
};
inline Quartiles QuartilesOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    const double place = share * static_cast<double>(values.size() - 1);
    const auto below = static_cast<size_t>(place);
    const size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
  };
  return {at(0.25), at(0.5), at(0.75)};
}

class Clock {
 public:
  explicit Clock(std::vector<cudaStream_t> streams)
      : streams_(std::move(streams)), between_(streams_.size()) {
    MUST(cudaStreamCreateWithFlags(&main_, cudaStreamNonBlocking));
    MUST(cudaEventCreate(&start_));
    MUST(cudaEventCreate(&stop_));
    MUST(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming));
    for (cudaEvent_t& event : between_) {
      MUST(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
    void* open = nullptr;
    MUST(cudaMallocHost(&open, sizeof(int)));
    open_ = static_cast<volatile int*>(open);
    cudaFuncAttributes attributes;
    MUST(cudaFuncGetAttributes(&attributes, HoldStream));
  }
  ~Clock() {
    cudaFreeHost(const_cast<int*>(open_));
    for (cudaEvent_t event : between_) cudaEventDestroy(event);
    for (cudaEvent_t event : {start_, stop_, joined_}) cudaEventDestroy(event);
    cudaStreamDestroy(main_);
  }
  Clock(const Clock&) = delete;

  // One run, in microseconds.
  double Time(const Contestant& contestant, bool cold) {
    MUST(cudaDeviceSynchronize());  // what was uploaded is there
    *open_ = 0;
    if (cold) {
      MUST(cudaMemsetAsync(others_.data(), ++turn_, static_cast<size_t>(others_.size()), main_));
    }
    HoldStream<<<1, 1, 0, main_>>>(open_);
    MUST(cudaGetLastError());
    MUST(cudaEventRecord(start_, main_));
    for (cudaStream_t stream : streams_) MUST(cudaStreamWaitEvent(stream, start_));
    for (size_t phase = 0; phase < contestant.phases.size(); ++phase) {
      if (phase > 0) Meet();
      for (size_t r = 0; r < streams_.size(); ++r) contestant.phases[phase](r, streams_[r]);
    }
    for (size_t r = 0; r < streams_.size(); ++r) {
      MUST(cudaEventRecord(between_[r], streams_[r]));
      MUST(cudaStreamWaitEvent(main_, between_[r]));
    }
    MUST(cudaEventRecord(stop_, main_));
    *open_ = 1;
    MUST(cudaStreamSynchronize(main_));
    float milliseconds = 0;
    MUST(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return milliseconds * 1e3;
  }
  // All of them, once a round, in an order drawn anew each time; the first round does not count.
  void InTurn(std::vector<Contestant>* contestants, int rounds, bool cold) {
    std::vector<Contestant*> order;
    for (Contestant& contestant : *contestants) order.push_back(&contestant);
    for (int round = 0; round <= rounds; ++round) {
      std::shuffle(order.begin(), order.end(), random_);
      for (Contestant* contestant : order) {
        const double us = Time(*contestant, cold);
        if (round > 0) contestant->runs_us.push_back(us);
      }
    }
  }

 private:
  void Meet() {
    for (size_t r = 0; r < streams_.size(); ++r) {
      MUST(cudaEventRecord(between_[r], streams_[r]));
      MUST(cudaStreamWaitEvent(main_, between_[r]));
    }
    MUST(cudaEventRecord(joined_, main_));
    for (cudaStream_t stream : streams_) MUST(cudaStreamWaitEvent(stream, joined_));
  }

  std::vector<cudaStream_t> streams_;
  std::vector<cudaEvent_t> between_;
  cudaStream_t main_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr, joined_ = nullptr;
  volatile int* open_ = nullptr;
  testing::GpuBytes others_{256 << 20};  // more than caches hold
  int turn_ = 0;
  std::mt19937 random_{0};
};

}  // namespace jax_fusco::bench

#endif  // JAX_FUSCO_BENCHMARKS_GPU_TIMING_H_
