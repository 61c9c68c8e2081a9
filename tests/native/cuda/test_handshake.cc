// The handshake of the CUDA engine: ranks on threads, with delays, deaths and mistakes. The operand
// memory is used for something else as soon as a call ends, as XLA does.
#include <algorithm>
#include <atomic>
#include <numeric>

#include "tests/native/check.h"
#include "tests/native/cuda/handshake_host.h"

namespace jax_fusco::testing {
namespace {

constexpr uint64_t kPatient = 60000;  // ms

void Sleep(int64_t milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

// What one rank does in a call, and what became of it.
struct Try {
  int32_t rank = 0;
  int32_t group = 0;
  int32_t num_ranks = 1;
  uint64_t run = 1;
  uint64_t stamp = 0;  // the same on all ranks of a call
  uint64_t signature = 7;
  uint64_t timeout_ms = kPatient;
  int threads = 1;
  uint64_t seed = 0;  // of delays; 0: none
  int64_t read_ms = 0;
  bool bad_index = false;
  bool racy = false;  // read and write operands atomically: somebody may read too late

  Failure failure = Failure::kNone;
  Phase phase = Phase::kNone;
  int32_t peer = -1;
  int64_t detail = 0;
  uint64_t elapsed_ms = 0;
  bool ok() const { return failure == Failure::kNone; }
};

// A device: two operands in memory that is used again and again.
class Device {
 public:
  Device(HostSite* site, int index) : site_(site), index_(index), operands_(2 * kWords) {}

  void Call(Try* call) {
    const uint64_t start = Nanoseconds();
    Fill(*call, [&](size_t i) { return Value(call->rank, call->stamp, i); });
    EnterArgs args;
    args.seat = site_->SeatOf(index_, call->timeout_ms);
    args.rank = &call->rank;
    args.group = &call->group;
    args.num_ranks = call->num_ranks;
    args.num_operands = 2;
    args.operand[0] = &operands_[0];
    args.operand[1] = &operands_[kWords];
    args.signature = call->signature;
    args.run = call->run;
    args.run_key = call->run + 1000;
    RunBlock(call->threads, call->seed, [&](const HandshakeTeam& team) { Enter(team, args); });
    Table* table = args.seat.table;
    bool right = true;
    if (table->failure == 0) {
      right = Right(*call, *table);
      if (call->read_ms > 0) Sleep(call->read_ms);
      right = Right(*call, *table) && right;
      if (call->bad_index) {
        table->failure = static_cast<int32_t>(Failure::kBadIndex);
        table->peer = call->rank;
        table->detail = 42;
      }
    }
    RunBlock(call->threads, call->seed + (call->seed != 0),
             [&](const HandshakeTeam& team) { Leave(team, args.seat); });
    call->failure = static_cast<Failure>(table->failure);
    call->phase = static_cast<Phase>(table->phase);
    call->peer = table->peer;
    call->detail = table->detail;
    CHECK(right || !call->ok());
    Fill(*call, [](size_t i) { return i; });
    call->elapsed_ms = (Nanoseconds() - start) / 1000000;
  }

 private:
  static constexpr size_t kWords = 16;
  static uint64_t Value(int32_t rank, uint64_t stamp, size_t i) {
    return (stamp << 20) + (static_cast<uint64_t>(rank) << 8) + i;
  }
  template <typename F>
  void Fill(const Try& call, const F& value) {
    for (size_t i = 0; i < operands_.size(); ++i) {
      if (call.racy) {
        __atomic_store_n(&operands_[i], value(i), __ATOMIC_RELAXED);
      } else {
        operands_[i] = value(i);
      }
    }
  }
  bool Right(const Try& call, const Table& table) const {
    bool right = table.rank == call.rank && table.num_ranks == call.num_ranks;
    for (int32_t p = 0; p < call.num_ranks; ++p) {
      for (size_t i = 0; i < 2 * kWords; ++i) {
        const auto* at = static_cast<const uint64_t*>(table.operand[p][i / kWords]) + i % kWords;
        const uint64_t is = call.racy ? __atomic_load_n(at, __ATOMIC_RELAXED) : *at;
        right = right && is == Value(p, call.stamp, i);
      }
    }
    return right;
  }

  HostSite* site_;
  int index_;
  std::vector<uint64_t> operands_;
};

// Devices with one call site.
struct Scene {
  std::vector<HostDevice> state;
  HostSite site;
  std::vector<Device> devices;

  explicit Scene(int num_devices) : state(static_cast<size_t>(num_devices)), site(&state) {
    for (int d = 0; d < num_devices; ++d) devices.emplace_back(&site, d);
  }
  Device& operator[](int d) { return devices[static_cast<size_t>(d)]; }

  // Every device makes its try at once, as the rank of its index.
  void CallAll(std::vector<Try>* tries) {
    RunAll(static_cast<int>(tries->size()),
           [&](int d) { (*this)[d].Call(&(*tries)[static_cast<size_t>(d)]); });
  }
};

std::vector<Try> Tries(int num_ranks, uint64_t run, uint64_t stamp,
                       uint64_t timeout_ms = kPatient) {
  std::vector<Try> tries(static_cast<size_t>(num_ranks));
  for (int32_t r = 0; r < num_ranks; ++r) {
    Try& one = tries[static_cast<size_t>(r)];
    one.rank = r;
    one.num_ranks = num_ranks;
    one.run = run;
    one.stamp = stamp;
    one.timeout_ms = timeout_ms;
  }
  return tries;
}

void CheckAllGood(Scene& scene, int num_ranks, uint64_t run) {
  std::vector<Try> tries = Tries(num_ranks, run, 1000 * run);
  scene.CallAll(&tries);
  for (const Try& one : tries) CHECK(one.ok());
}

// Groups of ranks that lie on the devices in any order; many calls one after the other, with no
// barrier but the handshake.
void RanksMeet() {
  const struct {
    int num_devices;
    int num_ranks;
    int threads;
    uint64_t calls;
  } cases[] = {{1, 1, 1, 5},  {2, 2, 1, 100}, {3, 3, 2, 40}, {4, 2, 1, 60},
               {6, 1, 1, 10}, {6, 3, 3, 20},  {5, 4, 1, 40}};
  Random random(1);
  for (const auto& c : cases) {
    Scene scene(c.num_devices);
    std::vector<int> place(static_cast<size_t>(c.num_devices));
    std::iota(place.begin(), place.end(), 0);
    std::shuffle(place.begin(), place.end(), std::mt19937(7));
    const int used = c.num_devices / c.num_ranks * c.num_ranks;
    const uint64_t seed = random.Bits();
    RunAll(used, [&](int i) {
      const int device = place[static_cast<size_t>(i)];
      for (uint64_t n = 1; n <= c.calls; ++n) {
        Try one;
        one.rank = i % c.num_ranks;
        one.group = i / c.num_ranks;
        one.num_ranks = c.num_ranks;
        one.run = 1 + n / 10;
        one.stamp = n * 8 + static_cast<uint64_t>(one.group);
        one.threads = c.threads;
        one.seed = n % 3 == 0 ? seed + n * 31 + static_cast<uint64_t>(i) : 0;
        scene[device].Call(&one);
        CHECK(one.ok());
      }
    });
    for (int i = 0; i < used; ++i) {
      const int device = place[static_cast<size_t>(i)];
      CHECK_EQ(scene.site.board(device)->calls, c.calls);
      CHECK_EQ(scene.site.record(device)->sequence, uint64_t{0});
      CHECK_EQ(scene.state[static_cast<size_t>(device)].alarm, uint64_t{0});
    }
  }
}

void MissingRankIsNamedAndLateRankFailsAtOnce() {
  for (int threads : {1, 3}) {
    Scene scene(3);
    std::vector<Try> tries = Tries(3, 1, 1, 100);
    for (Try& one : tries) one.threads = threads;
    RunAll(2, [&](int d) { scene[d].Call(&tries[static_cast<size_t>(d)]); });
    int timeouts = 0;
    for (int r : {0, 1}) {
      const Try& one = tries[static_cast<size_t>(r)];
      CHECK(one.failure == Failure::kTimeout || one.failure == Failure::kPeerFailed);
      CHECK(one.phase == Phase::kEnter);
      timeouts += one.failure == Failure::kTimeout;
      CHECK_EQ(one.peer, one.failure == Failure::kTimeout ? 2 : 1 - r);
      const Record& record = *scene.site.record(r);
      CHECK_EQ(record.sequence, uint64_t{1});
      CHECK_EQ(record.rank, static_cast<uint64_t>(r));
      CHECK_EQ(record.peer & 0xffffffffu, static_cast<uint64_t>(one.peer));
      CHECK_EQ(record.peer >> 32, static_cast<uint64_t>(one.failure));
      CHECK_EQ(record.phase & ~uint64_t{0xff00},
               uint64_t{3} << 32 | static_cast<uint64_t>(Phase::kEnter));
      CHECK_EQ(record.call, uint64_t{1});
      CHECK_EQ(record.run, uint64_t{1});
      CHECK(record.waited_ns <= 60000000000u);
    }
    CHECK(timeouts >= 1);
    tries[2].timeout_ms = kPatient;
    scene[2].Call(&tries[2]);  // would wait for a minute
    CHECK(tries[2].failure == Failure::kPeerFailed && tries[2].elapsed_ms < 30000);
    // To the end of the run nobody tries again, and nobody waits or reports again.
    for (int again = 0; again < 2; ++again) {
      std::vector<Try> more = Tries(3, 1, 2);
      scene.CallAll(&more);
      for (const Try& one : more) {
        CHECK(one.failure == Failure::kFailedRun && one.elapsed_ms < 30000);
      }
    }
    for (int r : {0, 1, 2}) CHECK_EQ(scene.site.record(r)->sequence, uint64_t{1});
    CheckAllGood(scene, 3, 2);
    CheckAllGood(scene, 3, 3);
  }
}

// The late rank comes when its peers are in the next run: it fails, they do not.
void LateByAWholeRun() {
  Scene scene(3);
  std::vector<Try> first = Tries(3, 1, 1, 50);
  std::vector<Try> second = Tries(3, 2, 2);
  RunAll(3, [&](int d) {
    const auto r = static_cast<size_t>(d);
    if (d == 2) Sleep(400);
    if (d == 2) first[r].timeout_ms = kPatient;
    scene[d].Call(&first[r]);
    scene[d].Call(&second[r]);
  });
  for (const Try& one : first) CHECK(!one.ok());
  CHECK(first[2].failure == Failure::kPeerFailed);
  for (const Try& one : second) CHECK(one.ok());
}

// A rank that left out a whole run, because its host failed, meets its peers in the next.
void SkippedRun() {
  Scene scene(2);
  std::vector<Try> first = Tries(2, 1, 1, 50);
  std::vector<Try> second = Tries(2, 2, 2);
  RunAll(2, [&](int d) {
    const auto r = static_cast<size_t>(d);
    if (d == 0) scene[d].Call(&first[r]);
    scene[d].Call(&second[r]);
  });
  CHECK(!first[0].ok() && first[0].peer == 1);  // it waited too long, or saw the other go on
  for (const Try& one : second) CHECK(one.ok());
}

// A rank reads for longer than its peer waits. The peer's operand is used for something else
// meanwhile, so the reader must not take what it read for good.
void SlowReaderFailsToo() {
  Scene scene(2);
  std::vector<Try> tries = Tries(2, 1, 1, 50);
  for (Try& one : tries) one.racy = true;
  tries[1].read_ms = 400;
  scene.CallAll(&tries);
  CHECK(tries[0].failure == Failure::kTimeout && tries[0].phase == Phase::kLeave);
  CHECK_EQ(tries[0].peer, 1);
  CHECK(tries[1].failure == Failure::kPeerFailed && tries[1].phase == Phase::kLeave);
  CHECK_EQ(tries[1].peer, 0);
  CheckAllGood(scene, 2, 2);
}

void DifferentCallsAreAMismatch() {
  Scene scene(2);
  std::vector<Try> tries = Tries(2, 1, 1);
  tries[1].signature = 8;
  scene.CallAll(&tries);
  // One of them may hear of the other's failure before it sees why.
  CHECK(tries[0].failure == Failure::kMismatch || tries[1].failure == Failure::kMismatch);
  for (const Try& one : tries) {
    CHECK(one.failure == Failure::kMismatch || one.failure == Failure::kPeerFailed);
    if (one.failure == Failure::kMismatch) CHECK_EQ(one.detail, one.rank == 0 ? 8 : 7);
    CHECK_EQ(one.peer, 1 - one.rank);
  }
  CheckAllGood(scene, 2, 2);
}

// A bad index on one rank fails the call everywhere, and the rest of the run on every device, also
// at call sites that nobody has been to; the next run is as if nothing had been.
void BadIndexFailsTheRun() {
  Scene scene(3);
  HostSite other_site(&scene.state);
  std::vector<Device> other;
  for (int d = 0; d < 3; ++d) other.emplace_back(&other_site, d);
  std::vector<Try> tries = Tries(3, 1, 1);
  for (Try& one : tries) one.racy = true;
  tries[1].bad_index = true;
  scene.CallAll(&tries);
  CHECK(tries[1].failure == Failure::kBadIndex && tries[1].phase == Phase::kMove);
  CHECK_EQ(tries[1].detail, 42);
  for (int r : {0, 2}) {
    const Try& one = tries[static_cast<size_t>(r)];
    CHECK(one.failure == Failure::kPeerFailed);  // in Leave, or still in Enter
  }
  CHECK_EQ(scene.site.record(1)->peer >> 32, static_cast<uint64_t>(Failure::kBadIndex));
  std::vector<Try> elsewhere = Tries(3, 1, 2);
  RunAll(3, [&](int d) { other[static_cast<size_t>(d)].Call(&elsewhere[static_cast<size_t>(d)]); });
  for (const Try& one : elsewhere) {
    CHECK(one.failure == Failure::kFailedRun && one.elapsed_ms < 30000);
  }
  std::vector<Try> next = Tries(3, 2, 3);
  RunAll(3, [&](int d) { other[static_cast<size_t>(d)].Call(&next[static_cast<size_t>(d)]); });
  for (const Try& one : next) CHECK(one.ok());
  CheckAllGood(scene, 3, 2);
}

// Only one rank has failed elsewhere: its peer hears of it at once.
void FailedRunIsPassedOn() {
  Scene scene(2);
  scene.state[0].failed_run = 1001;  // the key of run 1
  std::vector<Try> tries = Tries(2, 1, 1);
  scene.CallAll(&tries);
  CHECK(tries[0].failure == Failure::kFailedRun);
  CHECK(tries[1].failure == Failure::kPeerFailed && tries[1].elapsed_ms < 30000);
  CheckAllGood(scene, 2, 2);
}

void BadRanks() {
  const struct {
    int32_t rank;
    int32_t group;
  } bad[] = {{-1, 0}, {2, 0}, {0, 1}, {0, -1}, {1 << 30, 0}, {0, 1 << 30}};
  for (const auto& b : bad) {
    Scene scene(2);
    std::vector<Try> tries = Tries(2, 1, 1, 50);
    tries[1].rank = b.rank;
    tries[1].group = b.group;
    scene.CallAll(&tries);
    CHECK(tries[1].failure == Failure::kBadRank && tries[1].phase == Phase::kEnter);
    CHECK_EQ(tries[1].peer, b.rank);
    CHECK_EQ(tries[1].detail, static_cast<int64_t>(b.group));
    CHECK(tries[0].failure == Failure::kTimeout);
    CheckAllGood(scene, 2, 2);
  }
}

// The group operand forgets to tell devices apart.
void TwoDevicesAsOneRank() {
  Scene scene(4);
  std::vector<Try> tries = Tries(2, 1, 1);
  RunAll(2, [&](int d) { scene[d].Call(&tries[static_cast<size_t>(d)]); });
  for (const Try& one : tries) CHECK(one.ok());
  std::vector<Try> twins = Tries(2, 1, 1, 50);
  RunAll(2, [&](int d) { scene[2 + d].Call(&twins[static_cast<size_t>(d)]); });
  for (const Try& one : twins) {
    CHECK(one.failure == Failure::kSameRank);
    CHECK_EQ(one.peer, one.rank);
    CHECK_EQ(one.detail, static_cast<int64_t>(one.rank));
  }
}

// Some devices replay what an earlier run recorded, others do not.
void RecordedCalls() {
  Scene scene(3);
  CheckAllGood(scene, 3, 1);
  for (uint64_t run = 2; run < 6; ++run) {
    for (int d : {0, 1}) cuda::StartRun(scene.site.board(d), run, run + 1000);
    for (uint64_t n : {1, 2}) {
      std::vector<Try> tries = Tries(3, run, run * 10 + n);
      for (int d : {0, 1}) tries[static_cast<size_t>(d)].run = 1;
      if (run == 3) {
        for (Try& one : tries) one.racy = true;
        tries[1].bad_index = true;
      }
      scene.CallAll(&tries);
      for (const Try& one : tries) CHECK_EQ(one.ok(), run != 3);
    }
  }
}

// Anything goes wrong at any time, with little patience; then all is well again. What a call reads
// is checked in Device::Call: it never reports success with wrong data.
void RandomFaults() {
  Random random(3);
  int good = 0;
  int failed = 0;
  for (int round = 0; round < 40; ++round) {
    const int num_ranks = static_cast<int>(random.Int(2, 4));
    Scene scene(num_ranks);
    const uint64_t seed = random.Bits() | 1;
    std::atomic<int> succeeded{0};
    std::atomic<int> gave_up{0};
    RunAll(num_ranks, [&](int d) {
      Random mine(seed + static_cast<uint64_t>(d) * 977);
      for (uint64_t run = 1; run <= 4; ++run) {
        if (mine.OneIn(8)) continue;  // the host failed
        for (uint64_t n = 1; n <= 3; ++n) {
          Try one;
          one.rank = d;
          one.num_ranks = num_ranks;
          one.run = run;
          one.stamp = run * 16 + n;
          one.timeout_ms = static_cast<uint64_t>(mine.Int(1, 12));
          one.seed = mine.OneIn(2) ? mine.Bits() | 1 : 0;
          one.read_ms = mine.OneIn(6) ? mine.Int(1, 8) : 0;
          one.bad_index = mine.OneIn(30);
          one.racy = true;
          if (mine.OneIn(10)) Sleep(mine.Int(1, 15));
          if (mine.OneIn(40)) break;  // the host failed half-way
          scene[d].Call(&one);
          (one.ok() ? succeeded : gave_up) += 1;
        }
      }
    });
    good += succeeded;
    failed += gave_up;
    CheckAllGood(scene, num_ranks, 5);
    CheckAllGood(scene, num_ranks, 6);
  }
  CHECK(good > 50 && failed > 50);
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(
      argc, argv,
      {{"RanksMeet", RanksMeet},
       {"MissingRankIsNamedAndLateRankFailsAtOnce", MissingRankIsNamedAndLateRankFailsAtOnce},
       {"LateByAWholeRun", LateByAWholeRun},
       {"SkippedRun", SkippedRun},
       {"SlowReaderFailsToo", SlowReaderFailsToo},
       {"DifferentCallsAreAMismatch", DifferentCallsAreAMismatch},
       {"BadIndexFailsTheRun", BadIndexFailsTheRun},
       {"FailedRunIsPassedOn", FailedRunIsPassedOn},
       {"BadRanks", BadRanks},
       {"TwoDevicesAsOneRank", TwoDevicesAsOneRank},
       {"RecordedCalls", RecordedCalls},
       {"RandomFaults", RandomFaults}});
}
