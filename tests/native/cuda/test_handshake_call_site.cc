// Call sites of the CUDA engine over a CUDA of the host: runs, graphs, failures and what the user
// hears of them.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "tests/native/check.h"
#include "tests/native/cuda/fake_cuda.h"
#include "xla_ffi/engine/cuda/call_site.h"
#include "xla_ffi/engine/cuda/errors.h"

namespace jax_fusco::testing {
namespace {

using cuda::Arena;
using cuda::BeginArgs;
using cuda::CallFailure;
using cuda::CallSite;
using std::string;

class Timeout {
 public:
  explicit Timeout(const char* seconds) { setenv("JAX_FUSCO_TIMEOUT_S", seconds, 1); }
  ~Timeout() { unsetenv("JAX_FUSCO_TIMEOUT_S"); }
};

// Virtual ranks on one GPU, each with a stream, and programs of one call.
class Scene {
 public:
  explicit Scene(int num_ranks) : streams(static_cast<size_t>(num_ranks)) {
    CHECK(Arena::Create(std::vector<int>(static_cast<size_t>(num_ranks), 0), &arena).ok());
    site = CallSite::Create("a_call", arena.get());
    for (int r = 0; r < num_ranks; ++r) {
      ranks.push_back(r);
      operands.push_back(r);
      good.push_back(-1);
    }
  }
  ~Scene() { Wait(); }

  int size() const { return static_cast<int>(ranks.size()); }
  FakeStream& stream(int d) { return streams[Index(d)]; }

  Status Prepare(int d, int64_t run) { return site->Prepare(d, run, size(), &stream(d)); }
  // The call: the result is 1 where the call is good and the operands are those of its peers.
  Status Call(int d, int64_t run) {
    BeginArgs args;
    args.run = run;
    args.rank = &ranks[Index(d)];
    args.group = &group;
    args.num_ranks = size();
    args.num_operands = 1;
    args.operand[0] = &operands[Index(d)];
    cuda::Table* table = nullptr;
    Status status = site->Begin(d, args, &stream(d), &table);
    if (!status.ok()) return status;
    stream(d).Launch([this, d, table] {
      int right = 1;
      for (int p = 0; table->failure == 0 && p < size(); ++p) {
        right &= *static_cast<const int*>(table->operand[p][0]) == p && table->device[p] == p;
      }
      good[Index(d)] = right;
    });
    status = site->Finish(d, &stream(d));
    stream(d).Launch([this, d, table] {
      if (table->failure != 0) good[Index(d)] = 0;
    });
    return status;
  }
  Status Run(int d, int64_t run) {
    Status status = Prepare(d, run);
    if (status.ok()) status = Call(d, run);
    return status;
  }
  void Wait() {
    for (FakeStream& stream : streams) stream.Wait();
  }
  void CheckAll(int expected) {
    Wait();
    for (int& one : good) {
      CHECK_EQ(one, expected);
      one = -1;
    }
  }
  // One host thread drives all devices: nothing there may wait.
  void CheckRunWorks(int64_t run) {
    for (int d = 0; d < size(); ++d) CHECK_EQ(Run(d, run).message, "");
    CheckAll(1);
  }

  std::unique_ptr<Arena> arena;
  std::unique_ptr<CallSite> site;
  std::vector<int32_t> ranks;
  int32_t group = 0;
  std::vector<int> operands;
  std::vector<int> good;
  std::vector<FakeStream> streams;

 private:
  static size_t Index(int d) { return static_cast<size_t>(d); }
};

void CompilesWithoutADevice() {
  FakeMachine& machine = FakeMachine::The();
  machine.in_use_status = Status::Internal("jax_fusco: no driver.");
  const auto site = CallSite::Create("a_call");
  CHECK_EQ(machine.allocations + machine.loads, 0);
  FakeStream stream;
  CHECK_EQ(site->Prepare(0, 1, 1, &stream).message, "jax_fusco: no driver.");
  CHECK_EQ(site->Begin(0, {}, &stream, nullptr).message, "a_call: GPU 0 has not been prepared.");
  machine.in_use_status = Status::Ok();
  CHECK_EQ(site->Prepare(0, 1, 1, &stream).message, "jax_fusco: this process has no GPU in use.");
  machine.in_use = {0, 2};  // this process leaves GPU 1 to others
  CHECK(site->Prepare(2, 1, 2, &stream).ok());
  CHECK(site->Prepare(0, 1, 2, &stream).ok());
  CHECK_EQ(site->Prepare(1, 1, 2, &stream).message,
           "a_call: GPU 1 was not in use when the process first shuffled.");
  CHECK_EQ(site->Prepare(0, 1, 4, &stream).message,
           "a_call: a group has 4 ranks, but only the 3 GPUs of this process can meet.");
}

void RunsWork() {
  const int before = FakeMachine::The().allocations;
  for (int num_ranks : {1, 2, 4}) {
    Scene scene(num_ranks);
    scene.CheckRunWorks(70);
    const int allocations = FakeMachine::The().allocations;
    const int loads = FakeMachine::The().loads;
    for (int64_t run : {71, 60, 900, 901}) scene.CheckRunWorks(run);  // ids in any order
    for (int d = 0; d < num_ranks; ++d) {  // a scan: many calls of one run, not waited for
      CHECK(scene.Prepare(d, 902).ok() && scene.Prepare(d, 902).ok());
      for (int i = 0; i < 20; ++i) CHECK(scene.Call(d, 902).ok());
    }
    scene.CheckAll(1);
    CHECK_EQ(FakeMachine::The().allocations, allocations);
    CHECK_EQ(FakeMachine::The().loads, loads);
  }
  CHECK_EQ(FakeMachine::The().freed, FakeMachine::The().allocations - before);
}

// Everybody hears the same sentence in the next run, once; after it all is well.
void FailureIsReportedByANextRun() {
  Scene scene(3);
  scene.CheckRunWorks(1);
  {
    const Timeout timeout("0.05");
    for (int d : {0, 1}) CHECK(scene.Run(d, 2).ok());  // device 2 fails before
    scene.Wait();
    CHECK(scene.good[0] == 0 && scene.good[1] == 0);
  }
  const Status first = scene.Prepare(1, 3);
  CHECK(first.code == Code::kDeadlineExceeded);
  CHECK(first.message.find("jax_fusco: rank ") == 0);
  CHECK(first.message.find(" (JAX_FUSCO_TIMEOUT_S) for rank 2 in a_call (enter, call 2); look for "
                           "an earlier error on the device of rank 2") != string::npos);
  CHECK(first.message.find("The results of that run are not valid; this one was not started.") !=
        string::npos);
  for (int d : {0, 2, 1}) CHECK_EQ(scene.Prepare(d, 3).message, first.message);
  CHECK_EQ(scene.Call(0, 3).message, first.message);
  scene.CheckRunWorks(4);
  scene.CheckRunWorks(5);
}

// What is written to stderr while this lives.
class Log {
 public:
  Log() : file_(std::tmpfile()), before_(dup(2)) { dup2(fileno(file_), 2); }
  ~Log() {
    Restore();
    std::fclose(file_);
  }
  void Restore() {
    if (before_ < 0) return;
    dup2(before_, 2);
    close(before_);
    before_ = -1;
  }
  int Count(const string& text) {
    string all(static_cast<size_t>(1) << 16, ' ');
    all.resize(
        static_cast<size_t>(std::max<ssize_t>(0, pread(fileno(file_), all.data(), all.size(), 0))));
    int count = 0;
    for (size_t at = all.find(text); at != string::npos; at = all.find(text, at + 1)) ++count;
    return count;
  }

 private:
  std::FILE* file_;
  int before_;
};

// Also where no host code runs any more: each failure is logged once, by itself.
void FailuresAreLoggedOnce() {
  Log log;
  Scene scene(2);
  const Timeout timeout("0.05");
  for (int64_t run : {1, 3}) {
    CHECK(scene.Run(0, run).ok());
    scene.Wait();
    const int wanted = run == 1 ? 1 : 2;
    for (int i = 0; i < 600 && log.Count("for rank 1 in a_call (enter, call ") < wanted; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(250));
    CHECK_EQ(log.Count("for rank 1 in a_call (enter, call "), wanted);
    CHECK_EQ(log.Count("\n"), wanted);
    CHECK(!scene.Prepare(0, run + 1).ok());
  }
  log.Restore();
}

// The host is ahead of the devices: it learns of the failure only after it has started more runs.
// Those are not spoilt.
void HostIsAhead() {
  Scene scene(2);
  scene.CheckRunWorks(1);
  {
    const Timeout timeout("0.2");
    CHECK(scene.Run(0, 2).ok());
  }
  CHECK(scene.Run(0, 3).ok());
  CHECK(scene.Run(1, 3).ok());
  scene.CheckAll(1);
  CHECK(scene.Prepare(0, 4).code == Code::kDeadlineExceeded ||
        scene.Prepare(0, 4).code == Code::kInternal);
  CHECK_EQ(scene.Prepare(1, 4).message, scene.Prepare(0, 4).message);
  scene.CheckRunWorks(5);
}

// Device 0 replays a graph, device 1 does not; a replay fails; both work again.
void Graphs() {
  Scene scene(2);
  scene.CheckRunWorks(1);
  for (int d : {0, 1}) CHECK(scene.Prepare(d, 2).ok());
  scene.stream(0).StartRecording();
  CHECK(scene.Call(0, 2).ok());
  CHECK(scene.Call(0, 2).ok());
  const std::vector<Work> graph = scene.stream(0).EndRecording();
  const auto run = [&](int64_t id) {
    for (int d : {0, 1}) CHECK_EQ(scene.Prepare(d, id).message, "");
    scene.stream(0).Replay(graph);
    for (int i : {0, 1}) CHECK(i < 2 && scene.Call(1, id).ok());
    scene.CheckAll(1);
  };
  const int loads = FakeMachine::The().loads;
  const int allocations = FakeMachine::The().allocations;
  for (int64_t id : {2, 3, 4}) run(id);
  {
    const Timeout timeout("0.05");
    CHECK(scene.Run(1, 5).ok());  // device 0 does not come
    scene.Wait();
    CHECK_EQ(scene.good[1], 0);
  }
  const Status report = scene.Prepare(0, 6);
  CHECK(report.code == Code::kDeadlineExceeded);
  CHECK_EQ(scene.Prepare(1, 6).message, report.message);
  for (int64_t id : {7, 8}) run(id);
  // A replay on which the peer is not there: its own timeout was recorded, so break it otherwise.
  for (int d : {0, 1}) CHECK(scene.Prepare(d, 9).ok());
  scene.ranks[1] = 5;
  scene.stream(0).Replay(graph);
  CHECK(scene.Call(1, 9).ok());
  scene.stream(1).Wait();
  CHECK_EQ(scene.good[1], 0);
  CHECK_EQ(scene.Prepare(1, 10).code == Code::kInvalidArgument, true);
  scene.ranks[1] = 1;
  CHECK(scene.Prepare(0, 10).code == Code::kInvalidArgument);
  for (int d : {0, 1}) CHECK_EQ(scene.Prepare(d, 11).message, "");
  scene.stream(0).Replay(graph);  // queued behind the one that still waits: it hears of run 11
  for (int i : {0, 1}) CHECK(i < 2 && scene.Call(1, 11).ok());
  scene.CheckAll(1);
  CHECK_EQ(FakeMachine::The().loads, loads);
  CHECK_EQ(FakeMachine::The().allocations, allocations);
}

void BadArguments() {
  Scene scene(2);
  CHECK(scene.Prepare(0, 1).ok());
  {
    const Timeout timeout("soon");
    CHECK_EQ(scene.Call(0, 1).message,
             "JAX_FUSCO_TIMEOUT_S is 'soon', it must be a number of seconds from 0.001 to "
             "1000000.");
  }
  BeginArgs args;
  args.num_ranks = 2;
  args.num_operands = 17;
  cuda::Table* table = nullptr;
  CHECK_EQ(scene.site->Begin(0, args, &scene.stream(0), &table).message,
           "a_call: a call has 17 arrays, it may have at most 16.");
  args.num_operands = 0;
  args.num_ranks = 3;
  CHECK_EQ(scene.site->Begin(0, args, &scene.stream(0), &table).message,
           "a_call: a group has 3 ranks, but only the 2 GPUs of this process can meet.");
  CHECK(scene.Prepare(0, 2).ok());
  CHECK_EQ(scene.Prepare(0, 1).message,
           "a_call: two runs of one program overlap on GPU 0; start them from one thread.");
}

void UnreachablePeers() {
  FakeMachine& machine = FakeMachine::The();
  machine.unreachable.insert({0, 3});
  std::unique_ptr<Arena> arena;
  CHECK(Arena::Create({0, 3}, &arena).ok());
  machine.unreachable.clear();
  const auto site = CallSite::Create("a_call", arena.get());
  FakeStream stream;
  CHECK(site->Prepare(0, 1, 1, &stream).ok());  // alone it works
  CHECK_EQ(site->Prepare(0, 1, 2, &stream).message,
           "jax_fusco: GPU 0 cannot reach the memory of GPU 3 (no peer access); use "
           "implementation=\"xla\", or give the process GPUs that reach each other "
           "(CUDA_VISIBLE_DEVICES; `nvidia-smi topo -m` shows them).");
}

// Places are all zero, of their own, and there are more than one slab holds.
void ManyCallSites() {
  std::unique_ptr<Arena> arena;
  CHECK(Arena::Create({0, 0, -1, 0}, &arena).ok());
  std::set<const void*> seen;
  for (int i = 0; i < 6000; ++i) {
    std::vector<cuda::Place> places;
    CHECK(arena->NewPlaces("", 0, &places).ok());
    CHECK_EQ(places.size(), size_t{4});
    CHECK(places[2].board == nullptr && places[2].record == nullptr);
    for (int d : {0, 1, 3}) {
      const cuda::Place& place = places[static_cast<size_t>(d)];
      CHECK(seen.insert(place.board).second && seen.insert(place.table).second &&
            seen.insert(place.record).second);
      CHECK(place.board->run == 0 && place.board->slot[3].entered == 0);
      CHECK(place.record->sequence == 0 && place.seen_record == place.record);
      for (int other = 0; other < 4; ++other) {
        CHECK(place.boards[other] == places[static_cast<size_t>(other)].board);
      }
      std::memset(static_cast<void*>(place.board), 0xff, static_cast<size_t>(cuda::BoardBytes(4)));
      std::memset(static_cast<void*>(place.table), 0xff, static_cast<size_t>(cuda::TableBytes(4)));
    }
  }
  CHECK(arena->failed_run(0) != arena->failed_run(3));
  CHECK(arena->seen_alarm(0) != arena->seen_alarm(1));
}

void Sentences() {
  CallFailure f;
  f.call = 17;
  f.rank = 3;
  f.group = 0;
  f.num_ranks = 8;
  f.peer = 1;
  f.waited_s = 30.04;
  f.phase = cuda::Phase::kEnter;
  const auto says = [&](cuda::Failure failure, const string& sentence, Code code) {
    f.failure = failure;
    const Status status = Describe("jax_fusco_gather_rows", f);
    CHECK_EQ(status.message, sentence);
    CHECK(status.code == code);
  };
  says(cuda::Failure::kTimeout,
       "jax_fusco: rank 3 of group 0 waited 30.0 s (JAX_FUSCO_TIMEOUT_S) for rank 1 in "
       "jax_fusco_gather_rows (enter, call 17); look for an earlier error on the device of rank 1, "
       "or for a shuffle under a condition that ranks decide differently.",
       Code::kDeadlineExceeded);
  f.detail = 5;
  says(cuda::Failure::kSameRank,
       "jax_fusco: rank 3 of group 0 is also device 5 in jax_fusco_gather_rows (enter, call 17); "
       "group must tell apart the devices along every other mesh axis.",
       Code::kInvalidArgument);
  says(cuda::Failure::kMismatch,
       "jax_fusco: rank 3 of group 0 and rank 1 came to jax_fusco_gather_rows (enter, call 17) "
       "with different shapes or attributes (0000000000000005); all ranks must run the same "
       "program.",
       Code::kInvalidArgument);
  f.phase = cuda::Phase::kLeave;
  says(cuda::Failure::kPeerFailed,
       "jax_fusco: rank 3 of group 0 gave up jax_fusco_gather_rows (leave, call 17) because rank 1 "
       "had given it up, for a reason of its own.",
       Code::kInternal);
  f.phase = cuda::Phase::kMove;
  f.detail = cuda::BadIndexDetail(2, -7);
  says(cuda::Failure::kBadIndex,
       "jax_fusco: rank 3 of group 0 met index -7 of rank 2 in jax_fusco_gather_rows (move, call "
       "17), given by rank 1; it does not exist.",
       Code::kInvalidArgument);
  f.phase = cuda::Phase::kEnter;
  f.rank = 9;
  f.group = -1;
  says(cuda::Failure::kBadRank,
       "jax_fusco: rank is 9 and group is -1 in jax_fusco_gather_rows (enter, call 17); rank must "
       "lie in [0, 8) and there must be a device for each rank of each group.",
       Code::kInvalidArgument);
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  unsetenv("JAX_FUSCO_TIMEOUT_S");
  return RunTests(argc, argv,
                  {{"CompilesWithoutADevice", CompilesWithoutADevice},
                   {"RunsWork", RunsWork},
                   {"FailureIsReportedByANextRun", FailureIsReportedByANextRun},
                   {"FailuresAreLoggedOnce", FailuresAreLoggedOnce},
                   {"HostIsAhead", HostIsAhead},
                   {"Graphs", Graphs},
                   {"BadArguments", BadArguments},
                   {"UnreachablePeers", UnreachablePeers},
                   {"ManyCallSites", ManyCallSites},
                   {"Sentences", Sentences}});
}
