// The one door to PyTorch: every translation unit that needs torch includes this header first.
//
// Only the LibTorch Stable ABI is used, so one binary runs on torch 2.10 and everything newer. The
// target version stands here and not on the command line, because the pybind11 headers that torch
// bundled before 2.13 refuse to compile where it is defined.
#pragma once

#define TORCH_TARGET_VERSION 0x020a000000000000  // torch 2.10

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
