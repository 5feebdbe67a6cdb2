"""The faults: realistic mistakes of somebody who edits this code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Which tests mirror which code: the first path that a file begins with.
_MIRRORS = {
    "csrc/cpu": ("tests/cpu", "tests/ops"),
    "csrc/cuda": ("tests/cuda", "tests/ops"),
    "csrc": ("tests/ops",),
    "setup.py": ("tests/building",),
    "cbam_ext/reference": ("tests/ops",),
    "cbam_ext/functional.py": ("tests/ops",),
    "cbam_ext/module.py": ("tests/module",),
}
# Backends that a fault is not in, by words in the names of tests.
_KEYWORDS = {"csrc/cpu": "not emulated", "csrc/cuda": "emulat or plan"}


@dataclass(frozen=True)
class Fault:
    """``search``, which occurs in ``file`` once, becomes ``replacement``."""

    name: str
    file: str
    search: str
    replacement: str
    # Whether the kernels are built anew; those whose sources are in csrc always are.
    builds: bool = False

    @property
    def rebuilds(self) -> bool:
        return self.builds or self.file.startswith("csrc/")

    @property
    def is_emulated(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cpu/")

    @property
    def tests(self) -> tuple[str, ...]:
        """The folders of tests that mirror the file."""
        for prefix, folders in _MIRRORS.items():
            if self.file.startswith(prefix):
                return folders
        return (f"tests/{self.file.split('/')[1]}",)

    @property
    def keywords(self) -> str:
        """What pytest's -k is given for these tests."""
        return next((k for prefix, k in _KEYWORDS.items() if self.file.startswith(prefix)), "")


def planted_text(text: str, fault: Fault) -> str:
    """``text`` of the file with the fault in it."""
    if text.count(fault.search) != 1:
        raise ValueError(f"{fault.name}: {text.count(fault.search)} places in {fault.file}, not 1")
    return text.replace(fault.search, fault.replacement)


def misplaced(root: Path, fault: Fault) -> str:
    """Why a fault cannot be planted into the sources as they are; empty if it can."""
    try:
        text = (root / fault.file).read_text()
        unchanged = planted_text(text, fault) == text
    except (OSError, ValueError) as error:
        return str(error)
    return f"{fault.name} changes nothing" if unchanged else ""


_PYTHON = (
    Fault(
        "layers-hooks-of-fc2-are-passed-over",
        "cbam_ext/layers/questions.py",
        "for module in (channel, spatial, fc1, fc2, conv):",
        "for module in (channel, spatial, fc1, conv):",
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
        "padding=kernel_size // 2, bias=conv_bias, **factory",
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
        "\n        or conv_weight.shape[2] % 2 == 0",
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
        "for patched in (smp.base.modules.Attention, *_architectures(smp)):",
        "for patched in _architectures(smp):",
    ),
    Fault(
        "smp-identity-counts-the-bias-once",
        "cbam_ext/smp/placement.py",
        "nn.init.constant_(cbam.channel.fc2.bias, _OPEN_LOGIT / 2)",
        "nn.init.constant_(cbam.channel.fc2.bias, _OPEN_LOGIT)",
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
        'CXX_FLAGS = ("-O3", "-g0", "-fvisibility=hidden", "-Wall")',
        'CXX_FLAGS = ("-O3", "-g0", "-Wall")',
        builds=True,
    ),
)

FAULTS = (*_PYTHON, *_BUILDING)
