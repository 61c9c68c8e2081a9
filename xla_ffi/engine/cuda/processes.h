// The processes of a job: how they find each other, and what they agree on before a call.
//
// They talk through a store of keys and values that all of them reach: jax.distributed's. Only on
// the host, at the first Prepare of a call site and after a failure; never while programs run well.
#ifndef JAX_FUSCO_ENGINE_CUDA_PROCESSES_H_
#define JAX_FUSCO_ENGINE_CUDA_PROCESSES_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "xla_ffi/core/status.h"

namespace jax_fusco::cuda {

// The store, and who we are in it. Keys are written once.
struct Store {
  int process = 0;
  int num_processes = 1;
  // Names the GPUs that may reach each other's memory: the same on processes of one host, or of
  // hosts that NVLink joins. Empty: not known, then the host counts.
  std::function<std::string()> domain;
  std::function<Status(const std::string& key, const std::string& value)> put;
  // kDeadlineExceeded where nobody has written the key in time.
  std::function<Status(const std::string& key, double timeout_s, std::string* value)> get;
};

// One process of this one's domain. Devices have numbers: the domain's processes in order, and in
// each the CUDA ordinals from 0.
struct Member {
  int process = 0;
  std::string host;           // the same where CUDA IPC works
  std::vector<bool> devices;  // by ordinal: whether it is in use
  int first_device = 0;
};

// The processes that can meet on devices: those of a domain. All of its methods may be called from
// any thread; those that wait for the other members must be called by all of them in one order.
class Processes {
 public:
  // Waits for all processes of the job. `ordinals`: of the devices in use.
  static Status Meet(const Store& store, const std::string& host, const std::vector<int>& ordinals,
                     std::unique_ptr<Processes>* processes);

  const std::vector<Member>& members() const { return members_; }
  const Member& self() const { return members_[self_]; }
  size_t index() const { return self_; }
  int num_devices() const { return num_devices_; }
  bool is_one_host() const;
  // Whether there are others in the job that cannot meet these.
  bool is_part() const { return members_.size() < static_cast<size_t>(store_.num_processes); }
  // The process that has a device.
  int ProcessOf(int64_t device) const;

  // Everybody's `value`, by member. Waits ten times as long as a call would: processes compile at
  // different speeds. Who does not come is named, to all who do.
  Status Gather(const std::string& what, const std::string& value,
                std::vector<std::string>* values);
  // Ok if all members are; else the first one's sentence, on all.
  Status Agree(const std::string& what, const Status& mine);
  // A call site's first Prepare. All members must come to the same ones in the same order.
  Status AddSite(const std::string& description);

  // Failures. Runs of a call site have the same numbers in all processes, until one reports a
  // failure instead of going on. Then every process tells how far it has come, and the next runs of
  // all begin behind the farthest. Until then no call succeeds: devices tell each other.
  //
  // A run starts, unless a failure has been told in the meantime.
  Status StartRun(uint64_t number);
  Status TellFailure();
  // Waits, where a failure has been told and not been settled, for the others to tell theirs.
  // Runs up to *settled are settled.
  Status Settle(uint64_t* settled);

 private:
  Processes() = default;
  std::string SettleKey(int process) const;

  Store store_;
  std::vector<Member> members_;
  size_t self_ = 0;
  int num_devices_ = 0;
  std::mutex gather_mutex_;
  int64_t gathered_ = 0;
  std::mutex site_mutex_;
  uint64_t sites_ = 0;  // digest of all so far
  int64_t num_sites_ = 0;
  Status broken_;

  std::mutex settle_mutex_;
  uint64_t last_run_ = 0;
  uint64_t settled_ = 0;
  int64_t failures_ = 0;
  bool told_ = false;
};

// Makes the store known, once, before the first call.
void Connect(Store store);
// Null where the process is alone.
const Store* Connected();
// Everybody's value, once: for tests of a store.
Status Exchange(const Store& store, const std::string& value, std::vector<std::string>* values);

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_PROCESSES_H_
