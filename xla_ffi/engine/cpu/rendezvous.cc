#include "xla_ffi/engine/cpu/rendezvous.h"

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <exception>
#include <list>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::cpu {

using Clock = std::chrono::steady_clock;

// One meeting: the nth arrivals of a group's ranks in one run.
struct CallSite::Call {
  struct Rank {
    bool arrived = false;
    std::unique_ptr<Job> job;
    Done done;
    FpMode mode;
  };

  Session* session = nullptr;  // valid while the call waits
  int64_t group = 0;
  std::vector<Rank> ranks;
  size_t arrived = 0;
  Clock::time_point start;
  Clock::time_point deadline;
  Status failure;  // set once peers have been given up
  std::list<std::pair<std::shared_ptr<CallSite>, std::shared_ptr<Call>>>::iterator watch;
};

// What the ranks of a group have done in one run.
struct CallSite::Session {
  std::vector<int64_t> arrivals;                   // of each rank
  std::vector<int64_t> device;                     // of each rank, -1 until it arrives
  std::map<int64_t, std::shared_ptr<Call>> calls;  // by number: those that wait or have failed
  int64_t waiting = 0;
};

struct CallSite::Impl {
  std::string name;
  std::mutex mutex;
  std::map<std::pair<int64_t, int64_t>, Session> sessions;  // by run and group
  std::deque<std::pair<int64_t, int64_t>> oldest_first;

  Session& Find(const Arrival& arrival);
};

// Fails calls whose peers do not come. Never destroyed.
class Monitor {
 public:
  using Watched = std::list<std::pair<std::shared_ptr<CallSite>, std::shared_ptr<CallSite::Call>>>;

  static Monitor& The() {
    static Monitor* monitor = new Monitor;
    return *monitor;
  }

  void Watch(std::shared_ptr<CallSite> site, const std::shared_ptr<CallSite::Call>& call) {
    std::lock_guard<std::mutex> lock(mutex_);
    watched_.emplace_front(std::move(site), call);
    call->watch = watched_.begin();
    if (!started_) {
      started_ = true;
      Workers::RunOnOwnThread([this] { Serve(); });
    }
    if (idle_) wake_.notify_one();
  }

  void Unwatch(const std::shared_ptr<CallSite::Call>& call) {
    Watched ended;  // destroyed after the lock is gone
    std::lock_guard<std::mutex> lock(mutex_);
    if (call->watch != watched_.end()) ended.splice(ended.begin(), watched_, call->watch);
    call->watch = watched_.end();
  }

 private:
  // A shuffle must not pay for a wake-up of this thread: it looks around by itself, and sleeps for
  // good only after a while without calls.
  static constexpr std::chrono::milliseconds kTick{50};
  static constexpr int kTicksUntilIdle = 40;

  void Serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int quiet = 0;; ++quiet) {
      if (!watched_.empty()) quiet = 0;
      if (quiet < kTicksUntilIdle) {
        wake_.wait_for(lock, kTick);
      } else {
        idle_ = true;
        wake_.wait(lock, [&] { return !watched_.empty(); });
        idle_ = false;
      }
      Watched expired;
      const Clock::time_point now = Clock::now();
      for (auto it = watched_.begin(); it != watched_.end();) {
        const auto next = std::next(it);
        if (it->second->deadline <= now) {
          it->second->watch = watched_.end();
          expired.splice(expired.end(), watched_, it);
        }
        it = next;
      }
      lock.unlock();
      for (const auto& [site, call] : expired) site->Expire(call);
      expired.clear();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Watched watched_;
  bool started_ = false;
  bool idle_ = false;
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

void Complete(CallSite::Done done, FpMode mode, const Status& status) {
  Workers::RunOnOwnThread([done = std::move(done), mode, status] {
    const ScopedFpMode scoped(mode);
    done(status);
  });
}

}  // namespace

CallSite::CallSite(std::string name) : impl_(std::make_unique<Impl>()) {
  impl_->name = std::move(name);
}

CallSite::~CallSite() = default;

std::shared_ptr<CallSite> CallSite::Create(std::string name) {
  return std::shared_ptr<CallSite>(new CallSite(std::move(name)));
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
  session.arrivals.assign(static_cast<size_t>(arrival.num_ranks), 0);
  session.device.assign(static_cast<size_t>(arrival.num_ranks), -1);
  return session;
}

bool CallSite::Arrive(const Arrival& arrival, std::unique_ptr<Job> job, Done done, Status* status) {
  const std::string& name = impl_->name;
  Settings settings;
  *status = Settings::Read(&settings);
  if (!status->ok()) return true;
  if (arrival.num_ranks < 1 || arrival.rank < 0 || arrival.rank >= arrival.num_ranks) {
    *status = Status::InvalidArgument(
        Concat(name, ": rank is ", arrival.rank, ", it must lie in [0, ", arrival.num_ranks, ")."));
    return true;
  }
  if (arrival.num_ranks == 1) {
    *status = job->Run({job.get()}, settings);
    return true;
  }

  std::unique_lock<std::mutex> lock(impl_->mutex);
  Session& session = impl_->Find(arrival);
  if (static_cast<int64_t>(session.arrivals.size()) != arrival.num_ranks) {
    *status = Status::InvalidArgument(Concat(name, ": rank ", arrival.rank, " expects ",
                                             arrival.num_ranks, " ranks, its peers ",
                                             static_cast<int64_t>(session.arrivals.size()), "."));
    return true;
  }
  const auto rank = static_cast<size_t>(arrival.rank);
  int64_t& device = session.device[rank];
  if (device == -1) device = arrival.device;
  if (device != arrival.device) {
    *status = Status::InvalidArgument(
        Concat(name, ": devices ", device, " and ", arrival.device, " both came as rank ",
               arrival.rank, " of group ", arrival.group,
               "; group must tell apart the devices along every other mesh axis."));
    return true;
  }
  const int64_t number = session.arrivals[rank]++;
  std::shared_ptr<Call>& slot = session.calls[number];
  const bool first = slot == nullptr;
  if (first) slot = std::make_shared<Call>();
  const std::shared_ptr<Call> call = slot;
  if (first) call->ranks.resize(static_cast<size_t>(arrival.num_ranks));
  call->ranks[rank].arrived = true;
  const bool last = ++call->arrived == call->ranks.size();
  if (last) session.calls.erase(number);
  if (!call->failure.ok()) {
    *status = call->failure;
    return true;
  }
  if (!last) {
    call->ranks[rank].job = std::move(job);
    call->ranks[rank].done = std::move(done);
    call->ranks[rank].mode = FpMode::Current();
    if (first) {
      ++session.waiting;
      call->session = &session;
      call->group = arrival.group;
      call->start = Clock::now();
      call->deadline = call->start + std::chrono::duration_cast<Clock::duration>(
                                         std::chrono::duration<double>(settings.timeout_s));
      Monitor::The().Watch(shared_from_this(), call);
    }
    return false;
  }
  --session.waiting;
  lock.unlock();
  Monitor::The().Unwatch(call);
  call->ranks[rank].job = std::move(job);
  std::vector<const Job*> jobs;
  for (const Call::Rank& entry : call->ranks) jobs.push_back(entry.job.get());
  try {
    *status = jobs[0]->Run(jobs, settings);
  } catch (const std::exception& error) {
    *status = Status::Internal(Concat(name, ": ", error.what(), "."));
  }
  for (size_t i = 0; i < call->ranks.size(); ++i) {
    if (i != rank) Complete(std::move(call->ranks[i].done), call->ranks[i].mode, *status);
  }
  return true;
}

void CallSite::Expire(const std::shared_ptr<Call>& call) {
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    if (call->arrived == call->ranks.size()) return;  // the last came just now
    std::vector<size_t> missing, here;
    for (size_t i = 0; i < call->ranks.size(); ++i) {
      (call->ranks[i].arrived ? here : missing).push_back(i);
    }
    const double waited = std::chrono::duration<double>(Clock::now() - call->start).count();
    char seconds[32];
    std::snprintf(seconds, sizeof(seconds), "%.1f", waited);
    call->failure = Status::DeadlineExceeded(Concat(
        impl_->name, ": ", Ranks(missing), " did not come within ", seconds,
        " s (JAX_FUSCO_TIMEOUT_S) to group ", call->group, ", where ", Ranks(here),
        here.size() == 1 ? " waits" : " wait",
        "; look for an earlier error on the missing ranks' devices, or for a shuffle under a "
        "condition that ranks decide differently."));
    --call->session->waiting;
  }
  std::fprintf(stderr, "%s\n", call->failure.message.c_str());
  for (Call::Rank& entry : call->ranks) {
    if (entry.done) Complete(std::move(entry.done), entry.mode, call->failure);
  }
}

}  // namespace jax_fusco::cpu
