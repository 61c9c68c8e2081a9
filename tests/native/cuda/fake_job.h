// Several processes of a job on this host: a store of files, an NCCL, and programs that shuffle.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_FAKE_JOB_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_FAKE_JOB_H_

#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/cuda/fake_cuda.h"
#include "xla_ffi/engine/cuda/call_site.h"
#include "xla_ffi/engine/cuda/hex.h"

namespace jax_fusco::testing {

inline void Sleep(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

// Keys are files of a folder.
class FakeStore {
 public:
  explicit FakeStore(std::string folder) : folder_(std::move(folder)) {}

  Status Put(const std::string& key, const std::string& value) const {
    const std::string path = PathOf(key);
    const std::string draft = Concat(path, ".", getpid());
    std::ofstream(draft) << value;
    const bool is_new = link(draft.c_str(), path.c_str()) == 0;
    unlink(draft.c_str());
    return is_new ? Status::Ok() : Status::Internal(Concat(key, " exists already"));
  }
  Status Get(const std::string& key, double timeout_s, std::string* value) const {
    for (const auto end = std::chrono::steady_clock::now() +
                          std::chrono::microseconds(static_cast<int64_t>(timeout_s * 1e6));
         ;) {
      std::ifstream file(PathOf(key));
      if (file) {
        std::stringstream text;
        text << file.rdbuf();
        *value = text.str();
        return Status::Ok();
      }
      if (std::chrono::steady_clock::now() > end) return Status::DeadlineExceeded("no " + key);
      Sleep(0.002);
    }
  }

 private:
  std::string PathOf(std::string key) const {
    for (char& c : key) c = c == '/' ? '_' : c;
    return folder_ + "/" + key;
  }
  std::string folder_;
};

// NCCL's windows, whose peers' memory is opened when it is asked for.
struct FakeNccl {
  struct Comm {
    std::string id;
    int rank;
    int windows = 0;
  };
  struct Window {
    std::string key;
  };
  static FakeNccl& The() {
    static FakeNccl* the = new FakeNccl;
    return *the;
  }
  static cuda::Nccl Functions() {
    cuda::Nccl nccl;
    nccl.version = cuda::kNcclVersion;
    nccl.get_unique_id = [](cuda::NcclId* id) {
      std::snprintf(id->bytes, sizeof(id->bytes), "id-%d", static_cast<int>(getpid()));
      return 0;
    };
    nccl.comm_init_rank = [](cuda::NcclComm* comm, int, cuda::NcclId id, int rank) {
      *comm = new Comm{id.bytes, rank};
      return The().init_error;
    };
    nccl.group_start = nccl.group_end = [] { return 0; };
    nccl.mem_alloc = [](void** data, size_t bytes) {
      return cuda::AllocateZeroed(0, static_cast<int64_t>(bytes), data).ok() ? 0 : 1;
    };
    nccl.window_register = [](cuda::NcclComm comm, void* data, size_t, cuda::NcclWindow* window,
                              int flags) {
      auto* where = static_cast<Comm*>(comm);
      const std::string key = Concat(where->id, "/", where->windows++, "/");
      std::string handle;
      if (flags != 1 || !cuda::ExportMemory(0, data, &handle).ok()) return 4;
      if (!The().store->Put(key + std::to_string(where->rank), handle).ok()) return 3;
      *window = The().without_windows ? nullptr : new Window{key};
      return 0;
    };
    nccl.peer_pointer = [](cuda::NcclWindow window, size_t, int peer, void** data) {
      *data = nullptr;
      if (peer == The().unreachable) return 0;
      std::string handle;
      const auto* where = static_cast<Window*>(window);
      if (!The().store->Get(where->key + std::to_string(peer), 10, &handle).ok()) return 3;
      return cuda::ImportMemory(0, handle, data).ok() ? 0 : 1;
    };
    nccl.error_string = [](int error) { return error == 5 ? "invalid usage" : "an error"; };
    return nccl;
  }

  FakeStore* store = nullptr;
  int init_error = 0;
  int unreachable = -1;
  bool without_windows = false;
};

// What a process of the job knows, and a program of shuffles on its devices.
class Job {
 public:
  static constexpr int kMaxWords = 3 << 18;  // more than memory is rounded up by

  Job(const std::string& folder, int process, int num_processes, int num_devices)
      : process(process), store(folder), streams(static_cast<size_t>(num_devices)) {
    FakeMachine& machine = FakeMachine::The();
    machine.shared = true;
    machine.nccl = FakeNccl::Functions();
    FakeNccl::The().store = &store;
    for (int d = 0; d < num_devices; ++d) machine.in_use.push_back(d);
    cuda::Store connected;
    connected.process = process;
    connected.num_processes = num_processes;
    connected.domain = [this] { return domain; };
    connected.put = [this](const std::string& key, const std::string& value) {
      return store.Put(key, value);
    };
    connected.get = [this](const std::string& key, double timeout_s, std::string* value) {
      return store.Get(key, timeout_s, value);
    };
    cuda::Connect(connected);
    for (int d = 0; d < num_devices; ++d) {
      const int device = process * num_devices + d;
      devices.push_back({device, 0, std::vector<int>(kMaxWords), device, -1});
    }
  }
  ~Job() { Wait(); }

  // A call site whose ranks tell each other `words` ints.
  struct Program {
    std::unique_ptr<cuda::CallSite> site;
    int num_ranks;
    int words;
  };
  static Program NewProgram(const char* name, int num_ranks, int words) {
    return {cuda::CallSite::Create(name), num_ranks, words};
  }

  // One run on all devices here: the first status that is not ok, or the last.
  Status Run(const Program& program, int64_t run) {
    Status status;
    for (size_t d = 0; d < devices.size(); ++d) {
      status = program.site->Prepare(static_cast<int>(d), Args(program, run, d), &streams[d]);
      if (!status.ok()) return status;
    }
    for (size_t d = 0; d < devices.size(); ++d) {
      status = Call(program, run, d);
      if (!status.ok()) return status;
    }
    return status;
  }
  // The run works, and everybody has read what its peers have written for it.
  void CheckRunWorks(const Program& program, int64_t run) {
    Fill(++checks_);
    CHECK_EQ(Run(program, run).message, "");
    CheckAll(1);
  }
  void Fill(int value) {
    for (Device& one : devices) {
      std::fill(one.operand.begin(), one.operand.end(), 1000 * value + one.rank);
    }
  }
  void CheckAll(int expected) {
    Wait();
    for (Device& one : devices) {
      CHECK_EQ(one.good, expected);
      one.good = -1;
    }
  }
  void Wait() {
    for (FakeStream& stream : streams) stream.Wait();
  }
  Status Call(const Program& program, int64_t run, size_t d) {
    cuda::Table* table = nullptr;
    Status status =
        program.site->Begin(static_cast<int>(d), Args(program, run, d), &streams[d], &table);
    if (!status.ok()) return status;
    Device* one = &devices[d];
    const int words = program.words;
    streams[d].Launch([one, table, words] {
      int right = 1;
      const int base = one->operand[0] - one->rank;
      for (int p = 0; table->failure == 0 && p < table->num_ranks; ++p) {
        const int* operand = static_cast<const int*>(table->operand[p][1]);
        for (int i = 0; i < words; ++i) right &= operand[i] == base + p;
        right &= *static_cast<const int*>(table->operand[p][0]) == p;
      }
      one->good = right;
    });
    status = program.site->Finish(static_cast<int>(d), &streams[d]);
    streams[d].Launch([one, table] {
      if (table->failure != 0) one->good = 0;
    });
    return status;
  }

  struct Device {
    int32_t rank;
    int32_t group;
    std::vector<int> operand;
    int32_t copy_of_rank;
    int good;
  };

  int process;
  std::string domain;
  FakeStore store;
  std::vector<Device> devices;
  std::vector<FakeStream> streams;

 private:
  int checks_ = 0;

  cuda::BeginArgs Args(const Program& program, int64_t run, size_t d) {
    Device& one = devices[d];
    if (one.copy_of_rank != one.rank) one.copy_of_rank = one.rank;  // runs may be under way
    cuda::BeginArgs args;
    args.run = run;
    args.rank = &one.rank;
    args.group = &one.group;
    args.num_ranks = program.num_ranks;
    args.num_operands = 2;
    args.operand[0] = &one.copy_of_rank;
    args.operand_bytes[0] = sizeof(int32_t);
    args.operand[1] = one.operand.data();
    args.operand_bytes[1] = program.words * static_cast<int64_t>(sizeof(int));
    return args;
  }
};

// Runs body(job) in so many processes. They end with what failed, or as the body ends them.
inline void RunJob(int num_processes, int num_devices, const std::function<void(Job&)>& body) {
  char folder[] = "/tmp/jax_fusco_test_XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  std::fflush(nullptr);
  std::vector<pid_t> children;
  for (int process = 0; process < num_processes; ++process) {
    const pid_t child = fork();
    if (child != 0) {
      children.push_back(child);
      continue;
    }
    failures = 0;
    {
      Job job(folder, process, num_processes, num_devices);
      body(job);
    }
    std::fflush(nullptr);
    _exit(failures == 0 ? 0 : 1);
  }
  for (size_t process = 0; process < children.size(); ++process) {
    int status = 0;
    waitpid(children[process], &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      Fail(__FILE__, __LINE__, Concat("process ", static_cast<int64_t>(process), " failed"));
    }
  }
  CHECK_EQ(std::system(Concat("rm -r ", folder).c_str()), 0);
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_FAKE_JOB_H_
