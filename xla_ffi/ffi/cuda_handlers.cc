// The handlers of NVIDIA GPUs: a call is a row of launches on the device's stream.
#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <vector>

#include "xla_ffi/engine/cuda/call_site.h"
#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/ffi/handlers.h"

namespace ffi = xla::ffi;

namespace jax_fusco {
namespace {

struct CudaContext {
  cuda::Stream stream;
  int64_t run;
};
struct CudaContextTag {};

}  // namespace
}  // namespace jax_fusco

namespace xla::ffi {

template <>
struct CtxDecoding<jax_fusco::CudaContextTag> {
  using Type = jax_fusco::CudaContext;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto stream = CtxDecoding<PlatformStream<void*>>::Decode(api, context, diagnostic);
    const auto run = CtxDecoding<RunId>::Decode(api, context, diagnostic);
    if (!stream.has_value() || !run.has_value()) return std::nullopt;
    return Type{*stream, run->run_id};
  }
};

}  // namespace xla::ffi

namespace jax_fusco {
namespace {

// What is enqueued between meeting and parting, and before; what the ranks tell each other.
struct Operand {
  const void* data;
  int64_t bytes;
};
struct Shuffle {
  std::vector<Operand> operands;  // that peers read
  std::vector<cuda::Output> outputs;
  cuda::CallSignature signature;
};

Operand ToOperand(const Rows& rows) { return {rows.data, rows.count * rows.bytes}; }

void AddOutput(Shuffle* shuffle, const void* data, int64_t bytes) {
  if (bytes > 0) shuffle->outputs.push_back({const_cast<void*>(data), bytes});
}
void AddOutput(Shuffle* shuffle, const Rows& rows) {
  AddOutput(shuffle, rows.data, rows.count * rows.bytes);
}

// For each call: what it tells, what is launched before the ranks meet, and what moves rows.

Status Check(const PlanCall& call) {
  if (call.shape.num_experts > cuda::kMaxExperts) {
    return Status::InvalidArgument(Concat("jax_fusco_plan: num_experts is ", call.shape.num_experts,
                                          ", GPUs plan for at most ", cuda::kMaxExperts, "."));
  }
  const int64_t needed = cuda::PlanScratchBytes(call.shape);
  if (call.scratch.count < needed) {
    return Status::InvalidArgument(Concat("jax_fusco_plan: scratch has ", call.scratch.count,
                                          " bytes, GPUs need ", needed,
                                          " (was the program traced for another platform?)."));
  }
  return Status::Ok();
}
Shuffle Describe(const PlanCall& call) {
  const PlanShape& shape = call.shape;
  Shuffle shuffle;
  shuffle.operands = {ToOperand(call.scratch)};
  const int64_t int_bytes = sizeof(int32_t);
  const PlanResults& results = call.results;
  for (const int32_t* array : {results.group_sizes, results.expert_counts}) {
    AddOutput(&shuffle, array, shape.experts_per_rank() * int_bytes);
  }
  for (const int32_t* array : {results.slot, results.slot_rank}) {
    AddOutput(&shuffle, array, shape.assignments() * int_bytes);
  }
  for (const int32_t* array : {results.source_rank, results.source}) {
    AddOutput(&shuffle, array, shape.capacity * int_bytes);
  }
  for (const int32_t* array : {results.num_dropped, results.num_invalid}) {
    AddOutput(&shuffle, array, int_bytes);
  }
  AddOutput(&shuffle, call.chain);
  shuffle.signature.Add(shape.num_ranks).Add(shape.tokens).Add(shape.k).Add(shape.num_experts);
  shuffle.signature.Add(shape.capacity).Add(shape.alignment);
  return shuffle;
}
cuda::PlanArgs ToArgs(const PlanCall& call) {
  cuda::PlanArgs args;
  args.shape = call.shape;
  args.expert_ids = call.expert_ids;
  args.results = call.results;
  args.chain = call.chain.count > 0 ? static_cast<int32_t*>(call.chain.data) : nullptr;
  args.scratch = call.scratch.data;
  return args;
}
cuda::Error Before(const PlanCall& call, cuda::Stream stream) {
  return cuda::LaunchPlanCount(ToArgs(call), stream);
}
cuda::Error Move(const PlanCall& call, cuda::Table* table, cuda::Stream stream) {
  return cuda::LaunchPlanFinish(ToArgs(call), table, stream);
}

Status Check(const GatherRowsCall& call) {
  if (call.in.size() <= static_cast<size_t>(cuda::kMaxOperands)) return Status::Ok();
  return Status::InvalidArgument(
      Concat("jax_fusco_gather_rows: got ", static_cast<int64_t>(call.in.size()),
             " arrays, one call moves at most ", cuda::kMaxOperands, "."));
}
Shuffle Describe(const GatherRowsCall& call) {
  Shuffle shuffle;
  shuffle.signature.Add(call.fanout).Add(static_cast<int64_t>(call.in.size()));
  for (const Rows& rows : call.in) {
    shuffle.operands.push_back(ToOperand(rows));
    shuffle.signature.Add(rows.count).Add(rows.bytes);
  }
  for (const Rows& rows : call.out) AddOutput(&shuffle, rows);
  return shuffle;
}
cuda::Error Move(const GatherRowsCall& call, cuda::Table* table, cuda::Stream stream) {
  cuda::GatherRowsArgs args;
  args.num_rows = call.num_rows;
  args.source_rank = call.source_rank;
  args.source = call.source;
  args.chain = call.chain;
  args.fanout = call.fanout;
  args.zero_tail = call.zero_tail;
  for (size_t i = 0; i < call.in.size(); ++i) {
    args.peer_rows = call.in[i].count;
    args.row_bytes = call.in[i].bytes;
    args.operand = static_cast<int32_t>(i);
    args.out = call.out[i].data;
    if (const cuda::Error error = cuda::LaunchGatherRows(args, table, stream)) return error;
  }
  return nullptr;
}

Shuffle Describe(const GatherRowsWeightedCall& call) {
  Shuffle shuffle;
  shuffle.operands = {ToOperand(call.g),
                      {call.weights, call.g.count * call.k * SizeOf(call.weights_type)}};
  AddOutput(&shuffle, call.dy);
  AddOutput(&shuffle, call.dots, call.num_rows * (call.y_type == Float::kF64 ? 8 : 4));
  shuffle.signature.Add(call.g.count).Add(call.k).Add(call.length);
  shuffle.signature.Add(static_cast<int64_t>(call.g_type)).Add(static_cast<int64_t>(call.y_type));
  shuffle.signature.Add(static_cast<int64_t>(call.weights_type));
  return shuffle;
}
cuda::Error Move(const GatherRowsWeightedCall& call, cuda::Table* table, cuda::Stream stream) {
  cuda::GatherRowsWeightedArgs args;
  args.num_rows = call.num_rows;
  args.source_rank = call.source_rank;
  args.source = call.source;
  args.chain = call.chain;
  args.tokens = call.g.count;
  args.k = call.k;
  args.length = call.length;
  args.g_type = call.g_type;
  args.y_type = call.y_type;
  args.weights_type = call.weights_type;
  args.y = call.y.data;
  args.dy = call.dy.data;
  args.dots = call.dots;
  return cuda::LaunchGatherRowsWeighted(args, table, stream);
}

Shuffle Describe(const ReduceRowsCall& call) {
  Shuffle shuffle;
  shuffle.operands = {ToOperand(call.y)};
  AddOutput(&shuffle, call.out);
  shuffle.signature.Add(call.y.count).Add(call.k).Add(call.length);
  shuffle.signature.Add(static_cast<int64_t>(call.y_type));
  return shuffle;
}
cuda::Error Move(const ReduceRowsCall& call, cuda::Table* table, cuda::Stream stream) {
  cuda::ReduceRowsArgs args;
  args.tokens = call.tokens;
  args.k = call.k;
  args.slot_rank = call.slot_rank;
  args.slot = call.slot;
  args.peer_rows = call.y.count;
  args.length = call.length;
  args.y_type = call.y_type;
  args.out_type = call.out_type;
  args.weights_type = call.weights_type;
  args.weights = call.weights;
  args.out = call.out.data;
  return cuda::LaunchReduceRows(args, table, stream);
}

Status Check(const RaggedAllToAllCall& call) {
  if (call.result.data == call.output.data) return Status::Ok();
  return Status::Internal("jax_fusco_ragged_all_to_all: the result must share output's memory.");
}
Shuffle Describe(const RaggedAllToAllCall& call) {
  Shuffle shuffle;
  shuffle.operands = {ToOperand(call.operand)};
  for (const int32_t* table :
       {call.input_offsets, call.send_sizes, call.output_offsets, call.recv_sizes}) {
    const auto table_bytes = static_cast<int64_t>(sizeof(int32_t));
    shuffle.operands.push_back({table, call.num_slices * table_bytes});
  }
  AddOutput(&shuffle, call.result);
  shuffle.signature.Add(call.slices_per_rank).Add(call.operand.count).Add(call.operand.bytes);
  return shuffle;
}
cuda::Error Move(const RaggedAllToAllCall& call, cuda::Table* table, cuda::Stream stream) {
  cuda::RaggedAllToAllArgs args;
  args.slices_per_rank = call.slices_per_rank;
  args.recv_sizes = call.recv_sizes;
  args.peer_rows = call.operand.count;
  args.rows = call.result.count;
  args.row_bytes = call.operand.bytes;
  args.result = call.result.data;
  return cuda::LaunchRaggedAllToAll(args, table, stream);
}

template <typename Call>
Status Check(const Call&) {
  return Status::Ok();
}
template <typename Call>
cuda::Error Before(const Call&, cuda::Stream) {
  return nullptr;
}

struct CudaState {
  static ffi::TypeId id;
  static const ffi::TypeInfo info;

  explicit CudaState(const char* target) : site(cuda::CallSite::Create(target)) {}

  std::unique_ptr<cuda::CallSite> site;
};
ffi::TypeId CudaState::id = {};
const ffi::TypeInfo CudaState::info = ffi::MakeTypeInfo<CudaState>();

struct Cuda {
  using State = CudaState;
  using Context = CudaContext;
  using ContextTag = CudaContextTag;
  // Every execution enqueues the same launches: epochs, ranks and addresses of peers are the
  // device's business.
  static constexpr std::initializer_list<ffi::Traits> kTraits = {ffi::Traits::kCmdBufferCompatible};

  template <ffi::ExecutionStage stage, typename Call>
  static ffi::Error Run(const Caller<Cuda>& caller, const Call& call) {
    if constexpr (stage == ffi::ExecutionStage::kInitialize) {
      return ToError(Prepare(caller, call));
    } else {
      return ToError(Execute(caller, call));
    }
  }

 private:
  static cuda::BeginArgs ToArgs(const Caller<Cuda>& caller, const Shuffle& shuffle) {
    cuda::BeginArgs args;
    args.run = caller.context.run;
    args.rank = caller.rank;
    args.group = caller.group;
    args.num_ranks = caller.num_ranks;
    args.signature = shuffle.signature.bits();
    args.num_operands = static_cast<int>(shuffle.operands.size());
    for (int i = 0; i < args.num_operands; ++i) {
      args.operand[i] = shuffle.operands[static_cast<size_t>(i)].data;
      args.operand_bytes[i] = shuffle.operands[static_cast<size_t>(i)].bytes;
    }
    return args;
  }
  template <typename Call>
  static Status Launched(cuda::Error error) {
    if (error == nullptr) return Status::Ok();
    return Status::Internal(Concat(Signature<Call>::kTarget, ": CUDA refuses a launch: ", error));
  }

  template <typename Call>
  static Status Prepare(const Caller<Cuda>& caller, const Call& call) {
    const Status checked = Check(call);
    if (!checked.ok()) return checked;
    const Status prepared = caller.state->site->Prepare(
        caller.device, ToArgs(caller, Describe(call)), caller.context.stream);
    if (!prepared.ok()) return prepared;
    // Nothing must be loaded while a peer's kernel waits for this rank.
    cuda::Error error = Before(call, cuda::kLoadOnly);
    if (error == nullptr) error = Move(call, nullptr, cuda::kLoadOnly);
    if (error == nullptr) error = cuda::LaunchFillIfFailed(nullptr, 0, nullptr, cuda::kLoadOnly);
    return Launched<Call>(error);
  }

  template <typename Call>
  static Status Execute(const Caller<Cuda>& caller, const Call& call) {
    const cuda::Stream stream = caller.context.stream;
    Status status = Check(call);
    if (!status.ok()) return status;
    const Shuffle shuffle = Describe(call);
    cuda::CallSite& site = *caller.state->site;
    cuda::Table* table = nullptr;
    status = Launched<Call>(Before(call, stream));
    if (status.ok()) status = site.Begin(caller.device, ToArgs(caller, shuffle), stream, &table);
    if (status.ok()) status = Launched<Call>(Move(call, table, stream));
    if (status.ok()) status = site.Finish(caller.device, stream);
    if (status.ok()) {
      status = Launched<Call>(cuda::LaunchFillIfFailed(
          shuffle.outputs.data(), static_cast<int>(shuffle.outputs.size()), table, stream));
    }
    return status;
  }
};

template <typename Call>
constexpr Target TargetOf() {
  return {Signature<Call>::kTarget, Instantiate<Cuda, Call>,
          Handle<Cuda, Call, ffi::ExecutionStage::kInitialize>,
          Handle<Cuda, Call, ffi::ExecutionStage::kExecute>};
}

}  // namespace

TargetList CudaTargets() {
  static const Target targets[] = {TargetOf<PlanCall>(), TargetOf<GatherRowsCall>(),
                                   TargetOf<GatherRowsWeightedCall>(), TargetOf<ReduceRowsCall>(),
                                   TargetOf<RaggedAllToAllCall>()};
  return {targets, 5, "jax_fusco_cuda_call", &CudaState::id, &CudaState::info};
}

}  // namespace jax_fusco
