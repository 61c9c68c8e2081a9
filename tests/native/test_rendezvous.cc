// Call sites with many threads: who meets whom, and who hears what.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/meeting.h"

namespace jax_fusco::testing {
namespace {

using std::string;

// A call as the tests see it, shared by its ranks.
struct Record {
  std::atomic<int> runs{0};
  std::atomic<bool> ended{false};
};

struct TestJob : Job {
  std::tuple<int64_t, int64_t, int64_t, int64_t> call;  // site, run, group, number
  int64_t rank;
  Record* record;
  bool throws = false;

  TestJob(std::tuple<int64_t, int64_t, int64_t, int64_t> call, int64_t rank, Record* record)
      : call(call), rank(rank), record(record) {}

  Status Run(const std::vector<const Job*>& ranks, const cpu::Settings&) const override {
    ++record->runs;
    CHECK(ranks.at(0) == this);
    for (size_t r = 0; r < ranks.size(); ++r) {
      const auto* peer = static_cast<const TestJob*>(ranks[r]);
      CHECK(peer != nullptr && peer->call == call);
      CHECK_EQ(peer->rank, static_cast<int64_t>(r));
    }
    if (throws) throw std::runtime_error("bad luck");
    std::this_thread::yield();
    record->ended = true;
    return Status::Ok();
  }
};

std::unique_ptr<TestJob> MakeJob(Record* record, int64_t rank, int64_t number = 0) {
  return std::make_unique<TestJob>(std::make_tuple(0, 0, 0, number), rank, record);
}

// The ranks of a group go through the calls of a program in one order, each at its own pace; groups
// and runs share the sites.
void RanksComeInOneOrder(int64_t ranks, int64_t groups, int64_t runs, int64_t sites,
                         int64_t calls) {
  std::vector<std::unique_ptr<CallSite>> site;
  for (int64_t i = 0; i < sites; ++i) site.push_back(std::make_unique<CallSite>("site"));
  std::vector<Record> records(static_cast<size_t>(sites * runs * groups * calls));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < ranks * groups * runs; ++i) {
    threads.emplace_back([&, i] {
      const int64_t rank = i % ranks, group = i / ranks % groups, run = i / ranks / groups;
      Random random(static_cast<uint64_t>(i / ranks));
      std::vector<int64_t> order;
      for (int64_t c = 0; c < sites * calls; ++c) order.push_back(c % sites);
      for (size_t c = order.size(); c > 1; --c) {
        std::swap(order[c - 1],
                  order[static_cast<size_t>(random.Int(0, static_cast<int64_t>(c) - 1))]);
      }
      Random pace(static_cast<uint64_t>(1000 + i));
      std::vector<int64_t> made(static_cast<size_t>(sites));
      for (int64_t s : order) {
        const int64_t number = made[static_cast<size_t>(s)]++;
        Record& record =
            records[static_cast<size_t>(((s * runs + run) * groups + group) * calls + number)];
        const TestJob job(std::make_tuple(s, run, group, number), rank, &record);
        if (pace.Int(0, 3) == 0) std::this_thread::yield();
        CHECK(site[static_cast<size_t>(s)]->Meet(At(run, group, rank, ranks), job).ok());
        CHECK(record.ended.load());  // never before the job has ended
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Record& record : records) CHECK_EQ(record.runs.load(), 1);
  for (const auto& each : site) CHECK_EQ(each->Waiting(), int64_t{0});
}
void SixteenRanks() { RanksComeInOneOrder(16, 1, 1, 4, 10); }
void ManyGroupsAndRuns() { RanksComeInOneOrder(4, 3, 3, 3, 10); }
void TwoRanksManyCalls() { RanksComeInOneOrder(2, 1, 2, 2, 300); }

// More runs than the site remembers come and go while one call waits.
void OldCallWaits() {
  const auto site = std::make_shared<CallSite>("site");
  Record old, record;
  const Visit first(site, At(0, 0, 0, 2), MakeJob(&old, 0));
  while (site->Waiting() < 1) CHECK(!first.Over(1));
  for (int64_t run = 1; run <= 400; ++run) {
    const Visit one(site, At(run, 0, 1, 2), MakeJob(&record, 1, run));
    const Visit other(site, At(run, 0, 0, 2), MakeJob(&record, 0, run));
    CHECK(one.Wait().ok() && other.Wait().ok());
  }
  CHECK(!first.Over());
  const Visit second(site, At(0, 0, 1, 2), MakeJob(&old, 1));
  CHECK(first.Wait().ok() && second.Wait().ok());
  CHECK(old.runs == 1 && record.runs == 400);
}

void OneRankWaitsForNobody() {
  Record record;
  CHECK(CallSite("site").Meet(At(0, 0, 0, 1), *MakeJob(&record, 0)).ok() && record.runs == 1);
}

void JobThatThrows() {
  Record record;
  std::vector<std::unique_ptr<TestJob>> jobs;
  for (int64_t r = 0; r < 4; ++r) {
    jobs.push_back(MakeJob(&record, r));
    jobs.back()->throws = true;
  }
  const Status status = Meet(std::move(jobs));
  CHECK(status.code == Code::kInternal);
  CHECK_EQ(status.message, string("site: bad luck."));
  CHECK_EQ(record.runs.load(), 1);
}

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {
                      {"SixteenRanks", SixteenRanks},
                      {"ManyGroupsAndRuns", ManyGroupsAndRuns},
                      {"TwoRanksManyCalls", TwoRanksManyCalls},
                      {"OldCallWaits", OldCallWaits},
                      {"OneRankWaitsForNobody", OneRankWaitsForNobody},
                      {"JobThatThrows", JobThatThrows},
                  });
}
