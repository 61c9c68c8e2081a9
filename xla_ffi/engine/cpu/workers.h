// Library threads that share the copies of a shuffle.
#ifndef JAX_FUSCO_ENGINE_CPU_WORKERS_H_
#define JAX_FUSCO_ENGINE_CPU_WORKERS_H_

#include <cstdint>
#include <functional>

namespace jax_fusco::cpu {

// The floating-point mode of the calling thread (rounding, subnormals). XLA's threads flush
// subnormals to zero, ours do not: rows are summed in the default mode everywhere.
class FpMode {
 public:
  static FpMode Current();
  static FpMode Default();
  void Apply() const;

 private:
  uint64_t bits_ = 0;
};

// Applies a mode for the life of the object.
class ScopedFpMode {
 public:
  explicit ScopedFpMode(FpMode mode) : saved_(FpMode::Current()) { mode.Apply(); }
  ~ScopedFpMode() { saved_.Apply(); }
  ScopedFpMode(const ScopedFpMode&) = delete;
  ScopedFpMode& operator=(const ScopedFpMode&) = delete;

 private:
  FpMode saved_;
};

class Workers {
 public:
  // Cores that this process may run on.
  static int Cores();

  // Runs a task on a thread of some pool, sooner or later.
  using Schedule = std::function<void(std::function<void()> task)>;

  // Calls `chunk(i)` for every i in [0, num_chunks) on the calling thread and at most `threads` - 1
  // helpers, each in the default floating-point mode, and returns when all have ended. Chunks are
  // claimed in ascending order. The helpers are library threads, or tasks of a pool: one that comes
  // to run when no chunk is left does nothing, so the caller never waits for the pool.
  static void ParallelFor(int threads, int64_t num_chunks,
                          const std::function<void(int64_t)>& chunk,
                          const Schedule& schedule = nullptr);
};

}  // namespace jax_fusco::cpu

#endif  // JAX_FUSCO_ENGINE_CPU_WORKERS_H_
