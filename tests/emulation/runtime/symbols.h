// Names of kernels, for messages and counters.
#pragma once

#include <string>

namespace emulation {

// The function's name without its arguments; an empty string where the file of the library has no
// symbol table or is not an ELF file.
std::string function_name(const void* function);

}  // namespace emulation
