// The five calls as jobs that meet at a CallSite. docs/architecture.md says what each means.
//
// The integers that say where rows go come from the program and are not trusted: an index that does
// not lie in its buffer is an error that names it, and nothing is read or written there. Results of
// a call that fails are unspecified, as XLA discards them.
#ifndef JAX_FUSCO_ENGINE_CPU_SHUFFLE_H_
#define JAX_FUSCO_ENGINE_CPU_SHUFFLE_H_

#include <cstdint>
#include <vector>

#include "xla_ffi/core/plan.h"
#include "xla_ffi/engine/cpu/rendezvous.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {

// Dense rows of one rank.
struct Rows {
  void* data = nullptr;
  int64_t count = 0;
  int64_t bytes = 0;  // of one row

  char* At(int64_t row) const { return static_cast<char*>(data) + row * bytes; }
};

struct PlanJob : Job {
  PlanShape shape;
  const int32_t* expert_ids = nullptr;  // [T, k]
  PlanResults results;

  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct GatherRowsJob : Job {
  int64_t num_rows = 0;                  // M
  const int32_t* source_rank = nullptr;  // [M]
  const int32_t* source = nullptr;       // [M]
  int64_t fanout = 1;
  bool zero_tail = true;
  std::vector<Rows> in;
  std::vector<Rows> out;

  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct GatherRowsWeightedJob : Job {
  int64_t num_rows = 0;                  // M
  const int32_t* source_rank = nullptr;  // [M]
  const int32_t* source = nullptr;       // [M], token * k + j
  int64_t k = 1;
  int64_t length = 0;  // d
  Float g_type = Float::kF32;
  Float y_type = Float::kF32;
  Float weights_type = Float::kF32;  // kF32 or kF64
  Rows g;                            // [T, d]
  const void* weights = nullptr;     // [T, k]
  Rows y;                            // [M, d]
  Rows dy;                           // [M, d]
  void* dots = nullptr;              // [M], float, or double where y is

  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct ReduceRowsJob : Job {
  int64_t tokens = 0;  // T
  int64_t k = 1;
  const int32_t* slot_rank = nullptr;  // [T, k]
  const int32_t* slot = nullptr;       // [T, k]
  int64_t length = 0;                  // elements of a row
  Float y_type = Float::kF32;
  Float out_type = Float::kF32;
  Float weights_type = Float::kF32;  // kF32 or kF64
  Rows y;                            // [C, ...]
  const void* weights = nullptr;     // [T, k], or null: every weight is one
  Rows out;                          // [T, ...]

  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

struct RaggedAllToAllJob : Job {
  int64_t slices_per_rank = 1;              // K / R
  const int32_t* input_offsets = nullptr;   // [K]
  const int32_t* send_sizes = nullptr;      // [K]
  const int32_t* output_offsets = nullptr;  // [K]
  const int32_t* recv_sizes = nullptr;      // [K]
  Rows operand;
  Rows result;  // holds `output` already

  Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const override;
};

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_SHUFFLE_H_
