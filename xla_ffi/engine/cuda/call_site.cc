#include "xla_ffi/engine/cuda/call_site.h"

#include <algorithm>
#include <cstdio>
#include <mutex>
#include <utility>
#include <vector>

#include "xla_ffi/core/settings.h"
#include "xla_ffi/engine/cuda/errors.h"
#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/runs.h"
#include "xla_ffi/engine/cuda/runtime.h"
#include "xla_ffi/engine/cuda/stage.h"

namespace jax_fusco::cuda {

struct CallSite::Impl : Watched {
  // What the host knows of one device.
  struct Device {
    bool loaded = false;
    bool recorded = false;      // some call of it is in a CUDA graph
    uint64_t run = 0;           // number of the last one that came
    uint64_t prepared_run = 0;  // and of the last that was prepared
    uint64_t taken = 0;         // sequence of the last record that was reported
    uint64_t logged = 0;
    Seat seat;  // of the last Begin
  };

  std::string name;
  std::mutex mutex;
  Arena* arena = nullptr;
  std::vector<Place> places;
  std::vector<Device> devices;
  Runs runs;
  uint64_t reported = 0;  // runs up to this number have been reported
  uint64_t settled = 0;   // and up to this one by all processes
  int64_t stage_bytes = 0;

  ~Impl() override {
    if (places.empty()) return;
    arena->Unwatch(this);
    LogFailures();
  }

  Status Internal(const char* what, Error error) const {
    return Status::Internal(Concat(name, ": ", what, " failed: ", error, "."));
  }
  Device& At(int device) { return devices[static_cast<size_t>(device)]; }

  Status Open(int device, const BeginArgs& args);
  Status Load(int device);
  Status TakeFailure();
  Status DescribeHere(const CallFailure& failure) const;
  Run StartRun(uint64_t last);
  Status Enter(int device, int64_t run_id, Run* run);
  Status Stage(const Place& place, const BeginArgs& args, EnterArgs* enter, Stream stream);
  void LogFailures() override;
};

namespace {

// Operands lie in stages as they lie in memory, at multiples of this.
constexpr int64_t kStageAlignment = 256;
int64_t StageBytes(int64_t bytes) {
  return (bytes + kStageAlignment - 1) / kStageAlignment * kStageAlignment;
}
int64_t StageBytes(const BeginArgs& args) {
  int64_t bytes = 0;
  for (int i = 0; i < args.num_operands; ++i) bytes += StageBytes(args.operand_bytes[i]);
  return std::max(bytes, kStageAlignment);
}

}  // namespace

// The first time, on whatever device: gets places on all of them.
Status CallSite::Impl::Open(int device, const BeginArgs& args) {
  const int64_t num_ranks = args.num_ranks;
  if (arena == nullptr) {
    const Status status = Arena::Get(num_ranks, &arena);
    if (!status.ok()) return status;
  }
  if (arena->ordinal(device) < 0) {
    return Status::Internal(
        Concat(name, ": GPU ", device, " was not in use when the process first shuffled."));
  }
  if (num_ranks < 1 || num_ranks > arena->num_devices()) {
    return Status::InvalidArgument(Concat(
        name, ": a group has ", num_ranks, " ranks, but only the ", arena->num_devices(),
        arena->processes() == nullptr ? " GPUs of this process can meet."
                                      : " GPUs of the processes that share a host or NVLink can "
                                        "meet; use implementation=\"xla\"."));
  }
  if (num_ranks > 1 && !arena->reach().ok()) return arena->reach();
  if (!places.empty()) return Status::Ok();
  if (args.num_operands < 0 || args.num_operands > kMaxOperands) {
    return Status::InvalidArgument(Concat(name, ": a call has ", args.num_operands,
                                          " arrays, it may have at most ", kMaxOperands, "."));
  }
  const int64_t bytes = StageBytes(args);
  const Status status =
      arena->NewPlaces(Concat(name, " (", num_ranks, " ranks, ", bytes, " bytes, signature ",
                              static_cast<int64_t>(args.signature), ")"),
                       bytes, &places);
  if (!status.ok()) {
    places.clear();
    return status;
  }
  stage_bytes = bytes;
  devices.resize(places.size());
  arena->Watch(this);
  return Status::Ok();
}

// A kernel that is loaded at its first launch may have to wait for those that run, and they for us.
Status CallSite::Impl::Load(int device) {
  if (At(device).loaded) return Status::Ok();
  const OnDevice on(arena->ordinal(device));
  if (!on.status().ok()) return on.status();
  for (const Error error :
       {LaunchStage({}, kLoadOnly), LaunchEnter({}, kLoadOnly), LaunchLeave({}, kLoadOnly),
        LaunchStartRun(nullptr, 0, 0, 0, kLoadOnly)}) {
    if (error != nullptr) return Internal("loading a kernel", error);
  }
  At(device).loaded = true;
  return Status::Ok();
}

// What a new run has to report: failures of runs that nobody has reported yet. One sentence stands
// for all ranks, if possible of one that failed by itself.
Status CallSite::Impl::TakeFailure() {
  CallFailure chosen;
  uint64_t newest = reported;
  for (size_t d = 0; d < places.size(); ++d) {
    CallFailure failure;
    if (places[d].record == nullptr || !ReadRecord(places[d].record, &failure)) continue;
    if (failure.sequence == devices[d].taken) continue;
    devices[d].taken = failure.sequence;
    if (failure.run <= reported) continue;  // heard from another rank
    newest = std::max(newest, failure.run);
    if (chosen.failure == Failure::kNone || chosen.failure == Failure::kPeerFailed) {
      chosen = failure;
    }
  }
  reported = newest;
  if (chosen.failure == Failure::kNone) return Status::Ok();
  Status status = DescribeHere(chosen);
  status.message += " The results of that run are not valid; this one was not started.";
  return status;
}

Status CallSite::Impl::DescribeHere(const CallFailure& failure) const {
  const Processes* processes = arena->processes();
  if (processes == nullptr) return Describe(name, failure);
  return Describe(name, failure,
                  [processes](int64_t device) { return processes->ProcessOf(device); });
}

// The run after number `last`. With several processes its number must be the same in all.
Run CallSite::Impl::StartRun(uint64_t last) {
  Run run;
  Processes* processes = arena->processes();
  if (processes != nullptr) {
    uint64_t all_settled = 0;
    run.status = processes->Settle(&all_settled);
    if (run.status.ok() && all_settled > settled) {
      settled = last = all_settled;
      reported = std::max(reported, settled);
    }
  }
  if (run.status.ok()) {
    run.status = TakeFailure();
    if (!run.status.ok() && processes != nullptr) {
      const Status told = processes->TellFailure();
      if (!told.ok()) run.status.message += " " + told.message;
    }
  }
  run.number = last + 1;
  if (run.status.ok() && processes != nullptr) run.status = processes->StartRun(run.number);
  return run;
}

// Finds the run and checks that the device comes to its runs in order.
Status CallSite::Impl::Enter(int device, int64_t run_id, Run* run) {
  *run = runs.Find(run_id, [this](uint64_t last) { return StartRun(last); });
  if (!run->status.ok()) return run->status;
  if (run->number < At(device).run) {
    return Status::Internal(Concat(name, ": two runs of one program overlap on GPU ", device,
                                   "; start them from one thread."));
  }
  At(device).run = run->number;
  return Status::Ok();
}

// Puts the operands where the ranks of other processes reach them.
Status CallSite::Impl::Stage(const Place& place, const BeginArgs& args, EnterArgs* enter,
                             Stream stream) {
  if (StageBytes(args) > stage_bytes) {
    return Status::Internal(Concat(name, ": a call brings ", StageBytes(args),
                                   " bytes, but was prepared for ", stage_bytes, "."));
  }
  StageArgs stage;
  char* to = place.stage;
  for (int i = 0; i < args.num_operands; ++i) {
    enter->operand[i] = to;
    if (args.operand_bytes[i] == 0) continue;
    stage.part[stage.num_parts++] = {to, args.operand[i], args.operand_bytes[i]};
    to += StageBytes(args.operand_bytes[i]);
  }
  if (stage.num_parts == 0) return Status::Ok();
  const Error error = LaunchStage(stage, stream);
  return error == nullptr ? Status::Ok() : Internal("copying operands", error);
}

void CallSite::Impl::LogFailures() {
  for (size_t d = 0; d < places.size(); ++d) {
    CallFailure failure;
    if (places[d].record == nullptr || !ReadRecord(places[d].record, &failure)) continue;
    if (failure.sequence == devices[d].logged) continue;
    devices[d].logged = failure.sequence;
    std::fprintf(stderr, "%s\n", DescribeHere(failure).message.c_str());
  }
}

CallSite::CallSite() : impl_(std::make_unique<Impl>()) {}
CallSite::~CallSite() = default;

std::unique_ptr<CallSite> CallSite::Create(std::string name) {
  return Create(std::move(name), nullptr);
}

std::unique_ptr<CallSite> CallSite::Create(std::string name, Arena* arena) {
  std::unique_ptr<CallSite> site(new CallSite);
  site->impl_->name = std::move(name);
  site->impl_->arena = arena;
  return site;
}

namespace {
// Not zero, which means an unknown run.
uint64_t KeyOf(int64_t run_id) { return static_cast<uint64_t>(run_id) + 1; }
}  // namespace

Status CallSite::Prepare(int device, const BeginArgs& args, Stream stream) {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  const int64_t run_id = args.run;
  Status status = impl_->Open(device, args);
  if (status.ok()) status = impl_->Load(device);
  Run run;
  if (status.ok()) status = impl_->Enter(device, run_id, &run);
  if (!status.ok()) return status;
  Impl::Device& state = impl_->At(device);
  if (state.prepared_run == run.number) return Status::Ok();
  state.prepared_run = run.number;
  if (!state.recorded) return Status::Ok();
  Board* board = impl_->places[static_cast<size_t>(device)].board;
  const Error error = LaunchStartRun(board, run.number, KeyOf(run_id), impl_->settled, stream);
  return error == nullptr ? Status::Ok() : impl_->Internal("starting a run", error);
}

Status CallSite::Prepare(int device, int64_t run, int64_t num_ranks, Stream stream) {
  BeginArgs args;
  args.run = run;
  args.num_ranks = num_ranks;
  return Prepare(device, args, stream);
}

Status CallSite::Begin(int device, const BeginArgs& args, Stream stream, Table** table) {
  std::lock_guard<std::mutex> lock(impl_->mutex);
  CallSettings settings;
  Status status = CallSettings::Read(&settings);
  bool recording = false;
  if (status.ok()) status = IsRecording(stream, &recording);
  if (!status.ok()) return status;
  if (impl_->places.empty() || impl_->arena->ordinal(device) < 0) {
    return Status::Internal(Concat(impl_->name, ": GPU ", device, " has not been prepared."));
  }
  if (args.num_operands < 0 || args.num_operands > kMaxOperands) {
    return Status::InvalidArgument(Concat(impl_->name, ": a call has ", args.num_operands,
                                          " arrays, it may have at most ", kMaxOperands, "."));
  }
  Run run;
  status = impl_->Open(device, args);
  if (status.ok()) status = impl_->Enter(device, args.run, &run);
  if (!status.ok()) return status;
  const Place& place = impl_->places[static_cast<size_t>(device)];
  Impl::Device& state = impl_->At(device);
  state.recorded |= recording;
  Seat& seat = state.seat;
  seat.boards = place.boards;
  seat.stages = place.stages;
  seat.news = impl_->arena->news(device);
  seat.num_devices = impl_->arena->num_devices();
  seat.device = impl_->arena->first_device() + device;
  seat.has_others = impl_->arena->has_others();
  seat.timeout_ns = static_cast<uint64_t>(settings.timeout_s * 1e9);
  seat.table = place.table;
  seat.record = place.seen_record;
  seat.failed_run = impl_->arena->failed_run(device);
  seat.alarm = impl_->arena->seen_alarm(device);
  EnterArgs enter;
  enter.seat = seat;
  enter.rank = args.rank;
  enter.group = args.group;
  enter.num_ranks = static_cast<int32_t>(args.num_ranks);
  enter.num_operands = args.num_operands;
  CallSignature signature;
  signature.Add(static_cast<int64_t>(args.signature)).Add(args.num_ranks).Add(args.num_operands);
  enter.signature = signature.bits();
  enter.run = run.number;
  enter.run_key = KeyOf(args.run);
  enter.settled = impl_->settled;
  std::copy_n(args.operand, kMaxOperands, enter.operand);
  if (place.stage != nullptr) {
    status = impl_->Stage(place, args, &enter, stream);
    if (!status.ok()) return status;
  }
  *table = place.table;
  const Error error = LaunchEnter(enter, stream);
  return error == nullptr ? Status::Ok() : impl_->Internal("entering", error);
}

Status CallSite::Finish(int device, Stream stream) {
  Seat seat;
  {
    std::lock_guard<std::mutex> lock(impl_->mutex);
    seat = impl_->At(device).seat;
  }
  const Error error = LaunchLeave(seat, stream);
  return error == nullptr ? Status::Ok() : impl_->Internal("leaving", error);
}

}  // namespace jax_fusco::cuda
