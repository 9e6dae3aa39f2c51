"""Corruptions are the same in every batch, stronger with severity, and fit `evaluate`."""

import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional

from pyro_fordes import ArgumentError, MissingDependencyError, corruptions

same = torch.testing.assert_close


def pictures(count=6, channels=1, side=28):
    """Smooth pictures with edges."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = functional.resize(coarse, [side, side])
    smooth[:, :, side // 4 : side // 2, side // 4 :] = 0.9
    return smooth.clamp(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", corruptions.NAMES)
def test_the_same_whatever_the_batch(name, channels):
    images = pictures(channels=channels)
    whole = corruptions.corrupt(images, name, 4)
    assert whole.shape == images.shape
    assert whole.dtype == images.dtype
    assert not torch.equal(whole, images)
    assert whole.min() >= 0
    assert whole.max() <= 1
    state = torch.get_rng_state()
    order = [4, 1, 0]
    assert torch.equal(corruptions.corrupt(images[order], name, 4, indices=order), whole[order])
    same(torch.get_rng_state(), state)
    assert torch.equal(images, pictures(channels=channels))
    clean = TensorDataset(images, torch.arange(6))
    for size in (1, 4):
        (loader,) = corruptions.loaders(clean, [name], [4], batch_size=size).values()
        batches = list(loader)
        assert torch.equal(torch.cat([image for image, _ in batches]), whole)
        assert torch.cat([label for _, label in batches]).tolist() == list(range(6))
    shuffled = corruptions.CorruptedDataset(clean, name, 4)
    for images_, labels in DataLoader(shuffled, batch_size=3, shuffle=True):
        assert torch.equal(images_, whole[labels])


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_severities(name):
    images = pictures(24)
    changes = [
        (corruptions.corrupt(images, name, severity) - images).square().mean().item()
        for severity in corruptions.SEVERITIES
    ]
    assert changes == sorted(changes)
    assert changes[-1] > 1.3 * changes[0] > 0


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_bytes_and_rounding(name):
    """Images of bytes and of numbers are treated alike; results fit into bytes."""
    bytes_ = (pictures(3) * 255).round().to(torch.uint8)
    found = corruptions.corrupt(bytes_, name, 3)
    assert found.dtype == torch.uint8
    numbers = corruptions.corrupt(bytes_.float() / 255, name, 3)
    same(numbers, found.float() / 255)
    assert torch.equal(corruptions.corrupt(bytes_.double() / 255, name, 3).float(), numbers)


RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "rotation", "elastic", "occlusion")


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_images_differ_in_their_random_numbers_only(name):
    equal = pictures(1).expand(12, -1, -1, -1)
    found = corruptions.corrupt(equal, name, 3)
    other = corruptions.corrupt(equal, name, 3, seed=1)
    varied = not torch.equal(found, found[:1].expand_as(found))
    assert varied == (name in RANDOM)
    assert torch.equal(found, other) != varied


def test_noise_has_its_moments():
    grey = torch.full((40, 1, 28, 28), 0.5)
    noise = corruptions.corrupt(grey, "gaussian_noise", 2) - 0.5
    # 31,360 pixels: the sd's standard error is 0.4 %; five of them.
    assert noise.std().item() == pytest.approx(0.12, rel=0.02)
    hit = corruptions.corrupt(grey, "impulse_noise", 5)
    share = ((hit == 0) | (hit == 1)).float().mean().item()
    assert share == pytest.approx(0.27, abs=0.0125)  # five standard errors of 0.0025
    shot = corruptions.corrupt(grey, "shot_noise", 1)
    assert shot.var().item() == pytest.approx(0.5 / 60, rel=0.04)


def test_closed_forms():
    images = pictures(2)

    def found(name, severity):
        return corruptions.corrupt(images, name, severity)

    step = {"atol": 0.5 / 255 + 1e-6, "rtol": 0}
    same(found("brightness", 2), (images + 0.2).clamp_max(1), **step)
    mean = images.mean((2, 3), keepdim=True)
    same(found("contrast", 5), mean + 0.15 * (images - mean), **step)
    same(found("contrast", 5), functional.adjust_contrast(images, 0.15), **step)
    assert len(found("posterize", 5).unique()) <= 2
    assert (found("occlusion", 1) == 128 / 255).sum() >= 2 * 16  # a square of 4 x 4
    # Far from the edges a blur keeps the mean.
    assert found("gaussian_blur", 5).mean() == pytest.approx(images.mean().item(), abs=0.02)


def test_images_of_files(tmp_path):
    """A data set of PIL images, as torchvision has them."""
    image = functional.to_pil_image(pictures(1, channels=3)[0])
    data = [(image, 7)]
    found, label = corruptions.CorruptedDataset(data, "jpeg", 2, transform=lambda x: 2 * x - 1)[0]
    assert found.shape == (3, 28, 28)
    assert label == 7
    assert -1 <= found.min() < 0 < found.max() <= 1


# ---------------------------------------------------------------- published files


def test_cifar_files(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(20, 4, 4, 3), dtype=np.uint8)
    labels = np.tile(np.arange(4, dtype=np.uint8), 5)
    np.save(tmp_path / "fog.npy", images)
    np.save(tmp_path / "snow.npy", images[::-1])
    np.save(tmp_path / "labels.npy", labels)
    found = corruptions.files(tmp_path, batch_size=3, transform=lambda image: image - 0.5)
    assert list(found) == [(name, s) for name in ("fog", "snow") for s in range(1, 6)]
    x, y = (torch.cat(parts) for parts in zip(*found["fog", 2], strict=True))
    same(x, torch.from_numpy(images[4:8]).permute(0, 3, 1, 2) / 255 - 0.5)
    assert y.tolist() == [0, 1, 2, 3]
    assert y.dtype == torch.int64
    np.save(tmp_path / "labels.npy", labels[:4])  # labels of one severity
    again = corruptions.files(tmp_path, ["snow"], [5])
    x, y = next(iter(again["snow", 5]))
    same(x, torch.from_numpy(images[::-1][16:].copy()).permute(0, 3, 1, 2) / 255)
    assert y.tolist() == [0, 1, 2, 3]


def test_tiny_imagenet_files(tmp_path):
    picture = pictures(1, channels=3, side=8)[0]
    for severity in (1, 2):
        for place, name in enumerate(("n01", "n02")):
            folder = tmp_path / "fog" / str(severity) / name
            folder.mkdir(parents=True)
            image = functional.to_pil_image(picture / (severity + place))
            image.save(folder / "test_1.png")
    found = corruptions.files(tmp_path, severities=[1, 2], batch_size=2)
    assert list(found) == [("fog", 1), ("fog", 2)]
    x, y = next(iter(found["fog", 2]))
    assert y.tolist() == [0, 1]
    same(x, torch.stack([picture / 2, picture / 3]), atol=1 / 255, rtol=0)
    with pytest.raises(ArgumentError, match="is not there"):
        corruptions.files(tmp_path, severities=[3])


# ---------------------------------------------------------------- errors

IMAGES = pictures(2)
BAD = {
    "name": (lambda f: corruptions.corrupt(IMAGES, "fog", 1), "name must be one of 'gaussian"),
    "severity": (lambda f: corruptions.corrupt(IMAGES, "jpeg", 6), "from 1 to 5, got 6"),
    "severity 0": (lambda f: corruptions.CorruptedDataset([], "jpeg", 0), "from 1 to 5"),
    "one image": (lambda f: corruptions.corrupt(IMAGES[0], "jpeg", 1), "image, channel"),
    "normalised": (lambda f: corruptions.corrupt(IMAGES - 0.5, "jpeg", 1), "before normalising"),
    "NaN": (lambda f: corruptions.corrupt(IMAGES * torch.nan, "jpeg", 1), "between 0 and 1"),
    "indices": (lambda f: corruptions.corrupt(IMAGES, "jpeg", 1, indices=[1]), "1 numbers for 2"),
    "one name": (lambda f: corruptions.loaders([], "jpeg"), r"write \['jpeg'\]"),
    "batch size": (lambda f: corruptions.loaders([], ["jpeg"], batch_size=0), "batch_size"),
    "no files": (lambda f: corruptions.files(f), "neither"),
    "no labels": (lambda f: corruptions.files(save(f, "fog", (5, 2, 2, 3))), "labels.npy"),
    "sizes": (
        lambda f: corruptions.files(save(save(f, "labels", (4,)), "fog", (12, 2, 2, 3))),
        "5 severities",
    ),
    "labels": (
        lambda f: corruptions.files(save(save(f, "labels", (4,)), "fog", (10, 2, 2, 3))),
        "4 labels.* 2 images",
    ),
    "unknown": (
        lambda f: corruptions.files(save(f, "fog", (5, 2, 2, 3)), ["snow"]), r"it has \['fog'\]"
    ),
    "file severity": (
        lambda f: corruptions.files(save(f, "fog", (5, 2, 2, 3)), severities=[0]), "1 to 5"
    ),
}  # fmt: skip


def save(folder, name, shape):
    np.save(folder / f"{name}.npy", np.zeros(shape, np.uint8))
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
    wrong, pattern = BAD[case]
    with pytest.raises(ArgumentError, match=pattern):
        wrong(tmp_path)


def test_torchvision_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    corruptions.corrupt(IMAGES, "shot_noise", 1)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pyro-fordes\[vision\]'"):
        corruptions.corrupt(IMAGES, "rotation", 1)
