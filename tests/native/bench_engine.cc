// Times the engine against the machine's own limits, without XLA. Not a test; run by hand:
//   bench_engine [repeats [cpu]]
// With `cpu` it counts the threads' processor time in place of the wall clock: on a busy machine.
// Every quantity is timed in turn with the others, so that a busy neighbour hurts all alike, and
// the median over the repeats is printed. Destinations are fresh memory each time, as XLA's results
// are.
#include <malloc.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/settings.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

// Memory as XLA's CPU client gets it where it is large: straight from the system each time. (main
// tells malloc so for all sizes; left to itself it keeps pieces of less than 32 MiB, which would
// compare one rank's fresh memory with another's used one.)
class Fresh {
 public:
  explicit Fresh(int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 64) / 64 * 64))) {
    if (data_ == nullptr) std::abort();
  }
  Fresh(Fresh&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  ~Fresh() { std::free(data_); }
  char* get() const { return static_cast<char*>(data_); }

 private:
  void* data_;
};

// Memory that has been in use, on huge pages.
Fresh Warm(int64_t bytes) {
  Fresh memory(bytes);
  AdviseHugePages(memory.get(), bytes);
  auto* values = reinterpret_cast<uint16_t*>(memory.get());
  for (int64_t i = 0; i < bytes / 2; ++i) values[i] = static_cast<uint16_t>(0x3f80 + i % 128);
  return memory;
}

bool count_processor_time = false;

double Milliseconds(const std::function<void()>& body) {
  const auto now = [] {
    timespec time;
    clock_gettime(count_processor_time ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) / 1e6;
  };
  const double start = now();
  body();
  return now() - start;
}

struct Shape {
  const char* name;
  int64_t ranks, tokens, d, experts, k;
  bool exact;  // buffers without a tail
};

class Bench {
 public:
  explicit Bench(const Shape& shape) : shape_(shape) {
    if (!Settings::Read(&settings_).ok()) std::abort();
    row_ = shape.d * 2;
    MakePlan();
    for (int64_t r = 0; r < shape.ranks; ++r) {
      x_.push_back(Warm(shape.tokens * row_));
      y_.push_back(Warm(used_[static_cast<size_t>(r)] * row_));
    }
    total_ = std::accumulate(used_.begin(), used_.end(), int64_t{0}) * row_;
  }

  void Run(int repeats) {
    const std::vector<std::pair<std::string, std::function<double()>>> cases = {
        {"copy", [&] { return Copy(); }},      {"dispatch", [&] { return Dispatch(); }},
        {"read", [&] { return Read(); }},      {"combine", [&] { return Combine(); }},
        {"scale", [&] { return Weighted(); }}, {"plan", [&] { return Plan(); }},
    };
    std::map<std::string, std::vector<double>> times;
    for (int i = 0; i < repeats; ++i) {
      for (const auto& [name, body] : cases) times[name].push_back(body());
    }
    for (auto& [name, list] : times) std::sort(list.begin(), list.end());
    std::printf("%s, %.0f MB\n", shape_.name, static_cast<double>(total_) / 1e6);
    for (const auto& [label, at] : {std::pair<const char*, size_t>{"median", repeats / 2},
                                    std::pair<const char*, size_t>{"best", 0}}) {
      std::printf("  %-6s", label);
      for (const auto& [name, body] : cases)
        std::printf("  %s %.2f", name.c_str(), times[name][at]);
      std::printf(" ms | copy/dispatch %.2f  read/combine %.2f  plan %.1f%%\n",
                  times["copy"][at] / times["dispatch"][at],
                  times["read"][at] / times["combine"][at],
                  100 * times["plan"][at] / times["dispatch"][at]);
    }
    std::fflush(stdout);
  }

 private:
  void MakePlan() {
    std::mt19937 random(7);
    const int64_t a = shape_.tokens * shape_.k;
    for (int64_t r = 0; r < shape_.ranks; ++r) {
      std::vector<int32_t> ids;
      std::vector<int32_t> experts(static_cast<size_t>(shape_.experts));
      std::iota(experts.begin(), experts.end(), 0);
      for (int64_t t = 0; t < shape_.tokens; ++t) {
        for (int64_t j = 0; j < shape_.k; ++j) {
          const auto other = static_cast<size_t>(j + random() % (shape_.experts - j));
          std::swap(experts[static_cast<size_t>(j)], experts[other]);
          ids.push_back(experts[static_cast<size_t>(j)]);
        }
      }
      ids_.push_back(ids);
    }
    const int64_t local = shape_.experts / shape_.ranks;
    capacity_ = shape_.ranks * shape_.tokens * std::min(shape_.k, local);
    for (int64_t r = 0; r < shape_.ranks; ++r) {
      ints_.emplace_back(2 * local + 2 * a + 2 * capacity_ + 2);
    }
    Plan();
    for (int64_t r = 0; r < shape_.ranks; ++r) {
      const int32_t* sizes = ints_[static_cast<size_t>(r)].data();
      used_.push_back(std::accumulate(sizes, sizes + local, int64_t{0}));
    }
  }

  PlanResults ResultsOf(int64_t r) {
    const int64_t local = shape_.experts / shape_.ranks;
    const int64_t a = shape_.tokens * shape_.k;
    int32_t* at = ints_[static_cast<size_t>(r)].data();
    return {at,
            at + local,
            at + 2 * local,
            at + 2 * local + a,
            at + 2 * local + 2 * a,
            at + 2 * local + 2 * a + capacity_,
            at + 2 * local + 2 * a + 2 * capacity_,
            at + 2 * local + 2 * a + 2 * capacity_ + 1};
  }

  template <typename J>
  double Time(std::vector<J>& jobs) {
    std::vector<const Job*> ranks;
    for (const J& job : jobs) ranks.push_back(&job);
    return Milliseconds([&] {
      const Status status = jobs.back().Run(ranks, settings_);
      if (!status.ok()) {
        std::fprintf(stderr, "%s\n", status.message.c_str());
        std::abort();
      }
    });
  }

  double Plan() {
    std::vector<PlanJob> jobs(static_cast<size_t>(shape_.ranks));
    for (int64_t r = 0; r < shape_.ranks; ++r) {
      PlanJob& job = jobs[static_cast<size_t>(r)];
      job.shape = {shape_.ranks, shape_.tokens, shape_.k, shape_.experts, capacity_, 1};
      job.expert_ids = ids_[static_cast<size_t>(r)].data();
      job.results = ResultsOf(r);
    }
    return Time(jobs);
  }

  double Dispatch() {
    std::vector<Fresh> out;
    std::vector<GatherRowsJob> jobs(static_cast<size_t>(shape_.ranks));
    for (int64_t r = 0; r < shape_.ranks; ++r) {
      GatherRowsJob& job = jobs[static_cast<size_t>(r)];
      const int64_t rows = shape_.exact ? used_[static_cast<size_t>(r)] : capacity_;
      out.emplace_back(rows * row_);
      job.num_rows = rows;
      job.source_rank = ResultsOf(r).source_rank;
      job.source = ResultsOf(r).source;
      job.fanout = shape_.k;
      job.in = {{x_[static_cast<size_t>(r)].get(), shape_.tokens, row_}};
      job.out = {{out.back().get(), rows, row_}};
    }
    return Time(jobs);
  }

  double Combine() {
    std::vector<Fresh> out;
    std::vector<float> weights(static_cast<size_t>(shape_.tokens * shape_.k), 0.125f);
    std::vector<ReduceRowsJob> jobs(static_cast<size_t>(shape_.ranks));
    for (int64_t r = 0; r < shape_.ranks; ++r) {
      ReduceRowsJob& job = jobs[static_cast<size_t>(r)];
      out.emplace_back(shape_.tokens * row_);
      job.tokens = shape_.tokens;
      job.k = shape_.k;
      job.slot_rank = ResultsOf(r).slot_rank;
      job.slot = ResultsOf(r).slot;
      job.length = shape_.d;
      job.y_type = job.out_type = Float::kBf16;
      job.y = {y_[static_cast<size_t>(r)].get(), used_[static_cast<size_t>(r)], row_};
      job.weights = weights.data();
      job.out = {out.back().get(), shape_.tokens, row_};
    }
    return Time(jobs);
  }

  double Weighted() {
    std::vector<Fresh> out, dots;
    std::vector<float> weights(static_cast<size_t>(shape_.tokens * shape_.k), 0.125f);
    std::vector<GatherRowsWeightedJob> jobs(static_cast<size_t>(shape_.ranks));
    for (int64_t r = 0; r < shape_.ranks; ++r) {
      GatherRowsWeightedJob& job = jobs[static_cast<size_t>(r)];
      const int64_t rows = used_[static_cast<size_t>(r)];
      out.emplace_back(rows * row_);
      dots.emplace_back(rows * 4);
      job.num_rows = rows;
      job.source_rank = ResultsOf(r).source_rank;
      job.source = ResultsOf(r).source;
      job.k = shape_.k;
      job.length = shape_.d;
      job.g_type = job.y_type = Float::kBf16;
      job.g = {x_[static_cast<size_t>(r)].get(), shape_.tokens, row_};
      job.weights = weights.data();
      job.y = {y_[static_cast<size_t>(r)].get(), rows, row_};
      job.dy = {out.back().get(), rows, row_};
      job.dots = dots.back().get();
    }
    return Time(jobs);
  }

  // The limit of a dispatch: as many bytes from one place to as many fresh buffers, on huge pages,
  // by all threads.
  double Copy() {
    std::vector<Fresh> out;
    for (int64_t rows : used_) out.emplace_back(rows * row_);
    return Milliseconds([&] {
      const auto pieces = Pieces(2 << 20);
      for (size_t r = 0; r < out.size(); ++r) AdviseHugePages(out[r].get(), used_[r] * row_);
      Workers::ParallelFor(settings_.threads, static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const Piece& at = pieces[static_cast<size_t>(i)];
        std::memcpy(out[at.rank].get() + at.begin, y_[at.rank].get() + at.begin,
                    static_cast<size_t>(at.bytes));
      });
    });
  }

  // The limit of a combine: y read once from end to end, and the results written.
  double Read() {
    std::vector<Fresh> out;
    const int64_t written = shape_.tokens * row_;
    for (size_t r = 0; r < used_.size(); ++r) out.emplace_back(written);
    return Milliseconds([&] {
      const auto pieces = Pieces(2 << 20);
      for (Fresh& memory : out) AdviseHugePages(memory.get(), written);
      Workers::ParallelFor(settings_.threads, static_cast<int64_t>(pieces.size()), [&](int64_t i) {
        const Piece& at = pieces[static_cast<size_t>(i)];
        const auto* from = reinterpret_cast<const uint64_t*>(y_[at.rank].get() + at.begin);
        uint64_t bits[8] = {};
        for (int64_t word = 0; word + 8 <= at.bytes / 8; word += 8) {
          for (int64_t lane = 0; lane < 8; ++lane) bits[lane] ^= from[word + lane];
        }
        const int64_t all = used_[at.rank] * row_;
        const int64_t first = written * at.begin / all / 64 * 64;
        const int64_t last = written * (at.begin + at.bytes) / all / 64 * 64;
        std::memset(out[at.rank].get() + first, static_cast<int>(bits[0] | 1),
                    static_cast<size_t>(last - first));
        for (uint64_t lane : bits) sink_ = sink_ ^ lane;
      });
    });
  }

  struct Piece {
    size_t rank;
    int64_t begin;
    int64_t bytes;
  };

  // All ranks' rows in pieces.
  std::vector<Piece> Pieces(int64_t bytes) const {
    std::vector<Piece> pieces;
    for (size_t r = 0; r < used_.size(); ++r) {
      for (int64_t at = 0; at < used_[r] * row_; at += bytes) {
        pieces.push_back({r, at, std::min(bytes, used_[r] * row_ - at)});
      }
    }
    return pieces;
  }

  Shape shape_;
  Settings settings_;
  int64_t row_ = 0;
  int64_t capacity_ = 0;
  int64_t total_ = 0;
  std::vector<std::vector<int32_t>> ids_, ints_;
  std::vector<int64_t> used_;
  std::vector<Fresh> x_, y_;
  volatile uint64_t sink_ = 0;
};

}  // namespace
}  // namespace jax_fusco::cpu

int main(int argc, char** argv) {
  const int repeats = argc > 1 ? std::atoi(argv[1]) : 15;
  jax_fusco::cpu::count_processor_time = argc > 2;
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
  using jax_fusco::cpu::Shape;
  for (const Shape& shape : {Shape{"Qwen3-30B-A3B 4r", 4, 2048, 2048, 128, 8, false},
                             Shape{"Qwen3 4r, exact", 4, 2048, 2048, 128, 8, true},
                             Shape{"DeepSeek-V3 4r", 4, 512, 7168, 256, 8, false},
                             Shape{"Qwen3-30B-A3B 8r", 8, 1024, 2048, 128, 8, false}}) {
    jax_fusco::cpu::Bench(shape).Run(repeats);
  }
  return 0;
}
