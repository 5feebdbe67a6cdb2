// Chooses the instruction set at run time: one binary serves every machine.
#include "kernels.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace cbam::cpu {
namespace {

struct InstructionSet {
  const char* name;
  const KernelTable* table;
};

// In the order of KernelTable::isa. A machine that has one has all before it.
constexpr InstructionSet kSets[] = {
    {"generic", &generic::kTable},
#if defined(__x86_64__)
    {"avx2", &avx2::kTable},
    {"avx512", &avx512::kTable},
#endif
};

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  // Every machine with AVX2 has F16C, which not every compiler can be asked about.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// What users get.
const KernelTable* choose_table() {
  const int best = best_isa();
  const char* wish = std::getenv("CBAM_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return kSets[best].table;
  for (int isa = 0; isa <= best; ++isa) {
    if (std::strcmp(wish, kSets[isa].name) == 0) return kSets[isa].table;
  }
  std::fprintf(stderr,
               "cbam_ext: CBAM_CPU_ISA=%s is unknown or not supported by this machine (generic, "
               "avx2 and avx512 are known); using the best supported instruction set.\n",
               wish);
  return kSets[best].table;
}

// Relaxed order is enough everywhere: what the pointer leads to is constant.
std::atomic<const KernelTable*>& table_in_use() {
  static std::atomic<const KernelTable*> table{choose_table()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *table_in_use().load(std::memory_order_relaxed); }

const KernelTable* use_kernels(int64_t isa) {
  if (isa < 0 || isa > best_isa()) return nullptr;
  return table_in_use().exchange(kSets[isa].table, std::memory_order_relaxed);
}

}  // namespace cbam::cpu
