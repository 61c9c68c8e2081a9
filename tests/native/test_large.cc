// Buffers large enough for several threads, for writes past the caches, and for tails that are
// given back to the system in place of being written.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tests/native/check.h"
#include "tests/native/shuffle_cases.h"
#include "xla_ffi/engine/cpu/memory.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::testing {
namespace {

constexpr int64_t kMiB = 1 << 20;

bool All(const char* begin, int64_t bytes, char value) {
  return bytes == 0 ||
         (*begin == value && std::memcmp(begin, begin + 1, static_cast<size_t>(bytes - 1)) == 0);
}

// `rows` rows of each rank from all over the others, padding among them, then `tail` rows of tail.
std::vector<PlanArrays> LongPlan(int64_t ranks, int64_t rows, int64_t tail, int64_t tokens) {
  PlanShape shape;
  shape.num_ranks = ranks;
  shape.num_experts = ranks;
  shape.capacity = rows + tail;
  std::vector<PlanArrays> plans(static_cast<size_t>(ranks), PlanArrays(shape, -2));
  Random random(1);
  for (PlanArrays& plan : plans) {
    for (size_t m = 0; m < static_cast<size_t>(rows); ++m) {
      const bool padding = random.OneIn(10) && m + 1 < static_cast<size_t>(rows);
      plan.source_rank[m] = static_cast<int32_t>(padding ? -1 : random.Int(0, ranks - 1));
      plan.source[m] = static_cast<int32_t>(padding ? -1 : random.Int(0, tokens - 1));
    }
  }
  return plans;
}

// Gathers rows of some bytes into buffers full of 'x', at an odd address, and looks at every byte.
void CheckLongGather(int64_t ranks, int64_t rows, int64_t tail, int64_t bytes, bool zero_tail) {
  constexpr int64_t kTokens = 300;
  constexpr int64_t kGuard = 104;
  const std::vector<PlanArrays> plans = LongPlan(ranks, rows, tail, kTokens);
  Random random(2);
  std::vector<std::vector<Array>> in(static_cast<size_t>(ranks)), out(in.size());
  std::vector<Bytes> memory;
  for (size_t r = 0; r < in.size(); ++r) {
    in[r].emplace_back(kTokens, bytes, random);
    memory.emplace_back(static_cast<size_t>((rows + tail) * bytes + 2 * kGuard), 'x');
    out[r].emplace_back(0, 0);
    out[r][0].rows = {memory[r].data() + kGuard, rows + tail, bytes};
  }
  auto jobs = GatherJobs(plans, 1, in, out);
  for (auto& job : jobs) job->zero_tail = zero_tail;
  CHECK(Meet(std::move(jobs)).ok());
  const Bytes zeros(static_cast<size_t>(bytes));
  for (size_t r = 0; r < in.size(); ++r) {
    const Rows& got = out[r][0].rows;
    CHECK(All(memory[r].data(), kGuard, 'x') && All(got.At(rows + tail), kGuard, 'x'));
    for (size_t m = 0; m < static_cast<size_t>(rows); ++m) {
      const int32_t source = plans[r].source[m];
      const char* const expected =
          source < 0 ? zeros.data()
                     : in[static_cast<size_t>(plans[r].source_rank[m])][0].rows.At(source);
      const bool same = std::memcmp(got.At(static_cast<int64_t>(m)), expected, zeros.size()) == 0;
      if (!CHECK(same)) return;
    }
    CHECK(All(got.At(rows), tail * bytes, zero_tail ? '\0' : 'x'));
  }
}

void GatherPastTheCaches() {
  CheckLongGather(2, 3000, 0, 5760, true);
  CheckLongGather(3, 2000, 10, 4100, true);  // rows that begin anywhere in a line
  CheckLongGather(1, 90000, 5, 200, false);  // short rows
}

void LongTails() {
  CheckLongGather(2, 100, 3000, 5760, true);
  CheckLongGather(2, 100, 3000, 5760, false);
  CheckLongGather(2, 0, 30001, 333, true);
  CheckLongGather(4, 700, 1000, 5760, true);  // each under what is worth giving back, or around it
}

void ReduceWithThreads() {
  Random random(3);
  Step step(random, 2);
  step.shape.tokens = 1500;
  step.shape.k = 2;
  step.shape.num_experts = 4;
  step.shape.capacity = 4000;
  step.ids = RandomIds(step.shape, random);
  step.plans = NaivePlan(step.shape, step.ids);
  constexpr int64_t kLength = 700;
  const auto y = EachRank(2, [&](int64_t) { return Array(4000, kLength, Float::kF32, random); });
  const auto out = EachRank(2, [&](int64_t) { return Array(1500, kLength * 4); });
  CHECK(Meet(ReduceJobs(step, kLength, Float::kF32, Float::kF32, Float::kF32, y, {}, out)).ok());
  for (size_t r = 0; r < 2; ++r) {
    for (int64_t t = 0; t < 1500; ++t) {
      std::vector<float> expected(kLength);
      for (int64_t a = 2 * t; a < 2 * t + 2; ++a) {
        const int32_t slot = step.plans[r].slot[static_cast<size_t>(a)];
        if (slot < 0) continue;
        const auto peer = static_cast<size_t>(step.plans[r].slot_rank[static_cast<size_t>(a)]);
        const auto* row = reinterpret_cast<const float*>(y[peer].rows.At(slot));
        for (size_t i = 0; i < expected.size(); ++i) expected[i] += row[i];
      }
      if (!CheckSame(out[r].rows.At(t), expected.data(), kLength, Float::kF32, "out")) return;
    }
  }
}

#if defined(__x86_64__)
// XLA's threads flush subnormals to zero; sums of rows keep them, and leave the thread as it was.
void SumsKeepSubnormals() {
  Random random(4);
  Step step(random, 1);
  step.shape = PlanShape();
  step.shape.tokens = 1;
  step.shape.capacity = 1;
  step.plans = NaivePlan(step.shape, {{0}});
  std::vector<Array> y, out;
  y.emplace_back(1, 4);
  out.emplace_back(1, 4);
  const float tiny = 0x1p-140f;
  std::memcpy(y[0].data.data(), &tiny, 4);
  const unsigned mode = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x9fc0);
  const auto jobs = ReduceJobs(step, 1, Float::kF32, Float::kF32, Float::kF32, y, {}, out);
  const Status status = CallSite("site").Meet(At(0, 0, 0, 1), *jobs[0]);
  CHECK_EQ(__builtin_ia32_stmxcsr() & ~0x3fu, 0x9fc0u & ~0x3fu);
  __builtin_ia32_ldmxcsr(mode);
  CHECK(status.ok());
  CHECK(out[0].data == y[0].data);
}
#endif

#if defined(__linux__)
// Anonymous memory is given back and comes back as zeros; a shared mapping is left to the caller.
void ReleaseLeavesTheRestAlone() {
  for (bool shared : {false, true}) {
    const int64_t total = 16 * kMiB;
    void* const map = mmap(nullptr, static_cast<size_t>(total), PROT_READ | PROT_WRITE,
                           MAP_ANONYMOUS | (shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
    if (!CHECK(map != MAP_FAILED)) return;
    char* const data = static_cast<char*>(map);
    for (int64_t begin : {int64_t{0}, int64_t{1}, int64_t{4096}, 3 * kMiB + 77}) {
      for (int64_t end : {total, total - 1, 9 * kMiB, begin + 100, begin}) {
        std::memset(data, 'x', static_cast<size_t>(total));
        const int64_t left = cpu::ReleaseAsZero(data + begin, end - begin);
        CHECK(left >= 0 && left <= end - begin);
        CHECK(All(data, begin, 'x') && All(data + end, total - end, 'x'));
        CHECK(All(data + begin + left, end - begin - left, '\0'));
        if (shared) CHECK_EQ(left, end - begin);
        if (!shared && end - begin > 8 * kMiB) CHECK(left < cpu::kHugePage);
      }
    }
    munmap(map, static_cast<size_t>(total));
  }
}
#endif

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  setenv("JAX_FUSCO_THREADS", "3", 1);
  return RunTests(argc, argv,
                  {
                      {"GatherPastTheCaches", GatherPastTheCaches},
                      {"LongTails", LongTails},
                      {"ReduceWithThreads", ReduceWithThreads},
#if defined(__x86_64__)
                      {"SumsKeepSubnormals", SumsKeepSubnormals},
#endif
#if defined(__linux__)
                      {"ReleaseLeavesTheRestAlone", ReleaseLeavesTheRestAlone},
#endif
                  });
}
