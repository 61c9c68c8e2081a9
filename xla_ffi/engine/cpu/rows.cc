#include "xla_ffi/engine/cpu/rows.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "xla_ffi/engine/cpu/products.h"

namespace jax_fusco::cpu {

const char* IsaName(Isa isa) {
  constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx"};
  return kNames[static_cast<size_t>(isa)];
}

#if defined(__x86_64__)
namespace {

bool HasTilesOfBf16() {
  constexpr unsigned kTilesOfBf16 = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, features = 0;
  return HasBf16Products() && __get_cpuid_count(7, 0, &a, &b, &c, &features) != 0 &&
         (features & kTilesOfBf16) != 0 && (features & kTiles) != 0;
}

// Whether Linux lets the process use tiles. From then on it refuses signal stacks that are too
// small for them, and it refuses this if a thread has such a stack already.
bool MayUseTiles() {
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
#else
  return false;
#endif
}

Isa BestWithoutTiles() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Isa::kGeneric;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::kAvx512 : Isa::kAvx2;
}

}  // namespace
#endif

bool HasIsa(Isa isa) {
#if defined(__x86_64__)
  static const Isa best = BestWithoutTiles();
  if (isa != Isa::kAmx) return isa <= best;
  static const bool tiles = HasTilesOfBf16();
  return tiles;
#else
  return isa == Isa::kGeneric;
#endif
}

Isa BestIsa() {
  Isa best = Isa::kGeneric;
  for (const Isa isa : kIsas) {
    if (HasIsa(isa)) best = isa;
  }
  return best;
}

const RowKernels& RowKernels::For(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return Avx512RowKernels();
  if (isa == Isa::kAvx2) return Avx2RowKernels();
#endif
  (void)isa;
  return GenericRowKernels();
}

bool HasBf16Products() {
#if defined(__x86_64__)
  return HasIsa(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const Products* Products::For(Float type, Isa isa) {
#if defined(__x86_64__)
  if (isa < Isa::kAvx512) return nullptr;
  if (type == Float::kBf16 && isa == Isa::kAmx && MayUseTiles()) return &AmxProducts();
  return type == Float::kBf16 && HasBf16Products() ? &Avx512Bf16Products() : &Avx512Products();
#else
  (void)type;
  (void)isa;
  return nullptr;
#endif
}

}  // namespace jax_fusco::cpu
