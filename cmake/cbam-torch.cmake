# Where torch is, by asking a Python interpreter; CMakeLists.txt and the installed package read this
# file. find_package(Torch) could tell, but for a torch built with CUDA it demands a complete CUDA
# toolkit.

# Sets `result` to the folder of the torch that the interpreter `python` has; empty if it has none.
function(cbam_find_torch result python)
  # Without importing torch: that takes seconds, and only files are needed.
  execute_process(
    COMMAND "${python}" -c "
from importlib.util import find_spec
print(find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

# Sets `result` to what links a shared library even where the program refers to nothing in it. This
# is one item, since CMake may reorder and merge items.
function(cbam_keep_linked result library)
  set(${result} "-Wl,--push-state,--no-as-needed,\"${library}\",--pop-state" PARENT_SCOPE)
endfunction()

# Adds the target cbam::torch: what programs need of the torch in this folder.
function(cbam_add_torch folder with_cuda)
  set(libraries "${folder}/lib/libtorch_cpu.so" "${folder}/lib/libc10.so")
  if(with_cuda)
    # Else libcbam_cuda would load the libtorch_cuda of the torch that it was built with.
    cbam_keep_linked(torch_cuda "${folder}/lib/libtorch_cuda.so")
    list(APPEND libraries "${torch_cuda}")
  endif()
  add_library(cbam::torch INTERFACE IMPORTED)
  set_target_properties(cbam::torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${folder}/include;${folder}/include/torch/csrc/api/include"
    INTERFACE_LINK_LIBRARIES "${libraries}")
endfunction()
