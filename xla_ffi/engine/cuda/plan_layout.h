// How a plan's work is cut into tiles, and what its scratch memory keeps where: the same on every
// rank, so that peers find each other's lists.
#ifndef JAX_FUSCO_ENGINE_CUDA_PLAN_LAYOUT_H_
#define JAX_FUSCO_ENGINE_CUDA_PLAN_LAYOUT_H_

#include <cstdint>

#include "xla_ffi/core/plan.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

// What a machine's blocks are like.
struct PlanBlocks {
  int lanes = 32;
  int max_warps = 8;
  int64_t shared_bytes = (48 << 10) - kCollectiveBytes;
  int64_t rounds = 8;  // of a warp in a tile, at least
  int64_t max_tiles = 1024;
};

// Offsets are into the scratch memory, in int32.
struct PlanLayout {
  int64_t bins;       // E + 1: the last one counts ids out of range
  int64_t num_tiles;  // of assignments, each the work of a block
  int64_t tile;       // assignments of a tile
  int32_t warps;      // of such a block

  // Read by peers.
  int64_t counts;  // [E] assignments of each expert
  int64_t starts;  // [E] where they begin in `sorted`
  int64_t sorted;  // [T * k] the assignments by expert
  // This rank's own.
  int64_t tiles;        // [E + 1, num_tiles] assignments of each expert in the tiles before
  int64_t slot_first;   // [E] row of this rank's first assignment to each expert
  int64_t slot_kept;    // [E] how many have a row
  int64_t cell_first;   // [E_local, R] first row of each cell of this rank's buffer
  int64_t cell_last;    // [E_local, R] one past its last
  int64_t cell_source;  // [E_local, R] where it begins in its source rank's `sorted`
  int64_t used;         // [] rows up to the end of the last group
  int64_t tickets;      // [] blocks that are done
  int64_t heads;        // [R, T] a row that holds the token, -1 if none
  int64_t links;        // [C] another row that holds the same token, -1 if none
  int64_t size;         // of all
};

inline PlanLayout LayOutPlan(const PlanShape& shape, const PlanBlocks& blocks = {}) {
  const int64_t n = shape.assignments();
  const int64_t experts = shape.num_experts;
  PlanLayout layout{};
  layout.bins = experts + 1;
  const int64_t warps = (blocks.shared_bytes / 4 - experts) / layout.bins;
  layout.warps = static_cast<int32_t>(warps < 1                  ? 1
                                      : warps > blocks.max_warps ? blocks.max_warps
                                                                 : warps);
  const int64_t least = layout.warps * blocks.lanes * blocks.rounds;
  const int64_t most = (n + blocks.max_tiles - 1) / blocks.max_tiles;
  layout.tile = least > most ? least : most;
  layout.num_tiles = n == 0 ? 1 : (n + layout.tile - 1) / layout.tile;
  int64_t at = 0;
  const auto take = [&at](int64_t count) {
    const int64_t begin = at;
    at += (count + 3) / 4 * 4;
    return begin;
  };
  layout.counts = take(layout.bins);
  layout.starts = take(experts);
  layout.sorted = take(n);
  layout.tiles = take(layout.bins * layout.num_tiles);
  layout.slot_first = take(experts);
  layout.slot_kept = take(experts);
  layout.cell_first = take(experts);
  layout.cell_last = take(experts);
  layout.cell_source = take(experts);
  layout.used = take(1);
  layout.tickets = take(1);
  layout.heads = take(shape.num_ranks * shape.tokens);
  layout.links = take(shape.capacity);
  layout.size = at;
  return layout;
}

// Shared memory of the blocks of each step, besides kCollectiveBytes.
inline int64_t CountSharedBytes(const PlanShape& shape, const PlanLayout& layout) {
  return (layout.warps * layout.bins + shape.num_experts) * 4;
}
inline int64_t FinishSharedBytes(const PlanShape& shape) {
  return (shape.cells() + 2 * shape.experts_per_rank()) * 4;
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_PLAN_LAYOUT_H_
