#include "xla_ffi/engine/cpu/rows.h"

#include "xla_ffi/engine/cpu/products.h"

namespace jax_fusco::cpu {

const char* IsaName(Isa isa) {
  return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "generic";
}

Isa BestIsa() {
#if defined(__x86_64__)
  static const Isa best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
        !__builtin_cpu_supports("f16c")) {
      return Isa::kGeneric;
    }
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 ? Isa::kAvx512 : Isa::kAvx2;
  }();
  return best;
#else
  return Isa::kGeneric;
#endif
}

const RowKernels& RowKernels::For(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return Avx512RowKernels();
  if (isa == Isa::kAvx2) return Avx2RowKernels();
#endif
  (void)isa;
  return GenericRowKernels();
}

bool HasBf16Products() {
#if defined(__x86_64__)
  static const bool has = [] {
    __builtin_cpu_init();
    return BestIsa() == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16");
  }();
  return has;
#else
  return false;
#endif
}

const Products* Products::For(Float type, Isa isa) {
#if defined(__x86_64__)
  if (isa != Isa::kAvx512) return nullptr;
  return type == Float::kBf16 && HasBf16Products() ? &Avx512Bf16Products() : &Avx512Products();
#else
  (void)type;
  (void)isa;
  return nullptr;
#endif
}

}  // namespace jax_fusco::cpu
