"""What stands in two places because its readers cannot share one."""

from __future__ import annotations

import re

from cbam_ext.smp.options import OLDEST

from support.packages import CHECKOUT


def test_pre_commit_has_the_versions_of_make_lint() -> None:
    hooks = (CHECKOUT / ".pre-commit-config.yaml").read_text()
    found = set(re.findall(r"\[((?:ruff|clang-format)==[\d.]+)\]", hooks))
    (extra,) = re.findall(r"^dev = \[(.*)\]", (CHECKOUT / "pyproject.toml").read_text(), re.M)
    assert found == {word for word in re.findall(r'"(.*?)"', extra) if "==" in word}
    assert len(found) == 2


def test_the_extra_asks_for_the_smp_that_the_package_asks_for() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text()
    (found,) = re.findall(r'^smp = \["segmentation-models-pytorch>=([\d.]+)"\]', text, re.M)
    assert tuple(map(int, found.split("."))) == OLDEST


def test_ci_installs_nothing_by_hand() -> None:
    """Only make does, so that a fresh clone gets what CI has."""
    assert "pip install" not in (CHECKOUT / ".ci" / "run").read_text()
