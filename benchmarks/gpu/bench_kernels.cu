// Bandwidth of the CUDA engine's movers on one GPU, with 1, 4 and 8 virtual ranks, beside copies of
// the same bytes and the rival of three passes; latencies of small calls. Results are compared
// first. bench_kernels [RESULTS.json [ROUNDS]]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "benchmarks/gpu/permute_copy_permute.h"
#include "benchmarks/gpu/timing.h"
#include "tests/gpu/gpu_memory.h"
#include "tests/gpu/gpu_ranks.h"
#include "tests/gpu/gpu_shuffle.h"
#include "tests/gpu/whole_shuffles.h"
#include "tests/native/check.h"
#include "tests/native/naive_plan.h"

namespace jax_fusco::bench {
namespace {

using testing::GpuRanks;
using testing::Random;
using testing::RankCall;

struct Model {
  const char* name;
  int64_t length, experts, k, tokens;  // tokens of each rank
};
constexpr Model kModels[] = {{"qwen3-30b-a3b", 2048, 128, 8, 4096},
                             {"deepseek-v3", 7168, 256, 8, 2048},
                             {"gpt-oss-120b", 2880, 128, 4, 4096},
                             {"mixtral-8x7b", 4096, 8, 2, 4096}};

// What one operation took, and the bytes that it must read and write.
struct Record {
  std::string model, routing, op;
  int64_t ranks, tokens, read, written;
  std::vector<Contestant> contestants;
};

// The device's memory, copied and set.
class Limits {
 public:
  // Before Of is asked for no more bytes than these.
  void Reserve(int64_t read, int64_t written) {
    Grow(&from_, (read + written) / 2);
    Grow(&to_, std::max((read + written) / 2, written));
  }
  // The contestants that move as many bytes in all, and write as many.
  std::vector<Contestant> Of(int64_t read, int64_t written) const {
    const int64_t half = (read + written) / 2;
    char* const from = from_->data();
    char* const to = to_->data();
    const auto on_first = [](const auto& enqueue) {
      return [enqueue](size_t r, cudaStream_t stream) {
        if (r == 0) MUST(enqueue(stream));
      };
    };
    return {{"copy", {on_first([=](cudaStream_t stream) {
               return cudaMemcpyAsync(to, from, static_cast<size_t>(half), cudaMemcpyDeviceToDevice,
                                      stream);
             })}},
            {"memset", {on_first([=](cudaStream_t stream) {
               return cudaMemsetAsync(to, 7, static_cast<size_t>(written), stream);
             })}}};
  }

 private:
  static void Grow(std::unique_ptr<GpuBytes>* bytes, int64_t size) {
    if (*bytes != nullptr && (*bytes)->size() >= size) return;
    bytes->reset();
    *bytes = std::make_unique<GpuBytes>(size);
    MUST(cudaMemset((*bytes)->data(), 1, static_cast<size_t>(size)));
  }
  std::unique_ptr<GpuBytes> from_, to_;
};

// The movers of a call by themselves, as if the ranks had met.
Contestant Alone(GpuRanks* ranks, const std::string& name, const std::vector<RankCall>& calls) {
  std::vector<cuda::Table*> tables;
  for (size_t r = 0; r < ranks->count(); ++r) tables.push_back(ranks->TableByHand(calls, r));
  return {name, {[calls, tables](size_t r, cudaStream_t stream) {
            MUST(calls[r].move(tables[r], stream));
          }}};
}
// Calls as XLA would make them, one after another.
Contestant Whole(GpuRanks* ranks, const std::string& name,
                 const std::vector<std::vector<RankCall>>& calls) {
  return {name,
          {[ranks, calls](size_t r, cudaStream_t) { testing::EnqueueStep(ranks, calls, r); }}};
}

class Case {
 public:
  Case(const Model& model, int64_t num_ranks, int64_t tokens, bool skew, Random& random)
      : model_(model), skew_(skew), ranks_(static_cast<size_t>(num_ranks), false) {
    PlanShape shape{num_ranks, tokens, model.k, model.experts, 0, 1};
    ids_ = testing::DistinctIds(shape, skew, random);
    std::vector<int64_t> load(static_cast<size_t>(num_ranks), 0);
    for (const Ints& of_rank : ids_) {
      for (int32_t id : of_rank) ++load[static_cast<size_t>(id / shape.experts_per_rank())];
    }
    shape.capacity = RoundUp(*std::max_element(load.begin(), load.end()), 8);
    shuffle_ = std::make_unique<GpuShuffle>(shape, model.length, ids_, random);
    calls_ = testing::CallsOf(*shuffle_);
    testing::RunStep(&ranks_, calls_);
    testing::CheckStep(*shuffle_, ids_, random);
    for (size_t r = 0; r < ranks_.count(); ++r) {
      plans_.push_back(shuffle_->DownloadPlan(r));
      for (int32_t source : plans_.back().source) filled_ += source >= 0;
      for (int32_t link : testing::Downloaded(shuffle_->chain(r), shape.capacity))
        heads_ += link > 0;
    }
    std::vector<cudaStream_t> streams;
    for (size_t r = 0; r < ranks_.count(); ++r) streams.push_back(ranks_.stream(r));
    clock_ = std::make_unique<Clock>(streams);
    testing::StartStep(&ranks_, calls_);
  }

  // Rows of kilobytes: bandwidth.
  std::vector<Record> Large(Limits* limits, int rounds) {
    const int64_t row = shuffle_->row_bytes();
    const int64_t sums = shuffle_->shape().num_ranks * shuffle_->shape().tokens * row;
    const auto dispatch = [&](bool chained) {
      return shuffle_->All([&](size_t r) { return shuffle_->Dispatch(r, chained, false); });
    };
    PermuteCopyPermute rival(*shuffle_, plans_);
    CheckRival(&rival);
    std::vector<Record> records;
    records.push_back(New("dispatch", heads_ * row, filled_ * row));
    records.back().contestants = {
        Alone(&ranks_, "gather_rows", dispatch(true)),
        Alone(&ranks_, "gather_rows, no chains", dispatch(false)),
        Whole(&ranks_, "the call", {dispatch(true)}),
        rival.Dispatch(),
    };
    records.push_back(New("combine", filled_ * row, sums));
    records.back().contestants = {Alone(&ranks_, "reduce_rows", calls_[2]),
                                  Whole(&ranks_, "the call", {calls_[2]}), rival.Combine()};
    records.push_back(New("combine's gradient", (heads_ + filled_) * row, filled_ * row));
    records.back().contestants = {Alone(&ranks_, "gather_rows_weighted", calls_[3]),
                                  Whole(&ranks_, "the call", {calls_[3]})};
    const std::vector<RankCall> exchange = rival.Exchange();
    CheckExchange(&rival, exchange);
    records.push_back(New("exchange", filled_ * row, filled_ * row));
    records.back().contestants = {Alone(&ranks_, "ragged_all_to_all", exchange),
                                  Whole(&ranks_, "the call", {exchange}), rival.Copies()};
    for (const Record& record : records) limits->Reserve(record.read, record.written);
    for (Record& record : records) {
      for (Contestant& limit : limits->Of(record.read, record.written)) {
        record.contestants.push_back(limit);
      }
    }
    records.push_back(New("plan", 0, 0));
    records.back().contestants = {Whole(&ranks_, "the call", {calls_[0]})};
    for (Record& record : records) clock_->InTurn(&record.contestants, rounds, true);
    return records;
  }
  // A token or some: latency, in warm caches.
  std::vector<Record> Small(int rounds) {
    RankCall nothing;
    nothing.move = [](cuda::Table*, cuda::Stream) -> cuda::Error { return nullptr; };
    const std::vector<RankCall> empty(ranks_.count(), nothing);
    Record record = New("calls", 0, 0);
    record.contestants = {
        Whole(&ranks_, "enter and leave", {empty}), Whole(&ranks_, "plan", {calls_[0]}),
        Whole(&ranks_, "dispatch", {calls_[1]}), Whole(&ranks_, "combine", {calls_[2]}),
        Whole(&ranks_, "plan, dispatch, combine", {calls_[0], calls_[1], calls_[2]})};
    clock_->InTurn(&record.contestants, rounds, false);
    return {record};
  }

 private:
  Record New(const char* op, int64_t read, int64_t written) const {
    const PlanShape& shape = shuffle_->shape();
    return {
        model_.name, skew_ ? "zipf" : "uniform", op, shape.num_ranks, shape.tokens, read, written,
        {}};
  }
  void Run(const Contestant& contestant) { clock_->Time(contestant, false); }
  void CheckSame(const char* what, const char* a, const char* b, int64_t bytes) {
    if (testing::Downloaded(a, bytes) == testing::Downloaded(b, bytes)) return;
    testing::Fail(__FILE__, __LINE__, std::string(model_.name) + ": another result of " + what);
  }
  void CheckRival(PermuteCopyPermute* rival) {
    Run(rival->Dispatch());
    Run(rival->Combine());
    const PlanShape& shape = shuffle_->shape();
    for (size_t r = 0; r < ranks_.count(); ++r) {
      CheckSame("dispatch", rival->rows(r), shuffle_->rows(r), shape.capacity * 2 * model_.length);
      CheckSame("combine", rival->out(r), shuffle_->out(r), shape.tokens * 2 * model_.length);
    }
  }
  void CheckExchange(PermuteCopyPermute* rival, const std::vector<RankCall>& exchange) {
    const int64_t bytes = shuffle_->shape().capacity * shuffle_->row_bytes();
    std::vector<std::vector<char>> copied;
    // While the clock holds a stream nothing can be loaded.
    for (const RankCall& call : exchange) MUST(call.move(nullptr, cuda::kLoadOnly));
    for (const Contestant& way : {rival->Copies(), Whole(&ranks_, "", {exchange})}) {
      for (size_t r = 0; r < ranks_.count(); ++r) rival->ClearReceived(r);
      MUST(cudaDeviceSynchronize());
      Run(way);
      for (size_t r = 0; r < ranks_.count(); ++r) {
        copied.push_back(testing::Downloaded(rival->received(r), bytes));
      }
    }
    for (size_t r = 0; r < ranks_.count(); ++r) {
      if (copied[r] == copied[r + ranks_.count()]) continue;
      testing::Fail(__FILE__, __LINE__, std::string(model_.name) + ": another result of exchange");
    }
  }

  Model model_;
  bool skew_;
  GpuRanks ranks_;
  std::vector<Ints> ids_;
  std::unique_ptr<GpuShuffle> shuffle_;
  std::vector<std::vector<RankCall>> calls_;
  std::vector<PlanArrays> plans_;
  std::unique_ptr<Clock> clock_;
  int64_t filled_ = 0;  // rows of all ranks that hold a token
  int64_t heads_ = 0;   // those that are read
};

void Print(const Record& record) {
  double copy = 0;
  for (const Contestant& contestant : record.contestants) {
    if (contestant.name == "copy") copy = QuartilesOf(contestant.runs_us).median;
  }
  std::printf("%s, %s, %d ranks x %d tokens, %s: %.1f MB read, %.1f MB written\n",
              record.model.c_str(), record.routing.c_str(), static_cast<int>(record.ranks),
              static_cast<int>(record.tokens), record.op.c_str(),
              static_cast<double>(record.read) / 1e6, static_cast<double>(record.written) / 1e6);
  for (const Contestant& contestant : record.contestants) {
    const Quartiles us = QuartilesOf(contestant.runs_us);
    std::printf("  %-32s %10.1f us  (%.1f to %.1f)", contestant.name.c_str(), us.median, us.low,
                us.high);
    if (copy > 0 && contestant.name != "memset") std::printf("  %.3f of copy", copy / us.median);
    std::printf("\n");
  }
  std::fflush(stdout);
}

void Write(const std::vector<Record>& records, const char* gpu, const char* path) {
  std::FILE* const file = std::fopen(path, "w");
  if (file == nullptr) {
    std::fprintf(stderr, "cannot write %s\n", path);
    std::_Exit(1);
  }
  std::fprintf(file, "{\"gpu\": \"%s\", \"failures\": %d, \"records\": [", gpu,
               static_cast<int>(testing::failures));
  for (size_t i = 0; i < records.size(); ++i) {
    const Record& record = records[i];
    std::fprintf(file,
                 "%s\n {\"model\": \"%s\", \"routing\": \"%s\", \"op\": \"%s\", \"ranks\": %d, "
                 "\"tokens\": %d, \"read_bytes\": %lld, \"written_bytes\": %lld, \"us\": {",
                 i == 0 ? "" : ",", record.model.c_str(), record.routing.c_str(), record.op.c_str(),
                 static_cast<int>(record.ranks), static_cast<int>(record.tokens),
                 static_cast<long long>(record.read), static_cast<long long>(record.written));
    for (size_t c = 0; c < record.contestants.size(); ++c) {
      const Contestant& contestant = record.contestants[c];
      const Quartiles us = QuartilesOf(contestant.runs_us);
      std::fprintf(file, "%s\"%s\": {\"median\": %.3f, \"p25\": %.3f, \"p75\": %.3f, \"runs\": [",
                   c == 0 ? "" : ", ", contestant.name.c_str(), us.median, us.low, us.high);
      for (size_t n = 0; n < contestant.runs_us.size(); ++n) {
        std::fprintf(file, "%s%.2f", n == 0 ? "" : ", ", contestant.runs_us[n]);
      }
      std::fprintf(file, "]}");
    }
    std::fprintf(file, "}}");
  }
  std::fprintf(file, "\n]}\n");
  std::fclose(file);
}

int Main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("JAX_FUSCO_TIMEOUT_S", "10", 1);
  const char* const path = argc > 1 ? argv[1] : "bench_kernels.json";
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 15;
  MUST(cudaSetDevice(0));
  cudaDeviceProp properties;
  MUST(cudaGetDeviceProperties(&properties, 0));
  Random random(1);
  std::vector<Record> records;
  const auto add = [&](const std::vector<Record>& found) {
    for (const Record& record : found) Print(record);
    records.insert(records.end(), found.begin(), found.end());
    Write(records, properties.name, path);  // what an interrupted run leaves
  };
  // The quick ones first: a run may be cut short.
  for (int64_t ranks : {1, 8}) {
    for (int64_t tokens : {1, 8, 64, 128}) {
      add(Case(kModels[0], ranks, tokens, false, random).Small(3 * rounds));
    }
  }
  Limits limits;
  for (const Model& model : kModels) {
    for (int64_t ranks : {1, 4, 8}) {
      add(Case(model, ranks, model.tokens, false, random).Large(&limits, rounds));
    }
  }
  add(Case(kModels[0], 8, kModels[0].tokens, true, random).Large(&limits, rounds));
  if (testing::failures > 0) std::printf("FAIL: results differ\n");
  return testing::failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_fusco::bench

int main(int argc, char** argv) { return jax_fusco::bench::Main(argc, argv); }
