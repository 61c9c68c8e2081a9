// The handlers of CPU devices: a call is a job that meets its peers at a call site.
#include <cstring>
#include <functional>
#include <iterator>
#include <utility>

#include "xla_ffi/engine/cpu/grouped_matmul.h"
#include "xla_ffi/engine/cpu/shuffle.h"
#include "xla_ffi/ffi/handlers.h"

namespace ffi = xla::ffi;

namespace jax_fusco {
namespace {

struct CpuState {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  explicit CpuState(const char* target) : site(target) {}

  cpu::CallSite site;
};
ffi::TypeId CpuState::id = {};
const ffi::TypeInfo CpuState::info = ffi::MakeTypeInfo<CpuState>();

struct Cpu {
  using State = CpuState;
  using Context = ffi::RunId;
  using ContextTag = ffi::RunId;
  static constexpr std::initializer_list<ffi::Traits> kTraits = {};

  template <ffi::ExecutionStage stage, typename Call>
  static ffi::Error Run(const Caller<Cpu>& caller, const Call& call) {
    return Execute(caller, call);
  }

  template <typename Job, typename Call>
  static ffi::Error MeetWith(const Caller<Cpu>& caller, const Call& call) {
    Job job;
    static_cast<Call&>(job) = call;
    cpu::Arrival arrival;
    arrival.run = caller.context.run_id;
    arrival.group = *caller.group;
    arrival.rank = *caller.rank;
    arrival.num_ranks = caller.num_ranks;
    arrival.device = caller.device;
    return ToError(caller.state->site.Meet(arrival, job));
  }

  static ffi::Error Execute(const Caller<Cpu>& caller, const PlanCall& call) {
    // Chains serve engines whose peers are far; here a row is read from the nearest cache.
    if (call.chain.count > 0) {
      std::memset(call.chain.data, 0, static_cast<size_t>(call.chain.count * call.chain.bytes));
    }
    return MeetWith<cpu::PlanJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const GatherRowsCall& call) {
    return MeetWith<cpu::GatherRowsJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const GatherRowsWeightedCall& call) {
    return MeetWith<cpu::GatherRowsWeightedJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const ReduceRowsCall& call) {
    return MeetWith<cpu::ReduceRowsJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const CrossingCountCall& call) {
    return MeetWith<cpu::CrossingCountJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const CrossingLayOutCall& call) {
    return MeetWith<cpu::CrossingLayOutJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const CrossingPlaceCall& call) {
    return MeetWith<cpu::CrossingPlaceJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const CrossingDeliverCall& call) {
    return MeetWith<cpu::CrossingDeliverJob>(caller, call);
  }
  static ffi::Error Execute(const Caller<Cpu>& caller, const RaggedAllToAllCall& call) {
    if (call.result.data != call.output.data) {  // not aliased after all
      std::memcpy(call.result.data, call.output.data,
                  static_cast<size_t>(call.output.count * call.output.bytes));
    }
    return MeetWith<cpu::RaggedAllToAllJob>(caller, call);
  }
};

template <typename Call>
constexpr Target TargetOf() {
  return {Signature<Call>::kTarget, Instantiate<Cpu, Call>, nullptr,
          Handle<Cpu, Call, ffi::ExecutionStage::kExecute>};
}

Status Compute(const GroupedMatmulCall& call, const cpu::Settings& settings,
               const cpu::Workers::Schedule& schedule) {
  return cpu::GroupedMatmul(call, settings, schedule);
}
Status Compute(const GroupedOuterCall& call, const cpu::Settings& settings,
               const cpu::Workers::Schedule& schedule) {
  return cpu::GroupedOuter(call, settings, schedule);
}

// Calls without peers: this thread and XLA's own do the work, and nobody waits for another device.
template <typename Call>
XLA_FFI_Error* HandleAlone(XLA_FFI_CallFrame* frame) {
  auto handle = [](ffi::ThreadPool pool, auto... arguments) -> ffi::Error {
    return Guard(Signature<Call>::kTarget, [&]() -> ffi::Error {
      Call call;
      Status status = Signature<Call>::Read(arguments..., &call);
      cpu::Settings settings;
      if (status.ok()) status = cpu::Settings::Read(&settings);
      if (!status.ok()) return ToError(status);
      return ToError(Compute(
          call, settings, [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }));
    });
  };
  static auto* handler =
      Signature<Call>::Bind(
          ffi::Ffi::Bind<ffi::ExecutionStage::kExecute>().template Ctx<ffi::ThreadPool>())
          .To(handle)
          .release();
  return handler->Call(frame);
}

template <typename Call>
constexpr Target AloneTargetOf() {
  return {Signature<Call>::kTarget, nullptr, nullptr, HandleAlone<Call>};
}

}  // namespace

TargetList CpuTargets() {
  static const Target targets[] = {TargetOf<PlanCall>(),
                                   TargetOf<GatherRowsCall>(),
                                   TargetOf<GatherRowsWeightedCall>(),
                                   TargetOf<ReduceRowsCall>(),
                                   TargetOf<RaggedAllToAllCall>(),
                                   TargetOf<CrossingCountCall>(),
                                   TargetOf<CrossingLayOutCall>(),
                                   TargetOf<CrossingPlaceCall>(),
                                   TargetOf<CrossingDeliverCall>(),
                                   AloneTargetOf<GroupedMatmulCall>(),
                                   AloneTargetOf<GroupedOuterCall>()};
  return {targets, std::size(targets), "jax_fusco_call", &CpuState::id, &CpuState::info};
}

}  // namespace jax_fusco
