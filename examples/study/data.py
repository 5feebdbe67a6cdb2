"""Images and masks: reading them, holding some of them out, crops to train on."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from . import StudyError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOST_CLASSES = 64  # more is no number of classes, but a photograph or a mask saved as JPEG


@dataclass(frozen=True)
class Pair:
    """An image ``[C, H, W]`` and the class of each of its pixels, ``[H, W]``, from 0."""

    name: str
    image: Tensor
    mask: Tensor

    @functools.cached_property
    def light(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the image."""
        image = self.image.float()
        return image.mean(), image.std().clamp(min=1e-6)

    def standardised(self, *window: slice) -> Tensor:
        """The image, or a window of it, in float32, with mean 0 and standard deviation 1."""
        mean, deviation = self.light
        return (self.image[(slice(None), *window)].float() - mean) / deviation


@dataclass(frozen=True)
class Data:
    """What a study trains on and what it judges by, the same for all of its models."""

    train: list[Pair]
    held_out: list[Pair]
    classes: int
    about: str

    @property
    def channels(self) -> int:
        return self.train[0].image.shape[0]

    @property
    def outputs(self) -> int:
        """Of the model: two classes need one."""
        return 1 if self.classes == 2 else self.classes

    def fingerprint(self) -> str:
        """The same for the same pixels, split alike."""
        digest = hashlib.sha256()
        for side in (self.train, self.held_out):
            digest.update(str(len(side)).encode())
            for pair in side:
                for tensor in (pair.image, pair.mask):
                    digest.update(str((tensor.dtype, *tensor.shape)).encode())
                    digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------ reading


def read_pairs(images: Path, masks: Path) -> Data:
    """The pairs of two folders, matched by the names of their files without endings.

    Raises:
        StudyError: there is nothing that could be learnt or judged, or not all of it fits.
    """
    of_image, of_mask = _files(images, "--images"), _files(masks, "--masks")
    lonely = sorted(path.name for name, path in of_image.items() if name not in of_mask)
    if len(lonely) == len(of_image):
        raise StudyError(
            f"no pairs: an image and its mask need the same name, as photo1.jpg and photo1.png; "
            f"{images} has {lonely[0]}, {masks} has {min(path.name for path in of_mask.values())}"
        )
    if lonely:
        raise StudyError(f"{len(lonely)} of {len(of_image)} images have no mask: {_some(lonely)}")
    if len(of_image) == 1:
        raise StudyError(f"{images} has one image alone; a second one is needed to be held out")
    raw = [_read_pair(of_image[name], of_mask[name]) for name in sorted(of_image)]
    values = sorted(set().union(*(np.unique(mask).tolist() for _, _, mask in raw)))
    if len(values) == 1:
        raise StudyError(f"the masks have one class only: {values[0]} in every pixel")
    if len(values) > MOST_CLASSES:
        raise StudyError(
            f"the masks have {len(values)} different values; each pixel should hold the number of "
            "its class, in a format without losses such as PNG"
        )
    pairs = [
        Pair(name, torch.from_numpy(image), torch.from_numpy(np.searchsorted(values, mask)).byte())
        for name, image, mask in raw
    ]
    train, held_out = _split(pairs, len(values))
    about = f"{len(train)} images of {images}, {len(held_out)} more held out, {len(values)} classes"
    return Data(train, held_out, len(values), about)


def _files(folder: Path, option: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise StudyError(f"{option}: there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise StudyError(f"{option}: {found[path.stem].name} and {path.name} have one name")
            found[path.stem] = path
    if not found:
        raise StudyError(f"{option}: {folder} has no images ({', '.join(SUFFIXES)})")
    return found


def _read_pair(of_image: Path, of_mask: Path) -> tuple[str, np.ndarray, np.ndarray]:
    image, mask = _read(of_image), _read(of_mask)
    if image.size != mask.size:
        (width, height), (of_mask_width, of_mask_height) = image.size, mask.size
        raise StudyError(
            f"{of_image} is {width} x {height} pixels and its mask {of_mask_width} x "
            f"{of_mask_height}; they have to be of one size"
        )
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits, which PIL would cut off at 8
        pixels = np.stack([np.asarray(image, np.float32)] * 3)
    else:
        pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    classes = np.asarray(mask)  # of a palette: its indices
    if classes.ndim == 3:
        gray = classes[..., :1]
        if (classes[..., :3] != gray).any():
            raise StudyError(
                f"{of_mask} is coloured; each pixel should hold the number of its class, in a gray "
                "image or one with a palette"
            )
        classes = gray[..., 0]
    return of_image.stem, np.ascontiguousarray(pixels), classes.astype(np.int64)


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise StudyError(f"{path} cannot be read: {error}") from error


def _split(pairs: list[Pair], classes: int) -> tuple[list[Pair], list[Pair]]:
    """A quarter held out, every class on both sides; the same in every study of these pairs."""
    count = max(1, len(pairs) // 4)
    there = [set(pair.mask.unique().tolist()) for pair in pairs]
    for attempt in range(200):
        places = list(range(len(pairs)))
        random.Random(attempt).shuffle(places)
        sides = places[count:], places[:count]
        if all(len(set().union(*(there[i] for i in side))) == classes for side in sides):
            train, held_out = ([pairs[i] for i in sorted(side)] for side in sides)
            return train, held_out
    rare = min(range(classes), key=lambda each: sum(each in found for found in there))
    raise StudyError(
        f"no quarter of the {len(pairs)} images can be held out with every class on both sides: "
        f"the class number {rare} is in {sum(rare in found for found in there)} of them"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------------ training


def random_batches(
    pairs: list[Pair], batch: int, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches ``[batch, C, size, size]`` and ``[batch, size, size]`` of random crops."""
    while True:
        crops = [_random_crop(pairs, size, generator) for _ in range(batch)]
        images = torch.stack([image for image, _ in crops])
        # Other light: a random contrast and brightness per crop.
        light = 0.3 * torch.randn(2, batch, 1, 1, 1, generator=generator)
        yield images * light[0].exp() + light[1], torch.stack([mask for _, mask in crops])


def _random_crop(pairs: list[Pair], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square of random place, scale and orientation of one pair, resized to ``size``."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    pair = pairs[draw(0, len(pairs) - 1)]
    height, width = pair.mask.shape
    longest = min(3 * size // 2, height, width)
    side = draw(min(size // 2, longest), longest)
    top, left = draw(0, height - side), draw(0, width - side)
    window = slice(top, top + side), slice(left, left + side)
    image, mask = pair.standardised(*window), pair.mask[window][None]
    turns, flipped = draw(0, 3), draw(0, 1)
    image = F.interpolate(image[None], (size, size), mode="bilinear", align_corners=False)[0]
    mask = F.interpolate(mask[None].float(), (size, size), mode="nearest")[0].long()
    image, mask = (torch.rot90(each, turns, dims=(1, 2)) for each in (image, mask))
    if flipped:
        image, mask = image.flip(2), mask.flip(2)
    return image, mask[0]
