r"""Corrupted images for `evaluate`: made from clean ones, or read from published files.

Every corruption has five severities. What happens to an image depends on its index in the data set,
the corruption, the severity and a seed only: it is the same in every batch, order and process, so
that methods can be compared image by image. Random numbers come from generators of their own.

Images are tensors ``(channel, height, width)`` of numbers between 0 and 1, or of ``torch.uint8``.
Results are rounded to 8 bits, as in image files. Lengths are in units of a side of 32 pixels.

The kinds and many of the strengths follow Hendrycks & Dietterich, Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations, 2019 (arXiv 1903.12261). They are no substitute
for the published files where results are to be compared with the literature: `files` reads these.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_fordes._checks import ArgumentError, check_choice, check_positive_int, describe, require

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    indices: Sequence[int] | None = None,
    seed: int = 0,
) -> Tensor:
    """Corrupt images, each in its own way.

    Args:
        images: ``(image, channel, height, width)``, between 0 and 1 or of ``torch.uint8``.
        name: one of `NAMES`.
        severity: 1 to 5.
        indices: of the images in their data set; None for 0, 1, ...
        seed: another one gives other random numbers.

    Returns:
        Images of the same shape and type, rounded to 8 bits.

    Raises:
        ArgumentError: if images, name or severity cannot be used.
        MissingDependencyError: if torchvision is needed and not installed.

    Example:
        >>> images = torch.full((2, 1, 8, 8), 0.5)
        >>> noisy = corrupt(images, "gaussian_noise", 3)
        >>> noisy.shape, bool((noisy[0] == noisy[1]).all())
        (torch.Size([2, 1, 8, 8]), False)
        >>> torch.equal(noisy[1:], corrupt(images[1:], "gaussian_noise", 3, indices=[1]))
        True
    """
    corruption = _found(name, severity)
    if not isinstance(images, Tensor) or images.dim() != 4:
        got = describe(images) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(f"images must be a tensor (image, channel, height, width), got {got}")
    places = range(len(images)) if indices is None else indices
    if len(places) != len(images):
        raise ArgumentError(f"indices has {len(places)} numbers for {len(images)} images")
    strength = corruption.strengths[severity - 1]
    corrupted = [
        _apply(corruption, image, strength, f"{seed} {name} {severity} {int(place)}")
        for image, place in zip(images, places, strict=True)
    ]
    return torch.stack(corrupted) if corrupted else images


class CorruptedDataset(Dataset):
    """A data set with its images corrupted, whichever is asked for and in whatever order.

    Args:
        dataset: gives ``(image, ...)`` by index, the image as a tensor or a PIL image; what follows
            the image is passed on.
        name: one of `NAMES`.
        severity: 1 to 5.
        transform: function of the corrupted image, such as a normalisation; None for none.
        seed: see `corrupt`.

    Raises:
        ArgumentError: if the name or severity is unknown.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> clean = TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4))
        >>> image, label = CorruptedDataset(clean, "contrast", 5)[2]
        >>> image.shape, label
        (torch.Size([1, 8, 8]), tensor(2))
    """

    def __init__(
        self,
        dataset: Any,
        name: str,
        severity: int,
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        _found(name, severity)
        self.dataset = dataset
        self.name = name
        self.severity = severity
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple:
        """The corrupted image, and what comes with it."""
        image, *rest = self.dataset[index]
        if not isinstance(image, Tensor):
            image = require("torchvision.transforms.v2").functional.pil_to_tensor(image)
        options: dict[str, Any] = {"indices": [index], "seed": self.seed}
        image = _unit(corrupt(image.unsqueeze(0), self.name, self.severity, **options)[0])
        return (image if self.transform is None else self.transform(image), *rest)


def loaders(
    dataset: Any,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    *,
    batch_size: int = 128,
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> dict[tuple[str, int], DataLoader]:
    """Loaders of a data set under each corruption and severity, ready for `evaluate`.

    Images are corrupted while they are read. To evaluate several methods, keep the batches:
    ``{key: list(loader) for key, loader in loaders(...).items()}``.

    Args:
        dataset: see `CorruptedDataset`.
        names: some of `NAMES`; None for all.
        severities: from 1 to 5.
        batch_size: images per batch.
        transform: function of a corrupted image between 0 and 1; None for none.
        seed: see `corrupt`.
        num_workers: worker processes per loader.

    Returns:
        ``{(name, severity): loader}`` of ``(image, ...)``, images between 0 and 1.

    Raises:
        ArgumentError: if a name or severity is unknown.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> clean = TensorDataset(torch.rand(4, 1, 8, 8), torch.arange(4))
        >>> found = loaders(clean, ["contrast", "shot_noise"], [1, 5])
        >>> list(found)
        [('contrast', 1), ('contrast', 5), ('shot_noise', 1), ('shot_noise', 5)]
    """
    check_positive_int("batch_size", batch_size)
    return {
        (name, severity): DataLoader(
            CorruptedDataset(dataset, name, severity, transform=transform, seed=seed),
            batch_size=batch_size,
            num_workers=num_workers,
        )
        for name in _several("names", names or NAMES)
        for severity in severities
    }


# ---------------------------------------------------------------- published files


def files(
    folder: str | Path,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    *,
    batch_size: int = 128,
    transform: Callable[[Tensor], Tensor] | None = None,
    num_workers: int = 0,
) -> dict[tuple[str, int], DataLoader]:
    """Loaders of CIFAR-10-C, CIFAR-100-C or Tiny-ImageNet-C, ready for `evaluate`.

    Reads either layout: ``<corruption>.npy`` beside ``labels.npy``, the severities one after the
    other, as the CIFAR sets have it (memory-mapped, so that only batches are read); or image
    folders ``<corruption>/<severity>/<class>/``, as Tiny-ImageNet-C has it, classes numbered in the
    order of their names as ``torchvision.datasets.ImageFolder`` does.

    Source: Hendrycks & Dietterich, 2019 (arXiv 1903.12261).

    Args:
        folder: where the files are.
        names: of corruptions; None for all in the folder.
        severities: from 1 to 5.
        batch_size: images per batch.
        transform: function of an image ``(channel, height, width)`` between 0 and 1; None for none.
        num_workers: worker processes per loader.

    Returns:
        ``{(name, severity): loader}`` of ``(image, label)``.

    Raises:
        ArgumentError: if the folder has no such files, or they do not fit each other.
        MissingDependencyError: for image folders, if torchvision is not installed.
    """
    folder = Path(folder)
    check_positive_int("batch_size", batch_size)
    arrays = {path.stem: path for path in sorted(folder.glob("*.npy")) if path.stem != "labels"}
    folders = {path.parent.name: path.parent for path in sorted(folder.glob("*/1"))}
    there = arrays or folders
    if not there:
        raise ArgumentError(
            f"{folder} has neither <corruption>.npy files nor <corruption>/1 folders; give the "
            f"folder that CIFAR-10-C.tar, CIFAR-100-C.tar or Tiny-ImageNet-C.tar unpacks to"
        )
    names = _several("names", names or list(there))
    missing = [name for name in names if name not in there]
    if missing:
        raise ArgumentError(f"{folder} has no corruption {missing}; it has {list(there)}")
    wrong = [severity for severity in severities if severity not in SEVERITIES]
    if wrong:
        raise ArgumentError(f"severities must be from 1 to 5, got {wrong}")
    return {
        (name, severity): DataLoader(
            _ArrayImages(arrays[name], severity, transform)
            if arrays
            else _folder_images(folders[name] / str(severity), transform),
            batch_size=batch_size,
            num_workers=num_workers,
        )
        for name in names
        for severity in severities
    }


class _ArrayImages(Dataset):
    """The images of one severity in a memory-mapped array file."""

    def __init__(
        self, path: Path, severity: int, transform: Callable[[Tensor], Tensor] | None
    ) -> None:
        labels_path = path.with_name("labels.npy")
        if not labels_path.is_file():
            raise ArgumentError(f"{path} has no labels.npy beside it")
        images, labels = np.load(path, mmap_mode="r"), np.load(labels_path)
        if images.ndim != 4 or images.dtype != np.uint8 or len(images) % len(SEVERITIES):
            raise ArgumentError(
                f"{path} must have the images of 5 severities, uint8 (5 x image, height, width, "
                f"channel); it has {images.dtype} {images.shape}"
            )
        count = len(images) // len(SEVERITIES)
        if len(labels) not in (count, len(images)):
            raise ArgumentError(
                f"{labels_path} has {len(labels)} labels, but {path.name} has {count} images per "
                f"severity"
            )
        rows = slice((severity - 1) * count, severity * count)
        self.images = images[rows]
        self.labels = torch.from_numpy(labels[rows] if len(labels) > count else labels).long()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = _unit(torch.from_numpy(self.images[index].copy()).permute(2, 0, 1))
        return image if self.transform is None else self.transform(image), self.labels[index]


def _folder_images(folder: Path, transform: Callable[[Tensor], Tensor] | None) -> Any:
    """The images of a folder with one folder per class."""
    if not folder.is_dir():
        raise ArgumentError(f"the folder {folder} is not there; each corruption needs 1 to 5")
    to_tensor = require("torchvision.transforms.v2").functional.pil_to_tensor

    def prepared(image: Any) -> Tensor:
        found = _unit(to_tensor(image))
        return found if transform is None else transform(found)

    return require("torchvision.datasets").ImageFolder(folder, transform=prepared)


# ---------------------------------------------------------------- kinds


@dataclass(frozen=True)
class _Corruption:
    """A kind of corruption: a function of an image, a strength and a generator, five strengths."""

    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    strengths: tuple[float, float, float, float, float]


def _gaussian_noise(image: Tensor, sd: float, generator: torch.Generator) -> Tensor:
    return image + sd * torch.randn(image.shape, generator=generator)


def _shot_noise(image: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    return torch.poisson(image * photons, generator=generator) / photons


def _impulse_noise(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    draw = torch.rand(image.shape, generator=generator)
    return torch.where(draw < share / 2, 0.0, torch.where(draw > 1 - share / 2, 1.0, image))


def _gaussian_blur(image: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    sigma = sigma * _unit_length(image)
    size = 2 * int(3 * sigma + 0.5) + 1
    return _vision().gaussian_blur(image, [size, size], [sigma, sigma])


def _contrast(image: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    mean = image.mean((-2, -1), keepdim=True)
    return mean + factor * (image - mean)


def _brightness(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    return image + amount


def _rotation(image: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    sign = 1 if torch.rand((), generator=generator) < 0.5 else -1
    vision = require("torchvision.transforms.v2")
    return vision.functional.rotate(image, sign * degrees, vision.InterpolationMode.BILINEAR)


def _elastic(image: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    field = 2 * torch.rand((2, height, width), generator=generator) - 1
    sigma = 3 * _unit_length(image)
    size = 2 * int(2 * sigma + 0.5) + 1
    size = min(size, 2 * min(height, width) - 1)
    field = _vision().gaussian_blur(field, [size, size], [sigma, sigma])
    field = field / field.square().mean().sqrt()  # so that the strength is a mean length
    lengths = torch.tensor([width, height]) / 2  # the grid goes from -1 to 1
    displacement = field.permute(1, 2, 0) * shift * _unit_length(image) / lengths
    return _vision().elastic(image, displacement.unsqueeze(0))


def _pixelate(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    small = [max(1, round(share * height)), max(1, round(share * width))]
    mode = require("torchvision.transforms.v2").InterpolationMode.NEAREST
    vision = _vision()
    return vision.resize(vision.resize(image, small, antialias=True), [height, width], mode)


def _jpeg(image: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    # Through Pillow, which torchvision needs anyway: its own encoder is going away.
    vision, written = _vision(), io.BytesIO()
    vision.to_pil_image((image * 255).round().to(torch.uint8)).save(
        written, "JPEG", quality=int(quality)
    )
    return vision.pil_to_tensor(require("PIL.Image").open(written)).float() / 255


def _posterize(image: Tensor, bits: float, generator: torch.Generator) -> Tensor:
    return _vision().posterize(image, int(bits))


def _occlusion(image: Tensor, share: float, generator: torch.Generator) -> Tensor:
    height, width = image.shape[-2:]
    tall, wide = max(1, round(share * height)), max(1, round(share * width))
    top = int(torch.randint(height - tall + 1, (), generator=generator))
    left = int(torch.randint(width - wide + 1, (), generator=generator))
    return _vision().erase(image, top, left, tall, wide, torch.full((1, 1, 1), 0.5))


_KINDS = {
    "gaussian_noise": _Corruption(_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": _Corruption(_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": _Corruption(_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": _Corruption(_gaussian_blur, (0.6, 0.9, 1.2, 1.6, 2.0)),
    "contrast": _Corruption(_contrast, (0.75, 0.6, 0.45, 0.3, 0.15)),
    "brightness": _Corruption(_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "rotation": _Corruption(_rotation, (6, 12, 18, 24, 30)),
    "elastic": _Corruption(_elastic, (0.5, 0.8, 1.1, 1.5, 2.0)),
    "pixelate": _Corruption(_pixelate, (0.75, 0.6, 0.45, 0.35, 0.25)),
    "jpeg": _Corruption(_jpeg, (25, 18, 12, 8, 5)),
    "posterize": _Corruption(_posterize, (5, 4, 3, 2, 1)),
    "occlusion": _Corruption(_occlusion, (0.15, 0.25, 0.35, 0.45, 0.55)),
}

NAMES = tuple(_KINDS)
"""The corruptions: three of noise, then blur, light, geometry, coding and a grey square."""


def _apply(corruption: _Corruption, image: Tensor, strength: float, key: str) -> Tensor:
    """One image corrupted, from random numbers that follow from a key."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    corrupted = corruption.apply(_unit(image).float(), strength, generator)
    eight_bits = (corrupted.clamp(0.0, 1.0) * 255).round()
    if image.dtype == torch.uint8:
        return eight_bits.to(torch.uint8)
    return (eight_bits / 255).to(image.dtype)


def _unit(image: Tensor) -> Tensor:
    """An image between 0 and 1."""
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point() or not bool((image >= 0).all() & (image <= 1).all()):
        low, high = image.min().item(), image.max().item()
        raise ArgumentError(
            f"images must be of torch.uint8 or numbers between 0 and 1, got {describe(image)} "
            f"between {low:.4g} and {high:.4g}; corrupt before normalising, with transform= for "
            f"what comes after"
        )
    return image


def _unit_length(image: Tensor) -> float:
    """Pixels of a length that is 1 where a side has 32."""
    return min(image.shape[-2:]) / 32


def _vision() -> Any:
    """The functional interface of torchvision's transforms."""
    return require("torchvision.transforms.v2").functional


def _found(name: str, severity: int) -> _Corruption:
    """A corruption by name."""
    check_choice("name", name, NAMES)
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise ArgumentError(f"severity must be an integer from 1 to 5, got {severity!r}")
    return _KINDS[name]


def _several(argument: str, names: Iterable[str]) -> list[str]:
    """Names as a list; a single text is a mistake."""
    if isinstance(names, str):
        raise ArgumentError(f"{argument} must be a list of names, got {names!r}; write [{names!r}]")
    return list(names)
