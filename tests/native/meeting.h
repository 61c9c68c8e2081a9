// Ranks that meet at a call site, each on a thread of its own.
#ifndef JAX_FUSCO_TESTS_NATIVE_MEETING_H_
#define JAX_FUSCO_TESTS_NATIVE_MEETING_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/native/check.h"
#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cpu/rendezvous.h"

namespace jax_fusco::testing {

using cpu::Arrival;
using cpu::CallSite;
using cpu::Job;

// What a rank hears of its call, by return or by callback.
class Answer {
 public:
  // Says how many times `done` was called: it must be once where Arrive returned false.
  CallSite::Done Done() {
    return [state = state_](const Status& status) {
      if (++state->calls == 1) state->promise.set_value(status);
    };
  }
  void Arrive(CallSite& site, const Arrival& arrival, std::unique_ptr<Job> job) {
    Status status;
    at_once_ = site.Arrive(arrival, std::move(job), Done(), &status);
    if (at_once_) state_->promise.set_value(status);
  }
  bool at_once() const { return at_once_; }
  int calls() const { return state_->calls; }
  bool Here(int milliseconds = 0) const {
    return state_->future.wait_for(std::chrono::milliseconds(milliseconds)) ==
           std::future_status::ready;
  }
  // Waits for it; an answer that never comes is a failure, not a hang.
  Status Wait() const {
    if (Here(60000)) return state_->future.get();
    Fail(__FILE__, __LINE__, "no answer within a minute");
    std::_Exit(1);
  }

 private:
  struct State {
    std::promise<Status> promise;
    std::shared_future<Status> future = promise.get_future().share();
    std::atomic<int> calls{0};
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
  bool at_once_ = false;
};

inline Arrival At(int64_t run, int64_t group, int64_t rank, int64_t num_ranks) {
  Arrival arrival;
  arrival.run = run;
  arrival.group = group;
  arrival.rank = rank;
  arrival.num_ranks = num_ranks;
  arrival.device = group * num_ranks + rank;
  return arrival;
}

// Runs one call with a job for each rank, in a run for that many ranks; checks that all hear the
// same and returns it.
template <typename J>
Status Meet(CallSite& site, std::vector<std::unique_ptr<J>> jobs) {
  const size_t n = jobs.size();
  const auto run = static_cast<int64_t>(n);
  std::vector<Answer> answers(n);
  std::vector<std::thread> threads;
  for (size_t r = 0; r < n; ++r) {
    threads.emplace_back([&, r] {
      const Arrival arrival = At(run, 0, static_cast<int64_t>(r), run);
      answers[r].Arrive(site, arrival, std::move(jobs[r]));
      answers[r].Wait();
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Status status = answers[0].Wait();
  int64_t at_once = 0;
  for (const Answer& answer : answers) {
    at_once += answer.at_once();
    CHECK_EQ(answer.calls(), answer.at_once() ? 0 : 1);
    CHECK_EQ(answer.Wait().message, status.message);
    CHECK(answer.Wait().code == status.code);
  }
  CHECK_EQ(at_once, int64_t{1});  // the last to come
  return status;
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_MEETING_H_
