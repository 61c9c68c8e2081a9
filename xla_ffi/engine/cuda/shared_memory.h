// Memory on devices that the devices of other processes reach too.
#ifndef JAX_FUSCO_ENGINE_CUDA_SHARED_MEMORY_H_
#define JAX_FUSCO_ENGINE_CUDA_SHARED_MEMORY_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cuda/processes.h"

namespace jax_fusco::cuda {

// seen[d][e] is where this process's device d, a CUDA ordinal's place, sees the memory of device e
// of all; null where one of them is not in use.
using Seen = std::vector<std::vector<void*>>;

class SharedMemory {
 public:
  virtual ~SharedMemory() = default;
  // Zeroed memory of so many bytes on every device in use. Everybody in the domain together; waits
  // for kernels that run, so not while one waits for a process that has not come here.
  virtual Status Allocate(int64_t bytes, Seen* seen) = 0;

  // The way that fits, the same on all: plain memory for one process, CUDA IPC on one host, NCCL's
  // symmetric windows across hosts. `processes` null: this one alone. ordinals[d] is -1 where
  // device d is not in use.
  static Status Create(const std::vector<int>& ordinals, Processes* processes,
                       std::unique_ptr<SharedMemory>* memory);
};

// What is called of NCCL, opened at run time: its types as they are in memory.
struct NcclId {
  char bytes[128];
};
using NcclComm = void*;
using NcclWindow = void*;
struct Nccl {
  int version = 0;  // 10000 * major + 100 * minor + patch
  int (*get_unique_id)(NcclId* id) = nullptr;
  int (*comm_init_rank)(NcclComm* comm, int num_ranks, NcclId id, int rank) = nullptr;
  int (*group_start)() = nullptr;
  int (*group_end)() = nullptr;
  int (*mem_alloc)(void** data, size_t bytes) = nullptr;
  int (*window_register)(NcclComm comm, void* data, size_t bytes, NcclWindow* window,
                         int flags) = nullptr;
  int (*peer_pointer)(NcclWindow window, size_t offset, int peer, void** data) = nullptr;
  const char* (*error_string)(int error) = nullptr;
};
inline constexpr int kNcclVersion = 22902;  // the first that tells the host where peers' memory is

// Looks for the library at `hint` and where the system has it. The version is set where it was
// found; not ok where it is missing or too old.
Status LoadNccl(const std::string& hint, Nccl* nccl);
// Where to look; set before the first call.
void SetNcclHint(std::string path);
const std::string& NcclHint();

// By windows, with one communicator for each device.
Status OpenNcclWindows(const Nccl& nccl, const std::vector<int>& ordinals, Processes* processes,
                       std::unique_ptr<SharedMemory>* memory);

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_SHARED_MEMORY_H_
