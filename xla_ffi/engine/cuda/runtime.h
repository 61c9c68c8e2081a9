// What the CUDA engine asks of CUDA beside its launches. The tests have another one, on the host.
#ifndef JAX_FUSCO_ENGINE_CUDA_RUNTIME_H_
#define JAX_FUSCO_ENGINE_CUDA_RUNTIME_H_

#include <cstdint>
#include <string>
#include <vector>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cuda/handshake.h"

namespace jax_fusco::cuda {

// The CUDA ordinals of the devices that this process uses: those with a context. Makes none.
Status DevicesInUse(std::vector<int>* ordinals);

// Lets kernels on `from` read and write memory of `to`. *possible is false where the machine
// cannot.
Status EnablePeer(int from, int to, bool* possible);

// Zeroed memory of a device. May wait for kernels that run on it.
Status AllocateZeroed(int ordinal, int64_t bytes, void** data);
Status Zero(int ordinal, void* data, int64_t bytes);
Status Free(int ordinal, void* data);
Status CopyToDevice(int ordinal, void* to, const void* from, int64_t bytes);

// Lets every device write to host memory; `seen` is where a device sees it.
Status ShareHostMemory(void* data, int64_t bytes);
Status SeenHostMemory(int ordinal, void* data, void** seen);
Status UnshareHostMemory(void* data);

// Device memory for other processes of this host: a word without blanks that stands for it, and
// where kernels of a device see what another process exported. `data` is what was allocated.
Status ExportMemory(int ordinal, void* data, std::string* handle);
Status ImportMemory(int ordinal, const std::string& handle, void** data);
// The same in processes between which that works.
std::string HostName();

// Whether a CUDA graph is being recorded from the stream.
Status IsRecording(Stream stream, bool* recording);

// Makes a device the current one while it lives, and lets it allocate although another thread may
// be recording a graph.
class OnDevice {
 public:
  explicit OnDevice(int ordinal);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const Status& status() const { return status_; }

 private:
  int before_ = -1;
  int mode_ = 0;
  Status status_;
};

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_RUNTIME_H_
