// The handshake on one real GPU: virtual ranks, a stream each. By hand, where there is a GPU:
// prints what fails, and the microseconds of a call that moves nothing.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "xla_ffi/engine/cuda/call_site.h"
#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/runtime.h"

namespace jax_fusco::testing {
namespace {

using cuda::Arena;
using cuda::CallSite;
using std::string;

constexpr int64_t kRowBytes = 4096;
constexpr char kPatient[] = "3";  // seconds, of which meeting takes milliseconds

void Must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::_Exit(1);
}
#define MUST(call) Must((call), #call)

void MustLaunch(cuda::Error error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "FAIL launch: %s\n", error);
  std::_Exit(1);
}

template <typename T>
T* OnGpu(const std::vector<T>& values) {
  void* data = nullptr;
  const size_t bytes = std::max<size_t>(1, values.size()) * sizeof(T);
  MUST(cudaMalloc(&data, bytes));
  if (!values.empty()) {
    MUST(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  return static_cast<T*>(data);
}

// Each rank gathers one row of every rank. Operands are written before a call and overwritten right
// after it, so that a row read too early or too late is seen.
class Ranks {
 public:
  explicit Ranks(int count, int num_calls) : count_(count), num_calls_(num_calls) {
    CHECK(Arena::Create(std::vector<int>(static_cast<size_t>(count), 0), &arena_).ok());
    site_ = CallSite::Create("a_call", arena_.get());
    std::vector<int32_t> all(static_cast<size_t>(count));
    for (int r = 0; r < count; ++r) all[static_cast<size_t>(r)] = r;
    source_rank_ = OnGpu(all);
    source_ = OnGpu(std::vector<int32_t>(static_cast<size_t>(count), 0));
    group_ = OnGpu(std::vector<int32_t>{0});
    for (int r = 0; r < count; ++r) {
      Rank rank;
      rank.rank = OnGpu(std::vector<int32_t>{r});
      rank.operand = OnGpu(std::vector<char>(static_cast<size_t>(kRowBytes)));
      rank.out = OnGpu(std::vector<char>(static_cast<size_t>(OutBytes() * num_calls)));
      MUST(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking));
      ranks_.push_back(rank);
    }
  }
  ~Ranks() {
    Wait();
    for (const Rank& rank : ranks_) {
      for (void* data : {static_cast<void*>(rank.rank), static_cast<void*>(rank.operand),
                         static_cast<void*>(rank.out)}) {
        MUST(cudaFree(data));
      }
      MUST(cudaStreamDestroy(rank.stream));
    }
    for (int32_t* data : {source_rank_, source_, group_}) MUST(cudaFree(data));
  }

  int count() const { return count_; }
  cudaStream_t stream(int r) const { return ranks_[static_cast<size_t>(r)].stream; }
  Status Prepare(int r, int64_t run) {
    const Status status = site_->Prepare(r, run, count_, stream(r));
    MustLaunch(cuda::LaunchGatherRows(GatherArgs(r, 0), nullptr, cuda::kLoadOnly));
    MustLaunch(cuda::LaunchFillIfFailed(nullptr, 0, nullptr, cuda::kLoadOnly));
    return status;
  }

  // Enqueues a call whose rows hold `mark` plus their rank; its result goes to place `n`.
  Status Call(int r, int64_t run, int n, int mark, bool move = true) {
    const Rank& rank = ranks_[static_cast<size_t>(r)];
    if (move) MUST(cudaMemsetAsync(rank.operand, mark + r, kRowBytes, rank.stream));
    cuda::BeginArgs args;
    args.run = run;
    args.rank = rank.rank;
    args.group = group_;
    args.num_ranks = count_;
    args.num_operands = 1;
    args.operand[0] = rank.operand;
    cuda::Table* table = nullptr;
    Status status = site_->Begin(r, args, rank.stream, &table);
    if (!status.ok()) return status;
    const cuda::GatherRowsArgs gather = GatherArgs(r, n);
    if (move) MustLaunch(cuda::LaunchGatherRows(gather, table, rank.stream));
    status = site_->Finish(r, rank.stream);
    if (!move) return status;
    const cuda::Output output = {gather.out, OutBytes()};
    MustLaunch(cuda::LaunchFillIfFailed(&output, 1, table, rank.stream));
    MUST(cudaMemsetAsync(rank.operand, 0xee, kRowBytes, rank.stream));
    return status;
  }
  void Wait() {
    for (const Rank& rank : ranks_) MUST(cudaStreamSynchronize(rank.stream));
  }
  // Whether place `n` of rank r holds the rows of `mark`, or nothing but 0xff where mark is -1.
  bool Holds(int r, int n, int mark) {
    std::vector<unsigned char> out(static_cast<size_t>(OutBytes()));
    MUST(cudaMemcpy(out.data(), ranks_[static_cast<size_t>(r)].out + n * OutBytes(), out.size(),
                    cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < out.size(); ++i) {
      const int row = static_cast<int>(i / static_cast<size_t>(kRowBytes));
      if (out[i] != (mark < 0 ? 0xff : (mark + row) & 0xff)) return false;
    }
    return true;
  }
  void CheckRunWorks(int64_t run) {
    for (int r = 0; r < count_; ++r) CHECK_EQ(Prepare(r, run).message, "");
    for (int n = 0; n < num_calls_; ++n) {
      for (int r = 0; r < count_; ++r) CHECK_EQ(Call(r, run, n, n % 100).message, "");
    }
    Wait();
    int wrong = 0;
    for (int n = 0; n < num_calls_; ++n) {
      for (int r = 0; r < count_; ++r) wrong += !Holds(r, n, n % 100);
    }
    CHECK_EQ(wrong, 0);
  }

 private:
  struct Rank {
    int32_t* rank;
    char* operand;
    char* out;
    cudaStream_t stream;
  };
  int64_t OutBytes() const { return count_ * kRowBytes; }
  cuda::GatherRowsArgs GatherArgs(int r, int n) const {
    cuda::GatherRowsArgs gather;
    gather.num_rows = count_;
    gather.source_rank = source_rank_;
    gather.source = source_;
    gather.peer_rows = 1;
    gather.row_bytes = kRowBytes;
    gather.out = ranks_[static_cast<size_t>(r)].out + n * OutBytes();
    return gather;
  }

  int count_;
  int num_calls_;
  std::unique_ptr<Arena> arena_;
  std::unique_ptr<CallSite> site_;
  std::vector<Rank> ranks_;
  int32_t* source_rank_;
  int32_t* source_;
  int32_t* group_;
};

void DevicesAreFound() {
  std::vector<int> in_use;
  CHECK_EQ(cuda::DevicesInUse(&in_use).message, "");
  CHECK(in_use == std::vector<int>{0});  // main made a context on the first GPU only
  Arena* arena = nullptr;
  CHECK_EQ(Arena::Get(1, &arena).message, "");
}

void RunsWork() {
  for (int count : {1, 2, 4, 8}) {
    Ranks ranks(count, 200);
    for (int64_t run : {7, 5, 6}) ranks.CheckRunWorks(run);
  }
}

void FailuresAreReported() {
  Ranks ranks(4, 3);
  ranks.CheckRunWorks(1);
  setenv("JAX_FUSCO_TIMEOUT_S", "0.3", 1);
  for (int r = 0; r < 4; ++r) CHECK(ranks.Prepare(r, 2).ok());
  for (int n : {0, 1, 2}) {
    for (int r : {0, 1, 3}) CHECK(ranks.Call(r, 2, n, 50).ok());  // rank 2 does not come
  }
  const auto start = std::chrono::steady_clock::now();
  ranks.Wait();
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
  CHECK(waited.count() < 1.5);  // only the first call waits
  setenv("JAX_FUSCO_TIMEOUT_S", kPatient, 1);
  for (int n : {0, 1, 2}) {
    for (int r : {0, 1, 3}) CHECK(ranks.Holds(r, n, -1));
  }
  CHECK(ranks.Call(2, 2, 0, 50).ok());  // late: fails at once
  ranks.Wait();
  CHECK(ranks.Holds(2, 0, -1));
  const string message = ranks.Prepare(0, 3).message;
  CHECK(message.find(" (JAX_FUSCO_TIMEOUT_S) for rank 2 in a_call (enter, call 4)") !=
        string::npos);
  for (int r : {1, 2, 3}) CHECK_EQ(ranks.Prepare(r, 3).message, message);
  ranks.CheckRunWorks(4);
}

void GraphsWork() {
  constexpr int kCalls = 3;
  Ranks ranks(4, kCalls);
  ranks.CheckRunWorks(1);
  std::vector<cudaGraphExec_t> graphs;
  for (int r = 0; r < 4; ++r) {
    CHECK(ranks.Prepare(r, 2).ok());
    MUST(cudaStreamBeginCapture(ranks.stream(r), cudaStreamCaptureModeThreadLocal));
    for (int n = 0; n < kCalls; ++n) CHECK_EQ(ranks.Call(r, 2, n, 10 + n).message, "");
    cudaGraph_t graph;
    MUST(cudaStreamEndCapture(ranks.stream(r), &graph));
    cudaGraphExec_t executable;
    MUST(cudaGraphInstantiate(&executable, graph, 0));
    MUST(cudaGraphUpload(executable, ranks.stream(r)));
    MUST(cudaGraphDestroy(graph));
    graphs.push_back(executable);
  }
  ranks.Wait();
  for (int64_t run = 2; run < 40; ++run) {
    for (int r = 0; r < 4; ++r) CHECK_EQ(ranks.Prepare(r, run).message, "");
    for (int r = 0; r < 4; ++r) {
      if (r == 1 && run % 3 == 0) {  // some launch one by one
        for (int n = 0; n < kCalls; ++n) CHECK(ranks.Call(r, run, n, 10 + n).ok());
      } else {
        MUST(cudaGraphLaunch(graphs[static_cast<size_t>(r)], ranks.stream(r)));
      }
    }
  }
  ranks.Wait();
  for (int r = 0; r < 4; ++r) {
    for (int n = 0; n < kCalls; ++n) CHECK(ranks.Holds(r, n, 10 + n));
    MUST(cudaGraphExecDestroy(graphs[static_cast<size_t>(r)]));
  }
}

void TimesOfAnEmptyCall() {
  constexpr int kCalls = 500;
  for (int count : {1, 2, 4, 8}) {
    Ranks ranks(count, 1);
    ranks.CheckRunWorks(1);
    for (int r = 0; r < count; ++r) CHECK(ranks.Prepare(r, 2).ok());
    const auto start = std::chrono::steady_clock::now();
    for (int n = 0; n < kCalls; ++n) {
      for (int r = 0; r < count; ++r) CHECK(ranks.Call(r, 2, 0, 0, false).ok());
    }
    ranks.Wait();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%d ranks: %.1f us a call, launched by one thread\n", count,
                took.count() * 1e6 / kCalls);
  }
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  // Or streams would share a queue, and a rank wait behind the one that waits for it.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("JAX_FUSCO_TIMEOUT_S", kPatient, 1);
  MUST(cudaSetDevice(0));
  MUST(cudaFree(nullptr));
  return RunTests(argc, argv,
                  {{"DevicesAreFound", DevicesAreFound},
                   {"RunsWork", RunsWork},
                   {"FailuresAreReported", FailuresAreReported},
                   {"GraphsWork", GraphsWork},
                   {"TimesOfAnEmptyCall", TimesOfAnEmptyCall}});
}
