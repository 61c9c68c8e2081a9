#include "xla_ffi/engine/cuda/runtime.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <fstream>
#include <string>

#include "xla_ffi/engine/cuda/hex.h"

namespace jax_fusco::cuda {
namespace {

Status ToStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  cudaGetLastError();  // or a later call would report it
  return Status::Internal(Concat("jax_fusco: ", what, " failed: ", cudaGetErrorString(error), "."));
}

// A function of the driver, which is not linked.
template <typename Function>
Status DriverFunction(const char* name, Function* function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && (result != cudaDriverEntryPointSuccess || found == nullptr)) {
    return Status::Internal(Concat("jax_fusco: the CUDA driver has no ", name, "; it is too old."));
  }
  *function = reinterpret_cast<Function>(found);
  return ToStatus(error, name);
}

}  // namespace

Status DevicesInUse(std::vector<int>* ordinals) {
  ordinals->clear();
  int count = 0;
  Status status = ToStatus(cudaGetDeviceCount(&count), "counting the GPUs");
  CUresult (*get_device)(CUdevice*, int) = nullptr;
  CUresult (*get_state)(CUdevice, unsigned int*, int*) = nullptr;
  if (status.ok()) status = DriverFunction("cuDeviceGet", &get_device);
  if (status.ok()) status = DriverFunction("cuDevicePrimaryCtxGetState", &get_state);
  for (int i = 0; status.ok() && i < count; ++i) {
    CUdevice device;
    unsigned int flags = 0;
    int active = 0;
    if (get_device(&device, i) != CUDA_SUCCESS ||
        get_state(device, &flags, &active) != CUDA_SUCCESS) {
      return Status::Internal(Concat("jax_fusco: CUDA does not tell the state of GPU ", i, "."));
    }
    if (active != 0) ordinals->push_back(i);
  }
  return status;
}

Status EnablePeer(int from, int to, bool* possible) {
  int can = 0;
  Status status = ToStatus(cudaDeviceCanAccessPeer(&can, from, to), "asking for peer access");
  *possible = can != 0;
  if (!status.ok() || can == 0) return status;
  const OnDevice on(from);
  if (!on.status().ok()) return on.status();
  const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return Status::Ok();
  }
  return ToStatus(error, "enabling peer access");
}

Status AllocateZeroed(int ordinal, int64_t bytes, void** data) {
  const OnDevice on(ordinal);
  if (!on.status().ok()) return on.status();
  const auto size = static_cast<size_t>(bytes);
  const Status status = ToStatus(cudaMalloc(data, size), "allocating memory for the engine");
  return status.ok() ? Zero(ordinal, *data, bytes) : status;
}

Status Zero(int ordinal, void* data, int64_t bytes) {
  const OnDevice on(ordinal);
  if (!on.status().ok()) return on.status();
  const Status status = ToStatus(cudaMemset(data, 0, static_cast<size_t>(bytes)), "zeroing memory");
  return status.ok() ? ToStatus(cudaStreamSynchronize(nullptr), "zeroing memory") : status;
}

Status Free(int ordinal, void* data) {
  const OnDevice on(ordinal);
  if (!on.status().ok()) return on.status();
  return ToStatus(cudaFree(data), "freeing memory of the engine");
}

Status CopyToDevice(int ordinal, void* to, const void* from, int64_t bytes) {
  const OnDevice on(ordinal);
  if (!on.status().ok()) return on.status();
  return ToStatus(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice),
                  "copying to a GPU");
}

Status ShareHostMemory(void* data, int64_t bytes) {
  return ToStatus(cudaHostRegister(data, static_cast<size_t>(bytes),
                                   cudaHostRegisterPortable | cudaHostRegisterMapped),
                  "mapping host memory");
}

Status SeenHostMemory(int ordinal, void* data, void** seen) {
  const OnDevice on(ordinal);
  if (!on.status().ok()) return on.status();
  return ToStatus(cudaHostGetDevicePointer(seen, data, 0), "mapping host memory");
}

Status UnshareHostMemory(void* data) {
  return ToStatus(cudaHostUnregister(data), "unmapping host memory");
}

Status ExportMemory(int ordinal, void* data, std::string* handle) {
  const OnDevice on(ordinal);
  if (!on.status().ok()) return on.status();
  cudaIpcMemHandle_t bytes{};
  const Status status = ToStatus(cudaIpcGetMemHandle(&bytes, data), "sharing memory by CUDA IPC");
  *handle = ToHex(bytes.reserved, sizeof(bytes.reserved));
  return status;
}

Status ImportMemory(int ordinal, const std::string& handle, void** data) {
  const OnDevice on(ordinal);
  if (!on.status().ok()) return on.status();
  cudaIpcMemHandle_t bytes{};
  FromHex(handle, bytes.reserved, sizeof(bytes.reserved));
  return ToStatus(cudaIpcOpenMemHandle(data, bytes, cudaIpcMemLazyEnablePeerAccess),
                  "opening memory of another process by CUDA IPC");
}

std::string HostName() {
  std::string name;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> name;
  // CUDA IPC does not cross containers that are closed to each other.
  for (const char* space : {"/proc/self/ns/ipc", "/proc/self/ns/pid"}) {
    char text[64] = {};
    if (readlink(space, text, sizeof(text) - 1) > 0) name += Concat(",", text);
  }
  return name;
}

Status IsRecording(Stream stream, bool* recording) {
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  const Status status = ToStatus(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &state),
                                 "asking whether a graph is recorded");
  *recording = state != cudaStreamCaptureStatusNone;
  return status;
}

OnDevice::OnDevice(int ordinal) {
  status_ = ToStatus(cudaGetDevice(&before_), "asking for the current GPU");
  if (status_.ok()) status_ = ToStatus(cudaSetDevice(ordinal), "changing the current GPU");
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) cudaGetLastError();
  mode_ = static_cast<int>(mode);
}

OnDevice::~OnDevice() {
  auto mode = static_cast<cudaStreamCaptureMode>(mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace jax_fusco::cuda
