// The Python module cbam_ext._C: the facts of the build, as a dictionary.
//
// pybind11 alone, no torch headers. The operators are in plain libraries that know nothing of
// Python; this module only tells how they were built.

#include <pybind11/pybind11.h>

#include "build_info.h"  // written by the build: kBuildInfo, the facts as JSON

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info = py::module_::import("json").attr("loads")(kBuildInfo);
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "How the compiled part of cbam_ext was built.";
  module.def("build_info", &build_info,
             "Version, source hash, torch, compiler, flags, CUDA toolkit and architectures.");
}
