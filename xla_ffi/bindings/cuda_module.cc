// jax_fusco._cuda: the engine of NVIDIA GPUs. Importing it needs neither a GPU nor a driver.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/bindings/targets.h"
#include "xla_ffi/engine/cuda/devices.h"
#include "xla_ffi/engine/cuda/kernels.h"
#include "xla_ffi/engine/cuda/processes.h"
#include "xla_ffi/engine/cuda/shared_memory.h"

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
    entry["shares"] = device.shares;
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

// Calls Python from a thread of the runtime.
template <typename Body>
Status WithPython(const Body& body) {
  const nb::gil_scoped_acquire gil;
  try {
    return body();
  } catch (const std::exception& error) {
    return Status::Internal(Concat("jax_fusco: talking to the other processes: ", error.what()));
  }
}

// The callables live to the end of the process, as long as a thread may call them.
void Connect(int process, int num_processes, nb::object domain, nb::object put, nb::object get,
             std::string nccl) {
  const nb::handle ask_domain = domain.release();
  const nb::handle do_put = put.release();
  const nb::handle do_get = get.release();
  cuda::Store store;
  store.process = process;
  store.num_processes = num_processes;
  store.domain = [ask_domain] {
    std::string name;
    WithPython([&] {
      name = nb::cast<std::string>(ask_domain());
      return Status::Ok();
    });
    return name;
  };
  store.put = [do_put](const std::string& key, const std::string& value) {
    return WithPython([&] {
      do_put(key, value);
      return Status::Ok();
    });
  };
  store.get = [do_get](const std::string& key, double timeout_s, std::string* value) {
    return WithPython([&] {
      const nb::object found = do_get(key, timeout_s);
      if (found.is_none()) return Status::DeadlineExceeded(key);
      *value = nb::cast<std::string>(found);
      return Status::Ok();
    });
  };
  cuda::SetNcclHint(std::move(nccl));
  cuda::Connect(std::move(store));
}

std::vector<std::string> Exchange(const std::string& value) {
  if (cuda::Connected() == nullptr) return {value};
  std::vector<std::string> values;
  Status status;
  {
    const nb::gil_scoped_release no_gil;
    status = cuda::Exchange(*cuda::Connected(), value, &values);
  }
  if (!status.ok()) throw std::runtime_error(status.message);
  return values;
}

nb::dict Nccl(const std::string& path) {
  cuda::Nccl nccl;
  const Status status = cuda::LoadNccl(path, &nccl);
  nb::dict out;
  out["version"] = nccl.version;
  out["error"] = status.message.c_str();
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
  m.def("connect", &Connect, "process"_a, "num_processes"_a, "domain"_a, "put"_a, "get"_a, "nccl"_a,
        "Tells the engine once through what the job's processes find each other.");
  m.def("exchange", &Exchange, "value"_a,
        "Every process's value, through the store; as the engine does, without a device.");
  m.def("nccl", &Nccl, "path"_a,
        "The NCCL at a path, or the system's: version as 10000 * major + 100 * minor + patch (0: "
        "none), and error, why windows cannot work with it (empty: they can).");
  m.def(
      "machine", &Machine,
      "What CUDA says of this machine: driver and runtime as 1000 * major + 10 * minor (driver 0: "
      "none), error (empty: none), devices.");
}

}  // namespace jax_fusco
