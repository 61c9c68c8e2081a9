#include "xla_ffi/engine/cuda/launch.h"
#include "xla_ffi/engine/cuda/ragged_all_to_all.h"

namespace jax_fusco::cuda {
namespace {

constexpr int kThreads = 256;
// A block for so many bytes of the result: which of them arrive is known on the device only.
constexpr int64_t kBlockBytes = 32 << 10;

template <typename Word>
__global__ void __launch_bounds__(kThreads, 4)
    RaggedAllToAllKernel(const __grid_constant__ RaggedAllToAllArgs args, Table* table) {
  RaggedAllToAll<Word>(DeviceTeam(), args, table);
}

}  // namespace

Error LaunchRaggedAllToAll(const RaggedAllToAllArgs& args, Table* table, Stream stream) {
  const int64_t blocks = BlocksFor(args.rows * args.row_bytes, kBlockBytes, 4);
  return WithWord(args.row_bytes, args.result, [&](auto word) {
    return Launch(RaggedAllToAllKernel<decltype(word)>, blocks, kThreads,
                  RaggedSharedBytes(kThreads), stream, args, table);
  });
}

}  // namespace jax_fusco::cuda
