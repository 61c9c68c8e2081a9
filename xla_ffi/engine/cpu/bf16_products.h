// Products of bfloat16 matrices, summed in float32, with the instructions that some CPUs have for
// them: twice as fast as products in float32, and nothing is converted.
//
// Operands are read through pointers to their rows, so that rows may lie anywhere. Elements come in
// words, two that follow one another in the sum.
#ifndef JAX_FUSCO_ENGINE_CPU_BF16_PRODUCTS_H_
#define JAX_FUSCO_ENGINE_CPU_BF16_PRODUCTS_H_

#include <cstdint>

namespace jax_fusco::cpu {

// A packed matrix has panels of so many columns, each a word for every column and pair of rows.
inline constexpr int64_t kPanelColumns = 32;

// Words that a packed matrix of k rows (an even number) and n columns takes.
inline int64_t PackedWords(int64_t k, int64_t n) {
  return (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns * k / 2;
}

// Whether this machine can.
bool HasBf16Products();

// Packs a matrix of k rows, an even number, and n columns.
void PackBf16Rows(const uint16_t* const* rows, int64_t k, int64_t n, uint32_t* packed);
// Packs the transpose: n rows of k elements, an even number.
void PackBf16Columns(const uint16_t* const* rows, int64_t k, int64_t n, uint32_t* packed);

// c [m, n] += a b, or = where it is the first part of a sum over k, an even number. Row i of `a`
// has its words at a[i], a[i] + step, ...; `b` is packed.
void MultiplyBf16(const uint32_t* const* a, int64_t step, const uint32_t* b, int64_t m, int64_t n,
                  int64_t k, bool first, float* c, int64_t stride);

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_BF16_PRODUCTS_H_
