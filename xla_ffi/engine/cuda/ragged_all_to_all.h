// ragged_all_to_all: each rank pulls the slices that are sent to it. All of them are checked before
// the first byte moves; then the bytes, not the slices, are shared out among the blocks.
#ifndef JAX_FUSCO_ENGINE_CUDA_RAGGED_ALL_TO_ALL_H_
#define JAX_FUSCO_ENGINE_CUDA_RAGGED_ALL_TO_ALL_H_

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/peers.h"
#include "xla_ffi/engine/cuda/team.h"
#include "xla_ffi/engine/cuda/words.h"

namespace jax_fusco::cuda {

// A slice on its way to this rank, in rows.
struct Slice {
  int32_t sender = 0;
  int64_t from = 0;
  int64_t size = 0;
  int64_t to = 0;
};

// The i-th slice, those of rank + 1 first. One that does not fit marks the table.
template <typename Team>
JAX_FUSCO_PROGRAM Slice SliceAt(const Team& team, const RaggedAllToAllArgs& args, Table* table,
                                int64_t i, bool* fits) {
  Slice slice;
  const int64_t per_rank = args.slices_per_rank;
  slice.sender = static_cast<int32_t>((table->rank + 1 + i / per_rank) % table->num_ranks);
  const int64_t at = table->rank * per_rank + i % per_rank;  // in the sender's tables
  const auto entry = [&](int operand) {
    return static_cast<const int32_t*>(table->operand[slice.sender][operand])[at];
  };
  slice.from = entry(1);
  slice.size = entry(2);
  slice.to = entry(3);
  const int64_t expected = args.recv_sizes[slice.sender * per_rank + i % per_rank];
  int64_t bad = -1;
  bool good = true;
  if (slice.size < 0 || slice.size != expected) {
    good = false;
    bad = slice.size;
  } else if (slice.size > 0 && (slice.from < 0 || slice.from + slice.size > args.peer_rows)) {
    good = false;
    bad = slice.from;
  } else if (slice.size > 0 && (slice.to < 0 || slice.to + slice.size > args.rows)) {
    good = false;
    bad = slice.to;
  }
  if (!good) {
    MarkBadIndex(team, table, slice.sender, table->rank, static_cast<int32_t>(bad));
    *fits = false;
  }
  if (!good || slice.size == 0) slice.from = slice.size = slice.to = 0;
  return slice;
}

// Slices that a block looks at together, in shared memory.
struct SliceBatch {
  const char** from;
  char** to;
  int64_t* begin;  // [count + 1] words of the slices before each
};
inline int64_t RaggedSharedBytes(int threads) { return int64_t{threads} * 24 + 8; }

// Words [first, last) of the batch by this block.
template <typename Word, typename Team>
JAX_FUSCO_PROGRAM void CopyWords(const Team& team, const SliceBatch& batch, int64_t slice,
                                 int64_t first, int64_t last) {
  constexpr int kWords = 4;
  while (first < last) {
    while (batch.begin[slice + 1] <= first) ++slice;
    const int64_t end = batch.begin[slice + 1] < last ? batch.begin[slice + 1] : last;
    const int64_t skipped = (first - batch.begin[slice]) * static_cast<int64_t>(sizeof(Word));
    const char* const from = batch.from[slice] + skipped;
    char* const to = batch.to[slice] + skipped;
    const bool aligned = IsAligned<Word>(from);
    const int64_t words = end - first;
    for (int64_t at = team.thread(); at < words; at += kWords * team.num_threads()) {
      Word word[kWords];
      JAX_FUSCO_UNROLL
      for (int w = 0; w < kWords; ++w) {
        const int64_t i = at + w * team.num_threads();
        if (aligned && i < words) word[w] = LoadWord<Word>(from + i * sizeof(Word));
      }
      JAX_FUSCO_UNROLL
      for (int w = 0; w < kWords; ++w) {
        const int64_t i = at + w * team.num_threads();
        if (!aligned && i < words) word[w] = LoadBytes<Word>(from + i * sizeof(Word));
        if (i < words) StoreWord(to + i * sizeof(Word), word[w]);
      }
    }
    first = end;
  }
}

// row_bytes and `result` are multiples of Word; a peer's rows may lie anywhere.
template <typename Word, typename Team>
JAX_FUSCO_PROGRAM void RaggedAllToAll(const Team& team, const RaggedAllToAllArgs& args,
                                      Table* table) {
  if (!HasPeers(team, table)) return;
  const int64_t slices = args.slices_per_rank * table->num_ranks;
  bool fits = true;
  for (int64_t i = team.thread(); i < slices; i += team.num_threads()) {
    SliceAt(team, args, table, i, &fits);
  }
  if (SumOfBlock(team, fits ? 0 : 1) > 0) return;
  SliceBatch batch;
  batch.begin = reinterpret_cast<int64_t*>(team.shared());
  batch.from = reinterpret_cast<const char**>(batch.begin + team.num_threads() + 1);
  batch.to = const_cast<char**>(batch.from + team.num_threads());
  const auto words = args.row_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t first = 0; first < slices; first += team.num_threads()) {
    Slice slice;
    if (first + team.thread() < slices) {
      slice = SliceAt(team, args, table, first + team.thread(), &fits);
    }
    const int64_t size = slice.size * words;
    const int64_t before = ScanOfBlock(team, size);  // nobody reads the last batch any more
    const int t = team.thread();
    batch.begin[t] = before;
    if (t + 1 == team.num_threads()) batch.begin[t + 1] = before + size;
    batch.from[t] =
        static_cast<const char*>(table->operand[slice.sender][0]) + slice.from * args.row_bytes;
    batch.to[t] = static_cast<char*>(args.result) + slice.to * args.row_bytes;
    team.Sync();
    const int64_t all = batch.begin[team.num_threads()];
    const int64_t share = (all + team.num_blocks() - 1) / team.num_blocks();
    const int64_t begin = share * team.block();
    CopyWords<Word>(team, batch, 0, begin, begin + share < all ? begin + share : all);
  }
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_RAGGED_ALL_TO_ALL_H_
