"""What the documents say runs: docstring examples, the code of README and pages, the reference."""

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
DOCS = README.parent / "docs"

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(cbam_ext.__path__, "cbam_ext.")
    if info.name.rpartition(".")[2] not in ("__main__", "libcbam_cpu", "libcbam_cuda")
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
    """Each has an example, stands in the table of the reference, and has its docstring there."""
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or ""), "its docstring has no example"
    reference = (DOCS / "api.md").read_text()
    assert f"`{name}" in reference, "it is not in the table of docs/api.md"
    assert re.search(rf"^\.\. auto\w+:: {re.escape(name)}$", reference, re.MULTILINE), (
        "docs/api.md does not show its docstring"
    )


@pytest.mark.parametrize("operator", ["forward", "gates"])
def test_schemas(operator: str) -> None:
    """Those of docs/api.md are those of the operators."""
    text = " ".join((DOCS / "api.md").read_text().split())
    assert str(getattr(torch.ops.cbam, operator).default._schema) in text


# --------------------------------------------------------------------- the code of README and pages

# A block of Python, and what it prints where a block follows that says so.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+prints\n+```text\n(.*?)```)?", re.DOTALL)


def _blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


BLOCKS = {
    f"{page.name}-{number}": block
    for page in (README, *sorted(DOCS.glob("*.md")))
    for number, block in enumerate(_blocks(page))
}


def _surroundings(folder: Path) -> dict[str, Any]:
    """What the code takes for granted."""
    net = nn.Sequential(nn.Conv2d(3, 32, 3), peers.AuthorsBlock(32))
    torch.save(net.state_dict(), folder / "checkpoint.pth")
    names: dict[str, Any] = {"__name__": "readme", "torch": torch, "cbam_ext": cbam_ext}
    names |= {"net": net, "model": cbam_ext.convert(net), "attention": cbam_ext.CBAM(32)}
    names |= {"images": torch.rand(2, 3, 40, 40), "image": torch.rand(2, 3, 40, 40)}
    return names


def _run(code: str, folder: Path) -> dict[str, Any]:
    names = _surroundings(folder)
    if ".visualize(" in code:  # of a model that has been converted
        names["net"] = names["model"]
    exec(code, names)
    return names


@pytest.mark.parametrize("name", BLOCKS)
def test_code(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Each block by itself, as somebody would who copies it."""
    code, printed = BLOCKS[name]
    _run(code, tmp_path)
    if printed:
        assert capsys.readouterr().out.split("\n") == printed.split("\n")


def _block_with(text: str) -> str:
    (found,) = (code for code, _ in BLOCKS.values() if text in code)
    return found


@pytest.mark.slow
def test_three_models(tmp_path: Path) -> None:
    """Those of the pages with our operator in them have the outputs that they had."""
    names = _surroundings(tmp_path)
    exec(_block_with("theirs = timm.create_model"), names)
    with torch.no_grad():  # timm's blocks begin as zero, which would hide their attention
        for module in names["theirs"].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0.7)
    cbam_ext.load_peer_state_dict(names["model"], names["theirs"].state_dict())
    _assert_same_outputs(names["theirs"], names["model"], 16)
    names = _run(_block_with("return_report=True"), tmp_path)
    _assert_same_outputs(names["net"], names["model"], 1)
    names = _run(_block_with('add_cbam(model, init="identity")'), tmp_path)
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
