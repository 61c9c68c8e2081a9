#include "xla_ffi/engine/cpu/chunks.h"
#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

// Where a row of the result comes from.
struct Source {
  const GatherRowsWeightedJob* peer = nullptr;  // null: nowhere, the row is zero
  int64_t assignment = 0;

  const void* g() const { return peer == nullptr ? nullptr : peer->g.At(assignment / peer->k); }

  // Finds it for row m of `rank`. False, and an error, where it does not exist.
  bool Find(const std::vector<const GatherRowsWeightedJob*>& jobs, size_t rank, int64_t m,
            FirstError* error) {
    const GatherRowsWeightedJob& job = *jobs[rank];
    peer = nullptr;
    assignment = job.source[m];
    if (assignment < 0) return true;
    peer = PeerAt(jobs, job.source_rank[m]);
    if (peer != nullptr && assignment / job.k < peer->g.count) return true;
    error->Set(NoSource("jax_fusco_gather_rows_weighted", m, rank, assignment, job.source_rank[m]));
    return false;
  }
};

template <typename Sum>
void WeightedChunk(const std::vector<const GatherRowsWeightedJob*>& jobs, const Chunk& chunk,
                   RowKernels::ScaleAndDot kernel, RowKernels::StreamRows copy, FirstError* error) {
  const GatherRowsWeightedJob& job = *jobs[chunk.rank];
  // Rows are made in a buffer that stays in the cache, and leave it a few at a time.
  constexpr int64_t kBatch = 4;
  std::vector<char> buffer(static_cast<size_t>(kBatch * job.dy.bytes));
  const void* made[kBatch];
  void* to[kBatch];
  int64_t n = 0;
  Source now, next;
  if (!next.Find(jobs, chunk.rank, chunk.first, error)) return;
  for (int64_t m = chunk.first; m < chunk.last; ++m) {
    now = next;
    if (m + 1 < chunk.last && !next.Find(jobs, chunk.rank, m + 1, error)) return;
    Sum dot = 0;
    made[n] = nullptr;
    to[n] = job.dy.At(m);
    if (now.peer != nullptr) {
      char* const dy = buffer.data() + n * job.dy.bytes;
      const Sum weight = WeightAt<Sum>(now.peer->weights, now.peer->weights_type, now.assignment);
      kernel(now.g(), job.y.At(m), &weight, job.length, dy, &dot, next.g());
      made[n] = dy;
    }
    static_cast<Sum*>(job.dots)[m] = dot;
    if (++n == kBatch || m + 1 == chunk.last) {
      copy(to, made, n, job.dy.bytes);
      n = 0;
    }
  }
}

}  // namespace

Status GatherRowsWeightedJob::Run(const std::vector<const Job*>& ranks,
                                  const Settings& settings) const {
  const std::vector<const GatherRowsWeightedJob*> jobs = As<GatherRowsWeightedJob>(ranks);
  std::vector<Chunk> chunks;
  int64_t bytes = 0;
  for (size_t r = 0; r < jobs.size(); ++r) {
    if (jobs[r]->length != length || jobs[r]->k != k || jobs[r]->g_type != g_type ||
        jobs[r]->y_type != y_type || jobs[r]->weights_type != weights_type) {
      return Disagree("jax_fusco_gather_rows_weighted", r, "k, or the length or type of a row");
    }
    bytes += jobs[r]->num_rows * dy.bytes;
    AdviseHugePages(jobs[r]->dy.data, jobs[r]->num_rows * dy.bytes);
    Split(r, 0, jobs[r]->num_rows, dy.bytes, &chunks);
  }
  Interleave(&chunks);
  const RowKernels::ScaleAndDot kernel =
      RowKernels::For(settings.isa)
          .scale_and_dot[static_cast<size_t>(g_type)][static_cast<size_t>(y_type)];
  const RowKernels::StreamRows copy = CopierFor(bytes, settings);
  FirstError error;
  Workers::ParallelFor(ThreadsFor(bytes, settings), static_cast<int64_t>(chunks.size()),
                       [&](int64_t i) {
                         const Chunk& chunk = chunks[static_cast<size_t>(i)];
                         if (y_type == Float::kF64) {
                           WeightedChunk<double>(jobs, chunk, kernel, copy, &error);
                         } else {
                           WeightedChunk<float>(jobs, chunk, kernel, copy, &error);
                         }
                       });
  return error.Take();
}

}  // namespace jax_fusco::cpu
