#include "xla_ffi/engine/cuda/devices.h"

#include <cuda_runtime_api.h>

namespace jax_fusco::cuda {

Machine DescribeMachine() {
  Machine machine;
  if (cudaDriverGetVersion(&machine.driver) != cudaSuccess) machine.driver = 0;
  if (cudaRuntimeGetVersion(&machine.runtime) != cudaSuccess) machine.runtime = 0;
  int count = 0;
  const cudaError_t listed = cudaGetDeviceCount(&count);
  if (listed != cudaSuccess) {
    machine.error = cudaGetErrorString(listed);
    cudaGetLastError();  // or the next call would report it
    return machine;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    const cudaError_t asked = cudaGetDeviceProperties(&properties, i);
    if (asked != cudaSuccess) {
      machine.error = cudaGetErrorString(asked);
      cudaGetLastError();
      return machine;
    }
    Device device;
    device.name = properties.name;
    device.major = properties.major;
    device.minor = properties.minor;
    device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    int shares = 0;
    device.shares = cudaDeviceGetAttribute(&shares, cudaDevAttrIpcEventSupport, i) == cudaSuccess &&
                    shares != 0;
    for (int peer = 0; peer < count; ++peer) {
      int reaches = peer == i;
      if (peer != i && cudaDeviceCanAccessPeer(&reaches, i, peer) != cudaSuccess) reaches = 0;
      device.reaches.push_back(reaches != 0);
    }
    machine.devices.push_back(std::move(device));
  }
  return machine;
}

}  // namespace jax_fusco::cuda
