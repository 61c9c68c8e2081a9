// The handshake's kernels: one block each, a thread for each board and peer.
#include "xla_ffi/engine/cuda/handshake_program.h"
#include "xla_ffi/engine/cuda/launch.h"

namespace jax_fusco::cuda {
namespace {

// Peers' loads and stores come over NVLink, so all of these are at system scope.
struct BlockTeam {
  Outcome* shared;

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int num_threads() const { return static_cast<int>(blockDim.x); }
  __device__ Outcome* outcome() const { return shared; }
  __device__ void Sync() const { __syncthreads(); }
  __device__ bool First(Outcome* outcome) const { return atomicExch(&outcome->stop, 1) == 0; }
  __device__ bool Stopped(Outcome* outcome) const {
    return *static_cast<volatile int32_t*>(&outcome->stop) != 0;
  }
  __device__ uint64_t Acquire(const uint64_t* p) const {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
  }
  __device__ void Release(uint64_t* p, uint64_t value) const {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
  }
  __device__ uint64_t Read(const uint64_t* p) const {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
  }
  __device__ void Write(uint64_t* p, uint64_t value) const {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
  }
  __device__ void Fence() const { __threadfence_system(); }
  __device__ uint64_t Now() const {
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value)::"memory");
    return value;
  }
  __device__ void Pause() const { __nanosleep(64); }
};

__global__ void __launch_bounds__(kMaxRanks) EnterKernel(const EnterArgs args) {
  __shared__ Outcome outcome;
  Enter(BlockTeam{&outcome}, args);
}

__global__ void __launch_bounds__(kMaxRanks) LeaveKernel(const Seat seat) {
  __shared__ Outcome outcome;
  Leave(BlockTeam{&outcome}, seat);
}

__global__ void StartRunKernel(Board* board, uint64_t run, uint64_t run_key, uint64_t settled) {
  StartRun(board, run, run_key, settled);
}

}  // namespace

Error LaunchEnter(const EnterArgs& args, Stream stream) {
  return Launch(EnterKernel, 1, kMaxRanks, 0, stream, args);
}

Error LaunchLeave(const Seat& seat, Stream stream) {
  return Launch(LeaveKernel, 1, kMaxRanks, 0, stream, seat);
}

Error LaunchStartRun(Board* board, uint64_t run, uint64_t run_key, uint64_t settled,
                     Stream stream) {
  return Launch(StartRunKernel, 1, 1, 0, stream, board, run, run_key, settled);
}

}  // namespace jax_fusco::cuda
