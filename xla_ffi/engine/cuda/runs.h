// The runs of a call site: their numbers, and whether they report what happened to an earlier one.
//
// XLA names a run by an id that is the same on all its devices, but says nothing of the order of
// ids. Here they get numbers, in the order in which they are first heard of. Whoever comes first
// in a run also decides for all its ranks in this process whether the run goes on or is given up to
// report an earlier failure: if some went on, they would wait for those that do not.
#ifndef JAX_FUSCO_ENGINE_CUDA_RUNS_H_
#define JAX_FUSCO_ENGINE_CUDA_RUNS_H_

#include <cstdint>
#include <deque>
#include <utility>

#include "xla_ffi/core/status.h"

namespace jax_fusco::cuda {

struct Run {
  int64_t id = 0;
  uint64_t number = 0;  // from 1
  Status status;        // not ok: what its ranks report instead of going on
};

class Runs {
 public:
  // The run of this id. `start(last)` is asked once, when the run is new: for its status, and for
  // its number, which is greater than the last one's.
  template <typename Start>
  Run Find(int64_t id, const Start& start) {
    for (const Run& run : newest_first_) {
      if (run.id == id) return run;
    }
    Run run = start(last_);
    run.id = id;
    last_ = run.number;
    newest_first_.push_front(std::move(run));
    // More than any rank can be late.
    if (newest_first_.size() > kKept) newest_first_.pop_back();
    return newest_first_.front();
  }

 private:
  static constexpr size_t kKept = 256;
  std::deque<Run> newest_first_;
  uint64_t last_ = 0;
};

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_RUNS_H_
