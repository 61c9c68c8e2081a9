// How launchers launch. Included by .cu files only.
#ifndef JAX_FUSCO_ENGINE_CUDA_LAUNCH_H_
#define JAX_FUSCO_ENGINE_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

inline Error ToError(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

inline constexpr int64_t kDefaultSharedBytes = 48 << 10;  // more must be asked for

// Launches kernel(args...) on `stream`, or only loads it. `shared_bytes` are what the program uses,
// besides the team's own.
template <typename... Params, typename... Args>
Error Launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
             Stream stream, const Args&... args) {
  const int64_t shared = kCollectiveBytes + shared_bytes;
  cudaError_t status = cudaSuccess;
  if (shared > kDefaultSharedBytes) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared));
  }
  if (status == cudaSuccess && stream == kLoadOnly) {
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, kernel);
  } else if (status == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(1, blocks)));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    status = cudaLaunchKernelEx(&config, kernel, args...);
  }
  return ToError(status);
}

// Of the current device; 0 if it cannot be asked.
inline int64_t DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) return 0;
  return value;
}
inline int64_t Multiprocessors() { return DeviceAttribute(cudaDevAttrMultiProcessorCount); }

// Blocks for `work` pieces, `per_block` at a time: at most so many for each multiprocessor.
inline int64_t BlocksFor(int64_t work, int64_t per_block, int64_t per_multiprocessor) {
  return std::min((work + per_block - 1) / per_block, per_multiprocessor * Multiprocessors());
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_LAUNCH_H_
