// Memory of a GPU for tests and benchmarks. What CUDA refuses ends the program.
#ifndef JAX_FUSCO_TESTS_GPU_GPU_MEMORY_H_
#define JAX_FUSCO_TESTS_GPU_GPU_MEMORY_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tests/native/check.h"
#include "xla_ffi/core/status.h"
#include "xla_ffi/engine/cuda/handshake.h"

namespace jax_fusco::testing {

inline void Must(cudaError_t error, const char* file, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: CUDA: %s\n", file, line, cudaGetErrorString(error));
  std::_Exit(1);
}
inline void Must(cuda::Error error, const char* file, int line) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s:%d: a launcher: %s\n", file, line, error);
  std::_Exit(1);
}
inline void Must(const Status& status, const char* file, int line) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, status.message.c_str());
  std::_Exit(1);
}
#define MUST(call) ::jax_fusco::testing::Must((call), __FILE__, __LINE__)

// Bytes of the GPU that live as long as this.
class GpuBytes {
 public:
  explicit GpuBytes(int64_t bytes) : size_(bytes) {
    MUST(cudaMalloc(&data_, static_cast<size_t>(std::max<int64_t>(1, bytes))));
  }
  GpuBytes(GpuBytes&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
  }
  ~GpuBytes() { cudaFree(data_); }

  char* data() const { return static_cast<char*>(data_); }
  int64_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  int64_t size_;
};

inline void Upload(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) MUST(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyHostToDevice));
}
inline void Download(void* to, const void* from, int64_t bytes) {
  if (bytes > 0) MUST(cudaMemcpy(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost));
}
template <typename T>
std::vector<T> Downloaded(const T* from, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  Download(values.data(), from, count * static_cast<int64_t>(sizeof(T)));
  return values;
}

// The arrays of a case of the host, on the GPU: each as far behind a multiple of 16 bytes as there.
class Mirror {
 public:
  // `guarded`: bytes on both sides are watched. Without, an array ends where its allocation ends,
  // for tools that watch themselves.
  explicit Mirror(bool guarded) : guard_(guarded ? 256 : 0) {}

  // Where the GPU has a copy of `bytes` of the host.
  template <typename T>
  const T* In(const T* host, int64_t bytes) {
    return reinterpret_cast<const T*>(Add(host, bytes, nullptr));
  }
  // The same, for Back.
  template <typename T>
  T* Out(T* host, int64_t bytes) {
    return reinterpret_cast<T*>(Add(host, bytes, reinterpret_cast<char*>(host)));
  }
  // Takes over what kernels wrote, and checks that they wrote nowhere else.
  void Back() {
    for (const Part& part : parts_) {
      const std::vector<char> all = Downloaded(part.all.data(), part.all.size());
      if (part.host != nullptr) std::copy_n(all.data() + part.begin, part.bytes, part.host);
      int64_t touched = 0;
      for (int64_t i = 0; i < part.all.size(); ++i) {
        const bool inside = i >= part.begin && i < part.begin + part.bytes;
        touched += !inside && all[static_cast<size_t>(i)] != kGuardByte;
      }
      CHECK_EQ(touched, 0);
    }
  }

 private:
  static constexpr char kGuardByte = '\xa5';
  struct Part {
    GpuBytes all;
    int64_t begin;
    int64_t bytes;
    char* host;
  };

  char* Add(const void* host, int64_t bytes, char* back) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(host) % 16);
    const int64_t begin = guard_ + past;
    parts_.push_back({GpuBytes(begin + bytes + guard_), begin, bytes, back});
    char* const all = parts_.back().all.data();
    MUST(cudaMemset(all, kGuardByte, static_cast<size_t>(parts_.back().all.size())));
    Upload(all + begin, host, bytes);
    return all + begin;
  }

  int64_t guard_;
  std::vector<Part> parts_;
};

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_GPU_GPU_MEMORY_H_
