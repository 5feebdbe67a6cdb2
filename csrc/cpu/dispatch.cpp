// Chooses the instruction set at run time: one binary serves every machine.
#include "kernels.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cbam::cpu {
namespace {

const KernelTable* best_table() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return &avx512::kTable;
  }
  // Every machine with AVX2 has F16C, which not every compiler can be asked about.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kTable;
#endif
  return &generic::kTable;
}

const KernelTable* choose_table() {
  const KernelTable* best = best_table();
  const char* name = std::getenv("CBAM_CPU_ISA");
  if (name == nullptr || *name == '\0') return best;
  const KernelTable* asked = nullptr;
  if (std::strcmp(name, "generic") == 0) asked = &generic::kTable;
#if defined(__x86_64__)
  if (std::strcmp(name, "avx2") == 0) asked = &avx2::kTable;
  if (std::strcmp(name, "avx512") == 0) asked = &avx512::kTable;
#endif
  if (asked != nullptr && asked->isa <= best->isa) return asked;
  std::fprintf(stderr,
               "cbam_ext: CBAM_CPU_ISA=%s is unknown or not supported by this machine (generic, "
               "avx2 and avx512 are known); using the best supported instruction set.\n",
               name);
  return best;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* const table = choose_table();
  return *table;
}

}  // namespace cbam::cpu
