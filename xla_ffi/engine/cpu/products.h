// Products of matrices, summed in float32, with instructions that not every CPU has.
//
// Operands are read through pointers to their rows, so that rows may lie anywhere. Elements come in
// words of 32 bits: a float32, or two bfloat16 that follow one another in the sum. A sum is made of
// blocks of words, in ascending order, and does not depend on how the result is cut.
#ifndef JAX_FUSCO_ENGINE_CPU_PRODUCTS_H_
#define JAX_FUSCO_ENGINE_CPU_PRODUCTS_H_

#include <cstdint>

#include "xla_ffi/core/calls.h"
#include "xla_ffi/engine/cpu/rows.h"

namespace jax_fusco::cpu {

// A matrix is multiplied in panels of so many columns; packed, a panel has a word for each of them
// and each `per_word` rows.
inline constexpr int64_t kPanelColumns = 32;

// The largest `tile_rows` and `depth` below.
inline constexpr int64_t kMostTileRows = 512;
inline constexpr int64_t kMostDepth = 384;

// Static: files with instructions of their own must not share what they compile.
static inline int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct Products {
  Float type;         // of both operands
  int64_t per_word;   // elements
  int64_t block;      // words: a packed matrix has whole blocks of them, zeros at the end
  int64_t tile_rows;  // of a result, and
  int64_t depth;      // elements of a sum over which it is best made at a time
  // Whether rows of `a` whose distance is a power of two stand in each other's way.
  bool rows_compete;
  // Packs a matrix of k rows, whole blocks of them, and n columns.
  void (*pack_rows)(const void* const* rows, int64_t k, int64_t n, uint32_t* packed);
  // Packs the transpose: n rows of so many words.
  void (*pack_columns)(const void* const* rows, int64_t words, int64_t n, uint32_t* packed);
  // c [m, n] += a b, or = where it is the first part of a sum over so many words, `depth` elements
  // or fewer. Row i of `a` has its words at a[i], a[i] + step, ...: where step is not 1, a packed
  // matrix's column. `b` is packed.
  void (*multiply)(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t m, int64_t n,
                   int64_t words, bool first, float* c, int64_t stride);

  // The products of such operands, as far as they have instructions of their own here: those of
  // float32 also serve what is converted. Null: there are none, use a BLAS.
  static const Products* For(Float type, Isa isa);

  // Words that a packed matrix of n columns takes, `words` of them in a column.
  int64_t PackedWords(int64_t words, int64_t n) const {
    return RoundUp(n, kPanelColumns) * RoundUp(words, block);
  }
};

// Whether this machine multiplies bfloat16.
bool HasBf16Products();

// What `For` chooses from.
const Products& Avx512Products();
const Products& Avx512Bf16Products();
const Products& AmxProducts();

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_PRODUCTS_H_
