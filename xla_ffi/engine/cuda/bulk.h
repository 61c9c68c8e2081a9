// The bulk copy engine of sm_90 and later, as one thread uses it.
#ifndef JAX_FUSCO_ENGINE_CUDA_BULK_H_
#define JAX_FUSCO_ENGINE_CUDA_BULK_H_

#include <cstdint>

namespace jax_fusco::cuda {

// Copies between global and shared memory, 16-byte aligned and a multiple of 16 bytes each.
// gather_rows_bulk.h says what the functions promise. One thread owns it, and `barriers`, one a
// stage.
class DeviceBulk {
 public:
  static __device__ uint32_t Shared(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
  }

  explicit __device__ DeviceBulk(uint64_t* barriers) : barriers_(Shared(barriers)) {}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __device__ void Init(int stage) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers_ + 8 * stage) : "memory");
  }
  // What this thread wrote to shared memory, barriers included, is known to the engine.
  __device__ void FenceShared() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __device__ void Load(int stage, void* to, const void* from, int32_t bytes) {
    const uint32_t barrier = barriers_ + 8 * stage;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(Shared(to)),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
  }
  __device__ void Await(int stage) {
    const uint32_t parity = parities_ >> stage & 1;
    parities_ ^= 1u << stage;
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}"
          : "=r"(done)
          : "r"(barriers_ + 8 * stage), "r"(parity)
          : "memory");
    }
  }
  __device__ void Store(void* to, const void* from, int32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(Shared(from)), "r"(bytes)
                 : "memory");
  }
  __device__ void Commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
  template <int n>
  __device__ void Stored() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(n) : "memory");
  }
  __device__ void Finish() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
#else
  // Never run: the launcher sees to that.
  __device__ void Init(int) {}
  __device__ void FenceShared() {}
  __device__ void Load(int, void*, const void*, int32_t) {}
  __device__ void Await(int) {}
  __device__ void Store(void*, const void*, int32_t) {}
  __device__ void Commit() {}
  template <int n>
  __device__ void Stored() {}
  __device__ void Finish() {}
#endif

 private:
  uint32_t barriers_;
  uint32_t parities_ = 0;  // of the stages' next completion
};

}  // namespace jax_fusco::cuda

#endif  // JAX_FUSCO_ENGINE_CUDA_BULK_H_
