#include "xla_ffi/engine/cuda/shared_memory.h"

#include <sstream>
#include <utility>

#include "xla_ffi/engine/cuda/runtime.h"

namespace jax_fusco::cuda {
namespace {

using std::string;
using std::vector;

string* nccl_hint = new string;

// Peers of one process read each other by plain pointers.
class OneProcess : public SharedMemory {
 public:
  explicit OneProcess(const vector<int>& ordinals) : ordinals_(ordinals) {}
  ~OneProcess() override {
    for (const auto& [ordinal, data] : all_) Free(ordinal, data);
  }

  Status Allocate(int64_t bytes, Seen* seen) override {
    vector<void*> data(ordinals_.size(), nullptr);
    for (size_t d = 0; d < ordinals_.size(); ++d) {
      if (ordinals_[d] < 0) continue;
      const Status status = AllocateZeroed(ordinals_[d], bytes, &data[d]);
      if (!status.ok()) return status;
      all_.emplace_back(ordinals_[d], data[d]);
    }
    seen->assign(ordinals_.size(), data);
    return Status::Ok();
  }

 private:
  vector<int> ordinals_;
  vector<std::pair<int, void*>> all_;
};

// By CUDA IPC handles. Never freed: peers may map it to their end.
class OneHost : public SharedMemory {
 public:
  OneHost(const vector<int>& ordinals, Processes* processes)
      : ordinals_(ordinals), processes_(processes) {}

  Status Allocate(int64_t bytes, Seen* seen) override {
    // A handle stands for all of an allocation, so that small ones must not share theirs.
    constexpr int64_t kGranule = int64_t{2} << 20;
    bytes = (bytes + kGranule - 1) / kGranule * kGranule;
    vector<void*> own(ordinals_.size(), nullptr);
    string handles;
    Status status;
    for (size_t d = 0; d < ordinals_.size() && status.ok(); ++d) {
      string handle = "-";
      if (ordinals_[d] >= 0) {
        status = AllocateZeroed(ordinals_[d], bytes, &own[d]);
        if (status.ok()) status = ExportMemory(ordinals_[d], own[d], &handle);
      }
      handles += handle + ' ';
    }
    status = processes_->Agree("allocating shared memory", status);
    vector<string> all;
    if (status.ok()) status = processes_->Gather("sharing memory", handles, &all);
    if (!status.ok()) return status;
    status = Import(own, all, seen);
    return processes_->Agree("opening shared memory", status);
  }

 private:
  Status Import(const vector<void*>& own, const vector<string>& all, Seen* seen) {
    const auto num_devices = static_cast<size_t>(processes_->num_devices());
    seen->assign(ordinals_.size(), vector<void*>(num_devices, nullptr));
    for (size_t m = 0; m < all.size(); ++m) {
      std::istringstream handles(all[m]);
      const Member& member = processes_->members()[m];
      for (size_t e = 0; e < member.devices.size(); ++e) {
        string handle;
        handles >> handle;
        if (!member.devices[e]) continue;
        const size_t device = static_cast<size_t>(member.first_device) + e;
        for (size_t d = 0; d < ordinals_.size(); ++d) {
          if (ordinals_[d] < 0) continue;
          void*& place = (*seen)[d][device];
          if (m == processes_->index()) {
            place = own[e];
            continue;
          }
          const Status status = ImportMemory(ordinals_[d], handle, &place);
          if (status.ok()) continue;
          return Status::Internal(
              Concat("GPU ", ordinals_[d], " cannot reach the memory of GPU ",
                     static_cast<int64_t>(e), " of process ", member.process, " (", status.message,
                     "); use implementation=\"xla\", or GPUs with peer access (`nvidia-smi topo ",
                     "-m`) and processes of one container."));
        }
      }
    }
    return Status::Ok();
  }

  vector<int> ordinals_;
  Processes* processes_;
};

}  // namespace

void SetNcclHint(string path) { *nccl_hint = std::move(path); }
const string& NcclHint() { return *nccl_hint; }

Status SharedMemory::Create(const vector<int>& ordinals, Processes* processes,
                            std::unique_ptr<SharedMemory>* memory) {
  if (processes == nullptr) {
    *memory = std::make_unique<OneProcess>(ordinals);
    return Status::Ok();
  }
  if (processes->is_one_host()) {
    *memory = std::make_unique<OneHost>(ordinals, processes);
    return Status::Ok();
  }
  Nccl nccl;
  const Status status =
      processes->Agree("opening NCCL for shared memory", LoadNccl(NcclHint(), &nccl));
  return status.ok() ? OpenNcclWindows(nccl, ordinals, processes, memory) : status;
}

}  // namespace jax_fusco::cuda
