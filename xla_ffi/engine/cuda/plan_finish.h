// The second half of a plan, when the peers' counts and sorted lists may be read: a block for each
// receiving rank lays out its buffer, then every assignment gets its slot and every row of the own
// buffer its source, then rows of one token find each other.
#ifndef JAX_FUSCO_ENGINE_CUDA_PLAN_FINISH_H_
#define JAX_FUSCO_ENGINE_CUDA_PLAN_FINISH_H_

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/peers.h"
#include "xla_ffi/engine/cuda/plan_cells.h"
#include "xla_ffi/engine/cuda/plan_count.h"
#include "xla_ffi/engine/cuda/plan_layout.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

JAX_FUSCO_PROGRAM inline const int32_t* ScratchOf(const Table* table, int64_t rank) {
  return static_cast<const int32_t*>(table->operand[rank][0]);
}

// Lays out the buffer of one rank, and keeps what this rank needs to know of it.
template <typename Team>
JAX_FUSCO_PROGRAM void LayOutRank(const Team& team, const PlanArgs& args, const PlanLayout& layout,
                                  const Table* table, int64_t owner) {
  const PlanShape& shape = args.shape;
  const int64_t groups = shape.experts_per_rank();
  auto* const counts = reinterpret_cast<int32_t*>(team.shared());
  int32_t* const extra = counts + shape.cells();
  Cells cells{groups, shape.num_ranks, shape.capacity, shape.alignment,
              counts, extra,           extra + groups, 0,
              0};
  for (int64_t i = team.thread(); i < shape.cells(); i += team.num_threads()) {
    const int64_t s = i / groups;  // so that neighbours read neighbours
    const int64_t g = i % groups;
    counts[g * shape.num_ranks + s] = ScratchOf(table, s)[layout.counts + owner * groups + g];
  }
  team.Sync();
  FindLevel(team, &cells);
  DealExtraRows(team, &cells);
  const bool own = owner == table->rank;
  int32_t* const scratch = Scratch(args);
  const int64_t dropped =
      ForEachCell(team, cells, [&](int64_t g, int64_t s, int32_t first, int32_t kept) {
        const int64_t expert = owner * groups + g;
        if (s == table->rank) {
          scratch[layout.slot_first + expert] = first;
          scratch[layout.slot_kept + expert] = kept;
        }
        if (!own) return;
        const int64_t cell = g * shape.num_ranks + s;
        scratch[layout.cell_first + cell] = first;
        scratch[layout.cell_last + cell] = first + kept;
        scratch[layout.cell_source + cell] = ScratchOf(table, s)[layout.starts + expert];
        if (s + 1 < shape.num_ranks) return;
        const int32_t next =
            g + 1 < groups ? cells.starts[g + 1] : static_cast<int32_t>(cells.used);
        args.results.expert_counts[g] = first + kept - cells.starts[g];
        args.results.group_sizes[g] = next - cells.starts[g];
      });
  if (!own) return;
  const int64_t all = SumOfBlock(team, dropped);
  if (team.thread() > 0) return;
  *args.results.num_dropped = static_cast<int32_t>(all);
  scratch[layout.used] = static_cast<int32_t>(cells.used);
}

// Work shared by `count` threads, of which this one is number `index`.
struct Share {
  int64_t index;
  int64_t count;
};

// From the ordinal of each assignment to its slot.
JAX_FUSCO_PROGRAM inline void PlaceSlots(const PlanArgs& args, const PlanLayout& layout,
                                         const Share& share) {
  const int32_t* const scratch = Scratch(args);
  const auto groups = static_cast<int32_t>(args.shape.experts_per_rank());
  for (int64_t a = share.index; a < args.shape.assignments(); a += share.count) {
    const int32_t expert = args.expert_ids[a];
    int32_t slot = -1;
    if (expert >= 0 && expert < args.shape.num_experts) {
      const int32_t ordinal = args.results.slot[a];
      if (ordinal < scratch[layout.slot_kept + expert]) {
        slot = scratch[layout.slot_first + expert] + ordinal;
      }
    }
    args.results.slot[a] = slot;
    args.results.slot_rank[a] = slot < 0 ? -1 : expert / groups;
  }
}

// The last cell that begins at or before `row`.
JAX_FUSCO_PROGRAM inline int64_t CellAt(const int32_t* firsts, int64_t cells, int64_t row) {
  int64_t low = 0;
  int64_t high = cells;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (firsts[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The source of every row of this rank's buffer, and a list of the rows of each token, in any
// order. `firsts` [cells] is shared memory to be used.
template <typename Team>
JAX_FUSCO_PROGRAM void PlaceSources(const Team& team, const PlanArgs& args,
                                    const PlanLayout& layout, const Table* table,
                                    const Share& share, int32_t* firsts) {
  const PlanShape& shape = args.shape;
  int32_t* const scratch = Scratch(args);
  for (int64_t i = team.thread(); i < shape.cells(); i += team.num_threads()) {
    firsts[i] = scratch[layout.cell_first + i];
  }
  team.Sync();
  const int64_t used = scratch[layout.used];
  const auto k = static_cast<int32_t>(shape.k);
  for (int64_t row = share.index; row < shape.capacity; row += share.count) {
    int32_t rank = row < used ? kPadding : kTail;
    int32_t source = rank;
    const int64_t cell = CellAt(firsts, shape.cells(), row);
    if (row < scratch[layout.cell_last + cell]) {
      rank = static_cast<int32_t>(cell % shape.num_ranks);
      const int64_t at = scratch[layout.cell_source + cell] + (row - firsts[cell]);
      source = ScratchOf(table, rank)[layout.sorted + at];
      if (args.chain != nullptr) {
        int32_t* const head = scratch + layout.heads + rank * shape.tokens + source / k;
        scratch[layout.links + row] = team.Exchange(head, static_cast<int32_t>(row));
      }
    }
    args.results.source_rank[row] = rank;
    args.results.source[row] = source;
  }
}

// Chains the rows of each token: every row goes through its token's list, whose order says nothing.
JAX_FUSCO_PROGRAM inline void ChainRows(const PlanArgs& args, const PlanLayout& layout,
                                        const Share& share) {
  const PlanShape& shape = args.shape;
  const int32_t* const scratch = Scratch(args);
  const auto end = static_cast<int32_t>(shape.capacity);
  const auto k = static_cast<int32_t>(shape.k);
  for (int64_t row = share.index; row < shape.capacity; row += share.count) {
    const int32_t source = args.results.source[row];
    int32_t chain = 0;
    if (source >= 0) {
      const int64_t rank = args.results.source_rank[row];
      int32_t next = end;
      bool later = false;
      for (int32_t other = scratch[layout.heads + rank * shape.tokens + source / k]; other >= 0;
           other = scratch[layout.links + other]) {
        later |= other < row;
        if (other > row && other < next) next = other;
      }
      chain = later ? -1 - next : next;
    }
    args.chain[row] = chain;
  }
}

template <typename Team>
JAX_FUSCO_PROGRAM void PlaceAll(const Team& team, const PlanArgs& args, const PlanLayout& layout,
                                const Table* table) {
  if (!HasPeers(team, table)) return;
  const Share share{ThreadOfGrid(team), ThreadsOfGrid(team)};
  PlaceSlots(args, layout, share);
  PlaceSources(team, args, layout, table, share, reinterpret_cast<int32_t*>(team.shared()));
}

// The last step of a large plan.
template <typename Team>
JAX_FUSCO_PROGRAM void ChainAll(const Team& team, const PlanArgs& args, const PlanLayout& layout,
                                const Table* table) {
  if (!HasPeers(team, table)) return;
  ChainRows(args, layout, {ThreadOfGrid(team), ThreadsOfGrid(team)});
}

// A block for each receiving rank.
template <typename Team>
JAX_FUSCO_PROGRAM void LayOutRanks(const Team& team, const PlanArgs& args, const PlanLayout& layout,
                                   const Table* table) {
  if (!HasPeers(team, table)) return;
  LayOutRank(team, args, layout, table, team.block());
}

// All steps of a small plan: the block that comes last does what follows the first step.
template <typename Team>
JAX_FUSCO_PROGRAM void FinishSmallPlan(const Team& team, const PlanArgs& args,
                                       const PlanLayout& layout, const Table* table) {
  if (!HasPeers(team, table)) return;
  LayOutRank(team, args, layout, table, team.block());
  if (!team.IsLastBlock(Scratch(args) + layout.tickets)) return;
  const Share share{team.thread(), team.num_threads()};
  PlaceSlots(args, layout, share);
  PlaceSources(team, args, layout, table, share, reinterpret_cast<int32_t*>(team.shared()));
  if (args.chain == nullptr) return;
  team.Sync();
  ChainRows(args, layout, share);
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_PLAN_FINISH_H_
