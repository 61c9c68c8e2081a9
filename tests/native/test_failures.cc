// Ranks that do not come, come wrongly or come late, and settings that make no sense: who hears
// which sentence, and that the next call works.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/meeting.h"
#include "xla_ffi/engine/cpu/settings.h"

namespace jax_fusco::testing {
namespace {

using std::string;

struct CountingJob : Job {
  int* runs;
  explicit CountingJob(int* runs) : runs(runs) {}
  Status Run(const std::vector<const Job*>&, const cpu::Settings&) const override {
    ++*runs;
    return Status::Ok();
  }
};

// A site with short patience, and what its ranks do one after the other.
class Scene {
 public:
  explicit Scene(const char* timeout) { setenv("JAX_FUSCO_TIMEOUT_S", timeout, 1); }
  ~Scene() { unsetenv("JAX_FUSCO_TIMEOUT_S"); }

  // Returns when the rank waits, or has left: when all who have not left wait.
  Visit Come(const Arrival& arrival) {
    visits_.emplace_back(site_, arrival, std::make_shared<CountingJob>(&runs_));
    const auto here = [&] {
      return std::count_if(visits_.begin(), visits_.end(),
                           [](const Visit& visit) { return !visit.Over(); });
    };
    while (here() != site_->Waiting()) visits_.back().Over(1);
    return visits_.back();
  }
  Visit Come(int64_t rank) { return Come(At(5, 7, rank, 4)); }
  int runs() const { return runs_; }

 private:
  std::shared_ptr<CallSite> site_ = std::make_shared<CallSite>("a_call");
  std::vector<Visit> visits_;
  int runs_ = 0;
};

// All ranks of a call come, in this order, and the job runs.
void CheckNextCallWorks(Scene& scene) {
  setenv("JAX_FUSCO_TIMEOUT_S", "60", 1);
  const int before = scene.runs();
  const Visit visits[] = {scene.Come(2), scene.Come(0), scene.Come(3), scene.Come(1)};
  for (const Visit& visit : visits) CHECK(visit.Wait().ok());
  CHECK_EQ(scene.runs(), before + 1);
}

// The sentence with the seconds that were waited taken out.
string WithoutSeconds(const string& message) {
  const string before = "did not come within ";
  const size_t first = message.find(before);
  const size_t last = message.find(" s (JAX_FUSCO_TIMEOUT_S)");
  if (first == string::npos || last == string::npos) return message;
  const string seconds = message.substr(first + before.size(), last - first - before.size());
  CHECK(std::atof(seconds.c_str()) >= 0.5 && std::atof(seconds.c_str()) < 30);
  return message.substr(0, first + before.size()) + "#" + message.substr(last);
}

constexpr char kAdvice[] =
    "; look for an earlier error on the missing ranks' devices, or for a shuffle under a condition "
    "that ranks decide differently.";

void MissingRankIsNamed() {
  Scene scene("0.5");
  const Visit waiting[] = {scene.Come(3), scene.Come(0), scene.Come(1)};
  for (const Visit& visit : waiting) {
    const Status status = visit.Wait();
    CHECK(status.code == Code::kDeadlineExceeded);
    CHECK_EQ(WithoutSeconds(status.message),
             "a_call: rank 2 did not come within # s (JAX_FUSCO_TIMEOUT_S) to group 7, where ranks "
             "0, 1, 3 wait" +
                 string(kAdvice));
  }
  setenv("JAX_FUSCO_TIMEOUT_S", "60", 1);
  const Visit late = scene.Come(2);
  CHECK(late.Over());  // at once, and in the same words
  CHECK(late.Wait().code == Code::kDeadlineExceeded);
  CHECK_EQ(late.Wait().message, waiting[0].Wait().message);
  CHECK_EQ(scene.runs(), 0);
  CheckNextCallWorks(scene);
}

void MissingRanksAreNamed() {
  Scene scene("0.5");
  const Visit waiting = scene.Come(1);
  const Status status = waiting.Wait();
  CHECK_EQ(WithoutSeconds(status.message),
           "a_call: ranks 0, 2, 3 did not come within # s (JAX_FUSCO_TIMEOUT_S) to group 7, where "
           "rank 1 waits" +
               string(kAdvice));
  setenv("JAX_FUSCO_TIMEOUT_S", "60", 1);
  for (int64_t rank : {3, 0, 2}) {
    const Visit late = scene.Come(rank);
    CHECK(late.Over());
    CHECK_EQ(late.Wait().message, status.message);
  }
  CheckNextCallWorks(scene);
}

// A rank that skips a call comes to the failed one next: calls are told apart by their number.
void GoesOnWhileAnotherFailed() {
  Scene scene("0.5");
  const Visit first = scene.Come(0);
  CHECK(!first.Wait().ok());
  setenv("JAX_FUSCO_TIMEOUT_S", "60", 1);
  const Visit next = scene.Come(0);  // waits: its peers have not been at this call
  CHECK(!next.Over());
  for (int64_t rank : {1, 2, 3}) CHECK(!scene.Come(rank).Wait().ok());
  for (int64_t rank : {1, 2, 3}) scene.Come(rank);
  CHECK(next.Wait().ok());
  // Other runs and groups are not touched by any of this.
  const Visit other[] = {scene.Come(At(6, 7, 0, 2)), scene.Come(At(6, 7, 1, 2)),
                         scene.Come(At(5, 8, 1, 2)), scene.Come(At(5, 8, 0, 2))};
  for (const Visit& visit : other) CHECK(visit.Wait().ok());
}

// Time runs out for peers that do not come, not for a job.
void JobMayTakeLonger() {
  struct SlowJob : Job {
    Status Run(const std::vector<const Job*>&, const cpu::Settings&) const override {
      std::this_thread::sleep_for(std::chrono::milliseconds(800));
      return Status::Ok();
    }
  };
  setenv("JAX_FUSCO_TIMEOUT_S", "0.4", 1);
  std::vector<std::unique_ptr<SlowJob>> jobs(3);
  for (auto& job : jobs) job = std::make_unique<SlowJob>();
  const Status status = Meet(std::move(jobs));
  CHECK_EQ(status.message, string());
  unsetenv("JAX_FUSCO_TIMEOUT_S");
}

void RankOutOfRange() {
  Scene scene("20");
  for (int64_t rank : {-1, 4, 1000}) {
    const Visit visit = scene.Come(rank);
    CHECK(visit.Wait().code == Code::kInvalidArgument);
    CHECK_EQ(visit.Wait().message, Concat("a_call: rank is ", rank, ", it must lie in [0, 4)."));
  }
  CHECK(scene.Come(At(5, 7, 0, 0)).Wait().code == Code::kInvalidArgument);
  CheckNextCallWorks(scene);
}

void TwoDevicesClaimOneRank() {
  Scene scene("20");
  const Visit first = scene.Come(1);
  Arrival twin = At(5, 7, 1, 4);
  twin.device = 99;
  const Visit second = scene.Come(twin);
  CHECK(second.Over() && second.Wait().code == Code::kInvalidArgument);
  CHECK_EQ(second.Wait().message,
           string("a_call: devices 29 and 99 both came as rank 1 of group 7; group must tell apart "
                  "the devices along every other mesh axis."));
  CHECK(!first.Over());
  const Visit rest[] = {scene.Come(0), scene.Come(2), scene.Come(3)};
  CHECK(first.Wait().ok() && rest[2].Wait().ok());
  CheckNextCallWorks(scene);
  twin.run = 6;  // another run may place the ranks otherwise
  const Visit moved = scene.Come(twin);
  const Visit more[] = {scene.Come(At(6, 7, 0, 4)), scene.Come(At(6, 7, 2, 4)),
                        scene.Come(At(6, 7, 3, 4))};
  CHECK(moved.Wait().ok() && more[0].Wait().ok() && more[2].Wait().ok());
}

void PeersOfOtherNumber() {
  Scene scene("20");
  const Visit first = scene.Come(1);
  const Visit second = scene.Come(At(5, 7, 0, 2));
  CHECK_EQ(second.Wait().message, string("a_call: rank 0 expects 2 ranks, its peers 4."));
  const Visit rest[] = {scene.Come(0), scene.Come(2), scene.Come(3)};
  CHECK(first.Wait().ok() && rest[2].Wait().ok());
}

void SettingsAreChecked() {
  cpu::Settings settings;
  CHECK(cpu::Settings::Read(&settings).ok());
  CHECK(settings.threads >= 1 && settings.timeout_s == 30 && !settings.strict &&
        settings.isa == cpu::BestIsa());
  const struct {
    const char* name;
    const char* value;
    const char* message;
  } bad[] = {
      {"JAX_FUSCO_THREADS", "0", "'0', it must be a whole number from 1 to 1024."},
      {"JAX_FUSCO_THREADS", "1.5", "'1.5', it must be a whole number from 1 to 1024."},
      {"JAX_FUSCO_THREADS", "2x", "'2x', it must be a whole number from 1 to 1024."},
      {"JAX_FUSCO_TIMEOUT_S", "soon",
       "'soon', it must be a number of seconds from 0.001 to 1000000."},
      {"JAX_FUSCO_TIMEOUT_S", "nan",
       "'nan', it must be a number of seconds from 0.001 to 1000000."},
      {"JAX_FUSCO_ISA", "mmx", "'mmx', it must be 'generic', 'avx2', 'avx512' or 'amx'."},
  };
  for (const auto& entry : bad) {
    setenv(entry.name, entry.value, 1);
    const string expected = Concat(entry.name, " is ", entry.message);
    CHECK_EQ(cpu::Settings::Read(&settings).message, expected);
    int runs = 0;
    const Status status = CallSite("a_call").Meet(At(0, 0, 0, 2), CountingJob(&runs));
    CHECK_EQ(status.message, expected);  // every rank hears it at once
    CHECK_EQ(runs, 0);
    unsetenv(entry.name);
  }
  setenv("JAX_FUSCO_THREADS", "3", 1);
  setenv("JAX_FUSCO_STRICT", "1", 1);
  setenv("JAX_FUSCO_ISA", "generic", 1);
  CHECK(cpu::Settings::Read(&settings).ok());
  CHECK(settings.threads == 3 && settings.strict && settings.isa == cpu::Isa::kGeneric);
  for (const char* name : {"JAX_FUSCO_THREADS", "JAX_FUSCO_STRICT", "JAX_FUSCO_ISA"})
    unsetenv(name);
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  for (const char* name :
       {"JAX_FUSCO_THREADS", "JAX_FUSCO_STRICT", "JAX_FUSCO_ISA", "JAX_FUSCO_TIMEOUT_S"}) {
    unsetenv(name);
  }
  return RunTests(argc, argv,
                  {{"MissingRankIsNamed", MissingRankIsNamed},
                   {"MissingRanksAreNamed", MissingRanksAreNamed},
                   {"GoesOnWhileAnotherFailed", GoesOnWhileAnotherFailed},
                   {"JobMayTakeLonger", JobMayTakeLonger},
                   {"RankOutOfRange", RankOutOfRange},
                   {"TwoDevicesClaimOneRank", TwoDevicesClaimOneRank},
                   {"PeersOfOtherNumber", PeersOfOtherNumber},
                   {"SettingsAreChecked", SettingsAreChecked}});
}
