// Parameters between PyTorch's memory (any dtype, any strides) and the kernels' (accumulator dtype,
// dense rows). Parameters are small and every element is touched once a call, so this is plain
// code.
#pragma once

#include "../problem.h"

namespace cbam::cpu {

// Reads a parameter of [rows, columns] elements into rows of row_stride elements.
template <class A>
void pack(const ParameterView& from, int64_t row_stride, A* to);

// Writes such rows into a parameter, rounding to its dtype; does nothing where its data is null.
template <class A>
void unpack(const A* from, int64_t row_stride, const ParameterView& to);

// The same parameter with its last two dimensions swapped.
ParameterView transposed(ParameterView view);

}  // namespace cbam::cpu
