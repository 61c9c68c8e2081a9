// reduce_rows: the rows of a token's slots, weighted and summed, in ascending order of j. A warp
// makes a part of a row of the result; all the rows it sums are on their way before the first sum.
#ifndef JAX_FUSCO_ENGINE_CUDA_REDUCE_ROWS_H_
#define JAX_FUSCO_ENGINE_CUDA_REDUCE_ROWS_H_

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/numbers.h"
#include "xla_ffi/engine/cuda/peers.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

// Up to n terms of a token's sum, on all lanes of a warp.
template <typename Y, int n>
struct Terms {
  const Y* row[n];  // null: no term
  SumOf<Y> weight[n];

  // Those from j on. All lanes together; n <= lanes of a warp.
  template <typename Team>
  JAX_FUSCO_PROGRAM void Find(const Team& team, const ReduceRowsArgs& args, Table* table,
                              int64_t token, int64_t j) {
    static_assert(n <= Team::kLanes);
    int64_t from = 0;
    SumOf<Y> factor = 1;
    if (team.lane() < n && j + team.lane() < args.k) {
      const int64_t a = token * args.k + j + team.lane();
      const int32_t slot = args.slot[a];
      const int32_t rank = args.slot_rank[a];
      if (args.weights != nullptr) {
        factor = WeightAt<SumOf<Y>>(args.weights, args.weights_type, a);
      }
      if (slot >= 0 && rank >= 0 && rank < table->num_ranks && slot < args.peer_rows) {
        const auto* const rows = static_cast<const Y*>(table->operand[rank][0]);
        from = static_cast<int64_t>(reinterpret_cast<intptr_t>(rows + slot * args.length));
      } else if (slot >= 0) {
        MarkBadIndex(team, table, table->rank, rank, slot);
      }
    }
    JAX_FUSCO_UNROLL
    for (int i = 0; i < n; ++i) {
      row[i] = reinterpret_cast<const Y*>(static_cast<intptr_t>(team.Shuffle(from, i)));
      weight[i] = team.Shuffle(factor, i);
    }
  }
};

// Elements of Y in 16 bytes.
template <typename Y>
inline constexpr int kReduceUnit = 16 / static_cast<int>(sizeof(Y));

// Makes units [first, last) of N elements of a token's row. A lane has kUnits units, kLanes apart,
// of kTerms rows at a time.
template <typename Y, typename Out, int kTerms, int kUnits, int N, typename Team>
JAX_FUSCO_PROGRAM void SumUnits(const Team& team, const ReduceRowsArgs& args, Table* table,
                                int64_t token, Terms<Y, kTerms>* terms, int64_t first,
                                int64_t last) {
  using Sum = SumOf<Y>;
  Out* const out = static_cast<Out*>(args.out) + token * args.length;
  for (int64_t begin = first; begin < last; begin += kUnits * Team::kLanes) {
    const int64_t own = begin + team.lane();
    Sum sum[kUnits][N] = {};
    for (int64_t j = 0;;) {
      Pack<Y, N> in[kTerms][kUnits];
      JAX_FUSCO_UNROLL
      for (int t = 0; t < kTerms; ++t) {
        JAX_FUSCO_UNROLL
        for (int u = 0; u < kUnits; ++u) {
          const int64_t unit = own + u * Team::kLanes;
          in[t][u] = {};
          if (terms->row[t] != nullptr && unit < last) {
            in[t][u] = Pack<Y, N>::Load(terms->row[t] + unit * N);
          }
        }
      }
      JAX_FUSCO_UNROLL
      for (int t = 0; t < kTerms; ++t) {
        if (terms->row[t] == nullptr) continue;
        JAX_FUSCO_UNROLL
        for (int i = 0; i < kUnits * N; ++i) {
          Sum& to = sum[i / N][i % N];
          to = Fma(terms->weight[t], To<Sum>(in[t][i / N][i % N]), to);
        }
      }
      j += kTerms;
      if (j >= args.k) break;
      terms->Find(team, args, table, token, j);
    }
    if (args.k > kTerms) terms->Find(team, args, table, token, 0);
    JAX_FUSCO_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int64_t unit = own + u * Team::kLanes;
      Pack<Out, N> pack{};
      JAX_FUSCO_UNROLL
      for (int i = 0; i < N; ++i) {
        Out rounded;
        Round(sum[u][i], &rounded);
        pack.Set(i, rounded);
      }
      if (unit < last) pack.Store(out + unit * N);
    }
  }
}

// A warp for each of `parts` parts of every token's row.
template <typename Y, typename Out, int kTerms, int kUnits, typename Team>
JAX_FUSCO_PROGRAM void ReduceRows(const Team& team, const ReduceRowsArgs& args, Table* table,
                                  int64_t parts) {
  if (!HasPeers(team, table)) return;
  constexpr int N = kReduceUnit<Y>;
  const bool aligned = args.length % N == 0 && Pack<Out, N>::IsAlignedTo(args.out) &&
                       ArePeersAligned<Pack<Y, N>>(team, table, 0);
  const int64_t units = aligned ? args.length / N : args.length;
  const int64_t step = kUnits * Team::kLanes;
  const int64_t share = ((units + step - 1) / step + parts - 1) / parts * step;
  for (int64_t i = WarpOfGrid(team); i < args.tokens * parts; i += WarpsOfGrid(team)) {
    const int64_t token = parts == 1 ? i : i / parts;
    const int64_t part = i - token * parts;
    Terms<Y, kTerms> terms;
    terms.Find(team, args, table, token, 0);
    const int64_t first = part * share;
    const int64_t last = first + share < units ? first + share : units;
    if (aligned) {
      SumUnits<Y, Out, kTerms, kUnits, N>(team, args, table, token, &terms, first, last);
    } else {
      SumUnits<Y, Out, kTerms, kUnits, 1>(team, args, table, token, &terms, first, last);
    }
  }
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_REDUCE_ROWS_H_
