// The team of lanes that runs a kernel, as its program sees it.
//
// The logic of each kernel is a template over a Team, so that the same lines run on a GPU
// (DeviceTeam) and, in the tests, on threads of the host, where a race checker watches them. A
// program may ask of its team:
//
//   Team::kLanes                             lanes of a warp
//   block(), num_blocks()                    of the grid
//   thread(), num_threads()                  of the block
//   lane(), warp(), num_warps()              of the block
//   shared()                                 the block's shared memory, 128-byte aligned
//   collective()                             int64[num_warps()], for Sum and Scan below
//   Sync()                                   all threads of the block, none missing
//   SyncWarp(), Shuffle(value, from),        all lanes of the warp, none missing
//     Match(key)                             (Match: the lanes whose key is the same, as bits)
//   Load(p), Add(p, n), Exchange(p, n),      atomic; the last three return what was there
//     CompareExchange(p, expected, n)
//   IsLastBlock(tickets)                     true for the block that comes last, which then sees
//                                            what all others wrote; `tickets` starts at zero
#ifndef JAX_FUSCO_ENGINE_CUDA_TEAM_H_
#define JAX_FUSCO_ENGINE_CUDA_TEAM_H_

#include <cstdint>

#if defined(__CUDACC__)
#define JAX_FUSCO_PROGRAM __device__
#define JAX_FUSCO_UNROLL _Pragma("unroll")
#else
#define JAX_FUSCO_PROGRAM
#define JAX_FUSCO_UNROLL
#endif

namespace jax_fusco::cuda {

inline constexpr int kMaxWarps = 32;  // of a block
inline constexpr int kCollectiveBytes = kMaxWarps * 8;

// Which thread of the grid this is, to share out work one by one.
template <typename Team>
JAX_FUSCO_PROGRAM int64_t ThreadOfGrid(const Team& team) {
  return static_cast<int64_t>(team.block()) * team.num_threads() + team.thread();
}
template <typename Team>
JAX_FUSCO_PROGRAM int64_t ThreadsOfGrid(const Team& team) {
  return static_cast<int64_t>(team.num_blocks()) * team.num_threads();
}
template <typename Team>
JAX_FUSCO_PROGRAM int64_t WarpOfGrid(const Team& team) {
  return static_cast<int64_t>(team.block()) * team.num_warps() + team.warp();
}
template <typename Team>
JAX_FUSCO_PROGRAM int64_t WarpsOfGrid(const Team& team) {
  return static_cast<int64_t>(team.num_blocks()) * team.num_warps();
}

// Over `width` neighbouring lanes, a power of two: every lane gets the sum, always in one order.
template <typename Team, typename T>
JAX_FUSCO_PROGRAM T SumOfLanes(const Team& team, T value, int width = Team::kLanes) {
  for (int step = width / 2; step > 0; step /= 2) value += team.Shuffle(value, team.lane() ^ step);
  return value;
}

// The sum over the lanes up to and with this one, among `width` neighbours.
template <typename Team, typename T>
JAX_FUSCO_PROGRAM T ScanOfLanes(const Team& team, T value, int width = Team::kLanes) {
  const int within = team.lane() % width;
  for (int step = 1; step < width; step *= 2) {
    const T before = team.Shuffle(value, within >= step ? team.lane() - step : team.lane());
    if (within >= step) value += before;
  }
  return value;
}

// Every thread of the block gets the sum.
template <typename Team>
JAX_FUSCO_PROGRAM int64_t SumOfBlock(const Team& team, int64_t value) {
  value = SumOfLanes(team, value);
  if (team.lane() == 0) team.collective()[team.warp()] = value;
  team.Sync();
  int64_t sum = 0;
  for (int w = 0; w < team.num_warps(); ++w) sum += team.collective()[w];
  team.Sync();
  return sum;
}

template <typename Team>
JAX_FUSCO_PROGRAM int64_t MaxOfBlock(const Team& team, int64_t value) {
  for (int step = Team::kLanes / 2; step > 0; step /= 2) {
    const int64_t other = team.Shuffle(value, team.lane() ^ step);
    value = other > value ? other : value;
  }
  if (team.lane() == 0) team.collective()[team.warp()] = value;
  team.Sync();
  for (int w = 0; w < team.num_warps(); ++w) {
    const int64_t other = team.collective()[w];
    value = other > value ? other : value;
  }
  team.Sync();
  return value;
}

// The sum over all threads of the block before this one.
template <typename Team>
JAX_FUSCO_PROGRAM int64_t ScanOfBlock(const Team& team, int64_t value) {
  const int64_t with = ScanOfLanes(team, value);
  if (team.lane() == Team::kLanes - 1) team.collective()[team.warp()] = with;
  team.Sync();
  int64_t before = with - value;
  for (int w = 0; w < team.warp(); ++w) before += team.collective()[w];
  team.Sync();
  return before;
}

// Replaces the n values in shared memory by the sums over those before each. Syncs before and
// after.
template <typename Team, typename T>
JAX_FUSCO_PROGRAM void ScanArray(const Team& team, T* values, int64_t n) {
  team.Sync();
  const int64_t share = (n + team.num_threads() - 1) / team.num_threads();
  const int64_t begin = share * team.thread();
  const int64_t end = begin + share < n ? begin + share : n;
  int64_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += values[i];
  sum = ScanOfBlock(team, sum);
  for (int64_t i = begin; i < end; ++i) {
    const T value = values[i];
    values[i] = static_cast<T>(sum);
    sum += value;
  }
  team.Sync();
}

#if defined(__CUDACC__)

struct DeviceTeam {
  static constexpr int kLanes = 32;
  static constexpr uint32_t kAll = 0xffffffffu;

  __device__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ int num_blocks() const { return static_cast<int>(gridDim.x); }
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int num_threads() const { return static_cast<int>(blockDim.x); }
  __device__ int lane() const { return thread() % kLanes; }
  __device__ int warp() const { return thread() / kLanes; }
  __device__ int num_warps() const { return num_threads() / kLanes; }
  __device__ static char* memory() {
    extern __shared__ __align__(128) char shared[];
    return shared;
  }
  __device__ char* shared() const { return memory() + kCollectiveBytes; }
  __device__ int64_t* collective() const { return reinterpret_cast<int64_t*>(memory()); }

  __device__ void Sync() const { __syncthreads(); }
  __device__ void SyncWarp() const { __syncwarp(); }
  template <typename T>
  __device__ T Shuffle(T value, int from) const {
    return __shfl_sync(kAll, value, from);
  }
  __device__ uint32_t Match(int32_t key) const { return __match_any_sync(kAll, key); }

  __device__ int32_t Load(const int32_t* p) const {
    return *const_cast<const volatile int32_t*>(p);
  }
  __device__ int32_t Add(int32_t* p, int32_t n) const { return atomicAdd(p, n); }
  __device__ int32_t Exchange(int32_t* p, int32_t n) const { return atomicExch(p, n); }
  __device__ int32_t CompareExchange(int32_t* p, int32_t expected, int32_t n) const {
    return atomicCAS(p, expected, n);
  }
  __device__ bool IsLastBlock(int32_t* tickets) const {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (thread() == 0) last = atomicAdd(tickets, 1) == num_blocks() - 1;
    __syncthreads();
    __threadfence();
    return last;
  }
};

#endif  // __CUDACC__

JAX_FUSCO_PROGRAM inline int CountBits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_TEAM_H_
