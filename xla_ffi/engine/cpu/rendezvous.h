// Where the ranks of a shuffle meet.
//
// Each rank comes with its buffers and waits, as at XLA's own collectives on CPU devices; the last
// to come runs the job for all. Nobody waits for ever where every rank comes to the program's calls
// and collectives in one order: the program must see to that (jax_fusco/ffi.py).
#ifndef JAX_FUSCO_ENGINE_CPU_RENDEZVOUS_H_
#define JAX_FUSCO_ENGINE_CPU_RENDEZVOUS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cpu/settings.h"

namespace jax_fusco::cpu {

// What one rank brings: its operands and results.
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
class CallSite {
 public:
  // `name` is the call's name in messages.
  explicit CallSite(std::string name);
  ~CallSite();

  // A rank comes, and leaves with the job's status when it has ended, or with an error when peers
  // have not come in time. The nth visit of a rank in a (run, group) meets the nth visits of its
  // peers.
  Status Meet(const Arrival& arrival, const Job& job);

  // Ranks that wait here now.
  int64_t Waiting() const;

 private:
  struct Call;
  struct Session;
  struct Impl;

  std::unique_ptr<Impl> impl_;
};

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_RENDEZVOUS_H_
