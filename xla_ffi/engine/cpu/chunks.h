// How a job is cut into pieces for the workers, and what all jobs check.
#ifndef JAX_FUSCO_ENGINE_CPU_CHUNKS_H_
#define JAX_FUSCO_ENGINE_CPU_CHUNKS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/engine/cpu/rendezvous.h"
#include "xla_ffi/engine/cpu/rows.h"
#include "xla_ffi/engine/cpu/settings.h"

namespace jax_fusco::cpu {

// Below this a job is done before a helper wakes up.
inline constexpr int64_t kInlineBytes = 256 << 10;
// From here on results do not fit in the caches anyway, and are written past them.
inline constexpr int64_t kStreamBytes = 16 << 20;
// What one claim of a worker reads or writes: enough to make the claim free, little enough for all
// to end together.
inline constexpr int64_t kChunkBytes = 2 << 20;

inline int ThreadsFor(int64_t bytes, const Settings& settings) {
  return bytes < kInlineBytes ? 1 : settings.threads;
}

// Rows [first, last) of one rank's result (of one of its payloads).
struct Chunk {
  size_t rank;
  size_t payload;
  int64_t first;
  int64_t last;
};

// Cuts `count` rows into chunks of about kChunkBytes.
inline void Split(size_t rank, size_t payload, int64_t count, int64_t bytes_per_row,
                  std::vector<Chunk>* chunks) {
  const int64_t step = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, bytes_per_row));
  for (int64_t first = 0; first < count; first += step) {
    chunks->push_back({rank, payload, first, std::min(count, first + step)});
  }
}

// Deals the chunks out rank by rank: threads that meet in one fresh huge page wait for each other.
inline void Interleave(std::vector<Chunk>* chunks) {
  std::stable_sort(chunks->begin(), chunks->end(),
                   [](const Chunk& a, const Chunk& b) { return a.first < b.first; });
}

template <typename J>
std::vector<const J*> As(const std::vector<const Job*>& ranks) {
  std::vector<const J*> out;
  for (const Job* job : ranks) out.push_back(static_cast<const J*>(job));
  return out;
}

// The job of `rank`, or null where there is no such rank.
template <typename J>
const J* PeerAt(const std::vector<const J*>& jobs, int64_t rank) {
  const bool exists = rank >= 0 && rank < static_cast<int64_t>(jobs.size());
  return exists ? jobs[static_cast<size_t>(rank)] : nullptr;
}

inline Status Disagree(const char* call, size_t rank, const char* what) {
  return Status::InvalidArgument(Concat(call, ": ranks 0 and ", static_cast<int64_t>(rank),
                                        " disagree on ", what, ", all ranks need the same."));
}

// The first invalid id of a rank, which has one.
inline int64_t FindBadExpert(const int32_t* expert_ids, int64_t assignments, int64_t num_experts) {
  int64_t a = 0;
  while (a + 1 < assignments && expert_ids[a] >= -1 && expert_ids[a] < num_experts) ++a;
  return a;
}

inline Status BadExpert(const char* call, int64_t token, int64_t j, int64_t rank, int64_t id,
                        int64_t num_experts) {
  return Status::InvalidArgument(Concat(call, ": expert_ids[", token, ", ", j, "] of rank ", rank,
                                        " is ", id, ", it must lie in [-1, ", num_experts,
                                        ") (JAX_FUSCO_STRICT is set)."));
}

inline std::string NoSource(const char* call, int64_t row, size_t rank, int64_t source,
                            int64_t source_rank) {
  return Concat(call, ": row ", row, " of rank ", static_cast<int64_t>(rank), " comes from source ",
                source, " of rank ", source_rank, ", which does not exist.");
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

// Copies n rows, each to its place; a null source is a row of zeros.
inline void CopyRows(void* const* to, const void* const* from, int64_t n, int64_t bytes) {
  for (int64_t m = 0; m < n; ++m) {
    if (from[m] == nullptr) {
      std::memset(to[m], 0, static_cast<size_t>(bytes));
    } else {
      std::memcpy(to[m], from[m], static_cast<size_t>(bytes));
    }
  }
}

// How results of so many bytes are written.
inline RowKernels::StreamRows CopierFor(int64_t bytes, const Settings& settings) {
  return bytes >= kStreamBytes ? RowKernels::For(settings.isa).stream_rows : CopyRows;
}

// Weights as the sums need them.
template <typename Sum>
Sum WeightAt(const void* weights, Float type, int64_t i) {
  return type == Float::kF64 ? static_cast<Sum>(static_cast<const double*>(weights)[i])
                             : static_cast<Sum>(static_cast<const float*>(weights)[i]);
}

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_CHUNKS_H_
