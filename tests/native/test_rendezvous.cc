// Call sites with many threads: who meets whom, who hears what, and what happens when ranks fail.
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

// Ranks reach the sites of a program in orders of their own, and go on before a call is complete.
// No thread waits for another, so an engine that did would hang here.
void RanksComeInAnyOrder(int64_t ranks, int64_t groups, int64_t runs, int64_t sites,
                         int64_t calls) {
  std::vector<std::shared_ptr<CallSite>> site;
  for (int64_t i = 0; i < sites; ++i) site.push_back(CallSite::Create("site"));
  std::vector<Record> records(static_cast<size_t>(sites * runs * groups * calls));
  std::atomic<int64_t> told{0};
  std::vector<std::vector<Answer>> answers(static_cast<size_t>(ranks * groups * runs));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < ranks * groups * runs; ++i) {
    threads.emplace_back([&, i] {
      const int64_t rank = i % ranks, group = i / ranks % groups, run = i / ranks / groups;
      Random random(static_cast<uint64_t>(i));
      std::vector<int64_t> order;
      for (int64_t c = 0; c < sites * calls; ++c) order.push_back(c % sites);
      for (size_t c = order.size(); c > 1; --c) {
        std::swap(order[c - 1],
                  order[static_cast<size_t>(random.Int(0, static_cast<int64_t>(c) - 1))]);
      }
      std::vector<int64_t> made(static_cast<size_t>(sites));
      std::vector<Answer>& mine = answers[static_cast<size_t>(i)];
      for (int64_t s : order) {
        const int64_t number = made[static_cast<size_t>(s)]++;
        Record& record =
            records[static_cast<size_t>(((s * runs + run) * groups + group) * calls + number)];
        Answer answer;
        auto job = std::make_unique<TestJob>(std::make_tuple(s, run, group, number), rank, &record);
        Status status;
        auto done = [&record, &told, tell = answer.Done()](const Status& heard) {
          CHECK(record.ended.load());  // never before the job has ended
          ++told;
          tell(heard);
        };
        const bool at_once = site[static_cast<size_t>(s)]->Arrive(At(run, group, rank, ranks),
                                                                  std::move(job), done, &status);
        if (!at_once) {
          mine.push_back(answer);
        } else {
          CHECK(status.ok() && record.ended.load());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  int64_t heard = 0;
  for (const std::vector<Answer>& of_rank : answers) {
    for (const Answer& answer : of_rank) CHECK(answer.Wait().ok());
    for (const Answer& answer : of_rank) heard += answer.calls();
  }
  for (const Record& record : records) CHECK_EQ(record.runs.load(), 1);
  CHECK_EQ(heard, (ranks - 1) * groups * runs * sites * calls);  // every done once
  CHECK_EQ(told.load(), heard);
}
void SixteenRanks() { RanksComeInAnyOrder(16, 1, 1, 4, 10); }
void ManyGroupsAndRuns() { RanksComeInAnyOrder(4, 3, 3, 3, 10); }
void TwoRanksManyCalls() { RanksComeInAnyOrder(2, 1, 2, 2, 300); }

// More runs than the site remembers come and go while one call waits.
void OldCallWaits() {
  const auto site = CallSite::Create("site");
  Record old, record;
  Answer first;
  first.Arrive(*site, At(0, 0, 0, 2), MakeJob(&old, 0));
  for (int64_t run = 1; run <= 400; ++run) {
    Answer one, other;
    one.Arrive(*site, At(run, 0, 1, 2), MakeJob(&record, 1, run));
    other.Arrive(*site, At(run, 0, 0, 2), MakeJob(&record, 0, run));
    CHECK(one.Wait().ok() && !one.at_once() && other.Wait().ok() && other.at_once());
  }
  CHECK(!first.Here());
  Answer second;
  second.Arrive(*site, At(0, 0, 1, 2), MakeJob(&old, 1));
  CHECK(first.Wait().ok() && second.Wait().ok());
  CHECK(old.runs == 1 && record.runs == 400);
}

void OneRankRunsAtOnce() {
  Record record;
  Answer answer;
  answer.Arrive(*CallSite::Create("site"), At(0, 0, 0, 1), MakeJob(&record, 0));
  CHECK(answer.at_once() && answer.Wait().ok() && answer.calls() == 0 && record.runs == 1);
}

// A callback runs the rest of a device's program, which may block until its peers have come.
void BlockedDoneBlocksNobody() {
  const auto site = CallSite::Create("site");
  Record record[2];
  std::promise<void> all_called;
  const std::shared_future<void> open = all_called.get_future().share();
  std::atomic<int> blocked{0};
  std::vector<Answer> answers(15), later(16);
  Status status;
  for (int64_t r = 0; r < 15; ++r) {
    auto done = [&, tell = answers[static_cast<size_t>(r)].Done()](const Status& heard) {
      ++blocked;
      open.wait();  // for all others, and for the next call
      tell(heard);
    };
    CHECK(!site->Arrive(At(0, 0, r, 16), MakeJob(&record[0], r), done, &status));
  }
  CHECK(site->Arrive(At(0, 0, 15, 16), MakeJob(&record[0], 15), nullptr, &status) && status.ok());
  for (int64_t r = 0; r < 16; ++r) {
    later[static_cast<size_t>(r)].Arrive(*site, At(0, 0, r, 16), MakeJob(&record[1], r, 1));
  }
  for (const Answer& answer : later) CHECK(answer.Wait().ok());
  for (int i = 0; blocked < 15 && i < 60000; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK_EQ(blocked.load(), 15);
  for (const Answer& answer : answers) CHECK_EQ(answer.calls(), 0);
  all_called.set_value();
  for (const Answer& answer : answers) CHECK(answer.Wait().ok());
}

void JobThatThrows() {
  const auto site = CallSite::Create("site");
  Record record;
  std::vector<std::unique_ptr<TestJob>> jobs;
  for (int64_t r = 0; r < 4; ++r) {
    jobs.push_back(MakeJob(&record, r));
    jobs.back()->throws = true;
  }
  const Status status = Meet(*site, std::move(jobs));
  CHECK(status.code == Code::kInternal);
  CHECK_EQ(status.message, string("site: bad luck."));
  CHECK_EQ(record.runs.load(), 1);
}

#if defined(__x86_64__)
// The peers' programs go on in their own floating-point mode, not in that of the last to come.
void DoneKeepsTheFloatingPointMode() {
  const auto site = CallSite::Create("site");
  Record record;
  unsigned mode = 0;
  Answer answer;
  Status status;
  auto done = [&, tell = answer.Done()](const Status& heard) {
    mode = __builtin_ia32_stmxcsr();
    tell(heard);
  };
  std::thread([&] {
    __builtin_ia32_ldmxcsr(0x9fc0);  // flushes subnormals to zero
    CHECK(!site->Arrive(At(0, 0, 0, 2), MakeJob(&record, 0), done, &status));
  }).join();
  Answer last;
  last.Arrive(*site, At(0, 0, 1, 2), MakeJob(&record, 1));
  CHECK(answer.Wait().ok());
  CHECK_EQ(mode & ~0x3fu, 0x9fc0u & ~0x3fu);
  std::thread([] { CHECK_EQ(__builtin_ia32_stmxcsr() & ~0x3fu, 0x1f80u); }).join();
}
#endif

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
                      {"OneRankRunsAtOnce", OneRankRunsAtOnce},
                      {"BlockedDoneBlocksNobody", BlockedDoneBlocksNobody},
                      {"JobThatThrows", JobThatThrows},
#if defined(__x86_64__)
                      {"DoneKeepsTheFloatingPointMode", DoneKeepsTheFloatingPointMode},
#endif
                  });
}
