"""Checkpoints, folders and loaders that cannot be used, for the table of ``test_bad_input.py``.

Each case happens to a run that has made progress and has a checkpoint. Whatever goes wrong, the
inference and the checkpoint are what they were.
"""

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from unittest import mock

import pyro
import torch
from torch import nn

from pyro_fordes import (
    RBF,
    ArgumentError,
    CheckpointError,
    FordesError,
    ParticleInference,
    Weights,
    bayesianize,
)
from pyro_fordes.checkpoint import checksum, newest, numbered, write
from tests.models import Regression

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0.1, -0.4, 1.0, 0.3, -1.2, 0.6])
DATA = [(X[:3], Y[:3]), (X[3:], Y[3:])]


def make(features=3, num_particles=3, dtype=torch.float32, optim=None, hidden=None):
    net = nn.Linear(features, 1) if hidden is None else nn.Sequential(nn.Linear(features, 1))
    return ParticleInference(
        Regression(bayesianize(net.to(dtype))),
        optim or pyro.optim.Adam({"lr": 0.01}),
        num_particles,
        kernel=RBF(Weights()),
        seed=0,
    )


def equal(a, b):
    """Whether two trees are equal bit for bit."""
    return checksum(a) == checksum(b)


def happens(act):
    """A case: something that happens to a run with a checkpoint, which both survive."""

    def case():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            inference = make()
            options = {"progress_bar": False, "checkpoint": folder / "run"}
            inference.fit(DATA, 2, **options, checkpoint_every=3)
            state, files = inference.state_dict(), [p.name for p in numbered(folder / "run")]
            saved = newest(folder / "run")[0]
            try:
                act(inference, folder)
            finally:
                parts = ("particles", "buffers", "optimizer", "step", "random", "faults")
                now = inference.state_dict()
                assert equal(*({part: s[part] for part in parts} for s in (now, state)))
                assert [p.name for p in numbered(folder / "run")] == files
                assert equal(newest(folder / "run")[0], saved)
                assert not list((folder / "run").glob(".*"))

    return case


def loads(path="bad.pt", **options):
    """A file is made by the decorated function, and loaded by an inference that has moved."""

    def decorate(make_file):
        def act(inference, folder):
            make_file(inference, folder / path)
            inference.load(folder / path, **options)
            inference.step(X, Y)

        return happens(act)

    return decorate


def of(other, *data):
    """A file of another inference."""

    def make_file(inference, path):
        other.run(1, *(data or (X, Y)), progress_bar=False)
        other.save(path)

    return make_file


def changed(change):
    """A file whose state was changed before it was written."""

    def make_file(inference, path):
        state = inference.state_dict()
        change(state)
        write(path, state)

    return make_file


def damaged(change):
    """A file whose bytes were changed."""

    def make_file(inference, path):
        inference.save(path)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return make_file


class Bomb:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("exit 1",)


def flip(inference, path):
    """One bit of a particle's value; the file's structure stays as it is."""
    inference.save(path)
    content = bytearray(path.read_bytes())
    value = inference.get_unconstrained()["net.weight"].numpy().tobytes()
    content[content.index(value) + 2] ^= 1
    path.write_bytes(content)


def tensors(state):
    state["particles"]["net.weight"] = state["particles"]["net.weight"][:2]


def refuse(name, number):
    """Let a function of the operating system fail."""

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return mock.patch(name, fail)


def saving(context, path="state.pt"):
    def act(inference, folder):
        inference.save(folder / "run" / path)

    def act_within(inference, folder):
        with context():
            act(inference, folder)

    return happens(act_within)


def nothing():
    return contextlib.nullcontext()


def fits(loader=DATA, epochs=3, **options):
    """`fit` is called with something; the folder is that of the run unless given."""

    def act(inference, folder):
        given = {"checkpoint": folder / "run", "progress_bar": False, **options}
        if isinstance(given["checkpoint"], str):
            given["checkpoint"] = folder / given["checkpoint"]
        inference.fit(loader, epochs, **given)

    return happens(act)


def after(before, act):
    def both(inference, folder):
        before(inference, folder)
        act(inference, folder)

    return happens(both)


def elsewhere(change, **options):
    """A new inference meets a copy of the folder that was changed."""

    def act(inference, folder):
        copy = folder / "copy"
        copy.mkdir()
        for path in numbered(folder / "run"):
            (copy / path.name).write_bytes(path.read_bytes())
        change(copy)
        other = make(**options)
        x = X.to(options.get("dtype", torch.float32))[:, : options.get("features", 3)]
        data = [(x[:3], Y[:3].to(x.dtype)), (x[3:], Y[3:].to(x.dtype))]
        content = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
        try:
            other.fit(data, 3, progress_bar=False, checkpoint=copy)
        finally:
            assert content == {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}

    return happens(act)


def empty_all(folder):
    for path in numbered(folder):
        path.write_bytes(b"")


def folders(folder):
    for path in numbered(folder):
        path.unlink()
        path.mkdir()


def fewer_batches(folder):
    """A checkpoint from the middle of a longer epoch."""
    for path in numbered(folder):
        path.unlink()
    inference = make()

    def stop(inference, step, loss):
        return step == 6

    inference.fit(DATA * 4, 1, progress_bar=False, checkpoint=folder, callback=stop)


def sgd(params):
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def unreadable(inference, folder):
    inference.save(folder / "secret.pt")
    with refuse("torch.load", errno.EACCES):
        inference.load(folder / "secret.pt")


def hidden_folder(inference, folder):
    with refuse("pathlib.Path.iterdir", errno.EACCES):
        inference.fit(DATA, 3, progress_bar=False, checkpoint=folder / "run")


def full(inference, folder):
    with refuse("os.fsync", errno.ENOSPC):
        inference.fit(DATA, 3, progress_bar=False, checkpoint=folder / "new")


def from_state(state):
    return happens(lambda inference, folder: inference.load_state_dict(state))


CHECKPOINTS = {
    "truncated": (
        loads()(damaged(lambda content: content.__delitem__(slice(2000, None)))),
        CheckpointError,
        "bad.pt: it is damaged, or no checkpoint",
    ),
    "empty": (
        loads()(lambda inference, path: path.write_bytes(b"")),
        CheckpointError,
        "bad.pt: it is damaged, or no checkpoint",
    ),
    "bit flipped in a tensor": (
        loads()(flip),
        CheckpointError,
        "bad.pt: it is damaged|bad.pt is damaged",
    ),
    "first byte": (
        loads()(damaged(lambda content: content.__setitem__(0, 7))),
        CheckpointError,
        "damaged, or no checkpoint",
    ),
    "text": (
        loads()(lambda inference, path: path.write_text("weights: none")),
        CheckpointError,
        "damaged, or no checkpoint",
    ),
    "pickle bomb": (
        loads()(lambda inference, path: torch.save({"state": Bomb()}, path)),
        CheckpointError,
        "damaged, or no checkpoint.*",
    ),
    "weights of a network": (
        loads()(lambda inference, path: torch.save(nn.Linear(3, 1).state_dict(), path)),
        CheckpointError,
        r"no checkpoint of pyro_fordes; save\(...\) writes one",
    ),
    "a list": (
        loads()(lambda inference, path: torch.save([1, 2], path)),
        CheckpointError,
        "no checkpoint of pyro_fordes",
    ),
    "another version's": (
        loads()(
            lambda inference, path: torch.save(
                {"format": 9, "checksum": checksum({"step": 1}), "state": {"step": 1}}, path
            )
        ),
        CheckpointError,
        "has format 9, .* reads formats 1 to 2; load it with the version that wrote it",
    ),
    "a format that is no number": (
        loads()(
            lambda inference, path: torch.save(
                {"format": [1], "checksum": checksum({"step": 1}), "state": {"step": 1}}, path
            )
        ),
        CheckpointError,
        r"has format \[1\], .* reads formats 1 to 2",
    ),
    "a state that is no mapping": (
        loads()(
            lambda inference, path: torch.save(
                {"format": 2, "checksum": checksum([]), "state": []}, path
            )
        ),
        CheckpointError,
        "checksum does not fit",
    ),
    "a folder": (
        loads()(lambda inference, path: path.mkdir()),
        CheckpointError,
        "bad.pt: it is a folder",
    ),
    "missing": (
        loads()(lambda inference, path: None),
        CheckpointError,
        "bad.pt: it does not exist",
    ),
    "no permission": (happens(unreadable), CheckpointError, "secret.pt: .*Permission denied"),
    "a path that is a number": (
        happens(lambda inference, folder: inference.load(3)),
        ArgumentError,
        "path must be a text or a pathlib.Path, got 3",
    ),
    "another model's": (
        loads()(of(make(hidden=True))),
        CheckpointError,
        "latent sites .*'net.0.weight'.*, the model .*'net.weight'.*another model",
    ),
    "other features": (
        loads()(of(make(features=2), X[:, :2], Y)),
        CheckpointError,
        r"site 'net.weight' as \(1, 2\) .* the model as \(1, 3\)",
    ),
    "other precision": (
        loads()(of(make(dtype=torch.float64), X.double(), Y.double())),
        CheckpointError,
        "torch.float64, the model as .* torch.float32",
    ),
    "other particles": (
        loads()(of(make(num_particles=4))),
        CheckpointError,
        "has 4 particles, this inference 3; make it with num_particles=4",
    ),
    "another optimiser's": (
        loads()(of(make(optim=sgd))),
        CheckpointError,
        "optimiser state does not fit Adam: it is that of SGD; use the optimiser",
    ),
    "a state without its step": (
        loads()(changed(lambda state: state.pop("step"))),
        CheckpointError,
        r"lacks \['step'\]",
    ),
    "particles of two numbers": (
        loads()(changed(tensors)),
        CheckpointError,
        "not every site has 3 particles",
    ),
    "particles that are texts": (
        loads()(changed(lambda state: state.update(particles={"net.weight": "w"}))),
        CheckpointError,
        "no state of a ParticleInference, though it has the parts",
    ),
    "random state that is none": (
        loads()(changed(lambda state: state.update(random={"seed": 1, "cpu": "state"}))),
        CheckpointError,
        "no state of a ParticleInference, though it has the parts",
    ),
    "state None": (from_state(None), CheckpointError, "no state of a ParticleInference"),
    "state text": (from_state("state.pt"), CheckpointError, "no state of a ParticleInference"),
    "empty state": (from_state({}), CheckpointError, "no state of a ParticleInference.*lacks"),
    "save before any step": (
        happens(lambda inference, folder: make().save(folder / "new.pt")),
        FordesError,
        "no particles yet",
    ),
    "save to a folder": (saving(nothing, ""), CheckpointError, "it is a folder; name a file"),
    "save below a file": (
        saving(nothing, "step-000000004.pt/below.pt"),
        CheckpointError,
        "cannot write the checkpoint",
    ),
    "save to a long name": (
        saving(nothing, "n" * 300),
        CheckpointError,
        "cannot write the checkpoint.*[Nn]ame too long",
    ),
    "save to a name with a null": (
        saving(nothing, "a\0b"),
        CheckpointError,
        "cannot write the checkpoint.*null",
    ),
    "save to a number": (
        happens(lambda inference, folder: inference.save(3)),
        ArgumentError,
        "path must be a text or a pathlib.Path, got 3",
    ),
    "save to a full disk": (
        saving(lambda: refuse("os.fsync", errno.ENOSPC), "step-000000004.pt"),
        CheckpointError,
        "No space left.*older file of that name is unchanged",
    ),
    "save to a disk with errors": (
        saving(lambda: refuse("os.replace", errno.EIO), "step-000000004.pt"),
        CheckpointError,
        "Input/output error.*older file of that name is unchanged",
    ),
    "save without permission": (
        saving(lambda: refuse("pathlib.Path.open", errno.EACCES), "step-000000004.pt"),
        CheckpointError,
        "Permission denied.*older file of that name is unchanged",
    ),
}

FITS = {
    "checkpoint is a file": (
        fits(checkpoint="run/step-000000004.pt"),
        CheckpointError,
        "must be a folder, but .*step-000000004.pt is a file",
    ),
    "checkpoint below a file": (
        fits(checkpoint="run/step-000000004.pt/below"),
        CheckpointError,
        "[Nn]ot a directory",
    ),
    "checkpoint is a number": (
        fits(checkpoint=3),
        ArgumentError,
        r"fit\(checkpoint=...\) must be a folder's name, got 3",
    ),
    "folder that may not be listed": (happens(hidden_folder), CheckpointError, "Permission denied"),
    "folder on a full disk": (
        happens(full),
        CheckpointError,
        "no checkpoint can be written to the folder .*No space left.*nothing has run",
    ),
    "checkpoint_every 0": (
        fits(checkpoint_every=0),
        ArgumentError,
        r"fit\(checkpoint_every=...\) must be an integer of at least 1, got 0",
    ),
    "checkpoint_every text": (
        fits(checkpoint_every="1h"),
        ArgumentError,
        r"fit\(checkpoint_every=...\) must be an integer of at least 1, got '1h'",
    ),
    "checkpoint_every without a folder": (
        fits(checkpoint=None, checkpoint_every=3),
        ArgumentError,
        "needs a folder",
    ),
    "keep 0": (fits(keep=0), ArgumentError, "keep must be an integer of at least 1, got 0"),
    "callback that is none": (
        fits(callback=3),
        ArgumentError,
        "callback must be a function of",
    ),
    "all checkpoints empty": (
        elsewhere(empty_all),
        CheckpointError,
        "none of the 2 checkpoints in .* can be used: .*delete or rename the folder",
    ),
    "folders named like checkpoints": (
        elsewhere(folders),
        CheckpointError,
        "none of the 2 checkpoints in .* can be used: .*it is a folder",
    ),
    "a folder of another model": (
        elsewhere(lambda folder: None, hidden=True),
        CheckpointError,
        "latent sites .* another model",
    ),
    "a folder of another size": (
        elsewhere(lambda folder: None, features=2),
        CheckpointError,
        r"site 'net.weight' as \(1, 3\) .* the model as \(1, 2\)",
    ),
    "a folder of other precision": (
        elsewhere(lambda folder: None, dtype=torch.float64),
        CheckpointError,
        "torch.float32, the model as .* torch.float64",
    ),
    "a folder of fewer particles": (
        elsewhere(lambda folder: None, num_particles=2),
        CheckpointError,
        "has 3 particles, this inference 2",
    ),
    "a folder of another optimiser": (
        elsewhere(lambda folder: None, optim=sgd),
        CheckpointError,
        "optimiser state does not fit SGD: it is that of Adam; use the optimiser",
    ),
    "a loader with fewer batches": (
        elsewhere(fewer_batches),
        CheckpointError,
        "after 7 batches of an epoch, but the loader gave only 2; use the loader",
    ),
    "loader None": (fits(None), ArgumentError, "loader must be an iterable.*got NoneType"),
    "loader of nothing": (fits([], checkpoint=None), ArgumentError, "loader gave no batch"),
    "batch of other names": (
        fits([{"images": X, "labels": Y}], checkpoint=None),
        ArgumentError,
        r"model takes \(x, y=None\), but was called with .*'images'",
    ),
    "batch of numbered names": (
        fits([{0: X, 1: Y}], checkpoint=None),
        ArgumentError,
        r"batch .* names of arguments.*got \[0, 1\]",
    ),
    "batch without observations": (
        fits([(X,)], checkpoint=None),
        FordesError,
        "'y'",
    ),
    "batch of three": (
        fits([(X, Y, Y)], checkpoint=None),
        ArgumentError,
        r"model takes \(x, y=None\), but was called with 3 positional arguments",
    ),
    "batch of texts": (
        fits([("images", "labels")], checkpoint=None),
        FordesError,
        r"cannot be run with the arguments \(str, str\)",
    ),
    "batch None": (
        fits([None], checkpoint=None),
        FordesError,
        r"cannot be run with the arguments \(NoneType\)",
    ),
    "batch of other features": (
        fits([(X[:, :2], Y)], checkpoint=None),
        FordesError,
        r"cannot be run with the arguments \(a \(6, 2\) tensor .*shapes cannot be multiplied",
    ),
    "batch of other lengths": (
        fits([(X, Y[:4])], checkpoint=None),
        FordesError,
        r"cannot be run with the arguments \(a \(6, 3\) tensor .*a \(4,\) tensor",
    ),
    "batch of numpy arrays": (
        fits([(X.numpy(), Y.numpy())], checkpoint=None),
        FordesError,
        r"cannot be run with the arguments \(ndarray, ndarray\)",
    ),
    "batch of integers": (
        fits([(X.long(), Y)], checkpoint=None),
        FordesError,
        "a .6, 3. tensor of torch.int64",
    ),
    "batch of no points": (
        fits([(X[:0], Y[:0])], checkpoint=None),
        FordesError,
        "cannot be run with the arguments .*size cannot be zero",
    ),
    "batch with NaN": (
        fits([(X, Y * float("nan"))], checkpoint=None),
        FordesError,
        "observations of site 'y' have values that are not finite",
    ),
}

FAULTS = {
    "nan policy": (
        lambda: ParticleInference(Regression(nn.Linear(3, 1)), sgd, 3, nan="ignore"),
        ArgumentError,
        "nan must be one of 'raise', 'skip', 'reset'; got 'ignore'",
    ),
    "nan policy None": (
        lambda: ParticleInference(Regression(nn.Linear(3, 1)), sgd, 3, nan=None),
        ArgumentError,
        "nan must be one of 'raise', 'skip', 'reset'; got None",
    ),
    "clip_norm 0": (
        lambda: ParticleInference(Regression(nn.Linear(3, 1)), sgd, 3, clip_norm=0.0),
        ArgumentError,
        r"clip_norm must be a finite number above 0\.0, got 0\.0",
    ),
    "clip_norm text": (
        lambda: ParticleInference(Regression(nn.Linear(3, 1)), sgd, 3, clip_norm="1"),
        ArgumentError,
        r"clip_norm must be a number, got '1' \(str\)",
    ),
}
