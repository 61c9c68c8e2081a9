// Ranks that meet at a call site, each on a thread of its own.
#ifndef JAX_FUSCO_TESTS_NATIVE_MEETING_H_
#define JAX_FUSCO_TESTS_NATIVE_MEETING_H_

#include <chrono>
#include <cstdint>
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

// A rank's visit to a call site, on a thread of its own, and what it hears there.
class Visit {
 public:
  Visit(std::shared_ptr<CallSite> site, const Arrival& arrival, std::shared_ptr<Job> job) {
    std::promise<Status> heard;
    answer_ = heard.get_future().share();
    std::thread([site = std::move(site), arrival, job = std::move(job),
                 heard = std::move(heard)]() mutable {
      heard.set_value(site->Meet(arrival, *job));
    }).detach();
  }
  bool Over(int milliseconds = 0) const {
    return answer_.wait_for(std::chrono::milliseconds(milliseconds)) == std::future_status::ready;
  }
  // Waits for it; an answer that never comes is a failure, not a hang.
  Status Wait() const {
    if (Over(60000)) return answer_.get();
    Fail(__FILE__, __LINE__, "no answer within a minute");
    std::_Exit(1);
  }

 private:
  std::shared_future<Status> answer_;
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
Status Meet(const std::shared_ptr<CallSite>& site, std::vector<std::unique_ptr<J>> jobs) {
  const auto n = static_cast<int64_t>(jobs.size());
  std::vector<Visit> visits;
  for (int64_t r = 0; r < n; ++r) {
    visits.emplace_back(site, At(n, 0, r, n), std::move(jobs[static_cast<size_t>(r)]));
  }
  const Status status = visits[0].Wait();
  for (const Visit& visit : visits) {
    CHECK_EQ(visit.Wait().message, status.message);
    CHECK(visit.Wait().code == status.code);
  }
  return status;
}

template <typename J>
Status Meet(std::vector<std::unique_ptr<J>> jobs, const char* name = "site") {
  return Meet(std::make_shared<CallSite>(name), std::move(jobs));
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_MEETING_H_
