// Products of matrices, summed in float32, with instructions that not every CPU has.
//
// Operands are read through pointers to their rows, so that rows may lie anywhere. Elements come in
// words of 32 bits: a float32, or two bfloat16 that follow one another in the sum. Every sum is one
// chain of fused operations in ascending order, however the matrices are cut.
#ifndef JAX_FUSCO_ENGINE_CPU_PRODUCTS_H_
#define JAX_FUSCO_ENGINE_CPU_PRODUCTS_H_

#include <cstdint>

#include "xla_ffi/core/calls.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {

// A matrix is multiplied in panels of so many columns; packed, a panel has a word for each of them
// and each `per_word` rows.
inline constexpr int64_t kPanelColumns = 32;
// Rows of a result that are summed in registers.
inline constexpr int kStripRows = 14;

// Words that a packed matrix of n columns takes, `words` of them in a column.
inline int64_t PackedWords(int64_t words, int64_t n) {
  return (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns * words;
}

struct Products {
  Float type;        // of both operands
  int64_t per_word;  // elements
  // Packs a matrix of k rows, a multiple of `per_word`, and n columns.
  void (*pack_rows)(const void* const* rows, int64_t k, int64_t n, uint32_t* packed);
  // Packs the transpose: n rows of so many words.
  void (*pack_columns)(const void* const* rows, int64_t words, int64_t n, uint32_t* packed);
  // c [m, n] += a b, or = where it is the first part of a sum over so many words. Row i of `a` has
  // its words at a[i], a[i] + step, ...; `b` is packed.
  void (*multiply)(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t m, int64_t n,
                   int64_t words, bool first, float* c, int64_t stride);

  // The products of such operands, as far as they have instructions of their own here: those of
  // float32 also serve what is converted. Null: there are none, use a BLAS.
  static const Products* For(Float type, Isa isa);
};

// Whether this machine multiplies bfloat16.
bool HasBf16Products();

// What `For` chooses from.
const Products& Avx512Products();
const Products& Avx512Bf16Products();

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_PRODUCTS_H_
