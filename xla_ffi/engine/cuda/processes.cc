#include "xla_ffi/engine/cuda/processes.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "xla_ffi/core/settings.h"

namespace jax_fusco::cuda {
namespace {

using std::string;
using std::vector;

constexpr double kPatience = 10;  // times a call's time-out
constexpr char kProtocol[] = "jax_fusco-1";

class Deadline {
 public:
  explicit Deadline(double seconds)
      : end_(Clock::now() +
             std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds))) {}
  double left() const {
    return std::max(1e-3, std::chrono::duration<double>(end_ - Clock::now()).count());
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point end_;
};

Status Timeout(double* seconds) {
  CallSettings settings;
  Status status = CallSettings::Read(&settings);
  *seconds = settings.timeout_s;
  return status;
}

string Seconds(double seconds) {
  std::ostringstream out;
  out << seconds << " s";
  return out.str();
}

Status DidNotCome(int process, const string& what, const string& waited) {
  return Status::DeadlineExceeded(
      Concat("jax_fusco: process ", process, " did not come to ", what, " within ", waited,
             " (JAX_FUSCO_TIMEOUT_S counts ten times here); all processes must run the same ",
             "programs in the same order. Look for an earlier error there, then start all again."));
}

// Everybody's value, on everybody, through the first of `processes`: what each has to ask of the
// store does not grow with their number.
Status GatherFrom(const Store& store, const vector<int>& processes, const string& key,
                  const string& what, const string& value, vector<string>* values) {
  double timeout_s = 0;
  Status status = Timeout(&timeout_s);
  if (!status.ok()) return status;
  timeout_s *= kPatience;
  const string base = Concat("jax_fusco/", key, "/");
  const string all = base + "all";
  status = store.put(base + std::to_string(store.process), value);
  if (!status.ok()) return status;
  const string waited = Seconds(timeout_s);
  string joined;
  if (store.process == processes.front()) {
    const Deadline deadline(timeout_s);
    for (int process : processes) {
      string one = value;
      if (process != store.process) {
        status = store.get(base + std::to_string(process), deadline.left(), &one);
      }
      if (status.code == Code::kDeadlineExceeded) status = DidNotCome(process, what, waited);
      if (!status.ok()) break;
      joined += one + '\n';
    }
    const Status told = store.put(all, status.ok() ? "+" + joined : "-" + status.message);
    if (status.ok()) status = told;
  } else {
    status = store.get(base + std::to_string(processes.front()), timeout_s, &joined);
    if (status.ok()) status = store.get(all, timeout_s * 1.1 + 1, &joined);
    if (status.code == Code::kDeadlineExceeded) {
      status = DidNotCome(processes.front(), what, waited);
    }
    if (status.ok() && joined.compare(0, 1, "+") != 0) {
      return Status::DeadlineExceeded(joined.substr(std::min<size_t>(1, joined.size())));
    }
    if (status.ok()) joined.erase(0, 1);
  }
  if (!status.ok()) return status;
  values->clear();
  std::istringstream lines(joined);
  for (string line; std::getline(lines, line);) values->push_back(line);
  if (values->size() == processes.size()) return Status::Ok();
  return Status::Internal(Concat("jax_fusco: the store lost what processes said of ", what, "."));
}

// A process as a line: protocol, domain, host, and for each ordinal whether it is in use.
string ToLine(const string& domain, const Member& member) {
  string devices;
  for (const bool in_use : member.devices) devices += in_use ? '1' : '0';
  return Concat(kProtocol, "\t", domain, "\t", member.host, "\t", devices);
}

Status FromLine(const string& line, int process, string* domain, Member* member) {
  std::istringstream parts(line);
  string protocol, devices;
  std::getline(parts, protocol, '\t');
  std::getline(parts, *domain, '\t');
  std::getline(parts, member->host, '\t');
  std::getline(parts, devices, '\t');
  if (protocol != kProtocol) {
    return Status::InvalidArgument(Concat("jax_fusco: process ", process, " runs another version (",
                                          protocol, ", here ", kProtocol,
                                          "); install the same everywhere."));
  }
  member->process = process;
  for (const char c : devices) member->devices.push_back(c == '1');
  return Status::Ok();
}

uint64_t Digest(uint64_t digest, const string& text) {
  for (const char c : text) {
    digest = (digest ^ static_cast<unsigned char>(c)) * 0x100000001b3u;  // FNV-1a
  }
  return digest;
}

Store* connected = nullptr;

}  // namespace

void Connect(Store store) {
  if (store.num_processes > 1 && connected == nullptr) connected = new Store(std::move(store));
}
const Store* Connected() { return connected; }

Status Exchange(const Store& store, const string& value, vector<string>* values) {
  vector<int> all;
  for (int p = 0; p < store.num_processes; ++p) all.push_back(p);
  return GatherFrom(store, all, "exchange", "an exchange", value, values);
}

Status Processes::Meet(const Store& store, const string& host, const vector<int>& ordinals,
                       std::unique_ptr<Processes>* processes) {
  std::unique_ptr<Processes> made(new Processes);
  made->store_ = store;
  Member self;
  self.host = host;
  for (int ordinal : ordinals) {
    self.devices.resize(static_cast<size_t>(ordinal) + 1);
    self.devices.back() = true;
  }
  string domain = store.domain ? store.domain() : "";
  if (domain.empty()) domain = host;
  vector<int> all;
  for (int p = 0; p < store.num_processes; ++p) all.push_back(p);
  vector<string> lines;
  Status status =
      GatherFrom(store, all, "processes", "its first shuffle", ToLine(domain, self), &lines);
  for (size_t p = 0; p < lines.size() && status.ok(); ++p) {
    string where;
    Member member;
    status = FromLine(lines[p], static_cast<int>(p), &where, &member);
    if (where != domain) continue;
    if (member.process == store.process) made->self_ = made->members_.size();
    member.first_device = made->num_devices_;
    made->num_devices_ += static_cast<int>(member.devices.size());
    made->members_.push_back(std::move(member));
  }
  if (status.ok()) *processes = std::move(made);
  return status;
}

bool Processes::is_one_host() const {
  for (const Member& member : members_) {
    if (member.host != self().host) return false;
  }
  return true;
}

int Processes::ProcessOf(int64_t device) const {
  int process = -1;
  for (const Member& member : members_) {
    if (device >= member.first_device) process = member.process;
  }
  return device < num_devices_ ? process : -1;
}

Status Processes::Gather(const string& what, const string& value, vector<string>* values) {
  std::lock_guard<std::mutex> lock(gather_mutex_);
  if (!broken_.ok()) return broken_;
  vector<int> processes;
  for (const Member& member : members_) processes.push_back(member.process);
  const string key = Concat(members_.front().process, "/", gathered_++);
  broken_ = GatherFrom(store_, processes, key, what, value, values);
  return broken_;
}

Status Processes::Agree(const string& what, const Status& mine) {
  vector<string> values;
  string sentence = mine.message;
  std::replace(sentence.begin(), sentence.end(), '\n', ' ');
  const Status status = Gather(what, mine.ok() ? "" : "-" + sentence, &values);
  if (!status.ok() || !mine.ok()) return mine.ok() ? status : mine;
  for (size_t m = 0; m < values.size(); ++m) {
    if (values[m].empty()) continue;
    return Status::Internal(
        Concat("jax_fusco: process ", members_[m].process, " says: ", values[m].substr(1)));
  }
  return Status::Ok();
}

Status Processes::AddSite(const string& description) {
  std::lock_guard<std::mutex> lock(site_mutex_);
  sites_ = Digest(sites_ == 0 ? 0xcbf29ce484222325u : sites_, description + '\n');
  ++num_sites_;
  vector<string> values;
  const Status status = Gather(Concat("shuffle ", num_sites_, ", ", description),
                               Concat(std::to_string(sites_), "\t", description), &values);
  if (!status.ok()) return status;
  for (size_t m = 1; m < values.size(); ++m) {
    if (values[m] == values[0]) continue;
    const auto name = [&](size_t i) { return values[i].substr(values[i].find('\t') + 1); };
    const std::lock_guard<std::mutex> gathering(gather_mutex_);
    broken_ = Status::InvalidArgument(
        Concat("jax_fusco: shuffle ", num_sites_, " is ", name(0), " in process ",
               members_[0].process, " and ", name(m), " in process ", members_[m].process,
               "; all processes must run the same programs in the same order."));
    return broken_;
  }
  return Status::Ok();
}

string Processes::SettleKey(int process) const {
  return Concat("jax_fusco/", members_.front().process, "/failure/", failures_, "/", process);
}

Status Processes::StartRun(uint64_t number) {
  std::lock_guard<std::mutex> lock(settle_mutex_);
  if (told_) {
    return Status::Internal(
        "jax_fusco: another shuffle of this process failed while this run was started; it was not "
        "started.");
  }
  last_run_ = std::max(last_run_, number);
  return Status::Ok();
}

Status Processes::TellFailure() {
  std::lock_guard<std::mutex> lock(settle_mutex_);
  if (told_) return Status::Ok();
  const Status status = store_.put(SettleKey(self().process), std::to_string(last_run_));
  told_ = status.ok();
  return status;
}

Status Processes::Settle(uint64_t* settled) {
  std::lock_guard<std::mutex> lock(settle_mutex_);
  *settled = settled_;
  if (!told_) return Status::Ok();
  double timeout_s = 0;
  Status status = Timeout(&timeout_s);
  if (!status.ok()) return status;
  const Deadline deadline(2 * timeout_s);
  uint64_t farthest = last_run_;
  for (const Member& member : members_) {
    if (member.process == self().process) continue;
    string value;
    status = store_.get(SettleKey(member.process), deadline.left(), &value);
    if (status.code == Code::kDeadlineExceeded) {
      return Status::DeadlineExceeded(
          Concat("jax_fusco: process ", member.process, " has not reported the failure of an ",
                 "earlier shuffle within ", Seconds(2 * timeout_s),
                 " (twice JAX_FUSCO_TIMEOUT_S); ", "where it is gone, start all processes again."));
    }
    if (!status.ok()) return status;
    farthest = std::max<uint64_t>(farthest, std::strtoull(value.c_str(), nullptr, 10));
  }
  settled_ = last_run_ = farthest;
  ++failures_;
  told_ = false;
  *settled = settled_;
  return Status::Ok();
}

}  // namespace jax_fusco::cuda
