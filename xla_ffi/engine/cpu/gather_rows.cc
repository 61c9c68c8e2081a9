#include "xla_ffi/engine/cpu/chunks.h"
#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {
namespace {

void GatherChunk(const std::vector<const GatherRowsJob*>& jobs, const Chunk& chunk,
                 RowKernels::StreamRows copy, FirstError* error) {
  const GatherRowsJob& job = *jobs[chunk.rank];
  const Rows& out = job.out[chunk.payload];
  constexpr int64_t kBatch = 128;
  const void* from[kBatch];
  void* to[kBatch];
  int64_t n = 0;
  for (int64_t m = chunk.first; m < chunk.last; ++m) {
    const int64_t source = job.source[m];
    if (source == kTail && !job.zero_tail) continue;
    from[n] = nullptr;
    to[n] = out.At(m);
    if (source >= 0) {
      const GatherRowsJob* peer = PeerAt(jobs, job.source_rank[m]);
      const int64_t row = source / job.fanout;
      if (peer == nullptr || row >= peer->in[chunk.payload].count) {
        error->Set(NoSource("jax_fusco_gather_rows", m, chunk.rank, source, job.source_rank[m]));
        return;
      }
      from[n] = peer->in[chunk.payload].At(row);
    }
    if (++n == kBatch) {
      copy(to, from, n, out.bytes);
      n = 0;
    }
  }
  copy(to, from, n, out.bytes);
}

// A part of a tail that has to be zero.
struct Blank {
  char* begin;
  int64_t bytes;
};

// Clears the tails, as far as that goes without writing; returns what is left to write, in pieces.
std::vector<Blank> ReleaseTails(const std::vector<Blank>& tails, const Settings& settings) {
  std::vector<int64_t> left(tails.size());
  int64_t bytes = 0;
  for (const Blank& tail : tails) bytes += tail.bytes;
  Workers::ParallelFor(ThreadsFor(bytes, settings), static_cast<int64_t>(tails.size()),
                       [&](int64_t i) {
                         const Blank& tail = tails[static_cast<size_t>(i)];
                         left[static_cast<size_t>(i)] = ReleaseAsZero(tail.begin, tail.bytes);
                       });
  std::vector<Blank> pieces;
  for (size_t i = 0; i < tails.size(); ++i) {
    for (int64_t at = 0; at < left[i]; at += kChunkBytes) {
      pieces.push_back({tails[i].begin + at, std::min(kChunkBytes, left[i] - at)});
    }
  }
  return pieces;
}

}  // namespace

Status GatherRowsJob::Run(const std::vector<const Job*>& ranks, const Settings& settings) const {
  const std::vector<const GatherRowsJob*> jobs = As<GatherRowsJob>(ranks);
  std::vector<Chunk> chunks;
  std::vector<Blank> tails;
  int64_t bytes = 0;
  for (size_t r = 0; r < jobs.size(); ++r) {
    const GatherRowsJob& job = *jobs[r];
    bool same = job.fanout == fanout && job.in.size() == in.size();
    for (size_t p = 0; same && p < in.size(); ++p) same = job.in[p].bytes == in[p].bytes;
    if (!same) return Disagree("jax_fusco_gather_rows", r, "fanout or the size of a row");
    int64_t end = job.num_rows;
    while (end > 0 && job.source[end - 1] == kTail) --end;
    for (size_t p = 0; p < in.size(); ++p) {
      bytes += end * in[p].bytes;
      Split(r, p, end, in[p].bytes, &chunks);
      const int64_t tail = (job.num_rows - end) * in[p].bytes;
      if (zero_tail && tail > 0) tails.push_back({job.out[p].At(end), tail});
    }
  }
  const std::vector<Blank> blanks = ReleaseTails(tails, settings);
  for (const GatherRowsJob* job : jobs) {
    for (const Rows& out : job->out) AdviseHugePages(out.data, out.count * out.bytes);
  }
  Interleave(&chunks);
  const RowKernels::StreamRows copy = CopierFor(bytes, settings);
  const auto num_chunks = static_cast<int64_t>(chunks.size());
  int64_t blank_bytes = 0;
  for (const Blank& blank : blanks) blank_bytes += blank.bytes;
  FirstError error;
  Workers::ParallelFor(ThreadsFor(bytes + blank_bytes, settings),
                       num_chunks + static_cast<int64_t>(blanks.size()), [&](int64_t i) {
                         if (i < num_chunks) {
                           GatherChunk(jobs, chunks[static_cast<size_t>(i)], copy, &error);
                         } else {
                           const Blank& blank = blanks[static_cast<size_t>(i - num_chunks)];
                           std::memset(blank.begin, 0, static_cast<size_t>(blank.bytes));
                         }
                       });
  return error.Take();
}

}  // namespace jax_fusco::cpu
