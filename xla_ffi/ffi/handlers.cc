#include "xla_ffi/ffi/handlers.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "xla_ffi/engine/cpu/shuffle.h"

namespace ffi = xla::ffi;

namespace jax_fusco {

// The result of Execute: an error or success at once, or a future.
using Outcome = std::variant<ffi::Error, ffi::Future>;

}  // namespace jax_fusco

namespace xla::ffi {

template <ExecutionStage stage>
struct ResultEncoding<stage, jax_fusco::Outcome> {
  static std::variant<XLA_FFI_Error*, XLA_FFI_Future*> Encode(const XLA_FFI_Api* api,
                                                              XLA_FFI_ExecutionContext* ctx,
                                                              jax_fusco::Outcome outcome) {
    if (Error* error = std::get_if<Error>(&outcome)) {
      return ResultEncoding<stage, Error>::Encode(api, ctx, std::move(*error));
    }
    return ResultEncoding<stage, Future>::Encode(api, ctx, std::move(std::get<Future>(outcome)));
  }
};

}  // namespace xla::ffi

namespace jax_fusco {
namespace {

using cpu::Float;
using cpu::Rows;

ffi::Error ToError(const Status& status) {
  switch (status.code) {
    case Code::kOk:
      return ffi::Error::Success();
    case Code::kInvalidArgument:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message);
    case Code::kDeadlineExceeded:
      return ffi::Error(ffi::ErrorCode::kDeadlineExceeded, status.message);
    case Code::kInternal:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message);
}

// The context and the first two operands of every call.
struct Caller {
  CallState* state;
  ffi::RunId run;
  int32_t device;
  ffi::BufferR0<ffi::S32> rank;
  ffi::BufferR0<ffi::S32> group;
  int64_t num_ranks;
};

// Sends the job to its call site.
Outcome Meet(const Caller& caller, std::unique_ptr<cpu::Job> job) {
  cpu::Arrival arrival;
  arrival.run = caller.run.run_id;
  arrival.group = *caller.group.typed_data();
  arrival.rank = *caller.rank.typed_data();
  arrival.num_ranks = caller.num_ranks;
  arrival.device = caller.device;
  ffi::Promise promise;
  ffi::Future future(promise);
  auto done = [promise](const Status& status) mutable {
    status.ok() ? promise.SetAvailable() : promise.SetError(ToError(status));
  };
  Status status;
  if (caller.state->site->Arrive(arrival, std::move(job), std::move(done), &status)) {
    return ToError(status);
  }
  return Outcome(std::move(future));
}

// Collects the first thing that is wrong with the buffers of a call.
class Checks {
 public:
  explicit Checks(const char* call) : call_(call) {}

  bool Require(bool holds, const char* what) {
    if (!holds && message_.empty()) message_ = Concat(call_, ": ", what, ".");
    return holds;
  }
  bool ok() const { return message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

 private:
  const char* call_;
  std::string message_;
};

int64_t Dim(const ffi::AnyBuffer& buffer, size_t i) {
  return i < buffer.dimensions().size() ? buffer.dimensions()[i] : 1;
}

// An array as rows along its leading dimension.
Rows ToRows(const ffi::AnyBuffer& buffer) {
  Rows rows;
  rows.data = buffer.untyped_data();
  rows.count = Dim(buffer, 0);
  rows.bytes = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  for (size_t i = 1; i < buffer.dimensions().size(); ++i) rows.bytes *= Dim(buffer, i);
  return rows;
}

bool IsInts(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  return buffer.element_type() == ffi::S32 && buffer.dimensions().size() == shape.size() &&
         std::equal(shape.begin(), shape.end(), buffer.dimensions().begin());
}

int32_t* Ints(const ffi::AnyBuffer& buffer) { return static_cast<int32_t*>(buffer.untyped_data()); }

bool SameRow(const ffi::AnyBuffer& a, const ffi::AnyBuffer& b) {
  return a.dimensions().size() == b.dimensions().size() && a.dimensions().size() >= 1 &&
         std::equal(a.dimensions().begin() + 1, a.dimensions().end(), b.dimensions().begin() + 1);
}

std::optional<Float> ToFloat(ffi::DataType type) {
  if (type == ffi::BF16) return Float::kBf16;
  if (type == ffi::F16) return Float::kF16;
  if (type == ffi::F32) return Float::kF32;
  if (type == ffi::F64) return Float::kF64;
  return std::nullopt;
}

bool IsWeights(const ffi::AnyBuffer& weights, int64_t tokens, int64_t k) {
  return (weights.element_type() == ffi::F32 || weights.element_type() == ffi::F64) &&
         weights.dimensions().size() == 2 && Dim(weights, 0) == tokens && Dim(weights, 1) == k;
}

Outcome Plan(const Caller& caller, ffi::AnyBuffer expert_ids, ffi::Result<ffi::AnyBuffer> sizes,
             ffi::Result<ffi::AnyBuffer> counts, ffi::Result<ffi::AnyBuffer> slot,
             ffi::Result<ffi::AnyBuffer> slot_rank, ffi::Result<ffi::AnyBuffer> source_rank,
             ffi::Result<ffi::AnyBuffer> source, ffi::Result<ffi::AnyBuffer> dropped,
             ffi::Result<ffi::AnyBuffer> invalid, int64_t num_experts, int64_t alignment) {
  Checks checks("jax_fusco_plan");
  auto job = std::make_unique<cpu::PlanJob>();
  PlanShape& shape = job->shape;
  shape = {caller.num_ranks, Dim(expert_ids, 0), Dim(expert_ids, 1),
           num_experts,      Dim(*source, 0),    alignment};
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  checks.Require(alignment >= 1, "alignment must be at least 1");
  checks.Require(caller.num_ranks >= 1 && num_experts >= 1 && num_experts % caller.num_ranks == 0,
                 "num_experts must be a multiple of num_ranks");
  if (!checks.ok()) return checks.error();
  checks.Require(IsInts(expert_ids, {shape.tokens, shape.k}), "expert_ids must be int32 [T, k]");
  checks.Require(caller.num_ranks * shape.assignments() <= kMax && num_experts <= kMax &&
                     shape.capacity <= kMax && alignment <= kMax,
                 "the assignments of a group and its capacity must fit in int32");
  checks.Require(
      IsInts(*slot, {shape.tokens, shape.k}) && IsInts(*slot_rank, {shape.tokens, shape.k}),
      "slot and slot_rank must be int32 [T, k]");
  checks.Require(IsInts(*source, {shape.capacity}) && IsInts(*source_rank, {shape.capacity}),
                 "source_rank and source must be int32 [C]");
  checks.Require(
      IsInts(*sizes, {shape.experts_per_rank()}) && IsInts(*counts, {shape.experts_per_rank()}),
      "group_sizes and expert_counts must be int32 [E_local]");
  checks.Require(IsInts(*dropped, {}) && IsInts(*invalid, {}),
                 "num_dropped and num_invalid must be int32 []");
  if (!checks.ok()) return checks.error();
  job->expert_ids = Ints(expert_ids);
  job->results = {Ints(*sizes),       Ints(*counts), Ints(*slot),    Ints(*slot_rank),
                  Ints(*source_rank), Ints(*source), Ints(*dropped), Ints(*invalid)};
  return Meet(caller, std::move(job));
}

Outcome GatherRows(const Caller& caller, ffi::AnyBuffer source_rank, ffi::AnyBuffer source,
                   ffi::RemainingArgs in, ffi::RemainingRets out, int64_t fanout,
                   int64_t zero_tail) {
  Checks checks("jax_fusco_gather_rows");
  auto job = std::make_unique<cpu::GatherRowsJob>();
  job->num_rows = Dim(source, 0);
  checks.Require(IsInts(source, {job->num_rows}) && IsInts(source_rank, {job->num_rows}),
                 "source_rank and source must be int32 [M]");
  checks.Require(fanout >= 1, "fanout must be at least 1");
  checks.Require(in.size() == out.size(), "there must be one result for each rows operand");
  for (size_t i = 0; checks.ok() && i < in.size(); ++i) {
    const auto from = in.get<ffi::AnyBuffer>(i);
    auto to = out.get<ffi::AnyBuffer>(i);
    if (!checks.Require(from.has_value() && to.has_value(), "operands must be arrays")) break;
    checks.Require(from->element_type() == (*to)->element_type() && SameRow(*from, **to) &&
                       Dim(**to, 0) == job->num_rows,
                   "each result must be [M, ...] with the rows and type of its operand");
    job->in.push_back(ToRows(*from));
    job->out.push_back(ToRows(**to));
  }
  if (!checks.ok()) return checks.error();
  job->source_rank = Ints(source_rank);
  job->source = Ints(source);
  job->fanout = fanout;
  job->zero_tail = zero_tail != 0;
  return Meet(caller, std::move(job));
}

Outcome GatherRowsWeighted(const Caller& caller, ffi::AnyBuffer source_rank, ffi::AnyBuffer source,
                           ffi::AnyBuffer g, ffi::AnyBuffer weights, ffi::AnyBuffer y,
                           ffi::Result<ffi::AnyBuffer> dy, ffi::Result<ffi::AnyBuffer> dots) {
  Checks checks("jax_fusco_gather_rows_weighted");
  auto job = std::make_unique<cpu::GatherRowsWeightedJob>();
  job->num_rows = Dim(source, 0);
  const auto g_type = ToFloat(g.element_type());
  const auto y_type = ToFloat(y.element_type());
  checks.Require(IsInts(source, {job->num_rows}) && IsInts(source_rank, {job->num_rows}),
                 "source_rank and source must be int32 [M]");
  checks.Require(g_type.has_value() && y_type.has_value(), "g and y must be floating");
  checks.Require(SameRow(g, y) && Dim(y, 0) == job->num_rows,
                 "g must be [T, d] and y [M, d] with the same d");
  checks.Require(IsWeights(weights, Dim(g, 0), Dim(weights, 1)) && Dim(weights, 1) >= 1,
                 "weights must be float32 or float64 [T, k]");
  checks.Require(
      dy->element_type() == y.element_type() && SameRow(*dy, y) && Dim(*dy, 0) == job->num_rows,
      "dy must have the shape and type of y");
  checks.Require(dots->element_type() == (y_type == Float::kF64 ? ffi::F64 : ffi::F32) &&
                     dots->dimensions().size() == 1 && Dim(*dots, 0) == job->num_rows,
                 "dots must be float32 (float64 where y is) [M]");
  if (!checks.ok()) return checks.error();
  job->source_rank = Ints(source_rank);
  job->source = Ints(source);
  job->k = Dim(weights, 1);
  job->g_type = *g_type;
  job->y_type = *y_type;
  job->weights_type = *ToFloat(weights.element_type());
  job->g = ToRows(g);
  job->weights = weights.untyped_data();
  job->y = ToRows(y);
  job->dy = ToRows(*dy);
  job->dots = dots->untyped_data();
  job->length = job->y.bytes / SizeOf(*y_type);
  return Meet(caller, std::move(job));
}

Outcome ReduceRows(const Caller& caller, ffi::AnyBuffer slot_rank, ffi::AnyBuffer slot,
                   ffi::AnyBuffer y, ffi::RemainingArgs weights, ffi::Result<ffi::AnyBuffer> out) {
  Checks checks("jax_fusco_reduce_rows");
  auto job = std::make_unique<cpu::ReduceRowsJob>();
  job->tokens = Dim(slot, 0);
  job->k = Dim(slot, 1);
  const auto y_type = ToFloat(y.element_type());
  const auto out_type = ToFloat(out->element_type());
  checks.Require(IsInts(slot, {job->tokens, job->k}) && IsInts(slot_rank, {job->tokens, job->k}),
                 "slot_rank and slot must be int32 [T, k]");
  checks.Require(y_type.has_value() && out_type.has_value(), "y and out must be floating");
  checks.Require(SameRow(y, *out) && Dim(*out, 0) == job->tokens,
                 "out must be [T, ...] with the rows of y");
  checks.Require(weights.size() <= 1, "there must be at most one weights operand");
  if (checks.ok() && weights.size() == 1) {
    const auto given = weights.get<ffi::AnyBuffer>(0);
    if (checks.Require(given.has_value() && IsWeights(*given, job->tokens, job->k),
                       "weights must be float32 or float64 [T, k]")) {
      job->weights = given->untyped_data();
      job->weights_type = *ToFloat(given->element_type());
    }
  }
  if (!checks.ok()) return checks.error();
  job->slot_rank = Ints(slot_rank);
  job->slot = Ints(slot);
  job->y_type = *y_type;
  job->out_type = *out_type;
  job->y = ToRows(y);
  job->out = ToRows(*out);
  job->length = job->y.bytes / SizeOf(*y_type);
  return Meet(caller, std::move(job));
}

Outcome RaggedAllToAll(const Caller& caller, ffi::AnyBuffer input_offsets,
                       ffi::AnyBuffer send_sizes, ffi::AnyBuffer output_offsets,
                       ffi::AnyBuffer recv_sizes, ffi::AnyBuffer operand, ffi::AnyBuffer output,
                       ffi::Result<ffi::AnyBuffer> result) {
  Checks checks("jax_fusco_ragged_all_to_all");
  const int64_t slices = Dim(input_offsets, 0);
  checks.Require(IsInts(input_offsets, {slices}) && IsInts(send_sizes, {slices}) &&
                     IsInts(output_offsets, {slices}) && IsInts(recv_sizes, {slices}) &&
                     caller.num_ranks >= 1 && slices % caller.num_ranks == 0,
                 "offsets and sizes must be int32 [K], K a multiple of num_ranks");
  checks.Require(operand.element_type() == output.element_type() && SameRow(operand, output),
                 "operand and output must have the same rows and type");
  checks.Require(result->element_type() == output.element_type() && SameRow(*result, output) &&
                     Dim(*result, 0) == Dim(output, 0),
                 "the result must have the shape and type of output");
  if (!checks.ok()) return checks.error();
  auto job = std::make_unique<cpu::RaggedAllToAllJob>();
  job->slices_per_rank = slices / caller.num_ranks;
  job->input_offsets = Ints(input_offsets);
  job->send_sizes = Ints(send_sizes);
  job->output_offsets = Ints(output_offsets);
  job->recv_sizes = Ints(recv_sizes);
  job->operand = ToRows(operand);
  job->result = ToRows(*result);
  if (result->untyped_data() != output.untyped_data()) {  // not aliased after all
    std::memcpy(result->untyped_data(), output.untyped_data(), output.size_bytes());
  }
  return Meet(caller, std::move(job));
}

// Binds the context and the operands that every call has, and passes them on as one Caller.
#define JAX_FUSCO_BIND_CALLER()       \
  ffi::Ffi::Bind()                    \
      .Ctx<ffi::State<CallState>>()   \
      .Ctx<ffi::RunId>()              \
      .Ctx<ffi::DeviceOrdinal>()      \
      .Arg<ffi::BufferR0<ffi::S32>>() \
      .Arg<ffi::BufferR0<ffi::S32>>() \
      .Attr<int64_t>("num_ranks")

// Calls `handler(Caller, args...)`; an exception becomes an error.
template <auto handler, typename... Args>
Outcome Execute(CallState* state, ffi::RunId run, int32_t device, ffi::BufferR0<ffi::S32> rank,
                ffi::BufferR0<ffi::S32> group, int64_t num_ranks, Args... args) {
  try {
    return handler(Caller{state, run, device, rank, group, num_ranks}, args...);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(Concat("jax_fusco: ", error.what()));
  }
}

ffi::ErrorOr<std::unique_ptr<CallState>> MakeCallState(const char* name) {
  try {
    auto state = std::make_unique<CallState>();
    state->site = cpu::CallSite::Create(name);
    return state;
  } catch (const std::exception& error) {
    return ffi::Unexpected(ffi::Error::Internal(Concat(name, ": ", error.what())));
  }
}

template <int target>
XLA_FFI_Error* Instantiate(XLA_FFI_CallFrame* frame) {
  static auto* handler = ffi::Ffi::Bind<ffi::ExecutionStage::kInstantiate>()
                             .To([]() -> ffi::ErrorOr<std::unique_ptr<CallState>> {
                               return MakeCallState(kTargets[target].name);
                             })
                             .release();
  return handler->Call(frame);
}

using Any = ffi::AnyBuffer;
using AnyResult = ffi::Result<ffi::AnyBuffer>;

XLA_FFI_Error* ExecutePlan(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      JAX_FUSCO_BIND_CALLER()
          .Arg<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .Attr<int64_t>("num_experts")
          .Attr<int64_t>("alignment")
          .To(Execute<Plan, Any, AnyResult, AnyResult, AnyResult, AnyResult, AnyResult, AnyResult,
                      AnyResult, AnyResult, int64_t, int64_t>)
          .release();
  return handler->Call(frame);
}

XLA_FFI_Error* ExecuteGatherRows(XLA_FFI_CallFrame* frame) {
  static auto* handler = JAX_FUSCO_BIND_CALLER()
                             .Arg<Any>()
                             .Arg<Any>()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attr<int64_t>("fanout")
                             .Attr<int64_t>("zero_tail")
                             .To(Execute<GatherRows, Any, Any, ffi::RemainingArgs,
                                         ffi::RemainingRets, int64_t, int64_t>)
                             .release();
  return handler->Call(frame);
}

XLA_FFI_Error* ExecuteGatherRowsWeighted(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      JAX_FUSCO_BIND_CALLER()
          .Arg<Any>()
          .Arg<Any>()
          .Arg<Any>()
          .Arg<Any>()
          .Arg<Any>()
          .Ret<Any>()
          .Ret<Any>()
          .To(Execute<GatherRowsWeighted, Any, Any, Any, Any, Any, AnyResult, AnyResult>)
          .release();
  return handler->Call(frame);
}

XLA_FFI_Error* ExecuteReduceRows(XLA_FFI_CallFrame* frame) {
  static auto* handler = JAX_FUSCO_BIND_CALLER()
                             .Arg<Any>()
                             .Arg<Any>()
                             .Arg<Any>()
                             .RemainingArgs()
                             .Ret<Any>()
                             .To(Execute<ReduceRows, Any, Any, Any, ffi::RemainingArgs, AnyResult>)
                             .release();
  return handler->Call(frame);
}

XLA_FFI_Error* ExecuteRaggedAllToAll(XLA_FFI_CallFrame* frame) {
  static auto* handler = JAX_FUSCO_BIND_CALLER()
                             .Arg<Any>()
                             .Arg<Any>()
                             .Arg<Any>()
                             .Arg<Any>()
                             .Arg<Any>()
                             .Arg<Any>()
                             .Ret<Any>()
                             .To(Execute<RaggedAllToAll, Any, Any, Any, Any, Any, Any, AnyResult>)
                             .release();
  return handler->Call(frame);
}

}  // namespace

ffi::TypeId CallState::id = {};
const ffi::TypeInfo CallState::info = ffi::MakeTypeInfo<CallState>();

const Target kTargets[kNumTargets] = {
    {"jax_fusco_plan", Instantiate<0>, ExecutePlan},
    {"jax_fusco_gather_rows", Instantiate<1>, ExecuteGatherRows},
    {"jax_fusco_gather_rows_weighted", Instantiate<2>, ExecuteGatherRowsWeighted},
    {"jax_fusco_reduce_rows", Instantiate<3>, ExecuteReduceRows},
    {"jax_fusco_ragged_all_to_all", Instantiate<4>, ExecuteRaggedAllToAll},
};

}  // namespace jax_fusco
