// From FFI buffers to the calls of core/calls.h: the same checks for every platform.
#ifndef JAX_FUSCO_FFI_CALLS_H_
#define JAX_FUSCO_FFI_CALLS_H_

#include <cstdint>
#include <utility>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/core/calls.h"
#include "xla_ffi/core/crossing.h"
#include "xla_ffi/core/status.h"

namespace jax_fusco {

using Buffer = xla::ffi::AnyBuffer;
using Result = xla::ffi::Result<xla::ffi::AnyBuffer>;

xla::ffi::Error ToError(const Status& status);

// A binding with so many more operands, then results, that are arrays. At least one in all:
// bindings cannot be copied, nor returned but as they are made.
template <int kArgs, int kRets, typename Binding>
auto WithBuffers(Binding&& binding) {
  if constexpr (kArgs == 1 && kRets == 0) {
    return std::move(binding).template Arg<Buffer>();
  } else if constexpr (kArgs > 0) {
    return WithBuffers<kArgs - 1, kRets>(std::move(binding).template Arg<Buffer>());
  } else if constexpr (kRets > 1) {
    return WithBuffers<0, kRets - 1>(std::move(binding).template Ret<Buffer>());
  } else {
    return std::move(binding).template Ret<Buffer>();
  }
}

// For each call: its target, the operands, results and attributes that follow `rank`, `group` and
// `num_ranks`, and the check that makes a call of them (or says what is wrong).
template <typename Call>
struct Signature;

template <>
struct Signature<PlanCall> {
  static constexpr const char* kTarget = "jax_fusco_plan";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<1, 10>(std::move(binding))
        .template Attr<int64_t>("num_experts")
        .template Attr<int64_t>("alignment");
  }
  static Status Read(int64_t num_ranks, Buffer expert_ids, Result group_sizes, Result expert_counts,
                     Result slot, Result slot_rank, Result source_rank, Result source,
                     Result num_dropped, Result num_invalid, Result chain, Result scratch,
                     int64_t num_experts, int64_t alignment, PlanCall* call);
};

template <>
struct Signature<GatherRowsCall> {
  static constexpr const char* kTarget = "jax_fusco_gather_rows";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<3, 0>(std::move(binding))
        .RemainingArgs()
        .RemainingRets()
        .template Attr<int64_t>("fanout")
        .template Attr<int64_t>("zero_tail");
  }
  // `in` are the rows to gather, and then, or not, the arrays whose memory the results take over.
  static Status Read(int64_t num_ranks, Buffer source_rank, Buffer source, Buffer chain,
                     xla::ffi::RemainingArgs in, xla::ffi::RemainingRets out, int64_t fanout,
                     int64_t zero_tail, GatherRowsCall* call);
};

template <>
struct Signature<GatherRowsWeightedCall> {
  static constexpr const char* kTarget = "jax_fusco_gather_rows_weighted";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<6, 2>(std::move(binding));
  }
  static Status Read(int64_t num_ranks, Buffer source_rank, Buffer source, Buffer chain, Buffer g,
                     Buffer weights, Buffer y, Result dy, Result dots,
                     GatherRowsWeightedCall* call);
};

template <>
struct Signature<ReduceRowsCall> {
  static constexpr const char* kTarget = "jax_fusco_reduce_rows";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<3, 0>(std::move(binding)).RemainingArgs().template Ret<Buffer>();
  }
  static Status Read(int64_t num_ranks, Buffer slot_rank, Buffer slot, Buffer y,
                     xla::ffi::RemainingArgs weights, Result out, ReduceRowsCall* call);
};

template <>
struct Signature<RaggedAllToAllCall> {
  static constexpr const char* kTarget = "jax_fusco_ragged_all_to_all";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<6, 1>(std::move(binding));
  }
  static Status Read(int64_t num_ranks, Buffer input_offsets, Buffer send_sizes,
                     Buffer output_offsets, Buffer recv_sizes, Buffer operand, Buffer output,
                     Result result, RaggedAllToAllCall* call);
};

template <>
struct Signature<CrossingCountCall> {
  static constexpr const char* kTarget = "jax_fusco_crossing_count";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<2, 2>(std::move(binding)).template Attr<int64_t>("num_experts");
  }
  static Status Read(int64_t num_ranks, Buffer node, Buffer expert_ids, Result num_invalid,
                     Result wanted, int64_t num_experts, CrossingCountCall* call);
};

template <>
struct Signature<CrossingLayOutCall> {
  static constexpr const char* kTarget = "jax_fusco_crossing_lay_out";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<1, 4>(std::move(binding))
        .template Attr<int64_t>("capacity")
        .template Attr<int64_t>("alignment");
  }
  static Status Read(int64_t num_ranks, Buffer wanted, Result group_sizes, Result expert_counts,
                     Result num_dropped, Result granted, int64_t capacity, int64_t alignment,
                     CrossingLayOutCall* call);
};

template <>
struct Signature<CrossingPlaceCall> {
  static constexpr const char* kTarget = "jax_fusco_crossing_place";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<3, 8>(std::move(binding)).template Attr<int64_t>("capacity");
  }
  static Status Read(int64_t num_ranks, Buffer node, Buffer expert_ids, Buffer granted, Result slot,
                     Result slot_rank, Result owner_node, Result pack_rank, Result pack_token,
                     Result rail, Result rail_row, Result letters, int64_t capacity,
                     CrossingPlaceCall* call);
};

template <>
struct Signature<CrossingDeliverCall> {
  static constexpr const char* kTarget = "jax_fusco_crossing_deliver";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<2, 7>(std::move(binding));
  }
  static Status Read(int64_t num_ranks, Buffer letters, Buffer group_sizes, Result deliver_rank,
                     Result deliver_slot, Result from_rank, Result from_assignment,
                     Result source_rank, Result source, Result most_rows,
                     CrossingDeliverCall* call);
};

// Arrays of no elements stand for what is not given: source, merge, weights, partner.
template <>
struct Signature<GroupedMatmulCall> {
  static constexpr const char* kTarget = "jax_fusco_grouped_matmul";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<7, 2>(std::move(binding)).template Attr<int64_t>("transposed");
  }
  static Status Read(Buffer rows, Buffer kernel, Buffer group_sizes, Buffer source, Buffer merge,
                     Buffer weights, Buffer partner, Result out, Result dots, int64_t transposed,
                     GroupedMatmulCall* call);
};

template <>
struct Signature<GroupedOuterCall> {
  static constexpr const char* kTarget = "jax_fusco_grouped_outer";
  template <typename Binding>
  static auto Bind(Binding&& binding) {
    return WithBuffers<6, 1>(std::move(binding));
  }
  static Status Read(Buffer rows, Buffer g, Buffer group_sizes, Buffer source, Buffer merge,
                     Buffer weights, Result out, GroupedOuterCall* call);
};

}  // namespace jax_fusco

#endif  // JAX_FUSCO_FFI_CALLS_H_
