// Opens NCCL at run time: programs of one process or host do without it.
#include <dlfcn.h>

#include <string>

#include "xla_ffi/engine/cuda/shared_memory.h"

namespace jax_fusco::cuda {
namespace {

std::string VersionName(int version) {
  return Concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

template <typename Function>
bool Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

}  // namespace

Status LoadNccl(const std::string& hint, Nccl* nccl) {
  void* library = nullptr;
  if (!hint.empty()) library = dlopen(hint.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  const std::string need = Concat("NCCL ", VersionName(kNcclVersion), " or newer");
  if (library == nullptr) {
    return Status::InvalidArgument(Concat("jax_fusco: processes on several hosts need ", need,
                                          ", and there is none (pip install nvidia-nccl-cu13)."));
  }
  int (*get_version)(int*) = nullptr;
  if (Find(library, "ncclGetVersion", &get_version)) get_version(&nccl->version);
  const bool found = Find(library, "ncclGetUniqueId", &nccl->get_unique_id) &&
                     Find(library, "ncclCommInitRank", &nccl->comm_init_rank) &&
                     Find(library, "ncclGroupStart", &nccl->group_start) &&
                     Find(library, "ncclGroupEnd", &nccl->group_end) &&
                     Find(library, "ncclMemAlloc", &nccl->mem_alloc) &&
                     Find(library, "ncclCommWindowRegister", &nccl->window_register) &&
                     Find(library, "ncclGetPeerDevicePointer", &nccl->peer_pointer) &&
                     Find(library, "ncclGetErrorString", &nccl->error_string);
  if (found && nccl->version >= kNcclVersion) return Status::Ok();
  return Status::InvalidArgument(Concat("jax_fusco: processes on several hosts need ", need, ", ",
                                        "this is ", VersionName(nccl->version),
                                        " (pip install --upgrade nvidia-nccl-cu13)."));
}

}  // namespace jax_fusco::cuda
