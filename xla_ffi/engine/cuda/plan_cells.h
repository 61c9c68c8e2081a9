// How one receiving rank's buffer is laid out: the results of LayOutBuffer in core/plan.h and of
// WaterFill in core/water_fill.h, by a block of threads.
//
// The second pass of the water fill, which gives cut cells one row more in buffer order, is a
// prefix sum: the cut cells of a group first fill what its last block of `alignment` rows has left,
// which costs nothing, and then take whole blocks while there are any, one group after the other.
#ifndef JAX_FUSCO_ENGINE_CUDA_PLAN_CELLS_H_
#define JAX_FUSCO_ENGINE_CUDA_PLAN_CELLS_H_

#include "xla_ffi/core/plan.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

// The cells of one rank, in shared memory.
struct Cells {
  int64_t groups;
  int64_t ranks;
  int64_t capacity;
  int64_t alignment;
  int32_t* counts;  // [groups, ranks]
  int32_t* extra;   // [groups] rows above `level`, for the group's first cut cells
  int32_t* starts;  // [groups] first row of each
  int64_t level;    // no cell has more rows, but for the extra ones
  int64_t used;     // rows up to the end of the last group
};

// Neighbouring lanes that share the cells of a group: a power of two.
template <typename Team>
JAX_FUSCO_PROGRAM int LanesOfGroup(const Cells& cells) {
  int width = 1;
  while (width < Team::kLanes && width < cells.ranks) width *= 2;
  return width;
}

// Rows of group g, and its cut cells, when every cell is cut to `level`: on all its lanes.
struct GroupAtLevel {
  int64_t rows;
  int32_t cut;
};
template <typename Team>
JAX_FUSCO_PROGRAM GroupAtLevel CutGroup(const Team& team, const Cells& cells, int64_t g,
                                        int64_t level, int width) {
  GroupAtLevel group{0, 0};
  if (g < cells.groups) {
    for (int64_t s = team.lane() % width; s < cells.ranks; s += width) {
      const int64_t count = cells.counts[g * cells.ranks + s];
      group.rows += count < level ? count : level;
      group.cut += count > level;
    }
  }
  group.rows = SumOfLanes(team, group.rows, width);
  group.cut = SumOfLanes(team, group.cut, width);
  return group;
}

// Calls body(g, width) for every group, on all lanes of its share of a warp; groups past the last
// are there to keep warps whole.
template <typename Team, typename Body>
JAX_FUSCO_PROGRAM void ForEachGroup(const Team& team, const Cells& cells, Body body) {
  const int width = LanesOfGroup<Team>(cells);
  const int step = team.num_threads() / width;
  for (int64_t first = 0; first < cells.groups; first += step) {
    body(first + team.thread() / width, width);
  }
}

template <typename Team>
JAX_FUSCO_PROGRAM int64_t PaddedRowsOfBlock(const Team& team, const Cells& cells, int64_t level) {
  int64_t total = 0;
  ForEachGroup(team, cells, [&](int64_t g, int width) {
    const GroupAtLevel group = CutGroup(team, cells, g, level, width);
    if (team.lane() % width == 0) total += RoundUp(group.rows, cells.alignment);
  });
  return SumOfBlock(team, total);
}

// Finds the highest level at which all fits.
template <typename Team>
JAX_FUSCO_PROGRAM void FindLevel(const Team& team, Cells* cells) {
  int64_t most = 0;
  for (int64_t i = team.thread(); i < cells->groups * cells->ranks; i += team.num_threads()) {
    if (cells->counts[i] > most) most = cells->counts[i];
  }
  cells->level = MaxOfBlock(team, most);
  cells->used = PaddedRowsOfBlock(team, *cells, cells->level);
  if (cells->used <= cells->capacity) return;
  int64_t low = 0;  // fits always; `level` does not
  cells->used = 0;
  while (cells->level - low > 1) {
    const int64_t middle = low + (cells->level - low) / 2;
    const int64_t rows = PaddedRowsOfBlock(team, *cells, middle);
    if (rows <= cells->capacity) {
      low = middle;
      cells->used = rows;
    } else {
      cells->level = middle;
    }
  }
  cells->level = low;
}

// Rows that the cut cells of a group may have for nothing.
JAX_FUSCO_PROGRAM inline int64_t FreeRows(int64_t rows, int64_t alignment) {
  return RoundUp(rows, alignment) - rows;
}

// Deals out the extra rows, then finds the groups' starts and the rows in use.
template <typename Team>
JAX_FUSCO_PROGRAM void DealExtraRows(const Team& team, Cells* cells) {
  const int64_t alignment = cells->alignment;
  ForEachGroup(team, *cells, [&](int64_t g, int width) {
    const GroupAtLevel group = CutGroup(team, *cells, g, cells->level, width);
    if (g >= cells->groups || team.lane() % width != 0) return;
    const int64_t paid = group.cut - FreeRows(group.rows, alignment);
    cells->starts[g] = paid > 0 ? static_cast<int32_t>((paid + alignment - 1) / alignment) : 0;
  });
  ScanArray(team, cells->starts, cells->groups);  // blocks asked for by the groups before
  const int64_t blocks = (cells->capacity - cells->used) / alignment;
  int64_t used = 0;
  ForEachGroup(team, *cells, [&](int64_t g, int width) {
    const GroupAtLevel group = CutGroup(team, *cells, g, cells->level, width);
    if (g >= cells->groups || team.lane() % width != 0) return;
    const int64_t left = blocks - cells->starts[g];
    const int64_t most = FreeRows(group.rows, alignment) + (left > 0 ? left : 0) * alignment;
    const int64_t extra = group.cut < most ? group.cut : most;
    cells->extra[g] = static_cast<int32_t>(extra);
    cells->starts[g] = static_cast<int32_t>(RoundUp(group.rows + extra, alignment));
    used += cells->starts[g];
  });
  cells->used = SumOfBlock(team, used);
  ScanArray(team, cells->starts, cells->groups);
}

// Calls body(g, s, first, kept) for every cell, and returns to each thread the rows that it saw
// dropped.
template <typename Team, typename Body>
JAX_FUSCO_PROGRAM int64_t ForEachCell(const Team& team, const Cells& cells, Body body) {
  int64_t dropped = 0;
  ForEachGroup(team, cells, [&](int64_t g, int width) {
    const int within = team.lane() % width;
    const int last = team.lane() - within + width - 1;
    const bool exists = g < cells.groups;
    int32_t row = exists ? cells.starts[g] : 0;
    int32_t extra = exists ? cells.extra[g] : 0;  // not yet given to a cell
    for (int64_t s0 = 0; s0 < cells.ranks; s0 += width) {
      const int64_t s = s0 + within;
      const bool cell = exists && s < cells.ranks;
      const int64_t count = cell ? cells.counts[g * cells.ranks + s] : 0;
      const int32_t cut = count > cells.level;
      const int32_t cuts = ScanOfLanes(team, cut, width);
      const int64_t kept = cut != 0 ? cells.level + (cuts <= extra ? 1 : 0) : count;
      const auto rows = ScanOfLanes(team, static_cast<int32_t>(kept), width);
      if (cell) body(g, s, row + rows - static_cast<int32_t>(kept), static_cast<int32_t>(kept));
      dropped += count - kept;
      row += team.Shuffle(rows, last);
      extra -= team.Shuffle(cuts, last);
    }
  });
  return dropped;
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_PLAN_CELLS_H_
