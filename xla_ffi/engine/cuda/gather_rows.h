// gather_rows by words through registers, for rows of any size; gather_rows_bulk.h has another way
// for long ones. A row of a peer is read once and written to all rows of its chain.
#ifndef JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_H_
#define JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_H_

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/sources.h"
#include "xla_ffi/engine/cuda/team.h"
#include "xla_ffi/engine/cuda/words.h"

namespace jax_fusco::cuda {

JAX_FUSCO_PROGRAM inline Sources SourcesOf(const GatherRowsArgs& args) {
  return {args.num_rows, args.source_rank, args.source, args.chain, args.fanout, args.peer_rows};
}

JAX_FUSCO_PROGRAM inline const char* RowOf(const GatherRowsArgs& args, const Table* table,
                                           const Order& order) {
  if (order.task != Task::kTake) return nullptr;
  return static_cast<const char*>(table->operand[order.rank][args.operand]) +
         order.row * args.row_bytes;
}

// A part of a row that neighbouring lanes move together.
struct RowPart {
  Order order;
  const char* from = nullptr;
  int64_t row = 0;
  int64_t word = 0;  // this lane's first
};

// `width` neighbouring lanes, a power of two, move kWords words each of kParts rows, or parts of
// rows, at a time. row_bytes and `out` are multiples of Word; a peer's rows may lie anywhere.
template <typename Word, int kParts, int kWords, typename Team>
JAX_FUSCO_PROGRAM void GatherRowsByWords(const Team& team, const GatherRowsArgs& args, Table* table,
                                         int width) {
  if (!HasPeers(team, table)) return;
  const Sources sources = SourcesOf(args);
  const auto words = args.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t segments = (words + width * kWords - 1) / (width * kWords);
  char* const out = static_cast<char*>(args.out);
  for (Parts parts(args.num_rows, segments, FirstRow(args.num_rows, table),
                   ThreadOfGrid(team) / width, ThreadsOfGrid(team) / width);
       parts.any();) {
    RowPart part[kParts];
    bool aligned = true;
    JAX_FUSCO_UNROLL
    for (int p = 0; p < kParts; ++p) {
      if (!parts.any()) continue;
      part[p].row = parts.row();
      part[p].word = parts.part() * width * kWords + team.thread() % width;
      parts.Next();
      part[p].order =
          OrderOf(team, sources, table, part[p].row, EntryOf(sources, part[p].row), args.zero_tail);
      part[p].from = RowOf(args, table, part[p].order);
      aligned &= IsAligned<Word>(part[p].from);
    }
    Word word[kParts][kWords] = {};
    JAX_FUSCO_UNROLL
    for (int i = 0; i < kParts * kWords; ++i) {
      const int64_t at = part[i / kWords].word + i % kWords * width;
      const char* const from = part[i / kWords].from;
      if (aligned && from != nullptr && at < words) {
        word[i / kWords][i % kWords] = LoadWord<Word>(from + at * sizeof(Word));
      }
    }
    if (!aligned) {
      JAX_FUSCO_UNROLL
      for (int i = 0; i < kParts * kWords; ++i) {
        const int64_t at = part[i / kWords].word + i % kWords * width;
        const char* const from = part[i / kWords].from;
        if (from != nullptr && at < words) {
          word[i / kWords][i % kWords] = LoadBytes<Word>(from + at * sizeof(Word));
        }
      }
    }
    JAX_FUSCO_UNROLL
    for (int p = 0; p < kParts; ++p) {
      if (part[p].order.task == Task::kNone) continue;
      int64_t next = part[p].order.next;
      for (int64_t row = part[p].row;;) {
        JAX_FUSCO_UNROLL
        for (int w = 0; w < kWords; ++w) {
          const int64_t at = part[p].word + w * width;
          if (at < words) StoreWord(out + row * args.row_bytes + at * sizeof(Word), word[p][w]);
        }
        if (next >= args.num_rows) break;
        row = next;
        next = FollowChain(team, sources, table, row);
      }
    }
  }
}

// Lanes for a row, and whether it takes them more than one word each.
struct WordShape {
  int width;
  bool is_long;
};
inline WordShape ShapeWords(int64_t words, int lanes_of_warp) {
  int width = 1;
  while (width < lanes_of_warp && width < words) width *= 2;
  return {width, words > width};
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_H_
