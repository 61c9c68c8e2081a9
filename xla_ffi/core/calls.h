// What one rank brings to each call: operands, results, and what is static. docs/architecture.md
// says what each call means. Pointers are to memory of the device that the call runs on.
#ifndef JAX_FUSCO_CORE_CALLS_H_
#define JAX_FUSCO_CORE_CALLS_H_

#include <cstdint>
#include <vector>

#include "xla_ffi/core/plan.h"

namespace jax_fusco {

// Types of rows that are summed. Sums are double where y is kF64, else float.
enum class Float { kBf16, kF16, kF32, kF64 };
inline constexpr int kNumFloats = 4;

inline int64_t SizeOf(Float type) { return type == Float::kF64 ? 8 : type == Float::kF32 ? 4 : 2; }

// Dense rows of one rank.
struct Rows {
  void* data = nullptr;
  int64_t count = 0;
  int64_t bytes = 0;  // of one row

  char* At(int64_t row) const { return static_cast<char*>(data) + row * bytes; }
};

struct PlanCall {
  PlanShape shape;
  const int32_t* expert_ids = nullptr;  // [T, k]
  PlanResults results;
  Rows chain;    // int32 [C], or [0] where nobody asks for it
  Rows scratch;  // bytes for an engine that needs them
};

struct GatherRowsCall {
  int64_t num_rows = 0;                  // M
  const int32_t* source_rank = nullptr;  // [M]
  const int32_t* source = nullptr;       // [M]
  const int32_t* chain = nullptr;        // [M] or null
  int64_t fanout = 1;
  bool zero_tail = true;  // false: results may hold something; rows with source -2 are not touched
  std::vector<Rows> in;
  std::vector<Rows> out;
};

struct GatherRowsWeightedCall {
  int64_t num_rows = 0;                  // M
  const int32_t* source_rank = nullptr;  // [M]
  const int32_t* source = nullptr;       // [M], token * k + j
  const int32_t* chain = nullptr;        // [M] or null
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
};

struct ReduceRowsCall {
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
};

struct RaggedAllToAllCall {
  int64_t num_slices = 0;                   // K
  int64_t slices_per_rank = 1;              // K / R
  const int32_t* input_offsets = nullptr;   // [K]
  const int32_t* send_sizes = nullptr;      // [K]
  const int32_t* output_offsets = nullptr;  // [K]
  const int32_t* recv_sizes = nullptr;      // [K]
  Rows operand;
  Rows output;  // what the result holds where nothing arrives
  Rows result;
};

// Rows times the kernel of their group, both of one type that is not kF64. Assignment a of group e
// (the groups follow one another) is row source[a] of `rows` times kernel[e], or its transpose, and
// goes to row merge[a] of `out`, times weights[a].
struct GroupedMatmulCall {
  Float type = Float::kF32;
  int64_t num_groups = 0;
  int64_t num_assignments = 0;           // A
  const int32_t* group_sizes = nullptr;  // [E]
  const int32_t* source = nullptr;       // [A], negative: a row of zeros; null: row a
  const int32_t* merge = nullptr;        // [A], negative: nowhere; null: row a
  const float* weights = nullptr;        // [A], or null: ones
  bool transposed = false;
  int64_t kernel_rows = 0;     // p
  int64_t kernel_columns = 0;  // q
  Rows rows;                   // [N, p], or [N, q] where transposed
  Rows kernel;                 // [E * p, q]
  Rows partner;                // shaped as `out`, or null
  Rows out;                    // [M, q], or [M, p] where transposed
  float* dots = nullptr;       // [A]: <product of a without its weight, partner[merge[a]]>, or null
};

// The cotangent of the kernel: out[e] is the sum over the assignments of group e of
// outer(rows[source[a]], weights[a] * g[merge[a]]).
struct GroupedOuterCall {
  Float type = Float::kF32;
  int64_t num_groups = 0;
  int64_t num_assignments = 0;           // A
  const int32_t* group_sizes = nullptr;  // [E]
  const int32_t* source = nullptr;       // [A], as above
  const int32_t* merge = nullptr;        // [A], as above
  const float* weights = nullptr;        // [A], or null: ones
  int64_t kernel_rows = 0;               // p
  int64_t kernel_columns = 0;            // q
  Rows rows;                             // [N, p]
  Rows g;                                // [M, q]
  Rows out;                              // [E * p, q]
};

}  // namespace jax_fusco

#endif  // JAX_FUSCO_CORE_CALLS_H_
