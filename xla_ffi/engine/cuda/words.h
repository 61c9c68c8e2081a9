// Loads and stores of a few bytes at once.
#ifndef JAX_FUSCO_ENGINE_CUDA_WORDS_H_
#define JAX_FUSCO_ENGINE_CUDA_WORDS_H_

#include <cstdint>
#include <cstring>

#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

#if defined(__CUDACC__)
using Word16 = uint4;
#else
struct Word16 {
  uint32_t x, y, z, w;
};
#endif

template <typename Word>
JAX_FUSCO_PROGRAM bool IsAligned(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % sizeof(Word) == 0;
}

// From global memory.
template <typename Word>
JAX_FUSCO_PROGRAM Word LoadWord(const void* from) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(from));
  return *static_cast<const Word*>(from);
#else
  Word word;
  std::memcpy(&word, from, sizeof(word));
  return word;
#endif
}

// To global memory. The compiler would take a word that was put together from elements apart again
// and store it in pieces.
template <typename Word>
JAX_FUSCO_PROGRAM void StoreWord(void* to, const Word& word) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Word) == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
  } else if constexpr (sizeof(Word) == 8) {
    asm volatile("st.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(word)
                 : "memory");
  } else {
    *static_cast<Word*>(to) = word;
  }
#else
  std::memcpy(to, &word, sizeof(word));
#endif
}

// From an address that is not aligned to the word.
template <typename Word>
JAX_FUSCO_PROGRAM Word LoadBytes(const void* from) {
  char bytes[sizeof(Word)];
  for (unsigned i = 0; i < sizeof(Word); ++i) bytes[i] = static_cast<const char*>(from)[i];
  Word word;
  memcpy(&word, bytes, sizeof(word));
  return word;
}

// Calls body(Word{}) with the widest word of which both the row's size and the address are
// multiples.
template <typename Body>
auto WithWord(int64_t row_bytes, const void* at, const Body& body) {
  const uint64_t bits =
      static_cast<uint64_t>(row_bytes) | static_cast<uint64_t>(reinterpret_cast<uintptr_t>(at));
  if (bits % 16 == 0) return body(Word16{});
  if (bits % 8 == 0) return body(uint64_t{});
  if (bits % 4 == 0) return body(uint32_t{});
  if (bits % 2 == 0) return body(uint16_t{});
  return body(uint8_t{});
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_WORDS_H_
