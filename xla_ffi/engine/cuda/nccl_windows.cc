// Shared memory by NCCL's symmetric windows: what reaches across hosts of one NVLink domain.
#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/engine/cuda/hex.h"
#include "xla_ffi/engine/cuda/runtime.h"
#include "xla_ffi/engine/cuda/shared_memory.h"

namespace jax_fusco::cuda {
namespace {

using std::string;
using std::vector;

constexpr int kSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC

class NcclWindows : public SharedMemory {
 public:
  NcclWindows(const Nccl& nccl, const vector<int>& ordinals, Processes* processes)
      : nccl_(nccl), ordinals_(ordinals), processes_(processes), comms_(ordinals.size()) {
    for (const Member& member : processes->members()) {
      for (const bool in_use : member.devices) {
        rank_of_device_.push_back(in_use ? num_ranks_++ : -1);
      }
    }
  }

  // NCCL's ranks are the devices in use, in order.
  Status Open() {
    NcclId id{};
    Status status;
    if (processes_->index() == 0) status = Check(nccl_.get_unique_id(&id), "naming a communicator");
    status = processes_->Agree("naming a communicator", status);
    vector<string> ids;
    if (status.ok())
      status =
          processes_->Gather("opening a communicator", ToHex(id.bytes, sizeof(id.bytes)), &ids);
    if (!status.ok()) return status;
    FromHex(ids[0], id.bytes, sizeof(id.bytes));
    status = Together("opening a communicator", [&](size_t d) {
      return nccl_.comm_init_rank(&comms_[d], num_ranks_, id, RankOf(d));
    });
    return processes_->Agree("opening a communicator", status);
  }

  Status Allocate(int64_t bytes, Seen* seen) override {
    const auto size = static_cast<size_t>((bytes + 4095) / 4096 * 4096);
    vector<void*> own(ordinals_.size(), nullptr);
    vector<NcclWindow> windows(ordinals_.size(), nullptr);
    Status status;
    for (size_t d = 0; d < ordinals_.size() && status.ok(); ++d) {
      if (ordinals_[d] < 0) continue;
      const OnDevice on(ordinals_[d]);
      status = on.status();
      if (status.ok()) status = Check(nccl_.mem_alloc(&own[d], size), "allocating memory");
      if (status.ok()) status = Zero(ordinals_[d], own[d], static_cast<int64_t>(size));
    }
    status = processes_->Agree("allocating shared memory", status);
    if (!status.ok()) return status;
    status = Together("registering memory", [&](size_t d) {
      return nccl_.window_register(comms_[d], own[d], size, &windows[d], kSymmetric);
    });
    if (status.ok()) status = Look(own, windows, seen);
    return processes_->Agree("registering shared memory", status);
  }

 private:
  int RankOf(size_t d) const {
    return rank_of_device_[static_cast<size_t>(processes_->self().first_device) + d];
  }
  Status Check(int error, const char* what) const {
    if (error == 0) return Status::Ok();
    return Status::Internal(
        Concat("NCCL refuses ", what, ": ", nccl_.error_string(error),
               " (NCCL_DEBUG=WARN says more); use implementation=\"xla\" where ",
               "hosts share no NVLink."));
  }
  // call(d) for all devices in use, as one group.
  template <typename Call>
  Status Together(const char* what, const Call& call) const {
    Status status = Check(nccl_.group_start(), what);
    for (size_t d = 0; d < ordinals_.size() && status.ok(); ++d) {
      if (ordinals_[d] < 0) continue;
      const OnDevice on(ordinals_[d]);
      status = on.status();
      if (status.ok()) status = Check(call(d), what);
    }
    const Status ended = Check(nccl_.group_end(), what);
    return status.ok() ? ended : status;
  }
  Status Look(const vector<void*>& own, const vector<NcclWindow>& windows, Seen* seen) const {
    seen->assign(ordinals_.size(), vector<void*>(rank_of_device_.size(), nullptr));
    for (size_t d = 0; d < ordinals_.size(); ++d) {
      if (ordinals_[d] < 0) continue;
      const OnDevice on(ordinals_[d]);
      if (!on.status().ok()) return on.status();
      for (size_t e = 0; e < rank_of_device_.size(); ++e) {
        const int rank = rank_of_device_[e];
        if (rank < 0) continue;
        void*& place = (*seen)[d][e];
        if (rank == RankOf(d)) {
          place = own[d];
          continue;
        }
        if (windows[d] == nullptr) {
          return Status::InvalidArgument(
              "NCCL has no symmetric windows here (NCCL_CUMEM_ENABLE and NCCL_WIN_ENABLE must not "
              "be 0); use implementation=\"xla\".");
        }
        const Status status =
            Check(nccl_.peer_pointer(windows[d], 0, rank, &place), "naming a peer's memory");
        if (!status.ok()) return status;
        if (place == nullptr) {
          return Status::InvalidArgument(
              Concat("GPU ", ordinals_[d], " cannot reach the GPUs of process ",
                     processes_->ProcessOf(static_cast<int64_t>(e)),
                     " by load and store (no NVLink between them); use implementation=\"xla\"."));
        }
      }
    }
    return Status::Ok();
  }

  Nccl nccl_;
  vector<int> ordinals_;
  Processes* processes_;
  vector<NcclComm> comms_;
  vector<int> rank_of_device_;
  int num_ranks_ = 0;
};

}  // namespace

Status OpenNcclWindows(const Nccl& nccl, const vector<int>& ordinals, Processes* processes,
                       std::unique_ptr<SharedMemory>* memory) {
  auto windows = std::make_unique<NcclWindows>(nccl, ordinals, processes);
  const Status status = windows->Open();
  if (status.ok()) *memory = std::move(windows);
  return status;
}

}  // namespace jax_fusco::cuda
