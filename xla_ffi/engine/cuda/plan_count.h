// The first half of a plan, before a rank knows its peers: counts the assignments of each expert,
// and sorts them by expert, in order, without a sort. A block counts a tile of assignments, a scan
// over the tiles says where each tile's share begins, and the block then puts them there.
#ifndef JAX_FUSCO_ENGINE_CUDA_PLAN_COUNT_H_
#define JAX_FUSCO_ENGINE_CUDA_PLAN_COUNT_H_

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/plan_layout.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

JAX_FUSCO_PROGRAM inline int32_t* Scratch(const PlanArgs& args) {
  return static_cast<int32_t*>(args.scratch);
}

// The bin of an id: its expert, E where it is out of range, -1 for none.
JAX_FUSCO_PROGRAM inline int32_t BinOf(int32_t id, int64_t experts) {
  return id < -1 || id >= experts ? static_cast<int32_t>(experts) : id;
}

// The assignments of one warp: a contiguous part of its block's tile.
struct WarpTile {
  int64_t begin, end;
};
template <typename Team>
JAX_FUSCO_PROGRAM WarpTile TileOfWarp(const Team& team, const PlanShape& shape,
                                      const PlanLayout& layout) {
  const int64_t n = shape.assignments();
  const int64_t tile = team.block() * layout.tile;
  const int64_t last = tile + layout.tile < n ? tile + layout.tile : n;
  const int64_t share = (layout.tile + team.num_warps() - 1) / team.num_warps();
  const int64_t begin = tile + share * team.warp();
  return {begin, begin + share < last ? begin + share : last};
}

// Counts each warp's assignments into its row of the block's shared `counts` [warps, bins].
template <typename Team>
JAX_FUSCO_PROGRAM void CountWarps(const Team& team, const PlanArgs& args, const PlanLayout& layout,
                                  int32_t* counts) {
  const int64_t all = team.num_warps() * layout.bins;
  for (int64_t i = team.thread(); i < all; i += team.num_threads()) counts[i] = 0;
  team.Sync();
  const WarpTile tile = TileOfWarp(team, args.shape, layout);
  int32_t* const own = counts + team.warp() * layout.bins;
  for (int64_t a = tile.begin + team.lane(); a < tile.end; a += Team::kLanes) {
    const int32_t bin = BinOf(args.expert_ids[a], args.shape.num_experts);
    if (bin >= 0) team.Add(own + bin, 1);
  }
  team.Sync();
}

// A block for each tile.
template <typename Team>
JAX_FUSCO_PROGRAM void CountTiles(const Team& team, const PlanArgs& args,
                                  const PlanLayout& layout) {
  auto* const counts = reinterpret_cast<int32_t*>(team.shared());
  int32_t* const scratch = Scratch(args);
  CountWarps(team, args, layout, counts);
  for (int64_t bin = team.thread(); bin < layout.bins; bin += team.num_threads()) {
    int32_t sum = 0;
    for (int w = 0; w < team.num_warps(); ++w) sum += counts[w * layout.bins + bin];
    scratch[layout.tiles + bin * layout.num_tiles + team.block()] = sum;
  }
  const int64_t heads = args.chain == nullptr ? 0 : args.shape.num_ranks * args.shape.tokens;
  for (int64_t i = ThreadOfGrid(team); i < heads; i += ThreadsOfGrid(team)) {
    scratch[layout.heads + i] = -1;
  }
  if (ThreadOfGrid(team) == 0) scratch[layout.tickets] = 0;
}

// A warp for each bin: sums over the tiles before each, and over all.
template <typename Team>
JAX_FUSCO_PROGRAM void ScanTiles(const Team& team, const PlanArgs& args, const PlanLayout& layout) {
  int32_t* const scratch = Scratch(args);
  for (int64_t bin = WarpOfGrid(team); bin < layout.bins; bin += WarpsOfGrid(team)) {
    int32_t* const tiles = scratch + layout.tiles + bin * layout.num_tiles;
    int32_t sum = 0;
    for (int64_t first = 0; first < layout.num_tiles; first += Team::kLanes) {
      const int64_t tile = first + team.lane();
      const int32_t count = tile < layout.num_tiles ? tiles[tile] : 0;
      const int32_t with = ScanOfLanes(team, count);
      if (tile < layout.num_tiles) tiles[tile] = sum + with - count;
      sum += team.Shuffle(with, Team::kLanes - 1);
    }
    if (team.lane() > 0) continue;
    scratch[layout.counts + bin] = sum;
    if (bin == args.shape.num_experts) *args.results.num_invalid = sum;
  }
}

// A block for each tile: puts every assignment into its place in `sorted`, and its ordinal among
// this rank's assignments to its expert into results.slot.
template <typename Team>
JAX_FUSCO_PROGRAM void SortTiles(const Team& team, const PlanArgs& args, const PlanLayout& layout) {
  auto* const next = reinterpret_cast<int32_t*>(team.shared());  // [warps, bins]
  int32_t* const starts = next + team.num_warps() * layout.bins;
  int32_t* const scratch = Scratch(args);
  const int64_t experts = args.shape.num_experts;
  CountWarps(team, args, layout, next);
  for (int64_t e = team.thread(); e < experts; e += team.num_threads()) {
    int32_t ordinal = scratch[layout.tiles + e * layout.num_tiles + team.block()];
    for (int w = 0; w < team.num_warps(); ++w) {
      int32_t* const of_warp = next + w * layout.bins + e;
      const int32_t count = *of_warp;
      *of_warp = ordinal;
      ordinal += count;
    }
    starts[e] = scratch[layout.counts + e];
  }
  ScanArray(team, starts, experts);
  if (team.block() == 0) {
    for (int64_t e = team.thread(); e < experts; e += team.num_threads()) {
      scratch[layout.starts + e] = starts[e];
    }
  }
  const WarpTile tile = TileOfWarp(team, args.shape, layout);
  int32_t* const own = next + team.warp() * layout.bins;
  for (int64_t first = tile.begin; first < tile.end; first += Team::kLanes) {
    const int64_t a = first + team.lane();
    const int32_t bin = a < tile.end ? BinOf(args.expert_ids[a], experts) : -1;
    const bool counts = bin >= 0 && bin < experts;
    const uint32_t same = team.Match(bin);
    const int before = CountBits(same & ((1u << team.lane()) - 1));
    if (counts) {
      const int32_t ordinal = own[bin] + before;
      args.results.slot[a] = ordinal;
      scratch[layout.sorted + starts[bin] + ordinal] = static_cast<int32_t>(a);
    }
    team.SyncWarp();
    if (counts && before == 0) own[bin] += CountBits(same);
    team.SyncWarp();
  }
}

// All of it by one block, where there is one tile.
template <typename Team>
JAX_FUSCO_PROGRAM void CountOneTile(const Team& team, const PlanArgs& args,
                                    const PlanLayout& layout) {
  CountTiles(team, args, layout);
  team.Sync();
  ScanTiles(team, args, layout);
  team.Sync();
  SortTiles(team, args, layout);
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_PLAN_COUNT_H_
