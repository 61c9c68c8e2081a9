#include "xla_ffi/engine/cuda/launch.h"
#include "xla_ffi/engine/cuda/stage.h"

namespace jax_fusco::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kInFlight = 4;  // words that a thread reads before it writes them

// Words of `Word`; the last bytes one by one.
template <typename Word>
__device__ void Copy(const StagePart& part) {
  const int64_t words = part.bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto* from = static_cast<const Word*>(part.from);
  auto* to = static_cast<Word*>(part.to);
  int64_t i = thread;
  for (; i + (kInFlight - 1) * threads < words; i += kInFlight * threads) {
    Word some[kInFlight];
#pragma unroll
    for (int64_t j = 0; j < kInFlight; ++j) some[j] = from[i + j * threads];
#pragma unroll
    for (int64_t j = 0; j < kInFlight; ++j) to[i + j * threads] = some[j];
  }
  for (; i < words; i += threads) to[i] = from[i];
  for (int64_t b = words * static_cast<int64_t>(sizeof(Word)) + thread; b < part.bytes;
       b += threads) {
    static_cast<char*>(part.to)[b] = static_cast<const char*>(part.from)[b];
  }
}

__global__ void __launch_bounds__(kThreads) StageKernel(const StageArgs args) {
  for (int32_t p = 0; p < args.num_parts; ++p) {
    const StagePart& part = args.part[p];
    const auto address = reinterpret_cast<uint64_t>(part.from);
    if (address % sizeof(uint4) == 0) {
      Copy<uint4>(part);
    } else if (address % sizeof(uint32_t) == 0) {
      Copy<uint32_t>(part);
    } else {
      Copy<char>(part);
    }
  }
}

}  // namespace

Error LaunchStage(const StageArgs& args, Stream stream) {
  int64_t bytes = 0;
  for (int32_t p = 0; p < args.num_parts; ++p) bytes += args.part[p].bytes;
  const int64_t words = (bytes + 15) / 16;
  return Launch(StageKernel, BlocksFor(words, kThreads * kInFlight, 4), kThreads, 0, stream, args);
}

}  // namespace jax_fusco::cuda
