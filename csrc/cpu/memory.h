// Memory that the kernels write for the first time.
#pragma once

#include <cstdint>

namespace cbam::cpu {

// Asks the system to back large fresh memory by huge pages, as NumPy does for its arrays. A page
// that is touched for the first time costs an interrupt and its clearing; for outputs of many
// megabytes 4 KiB at a time that takes longer than the kernels. Harmless where the memory is in use
// already or the system has no such pages.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace cbam::cpu
