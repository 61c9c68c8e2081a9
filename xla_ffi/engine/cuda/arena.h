// The devices that can meet and the memory through which they do.
#ifndef JAX_FUSCO_ENGINE_CUDA_ARENA_H_
#define JAX_FUSCO_ENGINE_CUDA_ARENA_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cuda/handshake.h"
#include "xla_ffi/engine/cuda/processes.h"
#include "xla_ffi/engine/cuda/shared_memory.h"

namespace jax_fusco::cuda {

// One device's share of a call site.
struct Place {
  Board* board = nullptr;
  Board* const* boards = nullptr;  // of all devices, device memory
  Table* table = nullptr;
  Record* record = nullptr;       // as the host sees it,
  Record* seen_record = nullptr;  // and the device
  // Where there are several processes: where operands are put for the others, and where those of
  // all devices are, device memory.
  char* stage = nullptr;
  char* const* stages = nullptr;
};

// What logs the failures of a call site.
class Watched {
 public:
  virtual ~Watched() = default;
  virtual void LogFailures() = 0;
};

// Never synchronises after its first use but where it grows, every few hundred call sites or more;
// with several processes also at each call site whose operands are larger than those before.
//
// Places are not handed out twice: a kernel of a program that is gone, in a CUDA graph perhaps, may
// still write to the boards, and nothing cheap proves that none does. A call site costs each device
// about 0.5 KiB and 0.3 KiB for each device that can meet it (3 KiB with 8). Stages are one for all
// call sites: a device's calls come one after the other. One that has become too small stays, for
// those that have it.
class Arena {
 public:
  // For groups of so many ranks, on first use of all devices that the process uses, by CUDA
  // ordinal, and those of the processes that can meet it. Ranks that are alone meet nobody.
  static Status Get(int64_t num_ranks, Arena** arena);
  // Device i is ordinals[i]; one GPU may be several devices. `processes`: null, this one is alone.
  static Status Create(const std::vector<int>& ordinals, std::unique_ptr<Arena>* arena);
  static Status Create(const std::vector<int>& ordinals, std::unique_ptr<Processes> processes,
                       std::unique_ptr<Arena>* arena);
  ~Arena();

  Processes* processes() const;
  int num_devices() const;   // of all processes
  int first_device() const;  // of this one
  // Whether there are devices of the job that cannot meet these.
  bool has_others() const;
  // -1: no device of this process. By number within it, as everything below.
  int ordinal(int device) const;
  // Why ranks on several devices of this process cannot meet, if so.
  const Status& reach() const;
  uint64_t* failed_run(int device) const;
  uint64_t* seen_alarm(int device) const;
  uint64_t* const* news(int device) const;  // as Seat's

  // A place on each device of this process, all zero, with stages for so many bytes. Where there
  // are several processes, all of them together: `site` must be the same.
  Status NewPlaces(const std::string& site, int64_t stage_bytes, std::vector<Place>* places);

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
