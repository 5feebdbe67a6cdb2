// Stands in for CUDA's header of this name where the kernels are compiled as plain C++.
//
// It offers the small part of CUDA that csrc/cuda uses and nothing else, so that a kernel which
// leaves that part does not compile here. There is no __shared__ on purpose: shared memory is
// dynamic and comes from emulation::shared_memory().
#pragma once

#include "emulation/intrinsics.h"
#include "emulation/launch.h"
