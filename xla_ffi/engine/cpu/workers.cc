#include "xla_ffi/engine/cpu/workers.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jax_fusco::cpu {

#if defined(__x86_64__)
FpMode FpMode::Current() {
  FpMode mode;
  mode.bits_ = _mm_getcsr();
  return mode;
}
FpMode FpMode::Default() {
  FpMode mode;
  mode.bits_ = 0x1f80;  // round to nearest even, subnormals kept, exceptions masked
  return mode;
}
void FpMode::Apply() const { _mm_setcsr(static_cast<uint32_t>(bits_)); }
#elif defined(__aarch64__)
FpMode FpMode::Current() {
  FpMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode.bits_));
  return mode;
}
FpMode FpMode::Default() { return {}; }
void FpMode::Apply() const { asm volatile("msr fpcr, %0" : : "r"(bits_)); }
#else
FpMode FpMode::Current() { return {}; }
FpMode FpMode::Default() { return {}; }
void FpMode::Apply() const {}
#endif

namespace {

// Starts a detached thread that takes no signals. False where the system has no thread to give.
bool StartThread(std::function<void()> body) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  bool started = true;
  try {
    std::thread(std::move(body)).detach();
  } catch (const std::system_error&) {
    started = false;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return started;
}

void NameThread(const char* name) {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), name);
#else
  (void)name;
#endif
}

// One parallel loop. Helpers may look at it after its caller has left, so it is shared; the loop's
// body is only called for a claimed chunk, and the caller waits for those.
struct Loop {
  const std::function<void(int64_t)>* chunk;
  int64_t num_chunks;
  int wanted;  // helpers that may still join
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> ended{0};
  std::mutex mutex;
  std::condition_variable all_ended;

  // Runs chunks until none is left.
  void Run() {
    const ScopedFpMode mode(FpMode::Default());
    int64_t ran = 0;
    for (;;) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= num_chunks) break;
      (*chunk)(i);
      ++ran;
    }
    if (ran > 0 && ended.fetch_add(ran, std::memory_order_acq_rel) + ran == num_chunks) {
      std::lock_guard<std::mutex> lock(mutex);
      all_ended.notify_all();
    }
  }

  void Wait() {
    // Helpers are in their last chunk, so the end is near: look a while before sleeping.
    for (int i = 0; i < 2000; ++i) {
      if (ended.load(std::memory_order_acquire) == num_chunks) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_ended.wait(lock, [&] { return ended.load(std::memory_order_acquire) == num_chunks; });
  }
};

class Helpers {
 public:
  // Offers the loop to `wanted` helpers.
  void Offer(const std::shared_ptr<Loop>& loop) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (threads_ < loop->wanted && StartThread([this] { Serve(); })) {
      ++threads_;
    }
    loops_.push_back(loop);
    for (int i = 0; i < loop->wanted; ++i) work_.notify_one();
  }

  void Withdraw(const std::shared_ptr<Loop>& loop) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = loops_.begin(); it != loops_.end(); ++it) {
      if (*it == loop) {
        loops_.erase(it);
        return;
      }
    }
  }

 private:
  void Serve() {
    NameThread("jax_fusco_help");
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return !loops_.empty(); });
      const std::shared_ptr<Loop> loop = loops_.front();
      if (--loop->wanted == 0) loops_.pop_front();
      lock.unlock();
      loop->Run();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::shared_ptr<Loop>> loops_;
  int threads_ = 0;
};

// Never destroyed: threads may still use them while the process exits.
Helpers& TheHelpers() {
  static Helpers* helpers = new Helpers;
  return *helpers;
}

}  // namespace

int Workers::Cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return cores > 0 ? cores : 1;
}

void Workers::ParallelFor(int threads, int64_t num_chunks,
                          const std::function<void(int64_t)>& chunk, const Schedule& schedule) {
  if (threads <= 1 || num_chunks <= 1) {
    const ScopedFpMode mode(FpMode::Default());
    for (int64_t i = 0; i < num_chunks; ++i) chunk(i);
    return;
  }
  const auto loop = std::make_shared<Loop>();
  loop->chunk = &chunk;
  loop->num_chunks = num_chunks;
  loop->wanted = static_cast<int>(threads < num_chunks ? threads : num_chunks) - 1;
  if (schedule) {
    for (int i = 0; i < loop->wanted; ++i) schedule([loop] { loop->Run(); });
    loop->Run();
  } else {
    TheHelpers().Offer(loop);
    loop->Run();
    TheHelpers().Withdraw(loop);
  }
  loop->Wait();
}

}  // namespace jax_fusco::cpu
