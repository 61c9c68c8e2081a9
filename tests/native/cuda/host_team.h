// A team of the CUDA engine's programs on threads of the host: every lane is a thread and every
// barrier a barrier, so that a race checker sees what a GPU would do. Warps have four lanes.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_HOST_TEAM_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_HOST_TEAM_H_

#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "xla_ffi/engine/cuda/team.h"

namespace jax_fusco::testing {

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int turn = turn_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++turn_;
      lock.unlock();
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [&] { return turn_ != turn; });
  }

 private:
  const int count_;
  int arrived_ = 0;
  int turn_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

// How many blocks of how many threads.
struct Grid {
  int blocks = 1;
  int threads = 8;
  int64_t shared_bytes = 0;
};

inline constexpr int kHostLanes = 4;
inline constexpr std::align_val_t kSharedAlignment{128};

// What the threads of a block share.
struct HostBlock {
  Barrier barrier;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<uint64_t> posted;  // by thread, for exchanges within a warp
  std::vector<int64_t> collective;
  std::unique_ptr<char, void (*)(char*)> shared;  // of exactly its size
  bool last = false;

  explicit HostBlock(const Grid& grid)
      : barrier(grid.threads),
        posted(static_cast<size_t>(grid.threads)),
        collective(static_cast<size_t>(grid.threads / kHostLanes)),
        shared(static_cast<char*>(
                   ::operator new(static_cast<size_t>(grid.shared_bytes), kSharedAlignment)),
               [](char* at) { ::operator delete(at, kSharedAlignment); }) {
    for (int w = 0; w < grid.threads / kHostLanes; ++w) {
      warps.push_back(std::make_unique<Barrier>(kHostLanes));
    }
    std::memset(shared.get(), 0x5a, static_cast<size_t>(grid.shared_bytes));
  }
};

class HostTeam {
 public:
  static constexpr int kLanes = kHostLanes;

  HostTeam(const Grid& grid, int block, int thread, HostBlock* state)
      : grid_(grid), block_(block), thread_(thread), state_(state) {}

  int block() const { return block_; }
  int num_blocks() const { return grid_.blocks; }
  int thread() const { return thread_; }
  int num_threads() const { return grid_.threads; }
  int lane() const { return thread_ % kLanes; }
  int warp() const { return thread_ / kLanes; }
  int num_warps() const { return grid_.threads / kLanes; }
  char* shared() const { return state_->shared.get(); }
  int64_t* collective() const { return state_->collective.data(); }

  void Sync() const { state_->barrier.Wait(); }
  void SyncWarp() const { state_->warps[static_cast<size_t>(warp())]->Wait(); }
  template <typename T>
  T Shuffle(T value, int from) const {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(value));
    Posted(lane()) = bits;
    SyncWarp();
    bits = Posted(from);
    SyncWarp();
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  uint32_t Match(int32_t key) const {
    Posted(lane()) = static_cast<uint32_t>(key);
    SyncWarp();
    uint32_t same = 0;
    for (int l = 0; l < kLanes; ++l) {
      if (Posted(l) == static_cast<uint32_t>(key)) same |= 1u << l;
    }
    SyncWarp();
    return same;
  }

  int32_t Load(const int32_t* p) const { return __atomic_load_n(p, __ATOMIC_RELAXED); }
  int32_t Add(int32_t* p, int32_t n) const { return __atomic_fetch_add(p, n, __ATOMIC_RELAXED); }
  int32_t Exchange(int32_t* p, int32_t n) const {
    return __atomic_exchange_n(p, n, __ATOMIC_RELAXED);
  }
  int32_t CompareExchange(int32_t* p, int32_t expected, int32_t n) const {
    __atomic_compare_exchange_n(p, &expected, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
  }
  bool IsLastBlock(int32_t* tickets) const {
    Sync();
    if (thread_ == 0) {
      state_->last = __atomic_fetch_add(tickets, 1, __ATOMIC_ACQ_REL) == grid_.blocks - 1;
    }
    Sync();
    return state_->last;
  }

 private:
  uint64_t& Posted(int lane) const {
    return state_->posted[static_cast<size_t>(warp() * kLanes + lane)];
  }

  Grid grid_;
  int block_;
  int thread_;
  HostBlock* state_;
};

// Runs program(team) on every thread of a grid, like a launch that is waited for.
template <typename Program>
void Launch(const Grid& grid, const Program& program) {
  std::vector<std::unique_ptr<HostBlock>> blocks;
  std::vector<std::thread> threads;
  for (int b = 0; b < grid.blocks; ++b) {
    blocks.push_back(std::make_unique<HostBlock>(grid));
    for (int t = 0; t < grid.threads; ++t) {
      threads.emplace_back([&grid, &program, b, t, state = blocks.back().get()] {
        program(HostTeam(grid, b, t, state));
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
}

// Runs body(rank) for all ranks at once: nothing of one may disturb another.
template <typename Body>
void AllRanks(int64_t ranks, const Body& body) {
  std::vector<std::thread> threads;
  for (int64_t r = 0; r < ranks; ++r) threads.emplace_back([&body, r] { body(r); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_HOST_TEAM_H_
