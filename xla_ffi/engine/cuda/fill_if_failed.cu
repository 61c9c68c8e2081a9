#include "xla_ffi/engine/cuda/fill_if_failed.h"
#include "xla_ffi/engine/cuda/launch.h"

namespace jax_fusco::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    FillIfFailedKernel(const __grid_constant__ Outputs outputs, const Table* table) {
  FillIfFailed(DeviceTeam(), outputs, table);
}

}  // namespace

Error LaunchFillIfFailed(const Output* outputs, int num_outputs, const Table* table,
                         Stream stream) {
  if (num_outputs > kMaxOutputs) return "too many outputs to fill at once";
  Outputs all{};
  all.count = num_outputs;
  std::copy(outputs, outputs + num_outputs, all.output);
  // Few blocks: they have nothing to do unless the call failed.
  return Launch(FillIfFailedKernel, Multiprocessors(), kThreads, 0, stream, all, table);
}

}  // namespace jax_fusco::cuda
