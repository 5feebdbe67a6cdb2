// What the launches of backward hand on to the gradient of the input, one struct for each pixel and
// each channel, so that an element's part comes in one or two accesses.
#pragma once

#include "storage.cuh"

namespace cbam::cuda {

// What the gradient of an element needs of its pixel: the spatial gate; the gradient of s that
// reaches u, through the mean alone and, in the channel of the maximum, through both; and that
// channel. Written by map_grads.cuh.
template <class A>
struct alignas(16) PixelGrad {
  A sa;
  A through_mean;  // ds0 / C
  A through_both;  // ds0 / C + ds1
  int argmax;
  __device__ A grad_at(int channel) const {
    return argmax == channel ? through_both : through_mean;
  }
  __device__ void move_index(int by) { argmax += by; }
};

// What it needs of its channel beside the gate: the gradients of the mean (divided by P) and of the
// maximum over pixels, and the pixel of that maximum. Written by the MLP (mlp.cuh).
template <class A>
struct alignas(16) ChannelGrad {
  A daverage, dmaximum;
  long long argmax;
};

}  // namespace cbam::cuda
