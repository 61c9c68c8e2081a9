#include "xla_ffi/engine/cpu/chunks.h"
#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

// The terms of the sums of a few tokens: token i has those from begin[i] to begin[i + 1].
template <typename Sum>
struct Terms {
  std::vector<const void*> rows;
  std::vector<Sum> weights;
  std::vector<int64_t> begin;

  // Finds the chunk's. False, and an error, where a slot does not exist.
  bool Find(const std::vector<const ReduceRowsJob*>& jobs, const Chunk& chunk, FirstError* error) {
    const ReduceRowsJob& job = *jobs[chunk.rank];
    std::vector<Rows> y;
    for (const ReduceRowsJob* peer : jobs) y.push_back(peer->y);
    const auto ranks = static_cast<int64_t>(jobs.size());
    rows.resize(static_cast<size_t>((chunk.last - chunk.first) * job.k));
    weights.resize(rows.size());
    size_t n = 0;
    for (int64_t t = chunk.first; t < chunk.last; ++t) {
      begin.push_back(static_cast<int64_t>(n));
      for (int64_t a = t * job.k; a < (t + 1) * job.k; ++a) {
        const int64_t slot = job.slot[a];
        const int64_t rank = job.slot_rank[a];
        if (slot < 0) continue;
        if (rank < 0 || rank >= ranks || slot >= y[static_cast<size_t>(rank)].count) {
          error->Set(Concat("jax_fusco_reduce_rows: slot[", t, ", ", a - t * job.k, "] of rank ",
                            static_cast<int64_t>(chunk.rank), " is row ", slot, " of rank ", rank,
                            ", which does not exist."));
          return false;
        }
        rows[n] = y[static_cast<size_t>(rank)].At(slot);
        weights[n] =
            job.weights == nullptr ? Sum{1} : WeightAt<Sum>(job.weights, job.weights_type, a);
        ++n;
      }
    }
    begin.push_back(static_cast<int64_t>(n));
    // A sum fetches as many rows ahead as it has: behind the last there must be something to name.
    rows.resize(n);
    rows.resize(n + static_cast<size_t>(job.k), n > 0 ? rows.back() : nullptr);
    return true;
  }
};

template <typename Sum>
void ReduceChunk(const std::vector<const ReduceRowsJob*>& jobs, const Chunk& chunk,
                 RowKernels::SumRows kernel, FirstError* error) {
  const ReduceRowsJob& job = *jobs[chunk.rank];
  Terms<Sum> terms;
  if (!terms.Find(jobs, chunk, error)) return;
  for (int64_t t = chunk.first; t < chunk.last; ++t) {
    const int64_t first = terms.begin[static_cast<size_t>(t - chunk.first)];
    const int64_t last = terms.begin[static_cast<size_t>(t - chunk.first) + 1];
    kernel(terms.rows.data() + first, terms.weights.data() + first, last - first, job.length,
           job.out.At(t), terms.rows.data() + last);
  }
}

}  // namespace

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
  Interleave(&chunks);
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

}  // namespace jax_fusco::cpu
