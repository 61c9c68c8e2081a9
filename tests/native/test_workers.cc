// Library threads: chunks that are shared out.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "tests/native/check.h"
#include "xla_ffi/engine/cpu/workers.h"

namespace jax_fusco::testing {
namespace {

void ParallelForVisitsEachChunkOnce() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([caller] {
      Random random(static_cast<uint64_t>(caller));
      for (int repeat = 0; repeat < 100; ++repeat) {
        std::vector<int> visits(static_cast<size_t>(random.Int(0, 40)));
        cpu::Workers::ParallelFor(static_cast<int>(random.Int(1, 8)),
                                  static_cast<int64_t>(visits.size()),
                                  [&](int64_t i) { ++visits[static_cast<size_t>(i)]; });
        CHECK_EQ(visits, std::vector<int>(visits.size(), 1));
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

#if defined(__x86_64__)
// XLA's threads flush subnormals to zero; chunks do not, whichever thread runs them, and the caller
// goes on in its own mode.
void ChunksKeepSubnormals() {
  for (int threads : {1, 4}) {
    std::vector<unsigned> modes(static_cast<size_t>(threads));
    std::thread([&] {
      __builtin_ia32_ldmxcsr(0x9fc0);  // flushes
      std::atomic<int> here{0};
      cpu::Workers::ParallelFor(threads, threads, [&](int64_t i) {
        ++here;  // a chunk for each thread, the caller's too: they wait for each other
        for (int wait = 0; here < threads && wait < 20000; ++wait) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        modes[static_cast<size_t>(i)] = __builtin_ia32_stmxcsr() & ~0x3fu;
      });
      CHECK_EQ(__builtin_ia32_stmxcsr() & ~0x3fu, 0x9fc0u & ~0x3fu);
    }).join();
    CHECK_EQ(modes, std::vector<unsigned>(modes.size(), 0x1f80u));
  }
}
#endif

}  // namespace
}  // namespace jax_fusco::testing

int main(int argc, char** argv) {
  using namespace jax_fusco::testing;
  return RunTests(argc, argv,
                  {
                      {"ParallelForVisitsEachChunkOnce", ParallelForVisitsEachChunkOnce},
#if defined(__x86_64__)
                      {"ChunksKeepSubnormals", ChunksKeepSubnormals},
#endif
                  });
}
