#include "xla_ffi/engine/cpu/rendezvous.h"

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <utility>

namespace jax_fusco::cpu {

using Clock = std::chrono::steady_clock;

// One meeting: the nth visits of a group's ranks in one run.
struct CallSite::Call {
  std::vector<const Job*> jobs;  // by rank, null until it comes; valid until the call is over
  size_t arrived = 0;
  Clock::time_point start;
  bool over = false;  // the job has ended, or peers have been given up
  Status status;      // once it is over
  std::condition_variable left;
};

// What the ranks of a group have done in one run.
struct CallSite::Session {
  std::vector<int64_t> visits;                     // of each rank
  std::vector<int64_t> device;                     // of each rank, -1 until it comes
  std::map<int64_t, std::shared_ptr<Call>> calls;  // by number: those that wait or have failed
  int64_t waiting = 0;                             // calls of them that wait
};

struct CallSite::Impl {
  std::string name;
  mutable std::mutex mutex;
  std::map<std::pair<int64_t, int64_t>, Session> sessions;  // by run and group
  std::deque<std::pair<int64_t, int64_t>> oldest_first;
  int64_t ranks_waiting = 0;

  Session& Find(const Arrival& arrival);
  Status Run(const std::vector<const Job*>& jobs, const Settings& settings) const;
  void GiveUp(const Arrival& arrival, Call* call) const;
};

namespace {

// "rank 3", "ranks 1, 2"
std::string Ranks(const std::vector<size_t>& ranks) {
  std::string out = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    out += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  }
  return out;
}

}  // namespace

CallSite::CallSite(std::string name) : impl_(std::make_unique<Impl>()) {
  impl_->name = std::move(name);
}

CallSite::~CallSite() = default;

int64_t CallSite::Waiting() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->ranks_waiting;
}

// A session outlives its calls, for the devices' sake and for ranks that come late, but only the
// newest are kept. One without waiting calls may go at any time: its ranks are level, or have
// failed.
CallSite::Session& CallSite::Impl::Find(const Arrival& arrival) {
  constexpr size_t kKept = 128;
  const std::pair<int64_t, int64_t> key(arrival.run, arrival.group);
  const auto found = sessions.find(key);
  if (found != sessions.end()) return found->second;
  for (size_t looked = oldest_first.size(); looked > 0 && sessions.size() >= kKept; --looked) {
    const auto oldest = oldest_first.front();
    oldest_first.pop_front();
    if (sessions.at(oldest).waiting > 0) {
      oldest_first.push_back(oldest);
    } else {
      sessions.erase(oldest);
    }
  }
  oldest_first.push_back(key);
  Session& session = sessions[key];
  session.visits.assign(static_cast<size_t>(arrival.num_ranks), 0);
  session.device.assign(static_cast<size_t>(arrival.num_ranks), -1);
  return session;
}

Status CallSite::Impl::Run(const std::vector<const Job*>& jobs, const Settings& settings) const {
  try {
    return jobs[0]->Run(jobs, settings);
  } catch (const std::exception& error) {
    return Status::Internal(Concat(name, ": ", error.what(), "."));
  } catch (...) {  // or the peers would wait for ever
    return Status::Internal(Concat(name, ": an unknown exception."));
  }
}

// Ends a call whose peers have not come.
void CallSite::Impl::GiveUp(const Arrival& arrival, Call* call) const {
  std::vector<size_t> missing, here;
  for (size_t i = 0; i < call->jobs.size(); ++i) {
    (call->jobs[i] == nullptr ? missing : here).push_back(i);
  }
  const double waited = std::chrono::duration<double>(Clock::now() - call->start).count();
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%.1f", waited);
  call->over = true;
  call->status = Status::DeadlineExceeded(
      Concat(name, ": ", Ranks(missing), " did not come within ", seconds,
             " s (JAX_FUSCO_TIMEOUT_S) to group ", arrival.group, ", where ", Ranks(here),
             here.size() == 1 ? " waits" : " wait",
             "; look for an earlier error on the missing ranks' devices, or for a shuffle under a "
             "condition that ranks decide differently."));
}

Status CallSite::Meet(const Arrival& arrival, const Job& job) {
  const std::string& name = impl_->name;
  Settings settings;
  const Status read = Settings::Read(&settings);
  if (!read.ok()) return read;
  if (arrival.num_ranks < 1 || arrival.rank < 0 || arrival.rank >= arrival.num_ranks) {
    return Status::InvalidArgument(
        Concat(name, ": rank is ", arrival.rank, ", it must lie in [0, ", arrival.num_ranks, ")."));
  }
  if (arrival.num_ranks == 1) return impl_->Run({&job}, settings);

  std::unique_lock<std::mutex> lock(impl_->mutex);
  Session& session = impl_->Find(arrival);
  if (static_cast<int64_t>(session.visits.size()) != arrival.num_ranks) {
    return Status::InvalidArgument(Concat(name, ": rank ", arrival.rank, " expects ",
                                          arrival.num_ranks, " ranks, its peers ",
                                          static_cast<int64_t>(session.visits.size()), "."));
  }
  const auto rank = static_cast<size_t>(arrival.rank);
  int64_t& device = session.device[rank];
  if (device == -1) device = arrival.device;
  if (device != arrival.device) {
    return Status::InvalidArgument(
        Concat(name, ": devices ", device, " and ", arrival.device, " both came as rank ",
               arrival.rank, " of group ", arrival.group,
               "; group must tell apart the devices along every other mesh axis."));
  }
  const int64_t number = session.visits[rank]++;
  std::shared_ptr<Call>& slot = session.calls[number];
  if (slot == nullptr) {
    slot = std::make_shared<Call>();
    slot->jobs.resize(static_cast<size_t>(arrival.num_ranks));
    slot->start = Clock::now();
    ++session.waiting;
  }
  const std::shared_ptr<Call> call = slot;
  call->jobs[rank] = &job;
  const bool last = ++call->arrived == call->jobs.size();
  if (last) session.calls.erase(number);
  if (call->over) return call->status;  // too late

  if (last) {
    --session.waiting;
    lock.unlock();
    Status status = impl_->Run(call->jobs, settings);
    lock.lock();
    call->over = true;
    call->status = std::move(status);
    call->left.notify_all();
    return call->status;
  }
  ++impl_->ranks_waiting;
  const auto deadline = call->start + std::chrono::duration_cast<Clock::duration>(
                                          std::chrono::duration<double>(settings.timeout_s));
  const bool in_time = call->left.wait_until(
      lock, deadline, [&] { return call->over || call->arrived == call->jobs.size(); });
  if (!in_time) {
    impl_->GiveUp(arrival, call.get());
    --session.waiting;
    call->left.notify_all();
  }
  call->left.wait(lock, [&] { return call->over; });
  --impl_->ranks_waiting;
  lock.unlock();
  if (!in_time) std::fprintf(stderr, "%s\n", call->status.message.c_str());
  return call->status;
}

}  // namespace jax_fusco::cpu
