// jax_fusco._cuda: the engine of NVIDIA GPUs. Importing it needs neither a GPU nor a driver.
#include <nanobind/nanobind.h>

#include "xla_ffi/bindings/targets.h"
#include "xla_ffi/engine/cuda/devices.h"
#include "xla_ffi/engine/cuda/kernels.h"

namespace nb = nanobind;

namespace jax_fusco {
namespace {

int64_t PlanScratchBytes(int64_t num_ranks, int64_t tokens, int64_t k, int64_t num_experts,
                         int64_t capacity, int64_t alignment) {
  return cuda::PlanScratchBytes({num_ranks, tokens, k, num_experts, capacity, alignment});
}

nb::dict Machine() {
  const cuda::Machine machine = cuda::DescribeMachine();
  nb::list devices;
  for (const cuda::Device& device : machine.devices) {
    nb::list reaches;
    for (const bool peer : device.reaches) reaches.append(peer);
    nb::dict entry;
    entry["name"] = device.name.c_str();
    entry["compute_capability"] = nb::make_tuple(device.major, device.minor);
    entry["memory_bytes"] = device.memory_bytes;
    entry["reaches"] = reaches;
    devices.append(entry);
  }
  nb::dict out;
  out["driver"] = machine.driver;
  out["runtime"] = machine.runtime;
  out["error"] = machine.error.c_str();
  out["devices"] = devices;
  return out;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "The fused engine's custom calls on NVIDIA GPUs, as capsules for jax.ffi.";
  DefineTargets(m, CudaTargets);
  using namespace nb::literals;
  m.def("plan_scratch_bytes", &PlanScratchBytes, "num_ranks"_a, "tokens"_a, "k"_a, "num_experts"_a,
        "capacity"_a, "alignment"_a,
        "Bytes of device memory that planning such a shuffle needs beside its results.");
  m.attr("max_experts") = cuda::kMaxExperts;
  m.attr("max_ranks") = cuda::kMaxRanks;
  m.def(
      "machine", &Machine,
      "What CUDA says of this machine: driver and runtime as 1000 * major + 10 * minor (driver 0: "
      "none), error (empty: none), devices.");
}

}  // namespace jax_fusco
