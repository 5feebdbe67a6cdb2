"""The commands and their options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from . import cost, plan
from .diagnostics import collect, render

_COMMANDS = {"plan": plan, "cost": cost}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``python -m cbam_ext`` with these arguments; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is not None:
        try:
            print(_COMMANDS[options.command].run(options))
        except (ImportError, RuntimeError, ValueError) as error:
            parser.exit(2 if isinstance(error, ValueError) else 1, f"{error}\n")
        return 0
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cbam_ext",
        description="Tells what is installed, what was found, and why something is absent.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    names = ",".join(_COMMANDS)
    commands = parser.add_subparsers(dest="command", metavar=f"{{{names}}}")
    for command in _COMMANDS.values():
        command.add_parser(commands)
    return parser
