#include "xla_ffi/engine/cpu/memory.h"

#include <cstdio>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace jax_fusco::cpu {
namespace {

// Smaller ranges are cheaper to write than to hand back.
constexpr int64_t kReleaseFrom = 2 * kHugePage;

uintptr_t Down(uintptr_t address, int64_t multiple) {
  return address - address % static_cast<uintptr_t>(multiple);
}
uintptr_t Up(uintptr_t address, int64_t multiple) {
  return Down(address + static_cast<uintptr_t>(multiple) - 1, multiple);
}

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
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = Up(address, kHugePage);
  const uintptr_t last = Down(address + static_cast<uintptr_t>(bytes), kHugePage);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

int64_t ReleaseAsZero(void* data, int64_t bytes) {
#if defined(__linux__)
  // From a huge page on, so that the one before it, which gets rows, may be huge. To the last page.
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = address + static_cast<uintptr_t>(bytes);
  const uintptr_t first = Up(address, kHugePage);
  const uintptr_t last = Down(end, sysconf(_SC_PAGESIZE));
  if (last < first + kReleaseFrom) return bytes;
  if (!Release(reinterpret_cast<char*>(first), static_cast<int64_t>(last - first))) return bytes;
  std::memset(reinterpret_cast<void*>(last), 0, end - last);
  return static_cast<int64_t>(first - address);
#else
  (void)data;
  return bytes;
#endif
}

}  // namespace jax_fusco::cpu
