#include "xla_ffi/engine/cuda/gather_rows_weighted.h"
#include "xla_ffi/engine/cuda/launch.h"

namespace jax_fusco::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // of a multiprocessor at a time

template <typename G, typename Y>
__global__ void __launch_bounds__(kThreads, kBlocks)
    GatherRowsWeightedKernel(const __grid_constant__ GatherRowsWeightedArgs args, Table* table) {
  GatherRowsWeighted<G, Y>(DeviceTeam(), args, table);
}

}  // namespace

Error LaunchGatherRowsWeighted(const GatherRowsWeightedArgs& args, Table* table, Stream stream) {
  if (args.num_rows == 0) return nullptr;
  const int64_t blocks = BlocksFor(args.num_rows, kThreads / DeviceTeam::kLanes, 16);
  return WithFloat(args.g_type, [&](auto g) {
    return WithFloat(args.y_type, [&](auto y) {
      return Launch(GatherRowsWeightedKernel<decltype(g), decltype(y)>, blocks, kThreads, 0, stream,
                    args, table);
    });
  });
}

}  // namespace jax_fusco::cuda
