// The devices of the process and the memory through which they meet.
#ifndef JAX_FUSCO_ENGINE_CUDA_ARENA_H_
#define JAX_FUSCO_ENGINE_CUDA_ARENA_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cuda/handshake.h"

namespace jax_fusco::cuda {

// One device's share of a call site.
struct Place {
  Board* board = nullptr;
  Board* const* boards = nullptr;  // of all devices, device memory
  Table* table = nullptr;
  Record* record = nullptr;       // as the host sees it,
  Record* seen_record = nullptr;  // and the device
};

// What logs the failures of a call site.
class Watched {
 public:
  virtual ~Watched() = default;
  virtual void LogFailures() = 0;
};

// Never synchronises after its first use but where it grows, every few hundred call sites or more.
//
// Places are not handed out twice: a kernel of a program that is gone, in a CUDA graph perhaps, may
// still write to the boards, and nothing cheap proves that none does. A call site costs each device
// about 0.5 KiB and 0.3 KiB for each device of the process (3 KiB with 8).
class Arena {
 public:
  // The devices that the process uses, by CUDA ordinal, on first use.
  static Status Get(Arena** arena);
  // Device i is ordinals[i]; one GPU may be several devices.
  static Status Create(const std::vector<int>& ordinals, std::unique_ptr<Arena>* arena);
  ~Arena();

  int num_devices() const;
  // -1: no device of this process.
  int ordinal(int device) const;
  // Why ranks on several devices cannot meet, if so.
  const Status& reach() const;
  uint64_t* failed_run(int device) const;
  uint64_t* seen_alarm(int device) const;

  // A place on each device, all zero.
  Status NewPlaces(std::vector<Place>* places);

  // Calls LogFailures soon after an alarm. Unwatch waits for a call that is under way.
  void Watch(Watched* watched);
  void Unwatch(Watched* watched);

 private:
  struct Impl;
  Arena();
  std::unique_ptr<Impl> impl_;
};

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_ARENA_H_
