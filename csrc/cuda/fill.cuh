// One value in a whole map: the gates that are not there, and what they leave of gradients.
//
//   writes  small maps
//   launch  an element for each thread, or several
#pragma once

#include "launch.cuh"
#include "storage.cuh"

namespace cbam::cuda {

template <class A>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<A>)
    fill_kernel(A* map, int64_t count, A value) {
  wait_for_previous_launches();
  each_in_grid(count, [&](int64_t i) { store(map + i, value); });
}

template <class A>
void launch_fill(Launcher& launcher, A* map, int64_t count, A value) {
  launcher.launch_each(fill_kernel<A>, count, map, count, value);
}

}  // namespace cbam::cuda
