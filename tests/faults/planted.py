"""The faults: realistic mistakes of somebody who edits this code."""

from __future__ import annotations

from .fault import Fault
from .promised import PROMISED

_CPU = (
    Fault(
        "cpu-last-of-equal-channels-wins",
        "csrc/cpu/nchw.h",
        "const IntVec<A> higher = u > maximum;  // strictly: the first of equals stays",
        "const IntVec<A> higher = u >= maximum;",
    ),
    Fault(
        "cpu-last-nan-wins",
        "csrc/cpu/forward.h",
        "static_cast<Int<A>>(c);\n        break;\n",
        "static_cast<Int<A>>(c);\n",
    ),
    Fault(
        "cpu-relu-drops-nan",
        "csrc/cpu/mlp.h",
        "return value <= 0 ? 0 : value;  // NaN stays NaN",
        "return value > 0 ? value : 0;",
    ),
    Fault(
        "cpu-tail-has-one-lane-too-many",
        "csrc/cpu/simd.h",
        "return iota<A>() < static_cast<Int<A>>(tail.count) ? v : broadcast(value);",
        "return iota<A>() <= static_cast<Int<A>>(tail.count) ? v : broadcast(value);",
    ),
    Fault(
        "cpu-tail-without-avx512-loses-a-lane",
        "csrc/cpu/simd.h",
        "for (int i = 0; i < tail.count; ++i) lanes[i] = p[i];",
        "for (int i = 0; i < tail.count - 1; ++i) lanes[i] = p[i];",
    ),
    Fault(
        "cpu-avx2-maximum-of-floats-keeps-the-other-nan",
        "csrc/cpu/simd.h",
        "(V)_mm256_max_ps((__m256)a, (__m256)b)",
        "(V)_mm256_max_ps((__m256)b, (__m256)a)",
    ),
    Fault(
        "cpu-best-instruction-set-cannot-be-wished-for",
        "csrc/cpu/dispatch.cpp",
        "for (int isa = 0; isa <= best; ++isa) {",
        "for (int isa = 0; isa < best; ++isa) {",
    ),
    Fault(
        "cpu-bfloat16-rounds-ties-up",
        "csrc/cpu/simd.h",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
        "(bits + 0x8000u) >> 16;",
    ),
    Fault(
        "cpu-band-before-its-halo-is-there",
        "csrc/cpu/tiles.h",
        "(tile + 1) * shape.tile / shape.w - shape.halo)",
        "(tile + 1) * shape.tile / shape.w)",
    ),
    Fault(
        "cpu-channels-last-with-padded-pixels",
        "csrc/cpu/nhwc.h",
        "return p * shape.c + c;",
        "return p * shape.padded_c + c;",
    ),
    Fault(
        "cpu-bias-of-fc2-gets-half-its-gradient",
        "csrc/cpu/parameter_grads.h",
        "static_cast<A>(2 * bias);  // the MLP ran twice",
        "static_cast<A>(bias);",
    ),
    Fault(
        "cpu-border-of-a-map-is-not-cleared",
        "csrc/cpu/convolution.h",
        "std::fill(row(shape, y) + shape.w, row(shape, y + 1), A{0});",
        "std::fill_n(row(shape, y) + shape.w, shape.halo, A{0});",
    ),
    Fault(
        "cpu-threads-share-their-memory",
        "csrc/cpu/sample.h",
        "f(Sample<S>{shape, n, false}, memories[worker]);",
        "f(Sample<S>{shape, n, false}, memories[0]);",
    ),
    Fault(
        "cpu-nan-loses-where-the-spatial-gate-is-alone",
        "csrc/cpu/backward.h",
        "  settle_stats<Sweeps>(shape, tile, maps.x, sweeps.ca, pixel.sums, pixel.maxima, "
        "pixel.argmaxima);\n",
        "",
    ),
    Fault(
        "cpu-channel-gate-alone-keeps-an-old-gradient-of-statistics",
        "csrc/cpu/backward.h",
        "  for (A* ds : sweeps.ds) std::fill_n(ds, shape.pixels, A{0});\n",
        "",
    ),
)

_CUDA = (
    Fault(
        "cuda-barrier-before-staged-maps-are-read-is-gone",
        "csrc/cuda/spatial_gate.cuh",
        "  __syncthreads();\n  const int parts",
        "  const int parts",
    ),
    Fault(
        "cuda-last-of-equals-wins",
        "csrc/cuda/reduce.cuh",
        "const bool better = !(next <= value) & (value == value);",
        "const bool better = !(next < value) & (value == value);",
    ),
    Fault(
        "cuda-ties-between-threads-go-anywhere",
        "csrc/cuda/reduce.cuh",
        "const bool better = larger | (tie & (other.index < index));",
        "const bool better = larger;",
    ),
    Fault(
        "cuda-any-nan-wins",
        "csrc/cuda/reduce.cuh",
        "const bool larger = !(other.value <= value) & (value == value);",
        "const bool larger = !(other.value <= value);",
    ),
    Fault(
        "cuda-lane-without-the-maximum-has-a-say",
        "csrc/cuda/reduce.cuh",
        "if (!((own == total.value) | (own != own))) total.index = kNoIndex;",
        "",
    ),
    Fault(
        "cuda-sum-over-half-a-warp",
        "csrc/cuda/reduce.cuh",
        "for (int offset = kWarp / 2; offset > 0; offset /= 2) value +=",
        "for (int offset = kWarp / 4; offset > 0; offset /= 2) value +=",
    ),
    Fault(
        "cuda-last-tile-is-a-whole-one",
        "csrc/cuda/convolution.cuh",
        "static_cast<int>(smaller<int64_t>(tiling.columns, width - first_column))};",
        "tiling.columns};",
    ),
    Fault(
        "cuda-wide-accesses-anywhere",
        "csrc/cuda/plan.cpp",
        "return contiguous % wide == 0 ? static_cast<int>(wide) : 1;",
        "return contiguous >= wide ? static_cast<int>(wide) : 1;",
    ),
    Fault(
        "cuda-rows-of-channels-last-as-of-contiguous",
        "csrc/cuda/plan.cpp",
        "s.down = make_team(down, columns);",
        "s.down = make_team(down, p.pixels());",
    ),
    Fault(
        "cuda-second-chunk-begins-too-early",
        "csrc/cuda/call.cuh",
        "return batch == nullptr ? nullptr : batch + first * elements;",
        "return batch == nullptr ? nullptr : batch + first;",
    ),
    Fault(
        "cuda-hidden-units-of-the-first-channels-alone",
        "csrc/cuda/mlp.cuh",
        "units, shape.piece, shape.cut.blocks, scratch,",
        "units, shape.piece, 1, scratch,",
    ),
    Fault(
        "cuda-ones-for-the-first-sample-alone",
        "csrc/cuda/forward.cu",
        "launch_fill(chunk.launcher, ca, chunk.samples * p.c, A{1});",
        "launch_fill(chunk.launcher, ca, p.c, A{1});",
    ),
    Fault(
        "cuda-channel-gate-alone-reads-g-as-x",
        "csrc/cuda/sweep.cuh",
        "load_packed<S, W, Body::kUse>(body.g + (piece - body.x));",
        "load_packed<S, W, Body::kUse>(piece);",
    ),
)

_TORCH = (
    Fault(
        "torch-devices-of-parameters-are-not-checked",
        "csrc/torch/checks.cpp",
        "  check_device(name, parameter, input);\n",
        "",
    ),
    Fault(
        "torch-wrong-flag-for-the-bias-of-the-convolution",
        "csrc/torch/operators.h",
        "gradient_of(wanted.conv_grads, parameters.conv_bias)",
        "gradient_of(wanted.mlp_grads, parameters.conv_bias)",
    ),
    Fault(
        "torch-any-strides-are-native",
        "csrc/torch/tensors.cpp",
        "return is_channels_last(input) ? input : contiguous_of(input);",
        "return input;",
    ),
    Fault(
        "torch-unaligned-data-is-not-copied",
        "csrc/torch/tensors.cpp",
        "% static_cast<uintptr_t>(alignment) == 0 ?",
        "% static_cast<uintptr_t>(2) == 0 ?",
    ),
    Fault(
        "torch-rows-of-transposed-weights",
        "csrc/torch/pack.cpp",
        "f(matrix[r * row_stride + c * stride], i * rows + r, c);",
        "f(matrix[r * columns + c * stride], i * rows + r, c);",
    ),
)

_PYTHON = (
    Fault(
        "layers-hooks-of-fc2-are-passed-over",
        "cbam_ext/layers/questions.py",
        "_are_noticed(channel, fc1, fc2)",
        "_are_noticed(channel, fc1)",
    ),
    Fault(
        "module-hooks-of-one-gate-alone-are-passed-over",
        "cbam_ext/module.py",
        "    if gate is None:\n        return None\n    if type(gate) is not kind:\n",
        "    if gate is None or has_hooks(gate):\n        return None\n"
        "    if type(gate) is not kind:\n",
    ),
    Fault(
        "conversion-squeeze-and-excitation-is-told-of",
        "cbam_ext/conversion/walk.py",
        "            with contextlib.suppress(RefusalError):\n                if structures:\n"
        "                    self.alone[key] = recognise(module, structures)\n",
        "            if structures:\n"
        "                self.alone[key] = recognise(module, structures)\n",
    ),
    Fault(
        "conversion-a-gate-by-another-name-is-taken-apart",
        "cbam_ext/conversion/walk.py",
        "for inner in module.modules() if is_settled else [module]:",
        "for inner in [module]:",
    ),
    Fault(
        "layers-dilation-is-not-asked-for",
        "cbam_ext/layers/questions.py",
        'own["stride"] == own["dilation"] == _ONE',
        'own["stride"] == _ONE',
    ),
    Fault(
        "layers-attention-counts-for-the-norm",
        "cbam_ext/layers/questions.py",
        "return None if buffer is None else buffer.clone()",
        "return buffer",
    ),
    Fault(
        "module-norm-folded-without-eps",
        "cbam_ext/module.py",
        "torch.rsqrt(norm.running_var.to(dtype) + norm.eps)",
        "torch.rsqrt(norm.running_var.to(dtype))",
    ),
    Fault(
        "module-norm-folded-in-training",
        "cbam_ext/module.py",
        "        if not norm.training:\n            return functional.cbam(",
        "        if norm.running_var is not None:\n            return functional.cbam(",
    ),
    Fault(
        "module-conv-bias-not-scaled-by-the-norm",
        "cbam_ext/module.py",
        "shift = shift + bias.to(dtype) * scale",
        "shift = shift + bias.to(dtype)",
    ),
    Fault(
        "module-momentum-left-as-it-was",
        "cbam_ext/module.py",
        "    if isinstance(norm, _BatchNorm):\n        norm.momentum = 0.01  # the authors' code\n",
        "",
    ),
    Fault(
        "module-conv-bias-dropped",
        "cbam_ext/module.py",
        "padding=kernel_size // 2, bias=bias, **factory",
        "padding=kernel_size // 2, bias=False, **factory",
    ),
    Fault(
        "ops-half-of-the-mlp-may-be-frozen",
        "cbam_ext/ops/gradients.py",
        "return wanted[0], any(wanted[1:5]), any(wanted[5:7])",
        "return wanted[0], any(wanted[1:3]), any(wanted[5:7])",
    ),
    Fault(
        "ops-fake-output-is-contiguous",
        "cbam_ext/ops/fakes.py",
        "return input.new_empty_strided(input.shape, input.stride())",
        "return input.new_empty(input.shape)",
    ),
    Fault(
        "ops-vmap-over-the-first-dimension-only",
        "cbam_ext/ops/autograd.py",
        "input = input.movedim(in_dims[1], 0)",
        "pass",
    ),
    Fault(
        "ops-autocast-reaches-the-gate",
        "cbam_ext/reference/forward.py",
        "@without_autocast\ndef channel_gate(",
        "def channel_gate(",
    ),
    Fault(
        "ops-even-kernels-are-accepted",
        "cbam_ext/reference/checks.py",
        "\n            or conv_weight.shape[2] % 2 == 0",
        "",
    ),
    Fault(
        "visualization-hooks-stay",
        "cbam_ext/visualization/collect.py",
        "            hooks.callback(handle.remove)\n",
        "",
    ),
    Fault(
        "smp-attention-stays-registered",
        "cbam_ext/smp/registration.py",
        "for patched in (attention, *_architectures(smp)):",
        "for patched in _architectures(smp):",
    ),
    Fault(
        "smp-leaves-gates-open-that-a-checkpoint-closes",
        "cbam_ext/smp/registration.py",
        "        state_dict.update(absent)\n",
        "",
    ),
    Fault(
        "smp-closes-gates-that-begin-open",
        "cbam_ext/smp/registration.py",
        "            open_spatial_gate(spatial, logit)\n",
        "            pass\n",
    ),
    Fault(
        "placement-branches-end-in-dropout",
        "cbam_ext/placement/places.py",
        "for finished, name, seen in ends if not seen.passes]",
        "for finished, name, seen in ends]",
    ),
    Fault(
        "placement-successors-have-no-hook",
        "cbam_ext/placement/hooks.py",
        "    placed.again(successor, cbam)\n",
        "",
    ),
    Fault(
        "layers-identity-counts-the-bias-once",
        "cbam_ext/layers/initialisation.py",
        "nn.init.constant_(channel.fc2.bias, logit / 2)",
        "nn.init.constant_(channel.fc2.bias, logit)",
    ),
    Fault(
        "conversion-frozen-weights-thaw",
        "cbam_ext/conversion/translation.py",
        "nn.Parameter(weight, theirs.weight.requires_grad)",
        "nn.Parameter(weight)",
    ),
    Fault(
        "conversion-checkpoint-may-lack-tensors",
        "cbam_ext/conversion/checkpoints.py",
        '            yield f"{name} is missing"\n',
        "            continue\n",
    ),
    Fault(
        "cost-baseline-is-always-the-first",
        "cbam_ext/cost/measure.py",
        "return CostTable(costs, baseline, forward, training, device_name(device))",
        "return CostTable(costs, next(iter(costs)), forward, training, device_name(device))",
    ),
    Fault(
        "export-onnx-padding-of-a-kernel-of-7",
        "cbam_ext/export/onnx.py",
        "padding = parameters[4].shape[-1] // 2",
        "padding = 3",
    ),
    Fault(
        "export-decomposition-mixes-up-flags",
        "cbam_ext/export/aten.py",
        "wanted = (input_grad, *[mlp_grads] * 4, *[conv_grads] * 2)",
        "wanted = (input_grad, *[conv_grads] * 4, *[mlp_grads] * 2)",
    ),
)

_BUILDING = (
    Fault(
        "building-templates-are-not-hashed",
        "cbam_ext/building/decisions.py",
        '_HASHED_SUFFIXES = {".cpp", ".h", ".inl", ".cu", ".cuh", ".txt"}',
        '_HASHED_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".txt"}',
    ),
    Fault(
        "building-ptx-becomes-machine-code",
        "cbam_ext/building/decisions.py",
        'f"-gencode=arch=compute_{number},code=compute_{number}"',
        'f"-gencode=arch=compute_{number},code=sm_{number}"',
    ),
    Fault(
        "building-force-cuda-0-is-a-wish",
        "cbam_ext/building/decisions.py",
        "    if forced is False:\n",
        "    if forced is False and torch_cuda is None:\n",
    ),
    Fault(
        "building-old-cuda-library-stays",
        "cbam_ext/building/compile.py",
        "if self.inplace or self.editable_mode:",
        "if self.editable_mode:",
    ),
    Fault(
        "building-flags-do-not-make-another-build",
        "cbam_ext/building/jit.py",
        "        decisions.cxx_flags(),\n",
        "",
    ),
    Fault(
        "building-all-symbols-are-visible",
        "cbam_ext/building/decisions.py",
        'CXX_FLAGS = ("-O3", "-g0", "-fvisibility=hidden", ',
        'CXX_FLAGS = ("-O3", "-g0", ',
        builds=True,
    ),
)

FAULTS = (*_CPU, *_CUDA, *_TORCH, *_PYTHON, *_BUILDING, *PROMISED)
