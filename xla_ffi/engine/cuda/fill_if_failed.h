// Fills the outputs of a call that failed, so that nobody takes them for results.
#ifndef JAX_FUSCO_ENGINE_CUDA_FILL_IF_FAILED_H_
#define JAX_FUSCO_ENGINE_CUDA_FILL_IF_FAILED_H_

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/team.h"
#include "xla_ffi/engine/cuda/words.h"

namespace jax_fusco::cuda {

struct Outputs {
  Output output[kMaxOutputs];
  int32_t count;
};

template <typename Team>
JAX_FUSCO_PROGRAM void FillIfFailed(const Team& team, const Outputs& outputs, const Table* table) {
  if (table->failure == static_cast<int32_t>(Failure::kNone)) return;
  for (int32_t o = 0; o < outputs.count; ++o) {
    char* const at = static_cast<char*>(outputs.output[o].data);
    const int64_t bytes = outputs.output[o].bytes;
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at) % sizeof(Word16));
    const int64_t to_word = past == 0 ? 0 : static_cast<int64_t>(sizeof(Word16)) - past;
    const int64_t head = to_word < bytes ? to_word : bytes;
    const int64_t words = (bytes - head) / static_cast<int64_t>(sizeof(Word16));
    const int64_t tail = head + words * static_cast<int64_t>(sizeof(Word16));
    const int64_t first = ThreadOfGrid(team);
    const int64_t step = ThreadsOfGrid(team);
    for (int64_t i = first; i < head; i += step) at[i] = static_cast<char>(-1);
    for (int64_t i = first; i < words; i += step) {
      StoreWord(at + head + i * sizeof(Word16), Word16{~0u, ~0u, ~0u, ~0u});
    }
    for (int64_t i = tail + first; i < bytes; i += step) at[i] = static_cast<char>(-1);
  }
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_FILL_IF_FAILED_H_
