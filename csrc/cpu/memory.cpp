#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cbam::cpu {

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;  // of x86-64 and of arm64 with pages of 4 KiB
  constexpr int64_t kLeast = 4 << 20;
  if (bytes < kLeast) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  // Advice: whether it is taken changes no result.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace cbam::cpu
