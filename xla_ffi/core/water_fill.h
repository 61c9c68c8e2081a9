// Water filling: who loses rows where a rank would get more than it has room for.
#ifndef JAX_FUSCO_CORE_WATER_FILL_H_
#define JAX_FUSCO_CORE_WATER_FILL_H_

#include <cstdint>

#include "xla_ffi/core/macros.h"

namespace jax_fusco {

JAX_FUSCO_HOST_DEVICE inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Rows of the padded groups when every cell is cut to `level`. `counts` is [num_groups, num_ranks].
JAX_FUSCO_HOST_DEVICE inline int64_t PaddedRows(const int32_t* counts, int64_t num_groups,
                                                int64_t num_ranks, int64_t level,
                                                int64_t alignment) {
  int64_t total = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    int64_t rows = 0;
    for (int64_t s = 0; s < num_ranks; ++s) {
      const int64_t count = counts[g * num_ranks + s];
      rows += count < level ? count : level;
    }
    total += RoundUp(rows, alignment);
  }
  return total;
}

// Cuts the cells of one receiving rank so that its padded groups fit in `capacity` rows.
//
// `counts` and `kept` are [num_groups, num_ranks]: assignments from each source rank to each local
// expert, and how many of them keep a row. Every cell is cut to the highest level at which all
// fits; then each cut cell, in buffer order, gets one row more wherever that still fits. So no cell
// is cut while a larger one is spared. Returns the padded rows in use.
JAX_FUSCO_HOST_DEVICE inline int64_t WaterFill(const int32_t* counts, int64_t num_groups,
                                               int64_t num_ranks, int64_t capacity,
                                               int64_t alignment, int32_t* kept) {
  int64_t level = 0;
  for (int64_t i = 0; i < num_groups * num_ranks; ++i) {
    if (counts[i] > level) level = counts[i];
  }
  int64_t used = PaddedRows(counts, num_groups, num_ranks, level, alignment);
  if (used > capacity) {
    int64_t low = 0;  // fits always, since capacity >= 0; `level` does not fit
    while (level - low > 1) {
      const int64_t middle = low + (level - low) / 2;
      if (PaddedRows(counts, num_groups, num_ranks, middle, alignment) <= capacity) {
        low = middle;
      } else {
        level = middle;
      }
    }
    level = low;
    used = PaddedRows(counts, num_groups, num_ranks, level, alignment);
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    int64_t rows = 0;
    for (int64_t s = 0; s < num_ranks; ++s) {
      const int64_t i = g * num_ranks + s;
      kept[i] = static_cast<int32_t>(counts[i] < level ? counts[i] : level);
      rows += kept[i];
    }
    for (int64_t s = 0; s < num_ranks; ++s) {
      const int64_t i = g * num_ranks + s;
      if (counts[i] <= kept[i]) continue;
      const int64_t growth = rows % alignment == 0 ? alignment : 0;
      if (used + growth > capacity) continue;
      ++kept[i];
      ++rows;
      used += growth;
    }
  }
  return used;
}

}  // namespace jax_fusco

#endif  // JAX_FUSCO_CORE_WATER_FILL_H_
