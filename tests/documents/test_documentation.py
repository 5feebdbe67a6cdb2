"""What the documents say runs: docstring examples, the README's code, and its list of functions."""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cbam_ext

from support import peers

README = Path(__file__).parents[2] / "README.md"

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(cbam_ext.__path__, "cbam_ext.")
    if info.name.rpartition(".")[2] not in ("_C", "__main__", "libcbam_cpu", "libcbam_cuda")
)


@pytest.fixture(autouse=True)
def _unregister_from_smp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples may register and write files."""
    monkeypatch.chdir(tmp_path)
    yield
    importlib.import_module("cbam_ext.smp").unregister()


def _examples(module: Any) -> list[doctest.DocTest]:
    names = {"torch": torch, "nn": nn, "cbam_ext": cbam_ext, **vars(module)}
    return [t for t in doctest.DocTestFinder().find(module, globs=names) if t.examples]


@pytest.mark.parametrize("name", ["cbam_ext", *MODULES])
def test_docstrings(name: str, capsys: pytest.CaptureFixture) -> None:
    """Each example of each docstring prints what it says."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for test in _examples(importlib.import_module(name)):
        runner = doctest.DocTestRunner(optionflags=flags)
        runner.run(test)
        assert runner.failures == 0, f"{test.name}: {capsys.readouterr().out}"


def _public() -> Iterator[tuple[str, Any]]:
    for prefix in ("cbam_ext", "cbam_ext.smp"):
        module = importlib.import_module(prefix)
        for name in module.__all__:
            member = getattr(module, name)
            if callable(member):
                yield f"{prefix}.{name}", member
    yield "cbam_ext.plan.launch_plan", importlib.import_module("cbam_ext.plan").launch_plan


PUBLIC = dict(_public())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name: str) -> None:
    """Each has an example and stands in the README's reference."""
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or ""), "its docstring has no example"
    reference = README.read_text().split("\n## Reference\n")[1].split("\n## ")[0]
    assert f"`{name}" in reference, "it is not in the README's reference section"


def _blocks(section: str) -> list[str]:
    text = README.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _surroundings(folder: Path) -> dict[str, Any]:
    """What the README's code takes for granted."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3), peers.AuthorsBlock(32))
    torch.save(net.state_dict(), folder / "checkpoint.pth")
    names: dict[str, Any] = {"__name__": "readme", "torch": torch, "cbam_ext": cbam_ext}
    names |= {"net": net, "model": cbam_ext.convert(net), "images": torch.rand(2, 3, 40, 40)}
    return names


@pytest.mark.parametrize(
    ("section", "number"),
    [
        (section, number)
        for section in ("Three ways to use it", "A model that you have")
        for number in range(len(_blocks(section)))
    ],
)
def test_readme_code(section: str, number: int, tmp_path: Path) -> None:
    """Each block by itself, as somebody would who copies it."""
    names = _surroundings(tmp_path)
    if ".visualize(" in _blocks(section)[number]:  # of a model that has been converted
        names["net"] = names["model"]
    exec(_blocks(section)[number], names)


def test_three_models(tmp_path: Path) -> None:
    """Those of the README with our operator in them have the outputs that they had."""
    timm_block, authors_block, smp_block, *_ = _blocks("A model that you have")
    names = _surroundings(tmp_path)
    exec(timm_block, names)
    with torch.no_grad():  # timm's blocks begin as zero, which would hide their attention
        for module in names["theirs"].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0.7)
    cbam_ext.load_peer_state_dict(names["model"], names["theirs"].state_dict())
    _assert_same_outputs(names["theirs"], names["model"], 16)
    names = _surroundings(tmp_path)
    exec(authors_block, names)
    _assert_same_outputs(names["net"], names["model"], 1)
    names = _surroundings(tmp_path)
    exec(smp_block, names)
    model = names["model"].eval()
    plain = copy.deepcopy(model)
    plain.decoder._forward_pre_hooks.clear()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before, after = plain(x), model(x)
    assert 0 < float((before - after).abs().max() / before.abs().max()) < 0.3


def _assert_same_outputs(before: nn.Module, after: nn.Module, count: int) -> None:
    assert sum(isinstance(module, cbam_ext.CBAM) for module in after.modules()) == count
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(after.eval()(x), before.eval()(x), rtol=1e-4, atol=1e-4)
