#include "xla_ffi/engine/cuda/launch.h"
#include "xla_ffi/engine/cuda/plan_count.h"
#include "xla_ffi/engine/cuda/plan_finish.h"

namespace jax_fusco::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSmallThreads = 512;
// Up to so many assignments, and rows, one block does all that follows the layout.
constexpr int64_t kSmallPlan = 8192;

__global__ void __launch_bounds__(kThreads, 2)
    CountOneTileKernel(const __grid_constant__ PlanArgs args,
                       const __grid_constant__ PlanLayout layout) {
  CountOneTile(DeviceTeam(), args, layout);
}
__global__ void __launch_bounds__(kThreads, 2)
    CountTilesKernel(const __grid_constant__ PlanArgs args,
                     const __grid_constant__ PlanLayout layout) {
  CountTiles(DeviceTeam(), args, layout);
}
__global__ void __launch_bounds__(kThreads, 2)
    ScanTilesKernel(const __grid_constant__ PlanArgs args,
                    const __grid_constant__ PlanLayout layout) {
  ScanTiles(DeviceTeam(), args, layout);
}
__global__ void __launch_bounds__(kThreads, 2)
    SortTilesKernel(const __grid_constant__ PlanArgs args,
                    const __grid_constant__ PlanLayout layout) {
  SortTiles(DeviceTeam(), args, layout);
}
__global__ void __launch_bounds__(kSmallThreads)
    FinishSmallPlanKernel(const __grid_constant__ PlanArgs args,
                          const __grid_constant__ PlanLayout layout, const Table* table) {
  FinishSmallPlan(DeviceTeam(), args, layout, table);
}
__global__ void __launch_bounds__(kThreads, 2)
    LayOutRanksKernel(const __grid_constant__ PlanArgs args,
                      const __grid_constant__ PlanLayout layout, const Table* table) {
  LayOutRanks(DeviceTeam(), args, layout, table);
}
__global__ void __launch_bounds__(kThreads, 2)
    PlaceAllKernel(const __grid_constant__ PlanArgs args, const __grid_constant__ PlanLayout layout,
                   const Table* table) {
  PlaceAll(DeviceTeam(), args, layout, table);
}
__global__ void __launch_bounds__(kThreads, 2)
    ChainAllKernel(const __grid_constant__ PlanArgs args, const __grid_constant__ PlanLayout layout,
                   const Table* table) {
  ChainAll(DeviceTeam(), args, layout, table);
}

Error CheckShape(const PlanShape& shape) {
  if (shape.num_ranks > kMaxRanks) return "the CUDA engine has room for 128 ranks";
  if (shape.num_experts > kMaxExperts) return "the CUDA engine has room for 2048 experts";
  return nullptr;
}

}  // namespace

int64_t PlanScratchBytes(const PlanShape& shape) {
  return LayOutPlan(shape).size * static_cast<int64_t>(sizeof(int32_t));
}

Error LaunchPlanCount(const PlanArgs& args, Stream stream) {
  if (Error error = CheckShape(args.shape)) return error;
  const PlanLayout layout = LayOutPlan(args.shape);
  const int threads = layout.warps * DeviceTeam::kLanes;
  const int64_t shared = CountSharedBytes(args.shape, layout);
  if (layout.num_tiles == 1) {
    return Launch(CountOneTileKernel, 1, threads, shared, stream, args, layout);
  }
  Error error = Launch(CountTilesKernel, layout.num_tiles, threads, shared, stream, args, layout);
  const int64_t warps = kThreads / DeviceTeam::kLanes;
  if (error == nullptr) {
    const int64_t blocks = BlocksFor(layout.bins, warps, 4);
    error = Launch(ScanTilesKernel, blocks, kThreads, 0, stream, args, layout);
  }
  if (error == nullptr) {
    error = Launch(SortTilesKernel, layout.num_tiles, threads, shared, stream, args, layout);
  }
  return error;
}

Error LaunchPlanFinish(const PlanArgs& args, const Table* table, Stream stream) {
  if (Error error = CheckShape(args.shape)) return error;
  const PlanLayout layout = LayOutPlan(args.shape);
  const int64_t ranks = args.shape.num_ranks;
  const int64_t shared = FinishSharedBytes(args.shape);
  const int64_t work = std::max(args.shape.assignments(), args.shape.capacity);
  if (work <= kSmallPlan) {
    return Launch(FinishSmallPlanKernel, ranks, kSmallThreads, shared, stream, args, layout, table);
  }
  Error error = Launch(LayOutRanksKernel, ranks, kThreads, shared, stream, args, layout, table);
  const int64_t blocks = BlocksFor(work, kThreads, 8);
  if (error == nullptr) {
    error = Launch(PlaceAllKernel, blocks, kThreads, shared, stream, args, layout, table);
  }
  if (error == nullptr && args.chain != nullptr) {
    error = Launch(ChainAllKernel, blocks, kThreads, 0, stream, args, layout, table);
  }
  return error;
}

}  // namespace jax_fusco::cuda
