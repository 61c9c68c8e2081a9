// gather_rows_weighted: a warp takes a row of g, once for all the rows of this rank that hold its
// token, scales it by each one's weight, and multiplies it with each one's row of y.
#ifndef JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_WEIGHTED_H_
#define JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_WEIGHTED_H_

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/numbers.h"
#include "xla_ffi/engine/cuda/peers.h"
#include "xla_ffi/engine/cuda/sources.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

// Rows of one token: the i-th belongs to lane i of a warp.
template <typename Sum>
struct TokenRows {
  int32_t count = 0;  // on all lanes
  int64_t row = 0;    // this lane's
  Sum weight = 0;
  Sum dot = 0;
};

// Takes up to a warp of rows from a chain, where `*row` is the next and `*next` the one behind it,
// and finds their weights on rank `rank`, if that is not negative.
template <typename Sum, typename Team>
JAX_FUSCO_PROGRAM TokenRows<Sum> TakeRows(const Team& team, const GatherRowsWeightedArgs& args,
                                          const Sources& sources, Table* table, int32_t rank,
                                          int64_t* row, int64_t* next) {
  TokenRows<Sum> rows;
  while (rows.count < Team::kLanes && *row < args.num_rows) {
    if (team.lane() == rows.count) rows.row = *row;
    ++rows.count;
    *row = *next;
    if (*row < args.num_rows) *next = FollowChain(team, sources, table, *row);
  }
  if (rank < 0 || team.lane() >= rows.count) return rows;
  const int32_t a = args.source[rows.row];
  if (a >= 0 && a < args.tokens * args.k) {
    rows.weight = WeightAt<Sum>(table->operand[rank][1], args.weights_type, a);
  } else {
    MarkBadIndex(team, table, table->rank, rank, a);
  }
  return rows;
}

// The rows' dy and dots, from a row of g. A lane has kUnits units of N elements, kLanes apart, at a
// time.
template <typename G, typename Y, int kUnits, int N, typename Team>
JAX_FUSCO_PROGRAM void ScaleRows(const Team& team, const GatherRowsWeightedArgs& args, const G* g,
                                 TokenRows<SumOf<Y>>* rows) {
  using Sum = SumOf<Y>;
  const int64_t units = args.length / N;
  for (int64_t begin = 0; begin < units; begin += kUnits * Team::kLanes) {
    const int64_t own = begin + team.lane();
    Pack<G, N> from[kUnits] = {};
    JAX_FUSCO_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int64_t unit = own + u * Team::kLanes;
      if (unit < units) from[u] = Pack<G, N>::Load(g + unit * N);
    }
    for (int i = 0; i < rows->count; ++i) {
      const int64_t at = team.Shuffle(rows->row, i) * args.length;
      const Sum weight = team.Shuffle(rows->weight, i);
      const Y* const y = static_cast<const Y*>(args.y) + at;
      Y* const dy = static_cast<Y*>(args.dy) + at;
      Pack<Y, N> other[kUnits] = {};
      JAX_FUSCO_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        const int64_t unit = own + u * Team::kLanes;
        if (unit < units) other[u] = Pack<Y, N>::Load(y + unit * N);
      }
      Sum dot = 0;
      JAX_FUSCO_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        const int64_t unit = own + u * Team::kLanes;
        Pack<Y, N> scaled{};
        JAX_FUSCO_UNROLL
        for (int e = 0; e < N; ++e) {
          const Sum value = To<Sum>(from[u][e]);
          Y rounded;
          Round(weight * value, &rounded);
          scaled.Set(e, rounded);
          dot = Fma(value, To<Sum>(other[u][e]), dot);
        }
        if (unit < units) scaled.Store(dy + unit * N);
      }
      dot = SumOfLanes(team, dot);
      if (team.lane() == i) rows->dot += dot;
    }
  }
  if (team.lane() < rows->count) static_cast<Sum*>(args.dots)[rows->row] = rows->dot;
}

// dy and dots of rows without a source: zero, and y is not read.
template <typename Y, int N, typename Team>
JAX_FUSCO_PROGRAM void ClearRows(const Team& team, const GatherRowsWeightedArgs& args,
                                 const TokenRows<SumOf<Y>>& rows) {
  const int64_t units = args.length / N;
  for (int i = 0; i < rows.count; ++i) {
    Y* const dy = static_cast<Y*>(args.dy) + team.Shuffle(rows.row, i) * args.length;
    for (int64_t unit = team.lane(); unit < units; unit += Team::kLanes) {
      Pack<Y, N>{}.Store(dy + unit * N);
    }
  }
  if (team.lane() < rows.count) static_cast<SumOf<Y>*>(args.dots)[rows.row] = 0;
}

// A warp for each row that is not a later one of its chain.
template <typename G, typename Y, typename Team>
JAX_FUSCO_PROGRAM void GatherRowsWeighted(const Team& team, const GatherRowsWeightedArgs& args,
                                          Table* table) {
  if (!HasPeers(team, table)) return;
  constexpr int N = 16 / static_cast<int>(sizeof(G) > sizeof(Y) ? sizeof(G) : sizeof(Y));
  constexpr int kUnits = 4;
  const bool aligned = args.length % N == 0 && Pack<Y, N>::IsAlignedTo(args.y) &&
                       Pack<Y, N>::IsAlignedTo(args.dy) &&
                       ArePeersAligned<Pack<G, N>>(team, table, 0);
  const Sources sources{args.num_rows, args.source_rank, args.source,
                        args.chain,    args.k,           args.tokens};
  for (Parts parts(args.num_rows, 1, FirstRow(args.num_rows, table), WarpOfGrid(team),
                   WarpsOfGrid(team));
       parts.any(); parts.Next()) {
    int64_t row = parts.row();
    const Order order = OrderOf(team, sources, table, row, EntryOf(sources, row), true);
    if (order.task == Task::kNone) continue;
    const bool takes = order.task == Task::kTake;
    for (int64_t next = order.next; row < args.num_rows;) {
      TokenRows<SumOf<Y>> rows =
          TakeRows<SumOf<Y>>(team, args, sources, table, takes ? order.rank : -1, &row, &next);
      const G* const g =
          takes ? static_cast<const G*>(table->operand[order.rank][0]) + order.row * args.length
                : nullptr;
      if (takes && aligned) {
        ScaleRows<G, Y, kUnits, N>(team, args, g, &rows);
      } else if (takes) {
        ScaleRows<G, Y, kUnits, 1>(team, args, g, &rows);
      } else if (aligned) {
        ClearRows<Y, N>(team, args, rows);
      } else {
        ClearRows<Y, 1>(team, args, rows);
      }
    }
  }
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_GATHER_ROWS_WEIGHTED_H_
