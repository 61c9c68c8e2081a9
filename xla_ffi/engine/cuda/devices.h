// What CUDA says of this machine, for people: `jax-fusco doctor`.
#ifndef JAX_FUSCO_ENGINE_CUDA_DEVICES_H_
#define JAX_FUSCO_ENGINE_CUDA_DEVICES_H_

#include <cstdint>
#include <string>
#include <vector>

namespace jax_fusco::cuda {

struct Device {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  int64_t memory_bytes = 0;
  bool shares = false;        // memory with other processes, by CUDA IPC
  std::vector<bool> reaches;  // by device: whether its memory can be read from here
};

struct Machine {
  int driver = 0;     // newest CUDA that the driver serves, 1000 * major + 10 * minor; 0: no driver
  int runtime = 0;    // the CUDA that this build contains
  std::string error;  // why the devices cannot be listed, empty if they can
  std::vector<Device> devices;
};

// Asks the driver; never fails, never allocates on a device.
Machine DescribeMachine();

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_DEVICES_H_
