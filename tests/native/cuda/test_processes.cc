// Ranks of several processes, real ones, over a CUDA, an NCCL and a store of the host: how they
// find each other, what they read, and what they hear when one is late, dead, or runs something
// else.
#include <cmath>
#include <string>

#include "tests/native/check.h"
#include "tests/native/cuda/fake_cuda.h"
#include "tests/native/cuda/fake_job.h"

namespace jax_fusco::testing {
namespace {

using std::string;

bool Has(const string& text, const string& part) { return text.find(part) != string::npos; }

// What does not fail may take long on a busy machine; what is to fail shall not.
class Timeout {
 public:
  explicit Timeout(const char* seconds) { setenv("JAX_FUSCO_TIMEOUT_S", seconds, 1); }
  ~Timeout() { setenv("JAX_FUSCO_TIMEOUT_S", "20", 1); }
};

// Prints what was not found.
void CheckHas(const Status& status, const string& part) {
  if (!Has(status.message, part)) CHECK_EQ(status.message, part);
}

void RunsOfAllSizes(Job& job, int num_devices) {
  const auto one = Job::NewProgram("one", num_devices, 10);
  const auto larger = Job::NewProgram("larger", num_devices, Job::kMaxWords);
  const auto smaller = Job::NewProgram("smaller", num_devices, 3);
  int run = 100 * job.process;  // ids differ between processes
  int value = 0;
  for (const auto* program : {&one, &larger, &one, &smaller, &larger, &one, &one, &smaller}) {
    job.Fill(++value);
    CHECK_EQ(job.Run(*program, ++run).message, "");
    job.CheckAll(1);
  }
}

void OneGroup() {
  for (int processes : {2, 3}) {
    for (int devices : {1, 2}) {
      RunJob(processes, devices, [=](Job& job) {
        for (auto& one : job.devices) one.rank = processes * devices - 1 - one.rank;
        RunsOfAllSizes(job, processes * devices);
      });
    }
  }
}

void GroupsWithinAndAcrossProcesses() {
  RunJob(2, 2, [](Job& job) {
    const auto program = Job::NewProgram("a_call", 2, 5);
    for (bool across : {false, true}) {
      for (int d : {0, 1}) {
        auto& one = job.devices[static_cast<size_t>(d)];
        one.rank = across ? job.process : d;
        one.group = across ? d : job.process;
      }
      // A device is one rank at a call site, so each has its own.
      const auto fresh = Job::NewProgram(across ? "across" : "within", 2, 5);
      for (int run : {1, 2, 3}) job.CheckRunWorks(fresh, run);
    }
    const auto alone = Job::NewProgram("alone", 1, 5);
    for (int d : {0, 1}) {
      auto& one = job.devices[static_cast<size_t>(d)];
      one.rank = 0;
      one.group = 2 * job.process + d;
    }
    for (int run : {1, 2}) job.CheckRunWorks(alone, run);
    const auto large = Job::NewProgram("a_call", 5, 5);
    CheckHas(job.Run(large, 1),
             "a_call: a group has 5 ranks, but only the 4 GPUs of the processes");
  });
}

// Hosts of one NVLink domain.
void Windows() {
  RunJob(2, 2, [](Job& job) {
    FakeMachine::The().host = Concat("host ", job.process);
    job.domain = "domain";
    RunsOfAllSizes(job, 4);
  });
}

void WindowsThatCannotBe() {
  const auto refuses = [](const string& part, const std::function<void(Job&)>& change) {
    RunJob(2, 1, [&](Job& job) {
      FakeMachine::The().host = Concat("host ", job.process);
      job.domain = "domain";
      change(job);
      const auto program = Job::NewProgram("a_call", 2, 5);
      CheckHas(job.Run(program, 1), part);
      CheckHas(job.Run(program, 2), part);
    });
  };
  refuses("too old", [](Job& job) {
    if (job.process == 1) FakeMachine::The().nccl_status = Status::InvalidArgument("too old");
  });
  refuses("NCCL refuses opening a communicator: invalid usage",
          [](Job&) { FakeNccl::The().init_error = 5; });
  refuses("by load and store (no NVLink between them)", [](Job& job) {
    if (job.process == 0) FakeNccl::The().unreachable = 1;
  });
  refuses("NCCL_CUMEM_ENABLE", [](Job&) { FakeNccl::The().without_windows = true; });
}

void MemoryThatCannotBeShared() {
  RunJob(2, 1, [](Job& job) {
    FakeMachine::The().imports_fail = job.process == 1;
    const auto program = Job::NewProgram("a_call", 2, 5);
    CheckHas(job.Run(program, 1), "GPU 0 cannot reach the memory of GPU 0 of process 0");
  });
}

// Hosts without NVLink between them: each meets by itself, by plain pointers.
void DomainsApart() {
  RunJob(2, 2, [](Job& job) {
    FakeMachine::The().host = Concat("host ", job.process);
    const auto program = Job::NewProgram("a_call", 2, 5);
    for (int d : {0, 1}) {
      job.devices[static_cast<size_t>(d)].rank = d;
      job.devices[static_cast<size_t>(d)].group = job.process;
    }
    for (int run : {1, 2, 3}) job.CheckRunWorks(program, run);
    CheckHas(job.Run(Job::NewProgram("wide", 4, 5), 4),
             "a group has 4 ranks, but only the 2 GPUs of this process can meet");
  });
}

void OtherProgramsAreAnError() {
  RunJob(3, 1, [](Job& job) {
    const auto first = Job::NewProgram("first", 3, 5);
    job.CheckRunWorks(first, 1);
    const auto program = Job::NewProgram(job.process == 2 ? "that" : "this", 3, 5);
    const Status status = job.Run(program, 2);
    CHECK(status.code == Code::kInvalidArgument);
    CheckHas(status, "shuffle 2 is this (3 ranks");
    CheckHas(status, "in process 0 and that (3 ranks");
    CheckHas(status, "in process 2; all processes must run the same programs in the same order.");
  });
}

void LateIsFineMissingIsNamed() {
  RunJob(2, 1, [](Job& job) {
    const Timeout timeout("2");
    if (job.process == 1) Sleep(2.5);  // less than ten times 2 s
    job.CheckRunWorks(Job::NewProgram("a_call", 2, 5), 1);
  });
  for (int missing : {0, 1}) {
    RunJob(3, 1, [=](Job& job) {
      if (job.process == missing) return;
      const Timeout timeout("0.2");
      const Status status = job.Run(Job::NewProgram("a_call", 3, 5), 1);
      CHECK(status.code == Code::kDeadlineExceeded);
      CheckHas(status,
               Concat("jax_fusco: process ", missing, " did not come to its first shuffle"));
    });
  }
  RunJob(2, 1, [](Job& job) {
    job.CheckRunWorks(Job::NewProgram("first", 2, 5), 1);
    if (job.process == 1) return;
    const Timeout timeout("0.05");
    const Status status = job.Run(Job::NewProgram("second", 2, 5), 1);
    CheckHas(status, "process 1 did not come to shuffle 2, second (2 ranks");
    CHECK_EQ(job.Run(Job::NewProgram("third", 2, 5), 1).message, status.message);
  });
}

void DeadProcessIsNamed() {
  RunJob(3, 1, [](Job& job) {
    const auto program = Job::NewProgram("a_call", 3, 5);
    job.CheckRunWorks(program, 1);
    if (job.process == 1) _exit(0);
    const Timeout timeout("0.3");
    CHECK(job.Run(program, 2).ok());
    job.CheckAll(0);
    const Status status = job.Run(program, 3);
    CheckHas(status, " a_call (enter, call 2)");
    const bool waited = Has(status.message, "(JAX_FUSCO_TIMEOUT_S) for rank 1 (process 1) in");
    CHECK(waited || Has(status.message, "had given it up"));
    CheckHas(job.Run(program, 4), "process 1 has not reported the failure");
  });
}

// Runs until it works again; a failure has been heard of once.
void RunUntilItWorks(Job& job, const Job::Program& program, int* run) {
  int reports = 0;
  for (int tries = 0; tries < 100; ++tries) {
    Sleep(0.02);
    const Status status = job.Run(program, ++*run);
    reports += !status.ok() && !Has(status.message, "has not reported");  // or not yet
    job.Wait();
    bool good = status.ok();
    for (auto& one : job.devices) {
      good &= one.good == 1;
      one.good = -1;
    }
    if (reports > 0 && good) break;
  }
  CHECK_EQ(reports, 1);
}

// Each process hears of a failure once, at a run of its own; then all work again, in step.
void AllRecoverFromALateProcess() {
  for (int late : {0, 1}) {
    RunJob(2, 2, [=](Job& job) {
      const auto program = Job::NewProgram("a_call", 4, 5);
      const auto other = Job::NewProgram("another", 4, 5);
      int run = 1;
      job.CheckRunWorks(program, run);
      job.CheckRunWorks(other, run);
      job.CheckRunWorks(other, ++run);
      for (int again : {0, 1}) {
        const Timeout timeout("0.5");
        if (job.process == late) Sleep(0.8 + 0.4 * again);
        for (int ahead = 0; job.process != late && ahead < 3; ++ahead) {
          CHECK(job.Run(program, ++run).ok());  // nobody knows yet
        }
        RunUntilItWorks(job, program, &run);
        setenv("JAX_FUSCO_TIMEOUT_S", "20", 1);
        for (int i : {0, 1, 2}) {
          job.CheckRunWorks(i == 1 ? other : program, ++run);
        }
      }
    });
  }
}

// The groups are one in each pair of processes; only one of them fails.
void OtherGroupsHear() {
  RunJob(4, 1, [](Job& job) {
    const auto program = Job::NewProgram("a_call", 2, 5);
    job.devices[0].rank = job.process % 2;
    job.devices[0].group = job.process / 2;
    int run = 1;
    job.CheckRunWorks(program, run);
    {
      const Timeout timeout("0.5");
      if (job.process == 1) Sleep(0.8);
      RunUntilItWorks(job, program, &run);
    }
    for (int i : {0, 1, 2}) job.CheckRunWorks(program, run += 1 + i);
  });
}

// Programs that were recorded before a failure work after it.
void Graphs() {
  RunJob(2, 1, [](Job& job) {
    const auto program = Job::NewProgram("a_call", 2, 5);
    job.CheckRunWorks(program, 1);
    const Timeout timeout("1");  // recorded
    job.streams[0].StartRecording();
    CHECK(job.Call(program, 1, 0).ok());
    const std::vector<Work> graph = job.streams[0].EndRecording();
    const auto prepare = [&](int64_t run) {
      cuda::BeginArgs args;
      args.run = run;
      args.num_ranks = 2;
      return program.site->Prepare(0, args, &job.streams[0]);
    };
    int64_t run = 1;
    int reports = 0;
    for (int i = 0; i < 12; ++i) {
      if (i == 5 && job.process == 1) Sleep(1.5);
      const Status status = prepare(++run);
      reports += !status.ok();
      if (!status.ok()) continue;
      job.Fill(i);
      job.streams[0].Replay(graph);
      job.Wait();
    }
    CHECK_EQ(reports, 1);
    CHECK_EQ(job.devices[0].good, 1);
  });
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  setenv("JAX_FUSCO_TIMEOUT_S", "20", 1);
  return RunTests(argc, argv,
                  {{"OneGroup", OneGroup},
                   {"GroupsWithinAndAcrossProcesses", GroupsWithinAndAcrossProcesses},
                   {"Windows", Windows},
                   {"WindowsThatCannotBe", WindowsThatCannotBe},
                   {"MemoryThatCannotBeShared", MemoryThatCannotBeShared},
                   {"DomainsApart", DomainsApart},
                   {"OtherProgramsAreAnError", OtherProgramsAreAnError},
                   {"LateIsFineMissingIsNamed", LateIsFineMissingIsNamed},
                   {"DeadProcessIsNamed", DeadProcessIsNamed},
                   {"AllRecoverFromALateProcess", AllRecoverFromALateProcess},
                   {"OtherGroupsHear", OtherGroupsHear},
                   {"Graphs", Graphs}});
}
