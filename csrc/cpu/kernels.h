// The CPU kernels, one table per instruction set, and the choice among them.
#pragma once

#include "../problem.h"

namespace cbam::cpu {

struct KernelTable {
  int isa;  // 0 generic (the compiler's baseline), 1 AVX2 + FMA + F16C, 2 AVX-512
  void (*forward)(const ForwardArgs&);
  void (*apply)(const ApplyArgs&);
  void (*apply_backward)(const ApplyBackwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*pool)(const PoolArgs&);
  void (*channel_stats)(const ChannelStatsArgs&);
  void (*channel_stats_backward)(const ChannelStatsBackwardArgs&);
  void (*pool_backward)(const PoolBackwardArgs&);
};

// The table in use: at first the best one that this machine runs, or the one that the environment
// variable CBAM_CPU_ISA (generic, avx2 or avx512) names. A call of an operator asks once, so that
// all of it runs on one table; nothing that calls hand to each other depends on which.
const KernelTable& kernels();

// Puts the table of this instruction set in use, for calls of all threads that begin after it.
// Returns the one that was; null, with nothing changed, where the machine lacks the set.
const KernelTable* use_kernels(int64_t isa);

namespace generic {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

}  // namespace cbam::cpu
