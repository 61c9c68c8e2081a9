// The custom calls as XLA FFI handlers, written once for all platforms.
//
// A Platform has: State, which Instantiate makes once for each call in a compiled program; Context,
// what it needs of an execution beside the device, decoded by ContextTag; kTraits; and
// Run<stage>(caller, call), which does what a stage has to do.
#ifndef JAX_FUSCO_FFI_HANDLERS_H_
#define JAX_FUSCO_FFI_HANDLERS_H_

#include <exception>
#include <memory>
#include <utility>

#include "xla_ffi/ffi/calls.h"

namespace jax_fusco {

// The context and the first operands of every call.
template <typename Platform>
struct Caller {
  typename Platform::State* state;
  typename Platform::Context context;
  int32_t device;
  const int32_t* rank;   // memory of the device
  const int32_t* group;  // memory of the device
  int64_t num_ranks;
};

// What Python registers with JAX. Stages that a platform lacks are null.
struct Target {
  const char* name;
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
};
struct TargetList {
  const Target* targets;
  int size;
  const char* type_name;
  xla::ffi::TypeId* type_id;
  const xla::ffi::TypeInfo* type_info;
};
TargetList CpuTargets();
TargetList CudaTargets();

// An exception must not leave a handler.
template <typename F>
auto Guard(const char* target, const F& body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::exception& error) {
    return ToError(Status::Internal(Concat(target, ": ", error.what())));
  }
}

template <typename Platform, typename Call>
XLA_FFI_Error* Instantiate(XLA_FFI_CallFrame* frame) {
  using State = typename Platform::State;
  using MaybeState = xla::ffi::ErrorOr<std::unique_ptr<State>>;
  static auto* handler =
      xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInstantiate>()
          .To([]() -> MaybeState {
            try {
              return std::make_unique<State>(Signature<Call>::kTarget);
            } catch (const std::exception& error) {
              return xla::ffi::Unexpected(xla::ffi::Error::Internal(error.what()));
            }
          })
          .release();
  return handler->Call(frame);
}

template <typename Platform, typename Call, xla::ffi::ExecutionStage stage>
XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame) {
  namespace ffi = xla::ffi;
  using Outcome = decltype(Platform::template Run<stage>(std::declval<const Caller<Platform>&>(),
                                                         std::declval<const Call&>()));
  // The last parameter of Read is the call that it fills.
  auto handle = [](typename Platform::State* state, typename Platform::Context context,
                   int32_t device, ffi::BufferR0<ffi::S32> rank, ffi::BufferR0<ffi::S32> group,
                   int64_t num_ranks, auto... arguments) -> Outcome {
    return Guard(Signature<Call>::kTarget, [&]() -> Outcome {
      Call call;
      const Status status = Signature<Call>::Read(num_ranks, arguments..., &call);
      if (!status.ok()) return ToError(status);
      const Caller<Platform> caller = {
          state, context, device, rank.typed_data(), group.typed_data(), num_ranks};
      return Platform::template Run<stage>(caller, call);
    });
  };
  static auto* handler =
      Signature<Call>::Bind(ffi::Ffi::Bind<stage>()
                                .template Ctx<ffi::State<typename Platform::State>>()
                                .template Ctx<typename Platform::ContextTag>()
                                .template Ctx<ffi::DeviceOrdinal>()
                                .template Arg<ffi::BufferR0<ffi::S32>>()
                                .template Arg<ffi::BufferR0<ffi::S32>>()
                                .template Attr<int64_t>("num_ranks"))
          .To(handle, Platform::kTraits)
          .release();
  return handler->Call(frame);
}

}  // namespace jax_fusco

#endif  // JAX_FUSCO_FFI_HANDLERS_H_
