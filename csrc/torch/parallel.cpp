// PyTorch's thread pool behind cpu/parallel.h.
#include "abi.h"

#include "../cpu/parallel.h"

namespace cbam::cpu {

int64_t num_threads() { return torch::stable::get_num_threads(); }

void parallel_ranges(int64_t n, void (*body)(void* context, int64_t begin, int64_t end),
                     void* context) {
  torch::stable::parallel_for(0, n, 1,
                              [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace cbam::cpu
