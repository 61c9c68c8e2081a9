// The bulk copy engine on the host. Everything happens as late as it may: a load when it is waited
// for, a store when its memory is wanted again; until then the stage of a load holds rubbish.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_HOST_BULK_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_HOST_BULK_H_

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "tests/native/check.h"

namespace jax_fusco::testing {

class HostBulk {
 public:
  explicit HostBulk(uint64_t* barriers) : barriers_(barriers) {}

  void Init(int stage) { barriers_[stage] = kReady; }
  void FenceShared() {}
  void Load(int stage, void* to, const void* from, int32_t bytes) {
    CHECK_EQ(barriers_[stage], kReady);
    CheckCopy({to, from, bytes});
    loads_.resize(16);
    CHECK_EQ(loads_[static_cast<size_t>(stage)].bytes, 0);
    std::memset(to, 0xee, static_cast<size_t>(bytes));
    loads_[static_cast<size_t>(stage)] = {to, from, bytes};
  }
  void Await(int stage) {
    Copy& load = loads_[static_cast<size_t>(stage)];
    CHECK(load.bytes > 0);
    load.Run();
    load = {};
  }
  void Store(void* to, const void* from, int32_t bytes) {
    CheckCopy({to, from, bytes});
    open_.push_back({to, from, bytes});
  }
  void Commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  template <int n>
  void Stored() {
    Drain(n);
  }
  void Finish() {
    CHECK(open_.empty());
    for (const Copy& load : loads_) CHECK_EQ(load.bytes, 0);
    Drain(0);
  }

 private:
  static constexpr uint64_t kReady = 0x7ead7;

  struct Copy {
    void* to = nullptr;
    const void* from = nullptr;
    int32_t bytes = 0;

    void Run() const { std::memcpy(to, from, static_cast<size_t>(bytes)); }
  };
  static void CheckCopy(const Copy& copy) {
    CHECK(copy.bytes > 0);
    CHECK_EQ(copy.bytes % 16, 0);
    CHECK_EQ(reinterpret_cast<uintptr_t>(copy.to) % 16, uintptr_t{0});
    CHECK_EQ(reinterpret_cast<uintptr_t>(copy.from) % 16, uintptr_t{0});
  }
  void Drain(size_t left) {
    while (groups_.size() > left) {
      for (const Copy& store : groups_.front()) store.Run();
      groups_.pop_front();
    }
  }

  uint64_t* const barriers_;
  std::vector<Copy> loads_;  // by stage
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_HOST_BULK_H_
