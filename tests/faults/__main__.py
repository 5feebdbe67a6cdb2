"""``python -m faults``: plants faults and sees which tests find them; see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .checkout import Checkout
from .fault import Fault, misplaced
from .planted import FAULTS
from .records import STAGES, Records, summary, verdict
from .trial import Trial

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "faults"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m faults",
        description="Plants faults, one at a time, and sees which tests find them. A second call "
        "goes on where the first ended.",
    )
    parser.add_argument("--list", action="store_true", help="what is planted, and where")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--again", action="store_true", help="also what is known already")
    parser.add_argument(
        "--stage", choices=STAGES, default="all", help="the last that a fault meets (all)"
    )
    return parser.parse_args(arguments)


def chosen(names: Sequence[str] | None) -> list[Fault]:
    known = {fault.name: fault for fault in FAULTS}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        sys.exit(f"no such fault: {', '.join(unknown)}; --list names them")
    return list(FAULTS) if names is None else [known[name] for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    faults = chosen(options.only)
    if options.list:
        width = max(len(fault.name) for fault in faults)
        print(*(f"{fault.name:{width}}  {fault.file}" for fault in faults), sep="\n")
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    wrong = [text for fault in faults if (text := misplaced(ROOT, fault))]
    if wrong:
        sys.exit("\n".join(wrong))

    checkout = Checkout(ROOT, FOLDER)
    state = checkout.renew()
    records = Records(FOLDER / "results.json")
    built = checkout.build()
    if built.status != 0:
        sys.exit(f"without any fault the kernels do not compile:\n{built.output}")
    checkout.check_import()
    trial = Trial(checkout, records, state, options.stage, FOLDER / "logs")
    try:
        for number, fault in enumerate(faults, 1):
            print(f"[{number}/{len(faults)}] {fault.name}", flush=True)
            if options.again:
                records.forget(fault)
            trial.run(fault)
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("\nstopped; the next call goes on from here")
    text, good = summary([verdict(records, fault) for fault in faults], state)
    print(f"\n{text}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
