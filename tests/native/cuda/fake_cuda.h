// A CUDA of the host: device memory is memory, a stream is a thread, a graph a list of launches.
// Defines what xla_ffi/engine/cuda/runtime.h declares, the launchers of the handshake, and the
// loading of NCCL. Included by one file of a test.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_FAKE_CUDA_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_FAKE_CUDA_H_

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/native/cuda/handshake_host.h"
#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/runtime.h"
#include "xla_ffi/engine/cuda/shared_memory.h"
#include "xla_ffi/engine/cuda/stage.h"

namespace jax_fusco::testing {

using Work = std::function<void()>;

// Runs its work in order on a thread of its own, or records it.
class FakeStream {
 public:
  FakeStream() : thread_([this] { Serve(); }) {}
  ~FakeStream() {
    Push(nullptr);
    thread_.join();
  }

  void Launch(Work work) {
    if (recording_) {
      recorded_.push_back(std::move(work));
    } else {
      Push(std::move(work));
    }
  }
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [&] { return queue_.empty() && !busy_; });
  }

  // Called from the thread that launches.
  bool recording() const { return recorded_on_ && recording_; }
  void StartRecording() {
    recorded_on_ = recording_ = true;
    recorded_.clear();
  }
  std::vector<Work> EndRecording() {
    recording_ = false;
    return std::move(recorded_);
  }
  void Replay(const std::vector<Work>& graph) {
    for (const Work& work : graph) Push(work);
  }

 private:
  void Push(Work work) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    ready_.notify_one();
  }
  void Serve() {
    for (;;) {
      Work work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        busy_ = false;
        if (queue_.empty()) idle_.notify_all();
        ready_.wait(lock, [&] { return !queue_.empty(); });
        work = std::move(queue_.front());
        queue_.pop_front();
        busy_ = true;
      }
      if (!work) return;
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::condition_variable idle_;
  std::deque<Work> queue_;
  bool busy_ = false;
  bool recorded_on_ = false;
  bool recording_ = false;
  std::vector<Work> recorded_;
  std::thread thread_;  // last: it uses the others
};

// What the machine is like, and what was asked of it.
struct FakeMachine {
  std::mutex mutex;
  std::vector<int> in_use;
  Status in_use_status;
  std::set<std::pair<int, int>> unreachable;
  int allocations = 0;
  int freed = 0;
  int loads = 0;
  // For tests with several processes: device memory is shared memory then.
  bool shared = false;
  bool imports_fail = false;
  std::string host = "a host";
  Status nccl_status;
  cuda::Nccl nccl;
  struct File {
    int file;
    int64_t bytes;
  };
  std::map<void*, File> files;

  static FakeMachine& The() {
    static FakeMachine* machine = new FakeMachine;
    return *machine;
  }
};

inline cuda::Error Enqueue(cuda::Stream stream, Work work) {
  if (stream == cuda::kLoadOnly) {
    std::lock_guard<std::mutex> lock(FakeMachine::The().mutex);
    ++FakeMachine::The().loads;
  } else {
    static_cast<FakeStream*>(stream)->Launch(std::move(work));
  }
  return nullptr;
}

}  // namespace jax_fusco::testing

namespace jax_fusco::cuda {

using testing::FakeMachine;

Status DevicesInUse(std::vector<int>* ordinals) {
  *ordinals = FakeMachine::The().in_use;
  return FakeMachine::The().in_use_status;
}
Status EnablePeer(int from, int to, bool* possible) {
  *possible = FakeMachine::The().unreachable.count({from, to}) == 0;
  return Status::Ok();
}
Status AllocateZeroed(int, int64_t bytes, void** data) {
  std::lock_guard<std::mutex> lock(FakeMachine::The().mutex);
  ++FakeMachine::The().allocations;
  if (FakeMachine::The().shared) {
    const int file = memfd_create("device memory", 0);
    if (file < 0 || ftruncate(file, bytes) != 0) return Status::Internal("memfd_create failed.");
    *data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    FakeMachine::The().files[*data] = {file, bytes};
    return Status::Ok();
  }
  *data = new uint64_t[static_cast<size_t>(bytes + 7) / 8]();
  return Status::Ok();
}
Status Zero(int, void* data, int64_t bytes) {
  std::memset(data, 0, static_cast<size_t>(bytes));
  return Status::Ok();
}
Status ExportMemory(int, void* data, std::string* handle) {
  const FakeMachine::File& file = FakeMachine::The().files.at(data);
  *handle = Concat("/proc/", getpid(), "/fd/", file.file, ":", file.bytes);
  return Status::Ok();
}
Status ImportMemory(int, const std::string& handle, void** data) {
  const size_t colon = handle.find(':');
  const int file = open(handle.substr(0, colon).c_str(), O_RDWR);
  if (FakeMachine::The().imports_fail || file < 0) return Status::Internal("no such memory");
  const auto bytes = static_cast<size_t>(std::stoll(handle.substr(colon + 1)));
  *data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return Status::Ok();
}
std::string HostName() { return FakeMachine::The().host; }
Status LoadNccl(const std::string&, Nccl* nccl) {
  *nccl = FakeMachine::The().nccl;
  return FakeMachine::The().nccl_status;
}
Status Free(int, void* data) {
  ++FakeMachine::The().freed;
  if (FakeMachine::The().shared) return Status::Ok();  // while the process lives
  delete[] static_cast<uint64_t*>(data);
  return Status::Ok();
}
Status CopyToDevice(int, void* to, const void* from, int64_t bytes) {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return Status::Ok();
}
Status ShareHostMemory(void*, int64_t) { return Status::Ok(); }
Status SeenHostMemory(int, void* data, void** seen) {
  *seen = data;
  return Status::Ok();
}
Status UnshareHostMemory(void*) { return Status::Ok(); }
Status IsRecording(Stream stream, bool* recording) {
  *recording = static_cast<testing::FakeStream*>(stream)->recording();
  return Status::Ok();
}
OnDevice::OnDevice(int ordinal) : before_(ordinal), mode_(0) { static_cast<void>(mode_); }
OnDevice::~OnDevice() { before_ = -1; }

Error LaunchEnter(const EnterArgs& args, Stream stream) {
  return testing::Enqueue(stream, [args] {
    testing::RunBlock(1, 0, [&](const testing::HandshakeTeam& team) { Enter(team, args); });
  });
}
Error LaunchLeave(const Seat& seat, Stream stream) {
  return testing::Enqueue(stream, [seat] {
    testing::RunBlock(1, 0, [&](const testing::HandshakeTeam& team) { Leave(team, seat); });
  });
}
Error LaunchStartRun(Board* board, uint64_t run, uint64_t run_key, uint64_t settled,
                     Stream stream) {
  return testing::Enqueue(stream, [=] { StartRun(board, run, run_key, settled); });
}
Error LaunchStage(const StageArgs& args, Stream stream) {
  return testing::Enqueue(stream, [args] {
    for (int32_t p = 0; p < args.num_parts; ++p) {
      const StagePart& part = args.part[p];
      std::memcpy(part.to, part.from, static_cast<size_t>(part.bytes));
    }
  });
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_FAKE_CUDA_H_
