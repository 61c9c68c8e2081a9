#include "xla_ffi/engine/cuda/launch.h"
#include "xla_ffi/engine/cuda/reduce_rows.h"

namespace jax_fusco::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 5;  // of a multiprocessor at a time
constexpr int64_t kWarps = kThreads / DeviceTeam::kLanes;
// Where there are few tokens, their rows are cut until so many warps of a multiprocessor have work.
constexpr int64_t kBusyWarps = 16;

template <typename Y, typename Out, int kTerms, int kUnits>
__global__ void __launch_bounds__(kThreads, kBlocks)
    ReduceRowsKernel(const __grid_constant__ ReduceRowsArgs args, Table* table, int64_t parts) {
  ReduceRows<Y, Out, kTerms, kUnits>(DeviceTeam(), args, table, parts);
}

template <typename Y, typename Out, int kTerms, int kUnits>
Error LaunchWith(const ReduceRowsArgs& args, Table* table, Stream stream) {
  const int64_t columns = kUnits * DeviceTeam::kLanes * kReduceUnit<Y>;
  const int64_t most = (args.length + columns - 1) / columns;
  const int64_t wanted = (kBusyWarps * Multiprocessors() + args.tokens - 1) / args.tokens;
  const int64_t parts = std::clamp<int64_t>(wanted, 1, most);
  return Launch(ReduceRowsKernel<Y, Out, kTerms, kUnits>,
                BlocksFor(args.tokens * parts, kWarps, 16), kThreads, 0, stream, args, table,
                parts);
}

}  // namespace

Error LaunchReduceRows(const ReduceRowsArgs& args, Table* table, Stream stream) {
  if (args.tokens == 0 || args.length == 0) return nullptr;
  return WithFloat(args.y_type, [&](auto y) {
    return WithFloat(args.out_type, [&](auto out) {
      return args.k > 4 ? LaunchWith<decltype(y), decltype(out), 8, 1>(args, table, stream)
                        : LaunchWith<decltype(y), decltype(out), 4, 2>(args, table, stream);
    });
  });
}

}  // namespace jax_fusco::cuda
