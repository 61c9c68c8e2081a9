// How launchers launch. Included by .cu files only.
#ifndef JAX_FUSCO_ENGINE_CUDA_LAUNCH_H_
#define JAX_FUSCO_ENGINE_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::cuda {

inline Error ToError(cudaError_t status) {
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Loads a kernel to the current device, which takes microseconds each time CUDA is asked to.
inline cudaError_t Load(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> loaded;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.count({device, kernel}) != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess) loaded.insert({device, kernel});
  return status;
}

// Launches kernel(args...) on `stream`, or only loads it. `shared_bytes` are what the program uses,
// besides the team's own; a kernel that uses more than 48 KiB has asked for them before.
template <typename... Params, typename... Args>
Error Launch(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes,
             Stream stream, const Args&... args) {
  const int64_t shared = kCollectiveBytes + shared_bytes;
  if (stream == kLoadOnly) return ToError(Load(reinterpret_cast<const void*>(kernel)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::max<int64_t>(1, blocks)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  return ToError(cudaLaunchKernelEx(&config, kernel, args...));
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
