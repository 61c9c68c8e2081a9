#include "xla_ffi/ffi/calls.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

namespace ffi = xla::ffi;

namespace jax_fusco {
namespace {

// Collects the first thing that is wrong with the buffers of a call.
class Checks {
 public:
  explicit Checks(const char* call) : call_(call) {}

  bool Require(bool holds, const char* what) {
    if (!holds && message_.empty()) message_ = Concat(call_, ": ", what, ".");
    return holds;
  }
  bool ok() const { return message_.empty(); }
  Status status() const { return ok() ? Status::Ok() : Status::InvalidArgument(message_); }

 private:
  const char* call_;
  std::string message_;
};

int64_t Dim(const Buffer& buffer, size_t i) {
  return i < buffer.dimensions().size() ? buffer.dimensions()[i] : 1;
}

// An array as rows along its leading dimension.
Rows ToRows(const Buffer& buffer) {
  Rows rows;
  rows.data = buffer.untyped_data();
  rows.count = Dim(buffer, 0);
  rows.bytes = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  for (size_t i = 1; i < buffer.dimensions().size(); ++i) rows.bytes *= Dim(buffer, i);
  return rows;
}

bool IsInts(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  return buffer.element_type() == ffi::S32 && buffer.dimensions().size() == shape.size() &&
         std::equal(shape.begin(), shape.end(), buffer.dimensions().begin());
}

int32_t* Ints(const Buffer& buffer) { return static_cast<int32_t*>(buffer.untyped_data()); }

const int32_t* ChainOrNull(const Buffer& chain) {
  return Dim(chain, 0) == 0 ? nullptr : Ints(chain);
}

// Whether so many of anything are counted by int32.
bool FitsInt32(int64_t count) { return count >= 0 && count <= std::numeric_limits<int32_t>::max(); }

bool SameRow(const Buffer& a, const Buffer& b) {
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

bool IsWeights(const Buffer& weights, int64_t tokens, int64_t k) {
  return (weights.element_type() == ffi::F32 || weights.element_type() == ffi::F64) &&
         weights.dimensions().size() == 2 && Dim(weights, 0) == tokens && Dim(weights, 1) == k;
}

// The arrays with one entry for each assignment, null where they have none.
bool ReadAssignments(const Buffer& source, const Buffer& merge, const Buffer& weights,
                     int64_t if_none, int64_t* count, const int32_t** source_to,
                     const int32_t** merge_to, const float** weights_to) {
  *count = if_none;
  for (const Buffer* each : {&source, &merge, &weights}) {
    if (each->dimensions().size() != 1) return false;
    if (Dim(*each, 0) > 0) *count = Dim(*each, 0);
  }
  for (const Buffer* each : {&source, &merge, &weights}) {
    if (Dim(*each, 0) != 0 && Dim(*each, 0) != *count) return false;
  }
  if (source.element_type() != ffi::S32 || merge.element_type() != ffi::S32 ||
      weights.element_type() != ffi::F32) {
    return false;
  }
  if (Dim(source, 0) > 0) *source_to = Ints(source);
  if (Dim(merge, 0) > 0) *merge_to = Ints(merge);
  if (Dim(weights, 0) > 0) *weights_to = static_cast<const float*>(weights.untyped_data());
  return true;
}

bool IsMatrix(const Buffer& buffer, ffi::DataType type) {
  return buffer.element_type() == type && buffer.dimensions().size() == 2;
}

// A stack of matrices [E, p, q] as E * p rows.
Rows StackToRows(const Buffer& stack) {
  Rows rows = ToRows(stack);
  rows.count = Dim(stack, 0) * Dim(stack, 1);
  rows.bytes = Dim(stack, 2) * static_cast<int64_t>(ffi::ByteWidth(stack.element_type()));
  return rows;
}

// BLAS counts with 32-bit integers.
constexpr int64_t kMostColumns = std::numeric_limits<int32_t>::max();

}  // namespace

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

Status Signature<PlanCall>::Read(int64_t num_ranks, Buffer expert_ids, Result sizes, Result counts,
                                 Result slot, Result slot_rank, Result source_rank, Result source,
                                 Result dropped, Result invalid, Result chain, Result scratch,
                                 int64_t num_experts, int64_t alignment, PlanCall* call) {
  Checks checks(kTarget);
  PlanShape& shape = call->shape;
  shape = {num_ranks,   Dim(expert_ids, 0), Dim(expert_ids, 1),
           num_experts, Dim(*source, 0),    alignment};
  checks.Require(alignment >= 1, "alignment must be at least 1");
  checks.Require(num_ranks >= 1 && num_experts >= 1 && num_experts % num_ranks == 0,
                 "num_experts must be a multiple of num_ranks");
  if (!checks.ok()) return checks.status();
  checks.Require(IsInts(expert_ids, {shape.tokens, shape.k}), "expert_ids must be int32 [T, k]");
  checks.Require(FitsInt32(num_ranks * shape.assignments()) && FitsInt32(num_experts) &&
                     FitsInt32(shape.capacity) && FitsInt32(alignment),
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
  checks.Require(IsInts(*chain, {0}) || IsInts(*chain, {shape.capacity}),
                 "chain must be int32 [C] or [0]");
  checks.Require(scratch->element_type() == ffi::U8 && scratch->dimensions().size() == 1,
                 "scratch must be uint8 [bytes]");
  if (!checks.ok()) return checks.status();
  call->expert_ids = Ints(expert_ids);
  call->results = {Ints(*sizes),       Ints(*counts), Ints(*slot),    Ints(*slot_rank),
                   Ints(*source_rank), Ints(*source), Ints(*dropped), Ints(*invalid)};
  call->chain = ToRows(*chain);
  call->scratch = ToRows(*scratch);
  return Status::Ok();
}

Status Signature<GatherRowsCall>::Read(int64_t /*num_ranks*/, Buffer source_rank, Buffer source,
                                       Buffer chain, ffi::RemainingArgs in, ffi::RemainingRets out,
                                       int64_t fanout, int64_t zero_tail, GatherRowsCall* call) {
  Checks checks(kTarget);
  call->num_rows = Dim(source, 0);
  checks.Require(IsInts(source, {call->num_rows}) && IsInts(source_rank, {call->num_rows}),
                 "source_rank and source must be int32 [M]");
  checks.Require(IsInts(chain, {0}) || IsInts(chain, {call->num_rows}),
                 "chain must be int32 [M] or [0]");
  checks.Require(fanout >= 1, "fanout must be at least 1");
  const bool takes_over = in.size() > out.size();
  checks.Require(in.size() == out.size() * (takes_over ? 2 : 1),
                 "there must be one result for each rows operand, or for each with its into");
  checks.Require(!takes_over || zero_tail == 0, "into needs zero_tail to be 0");
  for (size_t i = 0; checks.ok() && i < out.size(); ++i) {
    const auto from = in.get<Buffer>(i);
    auto to = out.get<Buffer>(i);
    if (!checks.Require(from.has_value() && to.has_value(), "operands must be arrays")) break;
    checks.Require(from->element_type() == (*to)->element_type() && SameRow(*from, **to) &&
                       Dim(**to, 0) == call->num_rows,
                   "each result must be [M, ...] with the rows and type of its operand");
    call->in.push_back(ToRows(*from));
    call->out.push_back(ToRows(**to));
    if (!takes_over) continue;
    const auto into = in.get<Buffer>(out.size() + i);
    if (!checks.Require(into.has_value(), "operands must be arrays")) break;
    checks.Require(into->element_type() == (*to)->element_type() && SameRow(*into, **to) &&
                       Dim(*into, 0) == call->num_rows,
                   "each into must have the shape and type of its result");
    const Rows& result = call->out.back();
    checks.Require(result.count * result.bytes == 0 || into->untyped_data() == result.data,
                   "each result must share the memory of its into");
  }
  if (!checks.ok()) return checks.status();
  call->source_rank = Ints(source_rank);
  call->source = Ints(source);
  call->chain = ChainOrNull(chain);
  call->fanout = fanout;
  call->zero_tail = zero_tail != 0;
  return Status::Ok();
}

Status Signature<GatherRowsWeightedCall>::Read(int64_t /*num_ranks*/, Buffer source_rank,
                                               Buffer source, Buffer chain, Buffer g,
                                               Buffer weights, Buffer y, Result dy, Result dots,
                                               GatherRowsWeightedCall* call) {
  Checks checks(kTarget);
  call->num_rows = Dim(source, 0);
  const auto g_type = ToFloat(g.element_type());
  const auto y_type = ToFloat(y.element_type());
  checks.Require(IsInts(source, {call->num_rows}) && IsInts(source_rank, {call->num_rows}),
                 "source_rank and source must be int32 [M]");
  checks.Require(IsInts(chain, {0}) || IsInts(chain, {call->num_rows}),
                 "chain must be int32 [M] or [0]");
  checks.Require(g_type.has_value() && y_type.has_value(), "g and y must be floating");
  checks.Require(SameRow(g, y) && Dim(y, 0) == call->num_rows,
                 "g must be [T, d] and y [M, d] with the same d");
  checks.Require(IsWeights(weights, Dim(g, 0), Dim(weights, 1)) && Dim(weights, 1) >= 1,
                 "weights must be float32 or float64 [T, k]");
  checks.Require(
      dy->element_type() == y.element_type() && SameRow(*dy, y) && Dim(*dy, 0) == call->num_rows,
      "dy must have the shape and type of y");
  checks.Require(dots->element_type() == (y_type == Float::kF64 ? ffi::F64 : ffi::F32) &&
                     dots->dimensions().size() == 1 && Dim(*dots, 0) == call->num_rows,
                 "dots must be float32 (float64 where y is) [M]");
  if (!checks.ok()) return checks.status();
  call->source_rank = Ints(source_rank);
  call->source = Ints(source);
  call->chain = ChainOrNull(chain);
  call->k = Dim(weights, 1);
  call->g_type = *g_type;
  call->y_type = *y_type;
  call->weights_type = *ToFloat(weights.element_type());
  call->g = ToRows(g);
  call->weights = weights.untyped_data();
  call->y = ToRows(y);
  call->dy = ToRows(*dy);
  call->dots = dots->untyped_data();
  call->length = call->y.bytes / SizeOf(*y_type);
  return Status::Ok();
}

Status Signature<ReduceRowsCall>::Read(int64_t /*num_ranks*/, Buffer slot_rank, Buffer slot,
                                       Buffer y, ffi::RemainingArgs weights, Result out,
                                       ReduceRowsCall* call) {
  Checks checks(kTarget);
  call->tokens = Dim(slot, 0);
  call->k = Dim(slot, 1);
  const auto y_type = ToFloat(y.element_type());
  const auto out_type = ToFloat(out->element_type());
  checks.Require(
      IsInts(slot, {call->tokens, call->k}) && IsInts(slot_rank, {call->tokens, call->k}),
      "slot_rank and slot must be int32 [T, k]");
  checks.Require(y_type.has_value() && out_type.has_value(), "y and out must be floating");
  checks.Require(SameRow(y, *out) && Dim(*out, 0) == call->tokens,
                 "out must be [T, ...] with the rows of y");
  checks.Require(weights.size() <= 1, "there must be at most one weights operand");
  if (checks.ok() && weights.size() == 1) {
    const auto given = weights.get<Buffer>(0);
    if (checks.Require(given.has_value() && IsWeights(*given, call->tokens, call->k),
                       "weights must be float32 or float64 [T, k]")) {
      call->weights = given->untyped_data();
      call->weights_type = *ToFloat(given->element_type());
    }
  }
  if (!checks.ok()) return checks.status();
  call->slot_rank = Ints(slot_rank);
  call->slot = Ints(slot);
  call->y_type = *y_type;
  call->out_type = *out_type;
  call->y = ToRows(y);
  call->out = ToRows(*out);
  call->length = call->y.bytes / SizeOf(*y_type);
  return Status::Ok();
}

Status Signature<RaggedAllToAllCall>::Read(int64_t num_ranks, Buffer input_offsets,
                                           Buffer send_sizes, Buffer output_offsets,
                                           Buffer recv_sizes, Buffer operand, Buffer output,
                                           Result result, RaggedAllToAllCall* call) {
  Checks checks(kTarget);
  const int64_t slices = Dim(input_offsets, 0);
  checks.Require(IsInts(input_offsets, {slices}) && IsInts(send_sizes, {slices}) &&
                     IsInts(output_offsets, {slices}) && IsInts(recv_sizes, {slices}) &&
                     num_ranks >= 1 && slices % num_ranks == 0,
                 "offsets and sizes must be int32 [K], K a multiple of num_ranks");
  checks.Require(operand.element_type() == output.element_type() && SameRow(operand, output),
                 "operand and output must have the same rows and type");
  checks.Require(result->element_type() == output.element_type() && SameRow(*result, output) &&
                     Dim(*result, 0) == Dim(output, 0),
                 "the result must have the shape and type of output");
  if (!checks.ok()) return checks.status();
  call->num_slices = slices;
  call->slices_per_rank = slices / num_ranks;
  call->input_offsets = Ints(input_offsets);
  call->send_sizes = Ints(send_sizes);
  call->output_offsets = Ints(output_offsets);
  call->recv_sizes = Ints(recv_sizes);
  call->operand = ToRows(operand);
  call->output = ToRows(output);
  call->result = ToRows(*result);
  return Status::Ok();
}

Status Signature<CrossingCountCall>::Read(int64_t num_ranks, Buffer node, Buffer expert_ids,
                                          Result num_invalid, Result wanted, int64_t num_experts,
                                          CrossingCountCall* call) {
  Checks checks(kTarget);
  CrossingShape& shape = call->shape;
  shape.num_nodes = Dim(*wanted, 0);
  shape.local_ranks = num_ranks;
  shape.tokens = Dim(expert_ids, 0);
  shape.k = Dim(expert_ids, 1);
  const int64_t ranks = num_ranks * shape.num_nodes;
  checks.Require(ranks >= 1 && num_experts >= 0 && num_experts % ranks == 0,
                 "num_experts must be a multiple of the ranks of all nodes");
  if (!checks.ok()) return checks.status();
  shape.experts_per_rank = num_experts / ranks;
  checks.Require(IsInts(*wanted, {shape.num_nodes, shape.told()}),
                 "wanted must be int32 [N, L * E_local + 4]");
  checks.Require(IsInts(expert_ids, {shape.tokens, shape.k}), "expert_ids must be int32 [T, k]");
  checks.Require(IsInts(node, {}) && IsInts(*num_invalid, {}),
                 "node and num_invalid must be int32 []");
  if (!checks.ok()) return checks.status();
  call->node = Ints(node);
  call->expert_ids = Ints(expert_ids);
  call->num_invalid = Ints(*num_invalid);
  call->wanted = Ints(*wanted);
  return Status::Ok();
}

Status Signature<CrossingLayOutCall>::Read(int64_t /*num_ranks*/, Buffer wanted, Result sizes,
                                           Result counts, Result dropped, Result granted,
                                           int64_t capacity, int64_t alignment,
                                           CrossingLayOutCall* call) {
  Checks checks(kTarget);
  CrossingShape& shape = call->shape;
  shape.num_nodes = Dim(*granted, 0);
  shape.local_ranks = Dim(*granted, 1);
  shape.experts_per_rank = Dim(*granted, 3);
  shape.capacity = capacity;
  call->alignment = alignment;
  const int64_t experts = shape.experts_per_rank;
  checks.Require(IsInts(wanted, {shape.num_nodes, shape.told()}) &&
                     IsInts(*granted, {shape.num_nodes, shape.local_ranks, 2, experts}),
                 "wanted must be int32 [N, L * E_local + 4], granted [N, L, 2, E_local]");
  checks.Require(IsInts(*sizes, {experts}) && IsInts(*counts, {experts}) && IsInts(*dropped, {}),
                 "group_sizes and expert_counts must be int32 [E_local], num_dropped []");
  checks.Require(FitsInt32(capacity) && FitsInt32(alignment) && alignment >= 1,
                 "capacity must lie in [0, 2**31) and alignment in [1, 2**31)");
  if (!checks.ok()) return checks.status();
  call->wanted = Ints(wanted);
  call->group_sizes = Ints(*sizes);
  call->expert_counts = Ints(*counts);
  call->num_dropped = Ints(*dropped);
  call->granted = Ints(*granted);
  return Status::Ok();
}

Status Signature<CrossingPlaceCall>::Read(int64_t num_ranks, Buffer node, Buffer expert_ids,
                                          Buffer granted, Result slot, Result slot_rank,
                                          Result owner_node, Result pack_rank, Result pack_token,
                                          Result rail, Result rail_row, Result letters,
                                          int64_t capacity, CrossingPlaceCall* call) {
  Checks checks(kTarget);
  CrossingShape& shape = call->shape;
  shape.num_nodes = Dim(granted, 0);
  shape.local_ranks = num_ranks;
  shape.tokens = Dim(expert_ids, 0);
  shape.k = Dim(expert_ids, 1);
  shape.experts_per_rank = Dim(granted, 3);
  shape.capacity = capacity;
  const int64_t nodes = shape.num_nodes, tokens = shape.tokens, k = shape.k;
  checks.Require(num_ranks >= 1 && IsInts(node, {}) && IsInts(expert_ids, {tokens, k}) &&
                     IsInts(granted, {nodes, num_ranks, 2, shape.experts_per_rank}),
                 "node must be int32 [], expert_ids [T, k], granted [N, L, 2, E_local]");
  checks.Require(FitsInt32(capacity) && FitsInt32(num_ranks * capacity) &&
                     FitsInt32(num_ranks * tokens) && FitsInt32(nodes * tokens * (k + 1)),
                 "the rows and assignments of a node must be fewer than 2**31");
  checks.Require(IsInts(*slot, {tokens, k}) && IsInts(*slot_rank, {tokens, k}) &&
                     IsInts(*owner_node, {tokens, k}) && IsInts(*pack_rank, {nodes, tokens}) &&
                     IsInts(*pack_token, {nodes, tokens}) && IsInts(*rail, {tokens, nodes}) &&
                     IsInts(*rail_row, {tokens, nodes}) &&
                     IsInts(*letters, {nodes, tokens + 1, k + 1}),
                 "results must be int32 [T, k] x 3, [N, T] x 2, [T, N] x 2 and [N, T + 1, k + 1]");
  if (!checks.ok()) return checks.status();
  call->node = Ints(node);
  call->expert_ids = Ints(expert_ids);
  call->granted = Ints(granted);
  call->slot = Ints(*slot);
  call->slot_rank = Ints(*slot_rank);
  call->owner_node = Ints(*owner_node);
  call->pack_rank = Ints(*pack_rank);
  call->pack_token = Ints(*pack_token);
  call->rail = Ints(*rail);
  call->rail_row = Ints(*rail_row);
  call->letters = Ints(*letters);
  return Status::Ok();
}

Status Signature<CrossingDeliverCall>::Read(int64_t num_ranks, Buffer letters, Buffer sizes,
                                            Result deliver_rank, Result deliver_slot,
                                            Result from_rank, Result from_assignment,
                                            Result source_rank, Result source, Result most_rows,
                                            CrossingDeliverCall* call) {
  Checks checks(kTarget);
  CrossingShape& shape = call->shape;
  shape.num_nodes = Dim(letters, 0);
  shape.local_ranks = num_ranks;
  shape.tokens = Dim(letters, 1) - 1;
  shape.k = Dim(letters, 2) - 1;
  shape.experts_per_rank = Dim(sizes, 0);
  shape.capacity = Dim(*source, 0);
  const int64_t nodes = shape.num_nodes, tokens = shape.tokens, k = shape.k;
  checks.Require(num_ranks >= 1 && tokens >= 0 && k >= 0 &&
                     IsInts(letters, {nodes, tokens + 1, k + 1}) && IsInts(sizes, {Dim(sizes, 0)}),
                 "letters must be int32 [N, T + 1, k + 1], group_sizes [E_local]");
  checks.Require(FitsInt32(num_ranks * shape.capacity) && FitsInt32(num_ranks * tokens) &&
                     FitsInt32(nodes * tokens * (k + 1)),
                 "the rows and assignments of a node must be fewer than 2**31");
  checks.Require(
      IsInts(*deliver_rank, {nodes, tokens, k}) && IsInts(*deliver_slot, {nodes, tokens, k}) &&
          IsInts(*from_rank, {shape.capacity}) && IsInts(*from_assignment, {shape.capacity}) &&
          IsInts(*source_rank, {shape.capacity}) && IsInts(*source, {shape.capacity}) &&
          IsInts(*most_rows, {}),
      "results must be int32 [N, T, k] x 2, [C] x 4 and []");
  if (!checks.ok()) return checks.status();
  call->letters = Ints(letters);
  call->group_sizes = Ints(sizes);
  call->deliver_rank = Ints(*deliver_rank);
  call->deliver_slot = Ints(*deliver_slot);
  call->from_rank = Ints(*from_rank);
  call->from_assignment = Ints(*from_assignment);
  call->source_rank = Ints(*source_rank);
  call->source = Ints(*source);
  call->most_rows = Ints(*most_rows);
  return Status::Ok();
}

Status Signature<GroupedMatmulCall>::Read(Buffer rows, Buffer kernel, Buffer group_sizes,
                                          Buffer source, Buffer merge, Buffer weights,
                                          Buffer partner, Result out, Result dots,
                                          int64_t transposed, GroupedMatmulCall* call) {
  Checks checks(kTarget);
  const ffi::DataType type = rows.element_type();
  const auto known = ToFloat(type);
  checks.Require(known.has_value() && *known != Float::kF64,
                 "rows must be bfloat16, float16 or float32");
  checks.Require(kernel.element_type() == type && kernel.dimensions().size() == 3,
                 "kernel must be [E, n, m] of the type of rows");
  if (!checks.ok()) return checks.status();
  const int64_t depth = Dim(kernel, transposed ? 2 : 1), width = Dim(kernel, transposed ? 1 : 2);
  checks.Require(depth <= kMostColumns && width <= kMostColumns, "rows must be shorter than 2**31");
  checks.Require(IsMatrix(rows, type) && Dim(rows, 1) == depth, "rows must be [N, n]");
  checks.Require(IsMatrix(*out, type) && Dim(*out, 1) == width,
                 "the result must be [M, m] of the type of rows");
  checks.Require(IsInts(group_sizes, {Dim(kernel, 0)}), "group_sizes must be int32 [E]");
  checks.Require(ReadAssignments(source, merge, weights, Dim(rows, 0), &call->num_assignments,
                                 &call->source, &call->merge, &call->weights),
                 "source and merge must be int32 [A] or [0], weights float32 [A] or [0]");
  checks.Require(call->source != nullptr || call->num_assignments == Dim(rows, 0),
                 "rows must be [A, n] where there is no source");
  checks.Require(call->merge != nullptr || call->num_assignments == Dim(*out, 0),
                 "the result must be [A, m] where there is no merge");
  const bool paired = Dim(*dots, 0) > 0;
  checks.Require(dots->element_type() == ffi::F32 && dots->dimensions().size() == 1 &&
                     (!paired || Dim(*dots, 0) == call->num_assignments),
                 "dots must be float32 [A] or [0]");
  checks.Require(!paired || (IsMatrix(partner, type) && Dim(partner, 0) == Dim(*out, 0) &&
                             Dim(partner, 1) == width),
                 "partner must be shaped as the result where there are dots");
  if (!checks.ok()) return checks.status();
  call->type = *known;
  call->num_groups = Dim(kernel, 0);
  call->group_sizes = Ints(group_sizes);
  call->transposed = transposed != 0;
  call->kernel_rows = Dim(kernel, 1);
  call->kernel_columns = Dim(kernel, 2);
  call->rows = ToRows(rows);
  call->kernel = StackToRows(kernel);
  call->out = ToRows(*out);
  if (paired) {
    call->partner = ToRows(partner);
    call->dots = static_cast<float*>(dots->untyped_data());
  }
  return Status::Ok();
}

Status Signature<GroupedOuterCall>::Read(Buffer rows, Buffer g, Buffer group_sizes, Buffer source,
                                         Buffer merge, Buffer weights, Result out,
                                         GroupedOuterCall* call) {
  Checks checks(kTarget);
  const ffi::DataType type = rows.element_type();
  const auto known = ToFloat(type);
  checks.Require(known.has_value() && *known != Float::kF64,
                 "rows must be bfloat16, float16 or float32");
  checks.Require(IsMatrix(rows, type) && IsMatrix(g, type),
                 "rows must be [N, n], and g [M, m] of their type");
  checks.Require(Dim(rows, 1) <= kMostColumns && Dim(g, 1) <= kMostColumns,
                 "rows must be shorter than 2**31");
  checks.Require(out->element_type() == type && out->dimensions().size() == 3 &&
                     Dim(*out, 1) == Dim(rows, 1) && Dim(*out, 2) == Dim(g, 1),
                 "the result must be [E, n, m] of the type of rows");
  checks.Require(IsInts(group_sizes, {Dim(*out, 0)}), "group_sizes must be int32 [E]");
  const bool indexed = Dim(source, 0) > 0;
  checks.Require(
      ReadAssignments(source, merge, weights, Dim(indexed ? g : rows, 0), &call->num_assignments,
                      &call->source, &call->merge, &call->weights),
      "source and merge must be int32 [A] or [0], weights float32 [A] or [0]");
  checks.Require(call->source != nullptr || call->num_assignments == Dim(rows, 0),
                 "rows must be [A, n] where there is no source");
  checks.Require(call->merge != nullptr || call->num_assignments == Dim(g, 0),
                 "g must be [A, m] where there is no merge");
  if (!checks.ok()) return checks.status();
  call->type = *known;
  call->num_groups = Dim(*out, 0);
  call->group_sizes = Ints(group_sizes);
  call->kernel_rows = Dim(rows, 1);
  call->kernel_columns = Dim(g, 1);
  call->rows = ToRows(rows);
  call->g = ToRows(g);
  call->out = StackToRows(*out);
  return Status::Ok();
}

}  // namespace jax_fusco
