// Virtual ranks on one GPU, a stream each, that meet as the devices of a process do.
#ifndef JAX_FUSCO_TESTS_GPU_GPU_RANKS_H_
#define JAX_FUSCO_TESTS_GPU_GPU_RANKS_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/gpu/gpu_memory.h"
#include "xla_ffi/engine/cuda/arena.h"
#include "xla_ffi/engine/cuda/call_site.h"
#include "xla_ffi/engine/cuda/kernels.h"

namespace jax_fusco::testing {

// Enqueues launches; with kLoadOnly it only loads them.
using Before = std::function<cuda::Error(cuda::Stream)>;
using Move = std::function<cuda::Error(cuda::Table*, cuda::Stream)>;

// What one rank brings to a call.
struct RankCall {
  std::vector<const void*> operands;  // that peers read
  Move move;
  Before before;                      // null: nothing
  std::vector<cuda::Output> outputs;  // filled if the call fails
};

class GpuRanks {
 public:
  // By hand: the tables are written by the host, and the ranks come one after another, so that
  // tools may run one kernel at a time.
  GpuRanks(size_t count, bool by_hand) : by_hand_(by_hand) {
    MUST(cuda::Arena::Create(std::vector<int>(count, 0), &arena_));
    for (size_t r = 0; r < count; ++r) {
      ranks_.emplace_back(std::make_unique<Rank>(static_cast<int32_t>(r)));
    }
  }
  ~GpuRanks() {
    Wait();
    sites_.clear();
  }
  GpuRanks(const GpuRanks&) = delete;

  size_t count() const { return ranks_.size(); }
  bool by_hand() const { return by_hand_; }
  cudaStream_t stream(size_t r) const { return ranks_[r]->stream; }
  void Wait() const {
    for (const auto& rank : ranks_) MUST(cudaStreamSynchronize(rank->stream));
  }

  // One call of all ranks. `tables` get what the movers left in them; a failure that one holds
  // before is what the movers see.
  void Call(const std::vector<RankCall>& calls, std::vector<cuda::Table>* tables) {
    MUST(cudaDeviceSynchronize());  // what was uploaded is there
    const bool failed = std::any_of(tables->begin(), tables->end(),
                                    [](const cuda::Table& table) { return table.failure != 0; });
    if (by_hand_ || failed) return CallByHand(calls, tables);
    StartRun(1, calls);
    for (size_t r = 0; r < count(); ++r) Enqueue(0, r, calls[r], true);
    Wait();
    for (size_t r = 0; r < count(); ++r) (*tables)[r] = *ranks_[r]->seen;
  }

  // Before the first Enqueue of a run that has calls at sites 0 to n - 1.
  void StartRun(size_t num_sites, const std::vector<RankCall>& calls) {
    while (sites_.size() < num_sites) {
      sites_.push_back(
          cuda::CallSite::Create("call_" + std::to_string(sites_.size()), arena_.get()));
    }
    for (const RankCall& call : calls) {
      if (call.before) MUST(call.before(cuda::kLoadOnly));
      MUST(call.move(nullptr, cuda::kLoadOnly));
    }
    MUST(cuda::LaunchFillIfFailed(nullptr, 0, nullptr, cuda::kLoadOnly));
    ++run_;
    if (!Prepare(num_sites).ok()) {  // an earlier run's failure, said once
      ++run_;
      MUST(Prepare(num_sites));
    }
  }
  void Enqueue(size_t site, size_t r, const RankCall& call, bool see_table = false) {
    Rank& rank = *ranks_[r];
    if (call.before) MUST(call.before(rank.stream));
    cuda::BeginArgs args;
    args.run = run_;
    args.rank = reinterpret_cast<const int32_t*>(rank.number.data());
    args.group = args.rank + 1;
    args.num_ranks = static_cast<int64_t>(count());
    args.num_operands = static_cast<int>(call.operands.size());
    std::copy(call.operands.begin(), call.operands.end(), args.operand);
    cuda::Table* table = nullptr;
    MUST(sites_[site]->Begin(static_cast<int>(r), args, rank.stream, &table));
    MUST(call.move(table, rank.stream));
    if (see_table) {
      MUST(cudaMemcpyAsync(rank.seen, table, TableSize(), cudaMemcpyDeviceToHost, rank.stream));
    }
    MUST(sites_[site]->Finish(static_cast<int>(r), rank.stream));
    if (call.outputs.empty()) return;
    MUST(cuda::LaunchFillIfFailed(call.outputs.data(), static_cast<int>(call.outputs.size()), table,
                                  rank.stream));
  }

  // A table as Enter would leave it, for movers without the handshake. It lives as long as this.
  cuda::Table* TableByHand(const std::vector<RankCall>& calls, size_t r, cuda::Table table = {}) {
    table.rank = static_cast<int32_t>(r);
    table.num_ranks = static_cast<int32_t>(count());
    for (size_t p = 0; p < count(); ++p) {
      std::copy(calls[p].operands.begin(), calls[p].operands.end(), table.operand[p]);
    }
    ranks_[r]->tables.emplace_back(static_cast<int64_t>(sizeof(cuda::Table)));
    auto* const at = reinterpret_cast<cuda::Table*>(ranks_[r]->tables.back().data());
    Upload(at, &table, sizeof(table));
    return at;
  }

 private:
  struct Rank {
    cudaStream_t stream = nullptr;
    GpuBytes number{2 * sizeof(int32_t)};  // and the group
    cuda::Table* seen = nullptr;           // in the host's memory
    std::vector<GpuBytes> tables;

    explicit Rank(int32_t r) {
      const int32_t numbers[] = {r, 0};
      Upload(number.data(), numbers, sizeof(numbers));
      MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      void* memory = nullptr;
      MUST(cudaMallocHost(&memory, sizeof(cuda::Table)));
      seen = new (memory) cuda::Table{};
    }
    ~Rank() {
      cudaStreamDestroy(stream);
      cudaFreeHost(seen);
    }
  };

  size_t TableSize() const {
    return static_cast<size_t>(cuda::TableBytes(static_cast<int>(count())));
  }
  Status Prepare(size_t num_sites) {
    Status last = Status::Ok();
    for (size_t site = 0; site < num_sites; ++site) {
      for (size_t r = 0; r < count(); ++r) {
        const Status status = sites_[site]->Prepare(static_cast<int>(r), run_,
                                                    static_cast<int64_t>(count()), stream(r));
        if (!status.ok()) last = status;
      }
    }
    return last;
  }
  void CallByHand(const std::vector<RankCall>& calls, std::vector<cuda::Table>* tables) {
    for (const RankCall& call : calls) {
      if (call.before) MUST(call.before(stream(0)));
    }
    for (size_t r = 0; r < count(); ++r) {
      cuda::Table* const table = TableByHand(calls, r, (*tables)[r]);
      MUST(cudaDeviceSynchronize());
      MUST(calls[r].move(table, stream(0)));
      MUST(cudaDeviceSynchronize());
      Download(&(*tables)[r], table, sizeof(*table));
    }
    for (auto& rank : ranks_) rank->tables.clear();
  }

  bool by_hand_;
  int64_t run_ = 0;
  std::unique_ptr<cuda::Arena> arena_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  std::vector<std::unique_ptr<cuda::CallSite>> sites_;
};

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_GPU_GPU_RANKS_H_
