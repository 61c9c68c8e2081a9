// jax_fusco._core: the plan arithmetic of xla_ffi/core for property tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <vector>

#include "xla_ffi/core/plan.h"
#include "xla_ffi/core/status.h"
#include "xla_ffi/core/water_fill.h"

namespace py = pybind11;

namespace jax_fusco {
namespace {

using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

void Require(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

Ints WaterFillArray(const Ints& counts, int64_t capacity, int64_t alignment) {
  Require(counts.ndim() == 2, "counts must be int32 [E_local, R].");
  Require(capacity >= 0, Concat("capacity is ", capacity, ", it must be at least 0."));
  Require(alignment >= 1, Concat("alignment is ", alignment, ", it must be at least 1."));
  Ints kept({counts.shape(0), counts.shape(1)});
  WaterFill(counts.data(), counts.shape(0), counts.shape(1), capacity, alignment,
            kept.mutable_data());
  return kept;
}

py::dict MakePlan(const Ints& expert_ids, int64_t num_experts, int64_t capacity,
                  int64_t alignment) {
  Require(expert_ids.ndim() == 3 && expert_ids.shape(0) >= 1,
          "expert_ids must be int32 [R, T, k] with R >= 1.");
  const PlanShape shape = {expert_ids.shape(0),
                           expert_ids.shape(1),
                           expert_ids.shape(2),
                           num_experts,
                           capacity,
                           alignment};
  Require(num_experts >= 1 && num_experts % shape.num_ranks == 0,
          Concat("num_experts is ", num_experts, ", it must be a multiple of ", shape.num_ranks,
                 " ranks."));
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  Require(capacity >= 0 && capacity <= kMax,
          Concat("capacity is ", capacity, ", it must lie in [0, 2**31)."));
  Require(alignment >= 1 && alignment <= kMax,
          Concat("alignment is ", alignment, ", it must lie in [1, 2**31)."));
  const int64_t ranks = shape.num_ranks;
  const int64_t groups = shape.experts_per_rank();
  Ints group_sizes({ranks, groups}), expert_counts({ranks, groups});
  Ints slot({ranks, shape.tokens, shape.k}), slot_rank({ranks, shape.tokens, shape.k});
  Ints source_rank({ranks, capacity}), source({ranks, capacity});
  Ints num_dropped(ranks), num_invalid(ranks);
  std::vector<PlanResults> results;
  for (int64_t r = 0; r < ranks; ++r) {
    results.push_back(
        {group_sizes.mutable_data() + r * groups, expert_counts.mutable_data() + r * groups,
         slot.mutable_data() + r * shape.assignments(),
         slot_rank.mutable_data() + r * shape.assignments(),
         source_rank.mutable_data() + r * capacity, source.mutable_data() + r * capacity,
         num_dropped.mutable_data() + r, num_invalid.mutable_data() + r});
  }
  const auto cells = static_cast<size_t>(num_experts * ranks);
  std::vector<int32_t> counts(cells), next(cells), last(cells);
  const int64_t block = groups * ranks;
  for (int64_t r = 0; r < ranks; ++r) {
    *results[static_cast<size_t>(r)].num_invalid =
        CountAssignments(shape, r, expert_ids.data() + r * shape.assignments(), counts.data());
  }
  for (int64_t r = 0; r < ranks; ++r) {
    LayOutBuffer(shape, counts.data() + r * block, results[static_cast<size_t>(r)],
                 next.data() + r * block, last.data() + r * block);
    MarkEmptyRows(shape, results[static_cast<size_t>(r)]);
  }
  for (int64_t r = 0; r < ranks; ++r) {
    PlaceAssignments(shape, r, expert_ids.data() + r * shape.assignments(), results.data(),
                     next.data(), last.data());
  }
  py::dict out;
  out["group_sizes"] = group_sizes;
  out["expert_counts"] = expert_counts;
  out["slot"] = slot;
  out["slot_rank"] = slot_rank;
  out["source_rank"] = source_rank;
  out["source"] = source;
  out["num_dropped"] = num_dropped;
  out["num_invalid"] = num_invalid;
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The plan arithmetic of the engine, without XLA.";
  m.def("water_fill", &WaterFillArray, py::arg("counts"), py::arg("capacity"), py::arg("alignment"),
        "Rows kept in each cell, int32 [E_local, R], of counts [E_local, R].");
  m.def("make_plan", &MakePlan, py::arg("expert_ids"), py::arg("num_experts"), py::arg("capacity"),
        py::arg("alignment"),
        "The plan of R ranks from expert_ids int32 [R, T, k]: a dict of the results of all ranks, "
        "each with a leading dimension R, named as in docs/architecture.md.");
}

}  // namespace jax_fusco
