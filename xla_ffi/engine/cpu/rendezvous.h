// Where the ranks of a shuffle meet.
//
// Nobody waits here. Each rank arrives with its buffers and a callback; the last to arrive runs the
// job for all. XLA reaches independent calls in different orders on different devices, so a
// blocking meeting could wait for itself.
#ifndef JAX_FUSCO_ENGINE_CPU_RENDEZVOUS_H_
#define JAX_FUSCO_ENGINE_CPU_RENDEZVOUS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cpu/settings.h"

namespace jax_fusco::cpu {

// What one rank brings: its operands and results, valid until its call is complete.
class Job {
 public:
  virtual ~Job() = default;
  // Does the work of all ranks, `ranks` in rank order, `this` the first of them. Checks first that
  // they agree; returns when all copies have ended.
  virtual Status Run(const std::vector<const Job*>& ranks, const Settings& settings) const = 0;
};

struct Arrival {
  int64_t run = 0;    // the execution of the program, the same for all its devices
  int64_t group = 0;  // which ranks shuffle together
  int64_t rank = 0;   // in [0, num_ranks)
  int64_t num_ranks = 1;
  int64_t device = 0;  // a rank stays on its device throughout a run
};

// One call site of one program. Thread-safe.
class CallSite : public std::enable_shared_from_this<CallSite> {
 public:
  // `name` is the call's name in messages.
  static std::shared_ptr<CallSite> Create(std::string name);
  ~CallSite();

  using Done = std::function<void(const Status&)>;

  // A rank arrives. Returns true with `*status` where the call is complete for this rank: it came
  // last and ran the job, or there is an error. Otherwise returns false; `done` is called later, on
  // a thread of its own and in the floating-point mode of this thread: when the job has ended, or
  // when peers have not come in time. The nth arrival of a rank in a (run, group) meets the nth
  // arrivals of its peers.
  bool Arrive(const Arrival& arrival, std::unique_ptr<Job> job, Done done, Status* status);

 private:
  struct Call;
  struct Session;
  struct Impl;
  friend class Monitor;

  explicit CallSite(std::string name);
  void Expire(const std::shared_ptr<Call>& call);

  std::unique_ptr<Impl> impl_;
};

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_RENDEZVOUS_H_
