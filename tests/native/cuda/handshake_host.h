// Ranks that shake hands on threads of the host, by the same program as on a GPU.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_HANDSHAKE_HOST_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_HANDSHAKE_HOST_H_

#include <sched.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/host_team.h"
#include "xla_ffi/engine/cuda/handshake_program.h"

namespace jax_fusco::testing {

using cuda::Board;
using cuda::EnterArgs;
using cuda::Failure;
using cuda::Outcome;
using cuda::Phase;
using cuda::Record;
using cuda::Seat;
using cuda::Table;

inline uint64_t Nanoseconds() {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                   std::chrono::steady_clock::now().time_since_epoch())
                                   .count());
}

// A thread of the block. `jitter`, where there is one, delays its stores at random.
class HandshakeTeam {
 public:
  HandshakeTeam(int thread, int num_threads, Barrier* barrier, Outcome* outcome, Random* jitter)
      : thread_(thread),
        num_threads_(num_threads),
        barrier_(barrier),
        outcome_(outcome),
        jitter_(jitter) {}

  int thread() const { return thread_; }
  int num_threads() const { return num_threads_; }
  Outcome* outcome() const { return outcome_; }
  void Sync() const { barrier_->Wait(); }
  bool First(Outcome* outcome) const {
    return __atomic_exchange_n(&outcome->stop, 1, __ATOMIC_RELAXED) == 0;
  }
  bool Stopped(Outcome* outcome) const {
    return __atomic_load_n(&outcome->stop, __ATOMIC_RELAXED) != 0;
  }
  uint64_t Acquire(const uint64_t* p) const { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
  void Release(uint64_t* p, uint64_t value) const {
    Delay();
    __atomic_store_n(p, value, __ATOMIC_RELEASE);
  }
  // The race checker knows no fences, so each access orders by itself here.
  uint64_t Read(const uint64_t* p) const { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
  void Write(uint64_t* p, uint64_t value) const { __atomic_store_n(p, value, __ATOMIC_RELEASE); }
  void Fence() const {}
  uint64_t Now() const { return Nanoseconds(); }
  void Pause() const { sched_yield(); }

 private:
  void Delay() const {
    if (jitter_ == nullptr || !jitter_->OneIn(4)) return;
    std::this_thread::sleep_for(std::chrono::microseconds(jitter_->Int(0, 200)));
  }

  int thread_;
  int num_threads_;
  Barrier* barrier_;
  Outcome* outcome_;
  Random* jitter_;
};

// What belongs to a device, whatever the call site.
struct HostDevice {
  uint64_t failed_run = 0;
  uint64_t alarm = 0;
};

// A call site and its devices. Each array is of exactly its size.
class HostSite {
 public:
  explicit HostSite(std::vector<HostDevice>* devices)
      : devices_(devices), num_devices_(static_cast<int>(devices->size())) {
    for (int d = 0; d < num_devices_; ++d) {
      boards_.push_back(Zeros(cuda::BoardBytes(num_devices_)));
      tables_.push_back(Zeros(cuda::TableBytes(num_devices_)));
      pointers_.push_back(board(d));
    }
    records_.resize(devices->size());
  }

  int num_devices() const { return num_devices_; }
  Board* board(int d) { return reinterpret_cast<Board*>(boards_[Index(d)].get()); }
  Table* table(int d) { return reinterpret_cast<Table*>(tables_[Index(d)].get()); }
  Record* record(int d) { return &records_[Index(d)]; }

  Seat SeatOf(int device, uint64_t timeout_ms) {
    Seat seat;
    seat.boards = pointers_.data();
    seat.num_devices = num_devices_;
    seat.device = device;
    seat.timeout_ns = timeout_ms * 1000000;
    seat.table = table(device);
    seat.record = record(device);
    seat.failed_run = &(*devices_)[Index(device)].failed_run;
    seat.alarm = &(*devices_)[Index(device)].alarm;
    return seat;
  }

 private:
  using Words = std::unique_ptr<uint64_t[]>;
  static size_t Index(int d) { return static_cast<size_t>(d); }
  static Words Zeros(int64_t bytes) {
    return Words(new uint64_t[static_cast<size_t>(bytes + 7) / 8]());
  }

  std::vector<HostDevice>* devices_;
  int num_devices_;
  std::vector<Words> boards_;
  std::vector<Words> tables_;
  std::vector<Board*> pointers_;
  std::vector<Record> records_;
};

// Runs body(team) as a block of `threads` threads.
inline void RunBlock(int threads, uint64_t seed,
                     const std::function<void(const HandshakeTeam&)>& body) {
  Barrier barrier(threads);
  Outcome outcome{};
  const auto run = [&](int t) {
    Random jitter(seed + static_cast<uint64_t>(t));
    body(HandshakeTeam(t, threads, &barrier, &outcome, seed == 0 ? nullptr : &jitter));
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run, t);
  run(0);
  for (std::thread& other : others) other.join();
}

// Runs body(i) for i < count, each on a thread.
inline void RunAll(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> all;
  for (int i = 0; i < count; ++i) all.emplace_back(body, i);
  for (std::thread& one : all) one.join();
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_HANDSHAKE_HOST_H_
