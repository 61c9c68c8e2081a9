// Ranks of a call for the tests of movers: plans, tables, memory that may lie anywhere.
#ifndef JAX_FUSCO_TESTS_NATIVE_CUDA_RANK_CASES_H_
#define JAX_FUSCO_TESTS_NATIVE_CUDA_RANK_CASES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/naive_plan.h"
#include "xla_ffi/engine/cuda/handshake.h"
#include "xla_ffi/engine/cuda/kernels.h"

namespace jax_fusco::testing {

// Rows of one token of one source rank in ascending order, written as chains.
inline Ints NaiveChain(const PlanShape& shape, const PlanArrays& plan) {
  Ints chain(plan.source.size(), 0);
  std::map<std::pair<int32_t, int64_t>, Ints> rows;  // by source rank and token
  for (size_t c = 0; c < chain.size(); ++c) {
    if (plan.source[c] < 0) continue;
    rows[{plan.source_rank[c], plan.source[c] / shape.k}].push_back(static_cast<int32_t>(c));
  }
  for (const auto& [token, links] : rows) {
    for (size_t i = 0; i < links.size(); ++i) {
      const bool last = i + 1 == links.size();
      const int32_t next = last ? static_cast<int32_t>(chain.size()) : links[i + 1];
      chain[static_cast<size_t>(links[i])] = i == 0 ? next : -1 - next;
    }
  }
  return chain;
}

// Bytes that end where the memory ends, so that the sanitizers see what lies behind, and begin
// `offset` bytes behind a multiple of 16.
class Memory {
 public:
  Memory(int64_t bytes, int64_t offset, char value = 'x')
      : offset_(static_cast<size_t>(offset)),
        size_(static_cast<size_t>(bytes)),
        all_(static_cast<char*>(::operator new(offset_ + size_, std::align_val_t{16}))) {
    std::memset(all_, value, offset_ + size_);
  }
  Memory(int64_t bytes, int64_t offset, Random& random) : Memory(bytes, offset) {
    for (int64_t i = 0; i < bytes; i += 8) {
      const uint64_t bits = random.Bits();
      std::memcpy(at(i), &bits, static_cast<size_t>(std::min<int64_t>(8, bytes - i)));
    }
  }
  Memory(Memory&& other) noexcept : offset_(other.offset_), size_(other.size_), all_(other.all_) {
    other.all_ = nullptr;
  }
  ~Memory() { ::operator delete(all_, std::align_val_t{16}); }

  char* at(int64_t byte = 0) const { return all_ + offset_ + byte; }
  std::vector<char> Copy() const { return {at(), at() + size_}; }

 private:
  size_t offset_;
  size_t size_;
  char* all_;
};

// The plans of a random step and the tables of its ranks.
struct Ranks {
  PlanShape shape;
  std::vector<PlanArrays> plans;
  std::vector<Ints> chains;
  std::vector<cuda::Table> tables;

  Ranks(const PlanShape& shape_in, Random& random)
      : shape(shape_in), plans(NaivePlan(shape, RandomIds(shape, random))) {
    for (int64_t r = 0; r < shape.num_ranks; ++r) {
      chains.push_back(NaiveChain(shape, plans[static_cast<size_t>(r)]));
      chains.back().reserve(1);  // never null
      tables.push_back({});
      tables.back().rank = static_cast<int32_t>(r);
      tables.back().num_ranks = static_cast<int32_t>(shape.num_ranks);
    }
  }
  size_t size() const { return plans.size(); }

  // What every rank is told of the operand of rank `p`.
  void Publish(size_t p, int operand, const void* at) {
    for (cuda::Table& table : tables) table.operand[p][operand] = at;
  }
  void CheckNoFailure() const {
    for (const cuda::Table& table : tables) CHECK_EQ(table.failure, 0);
  }
};

inline PlanShape SmallShape(Random& random, int64_t ranks) {
  PlanShape shape = RandomShape(random, ranks);
  shape.tokens = std::min<int64_t>(shape.tokens, 64 / ranks);
  shape.alignment = std::min<int64_t>(shape.alignment, 8);
  shape.capacity = std::min<int64_t>(shape.capacity, 200);
  return shape;
}

// Checks what a mover says of an index that does not exist.
inline void CheckBadIndex(const cuda::Table& table, int32_t of, int32_t rank, int32_t index) {
  CHECK_EQ(table.failure, static_cast<int32_t>(cuda::Failure::kBadIndex));
  CHECK_EQ(table.phase, static_cast<int32_t>(cuda::Phase::kMove));
  CHECK_EQ(table.peer, of);
  CHECK_EQ(cuda::RankOfBadIndex(table.detail), rank);
  CHECK_EQ(cuda::IndexOfBadIndex(table.detail), index);
}

}  // namespace jax_fusco::testing

#endif  // JAX_FUSCO_TESTS_NATIVE_CUDA_RANK_CASES_H_
