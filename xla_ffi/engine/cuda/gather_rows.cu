#include <atomic>
#include <cstdlib>
#include <cstring>

#include "xla_ffi/engine/cuda/bulk.h"
#include "xla_ffi/engine/cuda/gather_rows.h"
#include "xla_ffi/engine/cuda/gather_rows_bulk.h"
#include "xla_ffi/engine/cuda/launch.h"

namespace jax_fusco::cuda {
namespace {

constexpr int kWordThreads = 256;
constexpr int kBulkWarps = 4;
constexpr int64_t kBulkRowBytes = 1024;  // shorter rows move by words

template <typename Word, int kParts, int kWords>
__global__ void __launch_bounds__(kWordThreads)
    GatherRowsByWordsKernel(const __grid_constant__ GatherRowsArgs args, Table* table, int width) {
  GatherRowsByWords<Word, kParts, kWords>(DeviceTeam(), args, table, width);
}

__global__ void __launch_bounds__(kBulkWarps* DeviceTeam::kLanes, 1)
    GatherRowsInBulkKernel(const __grid_constant__ GatherRowsArgs args, Table* table,
                           const __grid_constant__ BulkShape shape) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  GatherRowsInBulk<DeviceBulk>(DeviceTeam(), args, table, shape);
#endif
}

// What a launch may use of shared memory: asked for once, because a smaller limit, set for one
// launch, would hold for the launch of another thread.
constexpr int64_t kMaxSharedBytes = 200 << 10;
static_assert(kCollectiveBytes + BulkMaxSharedBytes(kBulkWarps, DeviceTeam::kLanes) <=
              kMaxSharedBytes);

// Whether the current device moves rows in bulk, and this binary has that for it.
bool CanMoveInBulk() {
  const char* const wanted = std::getenv("JAX_FUSCO_BULK_COPIES");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return false;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, GatherRowsInBulkKernel) == cudaSuccess &&
         attributes.ptxVersion >= 90 && DeviceAttribute(cudaDevAttrComputeCapabilityMajor) >= 9 &&
         DeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kMaxSharedBytes &&
         cudaFuncSetAttribute(GatherRowsInBulkKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(kMaxSharedBytes)) == cudaSuccess;
}

bool MovesInBulk() {
  enum : int8_t { kUnknown, kNo, kYes };
  static std::atomic<int8_t> known[64] = {};  // by device: to ask takes microseconds
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  int8_t has = kUnknown;
  if (device < 64) has = known[device].load(std::memory_order_acquire);
  if (has == kUnknown) {
    has = CanMoveInBulk() ? kYes : kNo;
    if (device < 64) known[device].store(has, std::memory_order_release);
  }
  return has == kYes;
}

template <typename Word>
Error LaunchByWords(const GatherRowsArgs& args, Table* table, Stream stream) {
  const auto words = args.row_bytes / static_cast<int64_t>(sizeof(Word));
  const WordShape shape = ShapeWords(words, DeviceTeam::kLanes);
  const int64_t groups = kWordThreads / shape.width;
  if (!shape.is_long) {
    return Launch(GatherRowsByWordsKernel<Word, 4, 1>, BlocksFor(args.num_rows, groups * 4, 8),
                  kWordThreads, 0, stream, args, table, shape.width);
  }
  const int64_t segment = shape.width * 4;
  const int64_t parts = args.num_rows * ((words + segment - 1) / segment);
  return Launch(GatherRowsByWordsKernel<Word, 1, 4>, BlocksFor(parts, groups, 8), kWordThreads, 0,
                stream, args, table, shape.width);
}

Error LaunchInBulk(const GatherRowsArgs& args, Table* table, Stream stream) {
  const BulkShape shape = ShapeBulk(args.row_bytes, DeviceTeam::kLanes, BulkShape::kWarpBytes);
  const int64_t blocks =
      BlocksFor(args.num_rows * shape.pieces, int64_t{kBulkWarps} * shape.lanes, 1);
  return Launch(GatherRowsInBulkKernel, blocks, kBulkWarps * DeviceTeam::kLanes,
                BulkSharedBytes(shape, kBulkWarps), stream, args, table, shape);
}

}  // namespace

Error LaunchGatherRows(const GatherRowsArgs& args, Table* table, Stream stream) {
  if (args.num_rows == 0 || args.row_bytes == 0) return nullptr;
  return WithWord(args.row_bytes, args.out, [&](auto word) {
    const bool bulk = sizeof(word) == 16 && args.row_bytes >= kBulkRowBytes && MovesInBulk();
    return bulk ? LaunchInBulk(args, table, stream)
                : LaunchByWords<decltype(word)>(args, table, stream);
  });
}

}  // namespace jax_fusco::cuda
