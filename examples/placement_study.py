"""Which attention suits your data, and what it costs: one smp model, trained several times.

    python examples/placement_study.py
    python examples/placement_study.py --images photos --masks masks --encoder resnet34 --steps 1000

Trains the same model of segmentation_models_pytorch (smp) without attention, with smp's SCSE and
with CBAM at several places, each over several seeds, and judges it by images held out. Runs of one
seed share crops and, where they have the same layers, first weights. An interrupted study goes on
when it is called again; one with more seeds or places keeps what is there.

Images and masks are matched by their names. A mask holds the number of a class in each pixel. By
default the data is scikit-image's photograph of coins, which is small: nothing is downloaded.

Writes `study.md`, `benefit.png` and `curves.png` into the folder --output. What the spread over the
seeds does not carry is not claimed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

try:
    import matplotlib  # noqa: F401
    import segmentation_models_pytorch  # noqa: F401
    import skimage  # noqa: F401
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f'This example needs {error.name}. Install it with: pip install "cbam_ext[demo]"')

import cbam_ext.smp

sys.path.insert(0, str(Path(__file__).parent))  # where it is imported and not run
from segment_coins import HELD_OUT, load_photograph
from study import StudyError, report, runs
from study.data import Data, Pair, random_batches, read_pairs
from study.runs import Outcome, Settings, Variant


def coins() -> Data:
    """The photograph of coins, of which the right third is held out."""
    image, mask = load_photograph()
    sides = {"left": slice(None, HELD_OUT), "right": slice(HELD_OUT, None)}
    left, right = (
        Pair(name, image[0][..., side], mask[0, 0][:, side].byte()) for name, side in sides.items()
    )
    return Data([left], [right], 2, "scikit-image's photograph of coins, its right third held out")


# ------------------------------------------------------------------------------ the program


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains one smp model with several kinds of attention and compares them.",
        epilog="Places: none, scse, blocks (smp's own place in decoder blocks), encoder, skips, "
        "bottleneck, decoder, residual, the number of a stage, or several as in skips+decoder.",
    )
    add = parser.add_argument
    add("--images", type=Path, help="folder of images (default: a photograph of coins)")
    add("--masks", type=Path, help="folder of masks with the names of the images")
    add("--arch", default="Unet", help="architecture of smp (default: %(default)s)")
    add("--encoder", default="resnet18", help="encoder of smp (default: %(default)s)")
    add("--weights", help="of the encoder, such as imagenet (default: random)")
    add("--places", nargs="+", metavar="PLACE", help="where attention stands (default: all)")
    inits = "how gates begin: identity (the default), default, a number from 0 to 1, or several"
    add("--init", nargs="+", type=_init, default=["identity"], metavar="INIT", help=inits)
    row = 'a row of the table, such as "blocks, default" (default: %(default)s)'
    add("--compare-with", default="none", metavar="ATTENTION", help=row)
    add("--seeds", type=int, default=5, help="runs of each (default: %(default)s)")
    add("--steps", type=int, default=100, help="of a training (default: %(default)s)")
    add("--size", type=int, default=96, help="side of a crop in pixels (default: %(default)s)")
    add("--batch", type=int, default=8, help="crops per step (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="of Adam, falling to 0 (default: %(default)s)")
    add("--rounds", type=int, default=9, help="how often each is timed (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is a GPU)")
    add("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    add("--output", type=Path, default=Path("study"), help="folder (default: %(default)s)")
    arguments = parser.parse_args(given)
    for name in ("seeds", "steps", "batch", "rounds", "threads"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.size < 32 or arguments.size % 32:
        parser.error("--size must be a multiple of 32")
    if not 0 < arguments.lr < float("inf"):
        parser.error("--lr must be a positive number")
    if (arguments.images is None) != (arguments.masks is None):
        parser.error("--images and --masks go together")
    return arguments


def _init(text: str) -> str | float:
    if text in ("default", "identity"):
        return text
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not identity, default or between 0 and 1")
    return number


def variants_of(arguments: argparse.Namespace) -> list[Variant]:
    """In the order of the table; without attention always, which the costs are compared with."""
    known = runs.places_of(arguments.arch)
    places = list(dict.fromkeys(["none", *(arguments.places or known)]))
    variants = []
    for place in places:
        for part in place.split("+"):
            if part not in known and not part.isdecimal():
                raise StudyError(
                    f"--places: {arguments.arch} has no place {part}; it has {', '.join(known)} "
                    "and the numbers of its stages"
                )
        if place in runs.WITHOUT_CBAM:
            variants.append(Variant(place))
        else:
            variants += [Variant(place, init) for init in dict.fromkeys(arguments.init)]
    return variants


def choose_device(name: str | None) -> str:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise StudyError(f"--device: {str(error).splitlines()[0]}") from error
    return str(device)


def train_all(
    variants: list[Variant], seeds: int, settings: Settings, data: Data, folder: Path
) -> list[Outcome]:
    """All outcomes, of which those that are there already are not computed again."""
    found = {(o.variant, o.seed): o for o in runs.load(folder, variants, range(seeds))}
    total = len(variants) * seeds
    progress = tqdm(total=total * settings.steps, unit="step", desc="training")
    progress.update(len(found) * settings.steps)
    with progress:
        for seed in range(seeds):  # in turns, so that an early look compares like with like
            for variant in variants:
                if (variant, seed) in found:
                    continue
                progress.set_description(f"run {len(found) + 1} of {total} ({variant})")
                before = progress.n

                def tell(steps: int, loss: float, before: int = before) -> None:
                    progress.update(before + steps - progress.n)
                    progress.set_postfix(loss=f"{loss:.3f}", refresh=False)

                try:
                    outcome = runs.train(variant, seed, settings, data, folder, tell)
                except (RuntimeError, ValueError) as error:  # memory, one pixel under a BatchNorm
                    told = str(error).splitlines()[0]
                    raise StudyError(f"training with {variant} failed: {told}") from error
                found[variant, seed] = outcome
    return [found[variant, seed] for variant in variants for seed in range(seeds)]


def measure_costs(
    variants: list[Variant], settings: Settings, data: Data, rounds: int, output: Path
) -> dict[str, Any]:
    """``CostTable.as_dict()`` with a model for each place; kept for the same models and rounds."""
    first = {variant.place: variant for variant in reversed(variants)}
    places = list(dict.fromkeys(variant.place for variant in variants))
    about = {"places": places, "rounds": rounds, "threads": torch.get_num_threads()}
    about["machine"] = platform.node()
    kept = output / "costs.json"
    if kept.exists():
        costs = json.loads(kept.read_text())
        if costs["about"] == about:
            return costs
    models = {place: runs.build(first[place], settings, data, seed=0) for place in places}
    for model in models.values():
        model.to(settings.device)
    batches = random_batches(data.train, settings.batch, settings.size, torch.Generator())
    images = next(batches)[0].to(settings.device)
    costs = {"about": about, **cbam_ext.compare_costs(models, images, rounds=rounds).as_dict()}
    runs.write(kept, json.dumps(costs, indent=1).encode())
    return costs


def study(arguments: argparse.Namespace) -> str:
    """All of it; returns what is printed in the end.

    Raises:
        StudyError: something that its user can change.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    variants = variants_of(arguments)
    baselines = [each for each in variants if str(each) == arguments.compare_with]
    if not baselines:
        known = "; ".join(map(str, variants))
        raise StudyError(f"--compare-with: there is no {arguments.compare_with}, but {known}")
    data = coins()
    if arguments.images is not None:
        data = read_pairs(arguments.images, arguments.masks)
    names = ("arch", "encoder", "weights", "steps", "size", "batch", "lr")
    common = {name: getattr(arguments, name) for name in names}
    settings = Settings(**common, device=device, data=data.fingerprint())
    runs.build(variants[0], settings, data, seed=0)  # what cannot be built is told before anything
    folder = runs.open_folder(arguments.output, settings)
    costs = measure_costs(variants, settings, data, arguments.rounds, arguments.output)
    outcomes = train_all(variants, arguments.seeds, settings, data, folder)

    (baseline,) = baselines
    rows = report.rows_of(outcomes, baseline)
    title = (
        f"smp.{settings.arch}, {settings.encoder}, {settings.steps} steps of {settings.batch} "
        f"crops of {settings.size} x {settings.size}"
    )
    about = (
        f"{title}, Adam {settings.lr:g}; {data.about}. {costs['device']}, "
        f"{costs['about']['threads']} threads; torch {settings.torch}, smp "
        f"{settings.segmentation_models_pytorch}, cbam_ext {settings.cbam_ext}; "
        f"{time.strftime('%Y-%m-%d')}."
    )
    text = "\n\n".join(
        [report.table(rows, costs, baseline), report.conclusion(rows, baseline), about]
    )
    runs.write(arguments.output / "study.md", f"{text}\n".encode())
    report.draw_benefit(rows, costs, baseline, title, arguments.output / "benefit.png")
    report.draw_curves(rows, title, arguments.output / "curves.png")
    return f"{text}\n\nWritten to {arguments.output}: study.md, benefit.png, curves.png"


def main(given: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(given)
    cbam_ext.smp.register()
    try:
        print(f"\n{study(arguments)}")
    except StudyError as error:
        print(f"placement_study: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nplacement_study: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
