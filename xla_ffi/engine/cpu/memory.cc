#include "xla_ffi/engine/cpu/memory.h"

#include <cstdio>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace jax_fusco::cpu {
namespace {

// Smaller ranges are cheaper to write than to hand back.
constexpr int64_t kReleaseFrom = 2 * kHugePage;

// The part of [data, data + bytes) that consists of whole huge pages.
struct Interior {
  char* begin;
  int64_t bytes;

  Interior(void* data, int64_t bytes_in) {
    const auto first = reinterpret_cast<uintptr_t>(data);
    const uintptr_t aligned = (first + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (first + static_cast<uintptr_t>(bytes_in)) / kHugePage * kHugePage;
    begin = static_cast<char*>(data) + (aligned - first);
    bytes = end > aligned ? static_cast<int64_t>(end - aligned) : 0;
  }
};

#if defined(__linux__)
// Gives the pages back. False if the memory may hold something else than zeros now.
bool Release(char* begin, int64_t bytes) {
  // Sentinels tell private anonymous memory, whose pages come back as zeros, from anything else.
  volatile char* first = begin;
  volatile char* last = begin + bytes - 1;
  *first = 1;
  *last = 1;
  return madvise(begin, static_cast<size_t>(bytes), MADV_DONTNEED) == 0 && *first == 0 &&
         *last == 0;
}
#endif

}  // namespace

bool HugePagesAvailable() {
#if defined(__linux__)
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (file == nullptr) return false;
  char text[64] = {};
  const size_t length = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  return length > 0 && std::strstr(text, "[never]") == nullptr;
#else
  return false;
#endif
}

void AdviseHugePages(void* data, int64_t bytes) {
#if defined(__linux__)
  const Interior interior(data, bytes);
  if (interior.bytes > 0) {
    madvise(interior.begin, static_cast<size_t>(interior.bytes), MADV_HUGEPAGE);
  }
#else
  (void)data;
  (void)bytes;
#endif
}

void FillZero(void* data, int64_t bytes) {
#if defined(__linux__)
  const Interior interior(data, bytes);
  if (interior.bytes >= kReleaseFrom && Release(interior.begin, interior.bytes)) {
    char* const begin = static_cast<char*>(data);
    char* const interior_end = interior.begin + interior.bytes;
    std::memset(begin, 0, static_cast<size_t>(interior.begin - begin));
    std::memset(interior_end, 0, static_cast<size_t>(begin + bytes - interior_end));
    return;
  }
#endif
  if (bytes > 0) std::memset(data, 0, static_cast<size_t>(bytes));
}

}  // namespace jax_fusco::cpu
