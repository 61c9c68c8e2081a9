#include "xla_ffi/engine/cpu/shuffle.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

// Below this a job is done before a helper wakes up.
constexpr int64_t kInlineBytes = 256 << 10;
// What one claim of a worker reads or writes: enough to make the claim free, little enough for all
// to end together.
constexpr int64_t kChunkBytes = 2 << 20;

template <typename J>
std::vector<const J*> As(const std::vector<const Job*>& ranks) {
  std::vector<const J*> out;
  for (const Job* job : ranks) out.push_back(static_cast<const J*>(job));
  return out;
}

Status Disagree(const char* call, size_t rank, const char* what) {
  return Status::InvalidArgument(Concat(call, ": ranks 0 and ", static_cast<int64_t>(rank),
                                        " disagree on ", what, ", all ranks need the same."));
}

// The first error that a chunk meets.
class FirstError {
 public:
  void Set(std::string message) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = Status::InvalidArgument(std::move(message));
  }
  Status Take() { return std::move(status_); }

 private:
  std::mutex mutex_;
  Status status_;
};

// Rows [first, last) of a rank's (and payload's) result.
struct Chunk {
  size_t rank;
  size_t payload;
  int64_t first;
  int64_t last;
};

// Splits `count` rows into chunks of about kChunkBytes.
void Split(size_t rank, size_t payload, int64_t count, int64_t bytes_per_row,
           std::vector<Chunk>* chunks) {
  const int64_t step = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, bytes_per_row));
  for (int64_t first = 0; first < count; first += step) {
    chunks->push_back({rank, payload, first, std::min(count, first + step)});
  }
}

int ThreadsFor(int64_t bytes, const Settings& settings) {
  return bytes < kInlineBytes ? 1 : settings.threads;
}

}  // namespace

Status PlanJob::Run(const std::vector<const Job*>& ranks, const Settings& settings) const {
  const std::vector<const PlanJob*> jobs = As<PlanJob>(ranks);
  for (size_t r = 1; r < jobs.size(); ++r) {
    if (jobs[r]->shape.tokens != shape.tokens || jobs[r]->shape.k != shape.k ||
        jobs[r]->shape.capacity != shape.capacity) {
      return Disagree("jax_fusco_plan", r, "tokens, k or capacity");
    }
  }
  const auto cells = static_cast<size_t>(shape.num_experts * shape.num_ranks);
  std::vector<int32_t> counts(cells), next(cells), last(cells);
  std::vector<PlanResults> results;
  for (const PlanJob* job : jobs) results.push_back(job->results);
  const int64_t bytes = shape.num_ranks * (shape.assignments() * 12 + shape.capacity * 8);
  const int threads = ThreadsFor(bytes, settings);
  Workers::ParallelFor(threads, shape.num_ranks, [&](int64_t r) {
    const PlanJob& job = *jobs[static_cast<size_t>(r)];
    *job.results.num_invalid = CountAssignments(shape, r, job.expert_ids, counts.data());
  });
  if (settings.strict) {
    for (size_t r = 0; r < jobs.size(); ++r) {
      for (int64_t a = 0; *results[r].num_invalid > 0 && a < shape.assignments(); ++a) {
        const int64_t id = jobs[r]->expert_ids[a];
        if (id >= -1 && id < shape.num_experts) continue;
        return Status::InvalidArgument(Concat("jax_fusco_plan: expert_ids[", a / shape.k, ", ",
                                              a % shape.k, "] of rank ", static_cast<int64_t>(r),
                                              " is ", id, ", it must lie in [-1, ",
                                              shape.num_experts, ") (JAX_FUSCO_STRICT is set)."));
      }
    }
  }
  const int64_t block = shape.experts_per_rank() * shape.num_ranks;
  Workers::ParallelFor(threads, shape.num_ranks, [&](int64_t r) {
    LayOutBuffer(shape, counts.data() + r * block, results[static_cast<size_t>(r)],
                 next.data() + r * block, last.data() + r * block);
    MarkEmptyRows(shape, results[static_cast<size_t>(r)]);
  });
  Workers::ParallelFor(threads, shape.num_ranks, [&](int64_t r) {
    PlaceAssignments(shape, r, jobs[static_cast<size_t>(r)]->expert_ids, results.data(),
                     next.data(), last.data());
  });
  return Status::Ok();
}

Status GatherRowsJob::Run(const std::vector<const Job*>& ranks, const Settings& settings) const {
  const std::vector<const GatherRowsJob*> jobs = As<GatherRowsJob>(ranks);
  for (size_t r = 0; r < jobs.size(); ++r) {
    bool same = jobs[r]->fanout == fanout && jobs[r]->in.size() == in.size();
    for (size_t p = 0; same && p < in.size(); ++p) same = jobs[r]->in[p].bytes == in[p].bytes;
    if (!same) return Disagree("jax_fusco_gather_rows", r, "fanout or the size of a row");
  }
  std::vector<Chunk> chunks;
  int64_t bytes = 0;
  std::vector<int64_t> ends;  // of each rank: where its tail begins
  for (size_t r = 0; r < jobs.size(); ++r) {
    int64_t end = jobs[r]->num_rows;
    while (end > 0 && jobs[r]->source[end - 1] == kTail) --end;
    ends.push_back(end);
    for (size_t p = 0; p < in.size(); ++p) {
      bytes += end * in[p].bytes;
      Split(r, p, end, in[p].bytes, &chunks);
    }
  }
  const auto num_copies = static_cast<int64_t>(chunks.size());
  for (size_t r = 0; r < jobs.size(); ++r) {
    for (size_t p = 0; p < in.size(); ++p) {
      const Rows& out = jobs[r]->out[p];
      AdviseHugePages(out.data, out.count * out.bytes);
      if (jobs[r]->zero_tail && ends[r] < out.count) chunks.push_back({r, p, ends[r], out.count});
    }
  }
  FirstError error;
  Workers::ParallelFor(
      ThreadsFor(bytes, settings), static_cast<int64_t>(chunks.size()), [&](int64_t i) {
        const Chunk& chunk = chunks[static_cast<size_t>(i)];
        const GatherRowsJob& job = *jobs[chunk.rank];
        const Rows& out = job.out[chunk.payload];
        if (i >= num_copies) {
          FillZero(out.At(chunk.first), (chunk.last - chunk.first) * out.bytes);
          return;
        }
        for (int64_t m = chunk.first; m < chunk.last; ++m) {
          const int64_t source = job.source[m];
          const auto size = static_cast<size_t>(out.bytes);
          if (source < 0) {
            if (source != kTail || job.zero_tail) std::memset(out.At(m), 0, size);
            continue;
          }
          const int64_t rank = job.source_rank[m];
          const int64_t row = source / fanout;
          if (rank < 0 || rank >= static_cast<int64_t>(jobs.size()) ||
              row >= jobs[static_cast<size_t>(rank)]->in[chunk.payload].count) {
            error.Set(Concat("jax_fusco_gather_rows: row ", m, " of rank ",
                             static_cast<int64_t>(chunk.rank), " comes from source ", source,
                             " of rank ", rank, ", which does not exist."));
            return;
          }
          std::memcpy(out.At(m), jobs[static_cast<size_t>(rank)]->in[chunk.payload].At(row), size);
        }
      });
  return error.Take();
}

namespace {

// Weights as the sums need them.
template <typename Sum>
Sum WeightAt(const void* weights, Float type, int64_t i) {
  return type == Float::kF64 ? static_cast<Sum>(static_cast<const double*>(weights)[i])
                             : static_cast<Sum>(static_cast<const float*>(weights)[i]);
}

template <typename Sum>
void GatherWeighted(const std::vector<const GatherRowsWeightedJob*>& jobs, const Chunk& chunk,
                    RowKernels::ScaleAndDot kernel, FirstError* error) {
  const GatherRowsWeightedJob& job = *jobs[chunk.rank];
  Sum* dots = static_cast<Sum*>(job.dots);
  for (int64_t m = chunk.first; m < chunk.last; ++m) {
    const int64_t source = job.source[m];
    if (source < 0) {
      std::memset(job.dy.At(m), 0, static_cast<size_t>(job.dy.bytes));
      dots[m] = 0;
      continue;
    }
    const int64_t rank = job.source_rank[m];
    const int64_t row = source / job.k;
    if (rank < 0 || rank >= static_cast<int64_t>(jobs.size()) ||
        row >= jobs[static_cast<size_t>(rank)]->g.count) {
      error->Set(Concat("jax_fusco_gather_rows_weighted: row ", m, " of rank ",
                        static_cast<int64_t>(chunk.rank), " comes from source ", source,
                        " of rank ", rank, ", which does not exist."));
      return;
    }
    const GatherRowsWeightedJob& peer = *jobs[static_cast<size_t>(rank)];
    const Sum weight = WeightAt<Sum>(peer.weights, peer.weights_type, source);
    kernel(peer.g.At(row), job.y.At(m), &weight, job.length, job.dy.At(m), &dots[m]);
  }
}

template <typename Sum>
void ReduceChunk(const std::vector<const ReduceRowsJob*>& jobs, const Chunk& chunk,
                 RowKernels::SumRows kernel, FirstError* error) {
  const ReduceRowsJob& job = *jobs[chunk.rank];
  std::vector<const void*> rows(static_cast<size_t>(job.k));
  std::vector<Sum> weights(static_cast<size_t>(job.k));
  for (int64_t t = chunk.first; t < chunk.last; ++t) {
    size_t n = 0;
    for (int64_t a = t * job.k; a < (t + 1) * job.k; ++a) {
      const int64_t slot = job.slot[a];
      if (slot < 0) continue;
      const int64_t rank = job.slot_rank[a];
      if (rank < 0 || rank >= static_cast<int64_t>(jobs.size()) ||
          slot >= jobs[static_cast<size_t>(rank)]->y.count) {
        error->Set(Concat("jax_fusco_reduce_rows: slot[", t, ", ", a - t * job.k, "] of rank ",
                          static_cast<int64_t>(chunk.rank), " is ", slot, " on rank ", rank,
                          ", which does not exist."));
        return;
      }
      rows[n] = jobs[static_cast<size_t>(rank)]->y.At(slot);
      weights[n] = job.weights ? WeightAt<Sum>(job.weights, job.weights_type, a) : Sum{1};
      ++n;
    }
    kernel(rows.data(), weights.data(), static_cast<int64_t>(n), job.length, job.out.At(t));
  }
}

}  // namespace

Status GatherRowsWeightedJob::Run(const std::vector<const Job*>& ranks,
                                  const Settings& settings) const {
  const std::vector<const GatherRowsWeightedJob*> jobs = As<GatherRowsWeightedJob>(ranks);
  std::vector<Chunk> chunks;
  for (size_t r = 0; r < jobs.size(); ++r) {
    if (jobs[r]->length != length || jobs[r]->k != k || jobs[r]->g_type != g_type ||
        jobs[r]->y_type != y_type || jobs[r]->weights_type != weights_type) {
      return Disagree("jax_fusco_gather_rows_weighted", r, "k, or the length or type of a row");
    }
    AdviseHugePages(jobs[r]->dy.data, jobs[r]->num_rows * dy.bytes);
    Split(r, 0, jobs[r]->num_rows, dy.bytes, &chunks);
  }
  const RowKernels::ScaleAndDot kernel =
      RowKernels::For(settings.isa)
          .scale_and_dot[static_cast<size_t>(g_type)][static_cast<size_t>(y_type)];
  FirstError error;
  Workers::ParallelFor(ThreadsFor(static_cast<int64_t>(chunks.size()) * kChunkBytes, settings),
                       static_cast<int64_t>(chunks.size()), [&](int64_t i) {
                         const Chunk& chunk = chunks[static_cast<size_t>(i)];
                         if (y_type == Float::kF64) {
                           GatherWeighted<double>(jobs, chunk, kernel, &error);
                         } else {
                           GatherWeighted<float>(jobs, chunk, kernel, &error);
                         }
                       });
  return error.Take();
}

Status ReduceRowsJob::Run(const std::vector<const Job*>& ranks, const Settings& settings) const {
  const std::vector<const ReduceRowsJob*> jobs = As<ReduceRowsJob>(ranks);
  std::vector<Chunk> chunks;
  int64_t bytes = 0;
  for (size_t r = 0; r < jobs.size(); ++r) {
    if (jobs[r]->length != length || jobs[r]->k != k || jobs[r]->y_type != y_type ||
        jobs[r]->out_type != out_type || (jobs[r]->weights == nullptr) != (weights == nullptr)) {
      return Disagree("jax_fusco_reduce_rows", r, "k, weights, or the length or type of a row");
    }
    AdviseHugePages(jobs[r]->out.data, jobs[r]->tokens * out.bytes);
    Split(r, 0, jobs[r]->tokens, k * y.bytes + out.bytes, &chunks);
    bytes += jobs[r]->tokens * (k * y.bytes + out.bytes);
  }
  const RowKernels::SumRows kernel =
      RowKernels::For(settings.isa)
          .sum_rows[static_cast<size_t>(y_type)][static_cast<size_t>(out_type)];
  FirstError error;
  Workers::ParallelFor(ThreadsFor(bytes, settings), static_cast<int64_t>(chunks.size()),
                       [&](int64_t i) {
                         const Chunk& chunk = chunks[static_cast<size_t>(i)];
                         if (y_type == Float::kF64) {
                           ReduceChunk<double>(jobs, chunk, kernel, &error);
                         } else {
                           ReduceChunk<float>(jobs, chunk, kernel, &error);
                         }
                       });
  return error.Take();
}

Status RaggedAllToAllJob::Run(const std::vector<const Job*>& ranks,
                              const Settings& settings) const {
  constexpr const char* kCall = "jax_fusco_ragged_all_to_all";
  const std::vector<const RaggedAllToAllJob*> jobs = As<RaggedAllToAllJob>(ranks);
  struct Block {
    char* to;
    const char* from;
    int64_t bytes;
  };
  std::vector<Block> blocks;
  int64_t bytes = 0;
  for (size_t s = 0; s < jobs.size(); ++s) {
    const RaggedAllToAllJob& from = *jobs[s];
    if (from.operand.bytes != operand.bytes || from.result.bytes != operand.bytes) {
      return Disagree(kCall, s, "the size of a row");
    }
    if (from.slices_per_rank != slices_per_rank) return Disagree(kCall, s, "the number of slices");
    for (int64_t i = 0; i < slices_per_rank * static_cast<int64_t>(jobs.size()); ++i) {
      const int64_t p = i / slices_per_rank;
      const RaggedAllToAllJob& to = *jobs[static_cast<size_t>(p)];
      const int64_t size = from.send_sizes[i];
      const int64_t begin = from.input_offsets[i];
      const int64_t target = from.output_offsets[i];
      const int64_t expected =
          to.recv_sizes[static_cast<int64_t>(s) * slices_per_rank + i % slices_per_rank];
      const std::string who =
          Concat(kCall, ": rank ", static_cast<int64_t>(s), " sends ", size, " rows to rank ", p);
      if (size < 0 || (size > 0 && (begin < 0 || begin + size > from.operand.count))) {
        return Status::InvalidArgument(
            Concat(who, " from row ", begin, " of an operand of ", from.operand.count, " rows."));
      }
      if (size > 0 && (target < 0 || target + size > to.result.count)) {
        return Status::InvalidArgument(
            Concat(who, " at row ", target, " of an output of ", to.result.count, " rows."));
      }
      if (expected != size) {
        return Status::InvalidArgument(Concat(who, ", which expects ", expected, " (recv_sizes)."));
      }
      for (int64_t done = 0; done < size * operand.bytes; done += kChunkBytes) {
        blocks.push_back({to.result.At(target) + done, from.operand.At(begin) + done,
                          std::min(kChunkBytes, size * operand.bytes - done)});
      }
      bytes += size * operand.bytes;
    }
  }
  Workers::ParallelFor(ThreadsFor(bytes, settings), static_cast<int64_t>(blocks.size()),
                       [&](int64_t i) {
                         const Block& block = blocks[static_cast<size_t>(i)];
                         std::memmove(block.to, block.from, static_cast<size_t>(block.bytes));
                       });
  return Status::Ok();
}

}  // namespace jax_fusco::cpu
