"""Exact resume: a run that was cut off ends like one that was not; damaged files are found out."""

import copy
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_fordes import (
    RBF,
    SVGD,
    ArgumentError,
    CheckpointError,
    Ensemble,
    InputGradients,
    ParticleInference,
    ParticlePredictive,
    Weights,
    bayesianize,
    loops,
)
from pyro_fordes.checkpoint import checksum, newest, numbered, read, write, write_numbered
from tests.models import Classifier

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(20) % 3


class Noisy(Dataset):
    """Rows with noise from every global generator, as augmentations have it."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        noise = torch.randn(6) + np.random.randn() + random.random()
        return X[index] + 0.01 * noise, Y[index]


def loader(**options):
    return DataLoader(Noisy(), batch_size=6, shuffle=True, **options)


def mlp():
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.ReLU(), nn.Linear(4, 3))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 2, 2),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4, 3),
    )


def function(x, y=None):
    """A model with a constrained site and parameters that all particles share."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(6, 3), scale).to_event(2))
    bias = pyro.param("bias", torch.zeros(3))
    rate = pyro.param("rate", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", 20, subsample_size=len(x)):
        pyro.sample("y", dist.Categorical(logits=rate * (x @ weight + bias)), obs=y)


def scheduler():
    return pyro.optim.StepLR(
        {
            "optimizer": torch.optim.Adam,
            "optim_args": {"lr": 0.01},
            "step_size": 1,
            "gamma": 0.7,
        }
    )


FORMAT_1_LOSSES = [25.7336, 25.5427, 25.3585]

SETTINGS = {
    "MLP, Pyro's Adam, FoRDE": (mlp, lambda: pyro.optim.Adam({"lr": 0.01}), {}, {}),
    "MLP, options by name": (mlp, lambda: pyro.optim.Adam(lambda name: {"lr": 0.01}), {}, {}),
    "CNN, Pyro's scheduler, weights": (cnn, scheduler, {"kernel": RBF(Weights())}, {}),
    "CNN, torch SGD, workers": (
        cnn,
        lambda: lambda params: torch.optim.SGD(params, lr=0.001, momentum=0.9),
        {"transport": Ensemble()},
        {"num_workers": 2},
    ),
    "function, shared parameters, SVGD": (
        None,
        lambda: pyro.optim.ClippedAdam({"lr": 0.01}),
        {"kernel": RBF(Weights()), "transport": SVGD()},
        {},
    ),
    "loader with a generator": (
        mlp,
        lambda: pyro.optim.Adam({"lr": 0.01}),
        {"kernel": RBF(Weights())},
        {"generator": True},
    ),
}


class Cut(Exception):
    """A run that ends in the middle, before anything can be saved."""


def cut_after(count):
    """A callback that ends the run after so many steps."""
    left = iter(range(count - 1))

    def callback(inference, step, loss):
        if next(left, None) is None:
            raise Cut

    return callback


def begin(name):
    """New objects, as a new process has them; the global state says how the data are drawn."""
    net, optim, options, of_loader = SETTINGS[name]
    pyro.clear_param_store()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    model = function if net is None else Classifier(bayesianize(net()), num_data=20)
    if of_loader.get("generator"):
        of_loader = {"generator": torch.Generator().manual_seed(7)}
    kernel = options.get("kernel", RBF(InputGradients("x")))
    inference = ParticleInference(
        model, optim(), 3, **{**options, "kernel": kernel}, num_data=20, seed=5
    )
    return inference, loader(**of_loader)


def same(a, b, path=""):
    """Whether two trees are equal bit for bit; raises where they are not."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            same(left, right, f"{path}/{index}")
    else:
        assert a == b, path


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_cut_off_and_resumed_ends_like_one_that_was_not(name, tmp_path):
    inference, data = begin(name)
    expected_losses = inference.fit(data, 3, progress_bar=False, checkpoint=tmp_path / "whole")
    expected = inference.state_dict()
    assert len(expected_losses) == 12

    options = {"progress_bar": False, "checkpoint": tmp_path / "cut", "checkpoint_every": 1}
    # In the middle of an epoch, at its end, at its start, after its first step.
    for count in (2, 2, 1, 4):
        inference, data = begin(name)
        with pytest.raises(Cut):
            inference.fit(data, 3, callback=cut_after(count), **options)
        torch.randn(5), np.random.rand(), random.random()
    inference, data = begin(name)
    losses = inference.fit(data, 3, **options)
    assert (losses == expected_losses).all()
    same(inference.state_dict(), expected)
    # All is done: the same call again changes nothing and returns the same.
    inference, data = begin(name)
    assert (inference.fit(data, 3, **options) == expected_losses).all()
    same(inference.state_dict()["particles"], expected["particles"])


@pytest.mark.parametrize("name", ["CNN, Pyro's scheduler, weights", "MLP, options by name"])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_cut_off_right_after_a_checkpoint(name, count, tmp_path, monkeypatch):
    """After the last batch of an epoch the scheduler has still to be stepped."""
    inference, data = begin(name)
    expected_losses = inference.fit(data, 2, progress_bar=False, checkpoint=tmp_path / "whole")
    expected = inference.state_dict()

    def cut(folder, step, *rest):
        write_numbered(folder, step, *rest)
        if step == count:
            raise Cut

    options = {"progress_bar": False, "checkpoint": tmp_path / "cut", "checkpoint_every": 1}
    inference, data = begin(name)
    monkeypatch.setattr(loops, "write_numbered", cut)
    with pytest.raises(Cut):
        inference.fit(data, 2, **options)
    monkeypatch.undo()
    inference, data = begin(name)
    assert (inference.fit(data, 2, **options) == expected_losses).all()
    same(inference.state_dict(), expected)


def test_killed_at_random_moments():
    """The short form of ``benchmarks/kill_and_resume.py``, in a process of its own."""
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/kill_and_resume.py", "--kills", "3", "--epochs", "2"),
            *("--settings", "CNN, torch SGD"),
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"3 kills.*: bit-equal", done.stdout)


def test_workers_that_stay_are_warned_of(tmp_path):
    options = {"progress_bar": False, "checkpoint": tmp_path, "checkpoint_every": 1}
    inference, data = begin("CNN, torch SGD, workers")
    with pytest.raises(Cut):
        inference.fit(data, 3, callback=cut_after(2), **options)
    inference, _ = begin("CNN, torch SGD, workers")
    with pytest.warns(UserWarning, match="persistent_workers=False. resumes exactly"):
        inference.fit(loader(num_workers=1, persistent_workers=True), 1, **options)


def test_more_epochs_go_on_where_the_last_ended(tmp_path):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    expected = inference.fit(data, 4, progress_bar=False, checkpoint=tmp_path / "whole")
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    inference.fit(data, 2, progress_bar=False, checkpoint=tmp_path / "two")
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    resumed = inference.fit(data, 3, progress_bar=False, checkpoint=tmp_path / "two")
    assert (resumed == expected[:12]).all()
    # In the same process, too.
    more = inference.fit(data, 4, progress_bar=False, checkpoint=tmp_path / "two")
    assert (more == expected).all()


def test_a_warm_up_in_a_new_process_does_not_hide_the_checkpoints(tmp_path):
    """Steps before `fit` are taken again by a restarted script; the checkpoint is further."""

    def script(callback=None):
        inference, data = begin("MLP, Pyro's Adam, FoRDE")
        inference.run(2, X, Y, progress_bar=False)
        return inference.fit(
            data,
            3,
            progress_bar=False,
            callback=callback,
            checkpoint=tmp_path,
            checkpoint_every=1,
        )

    with pytest.raises(Cut):
        script(cut_after(6))
    resumed = script()
    for path in numbered(tmp_path):
        path.unlink()
    assert (resumed == script()).all()


def test_a_plain_fit_does_not_count_for_one_with_checkpoints(tmp_path):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    inference.fit(data, 2, progress_bar=False)
    assert len(inference.fit(data, 2, progress_bar=False, checkpoint=tmp_path)) == 8
    assert inference.state_dict()["step"] == 16


def test_a_fit_in_another_folder_is_another_run(tmp_path):
    """Such as one on other data, after the first; each goes on where it was cut off."""

    def script(callback=None):
        inference, data = begin("MLP, Pyro's Adam, FoRDE")
        first = inference.fit(data, 3, progress_bar=False, checkpoint=tmp_path / "one")
        return (
            inference,
            first,
            inference.fit(
                [(X, Y)] * 2,
                3,
                progress_bar=False,
                callback=callback,
                checkpoint=tmp_path / "two",
                checkpoint_every=1,
            ),
        )

    inference, first, second = script()
    assert (len(first), len(second), inference.state_dict()["step"]) == (12, 6, 18)
    for path in numbered(tmp_path / "two"):
        path.unlink()
    with pytest.raises(Cut):
        script(cut_after(3))
    resumed, _, again = script()
    assert (again == second).all()
    same(resumed.state_dict()["particles"], inference.state_dict()["particles"])


SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    from tests import test_checkpoint as t
    import pyro_fordes.checkpoint as c

    folder, name, kill, at = sys.argv[1:5]
    torch.set_num_threads(1)
    inference, data = t.begin(name)
    calls = 0

    def killer(*_):
        global calls
        calls += 1
        if calls == int(at):
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        def wrapped(*args, **kwargs):
            killer()
            return function(*args, **kwargs)
        return wrapped

    if kill == "replace":
        c.os.replace = before(c.os.replace)
    if kill == "fsync":
        c.os.fsync = before(c.os.fsync)
    losses = inference.fit(
        data, 3, progress_bar=False, checkpoint=folder, checkpoint_every=1,
        callback=killer if kill == "step" else None,
    )
    torch.save({"losses": losses, "state": inference.state_dict()}, folder + ".result")
    """
)


def test_sigkill_in_a_step_and_while_saving(tmp_path):
    """New processes, killed by the system: after a step, before a file is flushed or renamed."""
    name = "CNN, torch SGD, workers"
    inference, data = begin(name)
    expected = inference.fit(data, 3, progress_bar=False)
    state = inference.state_dict()
    for kill, at in [("step", 3), ("replace", 3), ("fsync", 4), ("none", 1)]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), name, kill, str(at)],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if kill == "none" else -signal.SIGKILL), done.stderr
    result = torch.load(tmp_path / "run.result", weights_only=True)
    assert (result["losses"] == expected).all()
    same(result["state"]["particles"], state["particles"])
    same(result["state"]["buffers"], state["buffers"])
    same(result["state"]["optimizer"], state["optimizer"])
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signals_save_before_the_process_ends(number, error, tmp_path):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    before = signal.getsignal(number)

    def callback(inference, step, loss):
        if step == 4:
            os.kill(os.getpid(), number)

    with pytest.raises(error) as caught:
        inference.fit(
            data,
            3,
            progress_bar=False,
            callback=callback,
            checkpoint=tmp_path,
            checkpoint_every=timedelta(days=1),
        )
    if number == signal.SIGTERM:
        assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(number) is before
    state, _ = newest(tmp_path)
    assert state["step"] == 5
    assert (state["position"]["epoch"], state["position"]["batch"]) == (1, 1)


# -------------------------------------------------------------------- state and files


def started(name="MLP, Pyro's Adam, FoRDE", steps=3):
    inference, _ = begin(name)
    inference.run(steps, X, Y, progress_bar=False)
    return inference


@pytest.mark.parametrize("name", SETTINGS)
def test_loading_from_a_file_continues_bit_for_bit(name, tmp_path):
    inference = started(name)
    inference.save(tmp_path / "state.pt")
    expected = inference.run(3, X, Y, progress_bar=False)
    fresh, _ = begin(name)
    made = ParticleInference.load(
        tmp_path / "state.pt",
        fresh.model,
        fresh.optim,
        kernel=fresh.kernel,
        transport=fresh.transport,
        num_data=20,
    )
    assert (made.run(3, X, Y, progress_bar=False) == expected).all()
    same(made.state_dict(), inference.state_dict())
    # An inference that has already moved takes a state over, too.
    other = started(name, steps=5)
    other.load(tmp_path / "state.pt")
    assert (other.run(3, X, Y, progress_bar=False) == expected).all()
    same(other.state_dict(), inference.state_dict())


def test_samples_are_there_before_the_model_has_run(tmp_path):
    inference = started("function, shared parameters, SVGD")
    inference.save(tmp_path / "state.pt")
    fresh, _ = begin("function, shared parameters, SVGD")
    fresh.load(tmp_path / "state.pt")
    same(fresh.get_samples(), inference.get_samples())
    same(fresh.state_dict(), inference.state_dict())
    with pytest.raises(ArgumentError, match="the model takes"):
        fresh.step()


def partly_shared():
    """A network whose last layer all particles share, and that is trained."""
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    return Classifier(
        bayesianize(net, prior=lambda name, value: None if name.startswith("2") else 1.0),
        num_data=20,
    )


@pytest.mark.parametrize("make", [partly_shared, lambda: function])
def test_predictions_of_a_loaded_state_have_its_shared_parameters(make):
    """They need no observations, so they come before what is checked with the model's arguments."""

    def begun():
        pyro.clear_param_store()
        inference = ParticleInference(
            make(), pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights())
        )
        return inference, ParticlePredictive(inference)

    torch.manual_seed(0)
    inference, predict = begun()
    inference.run(3, X, Y, progress_bar=False)
    wanted = predict.mean(X)["y"]
    network = None if make() is function else inference.module(0)
    state = inference.state_dict()
    torch.manual_seed(1)
    fresh, predict = begun()
    fresh.load_state_dict(state)
    if network is not None:
        assert torch.equal(fresh.module(0)(X), network(X))
    assert torch.equal(predict.mean(X)["y"], wanted)
    same(fresh.state_dict(), state)
    fresh.step(X, Y)


def test_samples_drawn_of_a_loaded_state_move_its_random_stream():
    inference = started()
    fresh, _ = begin("MLP, Pyro's Adam, FoRDE")
    fresh.load_state_dict(inference.state_dict())
    same(fresh.get_samples(4), inference.get_samples(4))
    same(fresh.state_dict(), inference.state_dict())


def test_what_load_is_given_beside_is_checked(tmp_path):
    inference = started()
    inference.save(tmp_path / "state.pt")
    for options in ({"num_particles": 3}, {"gather": None}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            ParticleInference.load(
                tmp_path / "state.pt", inference.model, pyro.optim.Adam({"lr": 0.1}), **options
            )


def test_fit_refuses_a_file_that_is_no_state_of_an_inference(tmp_path):
    write(tmp_path / "step-000000003.pt", {"results": 1})
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    with pytest.raises(CheckpointError, match="no state of a ParticleInference"):
        inference.fit(data, 1, progress_bar=False, checkpoint=tmp_path)


def test_another_engine_goes_on_with_a_state(tmp_path):
    inference = started("CNN, Pyro's scheduler, weights")
    inference.save(tmp_path / "state.pt")
    fresh, _ = begin("CNN, Pyro's scheduler, weights")
    made = ParticleInference.load(
        tmp_path / "state.pt",
        fresh.model.eval(),
        fresh.optim,
        kernel=fresh.kernel,
        num_data=20,
        vectorize="vmap",
    )
    inference.model.eval()
    assert made.step(X, Y) == pytest.approx(inference.step(X, Y), rel=1e-5)


def test_a_file_is_read_without_unpickling(tmp_path):
    started().save(tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content["format"] == 2
    assert content["state"]["step"] == 3
    assert content["state"]["versions"]["torch"] == str(torch.__version__)


def test_a_file_of_the_first_format_is_read_and_goes_on():
    """Written by the version before faults were counted, with the losses that came next there."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    inference = ParticleInference.load(
        Path(__file__).parent / "data" / "format-1.pt",
        Classifier(bayesianize(net)),
        pyro.optim.Adam({"lr": 0.01}),
        kernel=RBF(InputGradients("x")),
    )
    losses = inference.run(3, x, torch.arange(12) % 2, progress_bar=False)
    assert losses.tolist() == pytest.approx(FORMAT_1_LOSSES, rel=1e-5)
    assert inference.state_dict()["faults"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"vectorize": "vmap"}, {"chunk_size": 1}])
def test_chunks_and_engines_go_on_with_a_state(options, tmp_path):
    """Dropout, BatchNorm and all: a particle's random numbers are its own."""
    name = "CNN, Pyro's scheduler, weights"
    inference = started(name)
    inference.save(tmp_path / "state.pt")
    fresh, _ = begin(name)
    made = ParticleInference.load(
        tmp_path / "state.pt", fresh.model, fresh.optim, kernel=fresh.kernel, num_data=20, **options
    )
    expected = inference.run(3, X, Y, progress_bar=False)
    torch.testing.assert_close(made.run(3, X, Y, progress_bar=False), expected, rtol=1e-5, atol=0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "state.pt"
    state = started("CNN, Pyro's scheduler, weights").state_dict()
    return write(path, state), state


def test_a_truncated_file_is_found_out(file):
    path, _ = file
    whole = path.read_bytes()
    for size in range(0, len(whole), 1024):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged, or no checkpoint"):
            read(path)


def test_flipped_bits_are_found_out_or_harmless(file):
    """A flip may hit padding; then the state is what it was."""
    path, state = file
    whole = path.read_bytes()
    generator = random.Random(0)
    found = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            same(read(path), state)
        except CheckpointError:
            found += 1
    assert found > 50


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save(
        {"format": 1, "checksum": "", "state": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt"
    )
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    future = {"versions": {"pyro_fordes": "7.1"}}
    torch.save(
        {"format": 99, "checksum": checksum(future), "state": future}, tmp_path / "future.pt"
    )
    (tmp_path / "text.pt").write_text("hello")
    for name, pattern in {
        "bomb.pt": "damaged, or no checkpoint",
        "other.pt": "no checkpoint of pyro_fordes",
        "future.pt": r"format 99, .* reads formats 1 to 2; load it with .* wrote it, 7\.1",
        "text.pt": "damaged, or no checkpoint",
        "missing.pt": "does not exist",
        ".": "is a folder",
    }.items():
        with pytest.raises(CheckpointError, match=pattern):
            started(steps=1).load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_a_failed_write_leaves_the_older_file(file, monkeypatch):
    path, state = file

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*older file"):
        write(path, {"step": 1})
    monkeypatch.undo()
    same(read(path), state)
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]
    with pytest.raises(CheckpointError, match="it is a folder"):
        write(path.parent, {"step": 1})
    with pytest.raises(CheckpointError, match="cannot write"):
        write(path / "below.pt", {"step": 1})


def test_fit_uses_an_older_file_where_the_newest_is_damaged(tmp_path):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    options = {"progress_bar": False, "checkpoint": tmp_path, "checkpoint_every": 3}
    expected = inference.fit(data, 2, keep=2, **options)
    files = numbered(tmp_path)
    assert [path.name for path in files] == ["step-000000008.pt", "step-000000006.pt"]
    files[0].write_bytes(files[0].read_bytes()[:-100])
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    with pytest.warns(UserWarning, match="step-000000008.*an older checkpoint is used"):
        losses = inference.fit(data, 2, **options)
    assert (losses == expected).all()
    for path in numbered(tmp_path):
        path.write_bytes(b"")
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        inference.fit(data, 2, **options)


def test_fit_goes_on_with_the_older_file_whatever_bit_is_flipped(tmp_path):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    options = {"progress_bar": False, "checkpoint": tmp_path, "checkpoint_every": 3}
    expected = inference.fit(data, 2, keep=2, **options)
    newer, older = numbered(tmp_path)
    whole = {path: path.read_bytes() for path in (newer, older)}
    generator, found = random.Random(1), 0
    for _ in range(20):
        for path, content in whole.items():
            path.write_bytes(content)
        damaged = bytearray(whole[newer])
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        newer.write_bytes(damaged)
        inference, data = begin("MLP, Pyro's Adam, FoRDE")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert (inference.fit(data, 2, keep=2, **options) == expected).all()
        found += len(said)
    assert found > 3


def test_an_old_file_that_cannot_be_deleted_does_not_end_a_run(tmp_path):
    (tmp_path / "step-000000001.pt").mkdir()  # unlink refuses a folder
    write_numbered(tmp_path, 2, started().state_dict(), 3)
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    inference.fit(data, 2, progress_bar=False, checkpoint=tmp_path, checkpoint_every=2, keep=1)
    assert [path.name for path in numbered(tmp_path)] == ["step-000000011.pt", "step-000000001.pt"]


@pytest.mark.skipif(os.name == "nt", reason="the mode of a file is that of POSIX")
def test_others_can_read_a_file_as_far_as_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        path = write(tmp_path / "state.pt", {"a": 1})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(tmp_path, monkeypatch):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    expected = inference.fit(data, 2, progress_bar=False)
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if 4 <= len(calls) < 7:  # a write flushes the file and its folder
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    options = {"progress_bar": False, "checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.warns(UserWarning, match=r"No space left.*The run goes on and tries again") as said:
        losses = inference.fit(data, 2, keep=10, **options)
    assert len(said) == 1
    assert (losses == expected).all()
    steps = [newest(tmp_path)[0]["step"], len(numbered(tmp_path))]
    assert steps == [8, 5]  # three were not written


def test_the_last_checkpoint_has_to_be_written(tmp_path, monkeypatch):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")

    def callback(inference, step, loss):
        if step == 7:
            monkeypatch.setattr(os, "replace", lambda *names: os.open("/no/such/folder", 0))

    with pytest.raises(CheckpointError, match="No such file"):
        inference.fit(data, 2, progress_bar=False, checkpoint=tmp_path, callback=callback)
    assert inference.state_dict()["step"] == 8


def other_model():
    return Classifier(bayesianize(nn.Linear(6, 3)), num_data=20)


def two_groups(params):
    return torch.optim.Adam([{"params": params[:1]}, {"params": params[1:]}])


BAD = {
    "fewer particles": (
        lambda: ParticleInference(other_model(), pyro.optim.Adam({"lr": 0.1}), 2),
        "has 3 particles, this inference 2",
    ),
    "another model": (
        lambda: ParticleInference(other_model(), pyro.optim.Adam({"lr": 0.1}), 3),
        "latent sites .*'net.0.weight'.* that of another model",
    ),
    "another size": (
        lambda: ParticleInference(
            Classifier(
                bayesianize(
                    nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 3))
                )
            ),
            pyro.optim.Adam({"lr": 0.1}),
            3,
        ),
        r"site 'net.0.weight' as \(4, 6\) .* the model as \(5, 6\)",
    ),
    "double precision": (
        lambda: ParticleInference(
            Classifier(bayesianize(mlp().double())), pyro.optim.Adam({"lr": 0.1}), 3
        ),
        r"torch.float32, the model as \(4, 6\) of torch.float64",
    ),
    "another optimiser": (
        lambda: ParticleInference(
            Classifier(bayesianize(mlp())),
            lambda params: torch.optim.Adam([{"params": params[:1]}, {"params": params[1:]}]),
            3,
        ),
        "optimiser state does not fit Adam",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_state_of_something_else_is_refused(name):
    state = started().state_dict()
    make, pattern = BAD[name]
    inference = make()
    x = X.double() if name == "double precision" else X

    def load_and_step():
        inference.load_state_dict(state)  # says what it can
        inference.step(x, Y)  # and the rest with the model at hand

    with pytest.raises(CheckpointError, match=pattern):
        load_and_step()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("other", [torch.zeros(()), torch.zeros(1, 3), torch.zeros(3).double()])
def test_a_shared_parameter_of_another_shape_is_refused(other, known):
    """Not broadcast or rounded; and the inference is what it was before."""

    def begun(bias):
        def model(y):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            bias_here = pyro.param("bias", bias.clone()).sum().to(y.dtype)
            with pyro.plate("data", 3):
                pyro.sample("y", dist.Normal(weight + bias_here, 1.0), obs=y)

        pyro.clear_param_store()
        return ParticleInference(model, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()))

    y = torch.ones(3)
    wrong = begun(other)
    wrong.step(y)
    state = wrong.state_dict()
    inference = begun(torch.zeros(3))
    if known:
        inference.step(y)
        before = inference.state_dict()
    inference.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"shared parameter 'bias' as .* the model as \(3,\)"):
        inference.step(y)
    if known:
        same(inference.state_dict(), before)
    assert math.isfinite(inference.step(y))


OPTIMISERS = {
    "one": lambda: pyro.optim.Adam({"lr": 0.1}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 100.0}),
    "scheduler": lambda: pyro.optim.StepLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "step_size": 1, "gamma": 0.7}
    ),
    "torch": lambda: lambda params: torch.optim.Adam(params, lr=0.1),
}


@pytest.mark.parametrize("other", OPTIMISERS)
@pytest.mark.parametrize("one", OPTIMISERS)
def test_an_optimiser_of_the_same_class_goes_on_or_refuses(one, other):
    """With all that it has, or as if nothing had been loaded: a schedule is not lost silently."""

    def begun(name):
        pyro.clear_param_store()
        return ParticleInference(function, OPTIMISERS[name](), 3, kernel=RBF(Weights()), seed=0)

    def go_on(inference):
        inference._stepper.end_epoch(1.0)
        return inference.step(X, Y), inference.step(X, Y)

    inference = begun(one)
    inference.run(3, X, Y, progress_bar=False)
    state = inference.state_dict()
    fresh = begun(other)
    fresh.run(2, X, Y, progress_bar=False)
    before = fresh.state_dict()
    fresh.load_state_dict(state)
    if (one == "scheduler") == (other == "scheduler") and (one, other) not in (
        ("by name", "torch"),
        ("clipped", "torch"),
    ):
        found = go_on(fresh)
        again = begun(one)
        again.load_state_dict(state)
        assert found == go_on(again)
    else:
        with pytest.raises(CheckpointError, match="saved optimiser state"):
            fresh.step(X, Y)
        same(fresh.state_dict(), before)
        fresh.step(X, Y)


@pytest.mark.parametrize("name", ["MLP, Pyro's Adam, FoRDE", "function, shared parameters, SVGD"])
def test_a_state_can_be_loaded_again_and_again(name):
    """Steps after loading do not change it."""
    inference = started(name)
    state = inference.state_dict()
    kept = copy.deepcopy(state)
    losses = []
    for _ in range(2):
        inference.load_state_dict(state)
        losses.append(inference.run(3, X, Y, progress_bar=False))
        same(state, kept)
    assert (losses[0] == losses[1]).all()


def test_what_was_replaced_by_loading_is_let_go():
    inference = started()
    state = inference.state_dict()
    made = len(inference.optim.optim_objs)
    for _ in range(2):
        inference.load_state_dict(state)
        inference.step(X, Y)
    assert len(inference.optim.optim_objs) == made


def test_a_mapping_that_is_no_state_is_refused():
    inference = started()
    before = inference.state_dict()
    with pytest.raises(CheckpointError, match=r"lacks .'num_particles'"):
        inference.load_state_dict({"step": 3})
    same(inference.state_dict(), before)


def test_arguments_of_fit_are_checked(tmp_path):
    inference, data = begin("MLP, Pyro's Adam, FoRDE")
    with pytest.raises(ArgumentError, match="needs a folder"):
        inference.fit(data, 1, checkpoint_every=3)
    for every in (0, 1.5, timedelta(0)):
        with pytest.raises(ArgumentError, match="checkpoint_every"):
            inference.fit(data, 1, checkpoint=tmp_path, checkpoint_every=every)
    with pytest.raises(ArgumentError, match="keep"):
        inference.fit(data, 1, checkpoint=tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must be a folder"):
        inference.fit(data, 1, checkpoint=tmp_path / "file")


def test_the_checksum_sees_everything():
    state = {"a": torch.ones(2), "b": [1, (2.0, None)], "c": {"d": "text"}}
    others = [
        {**state, "a": torch.ones(2, 1)},
        {**state, "a": torch.ones(2).double()},
        {**state, "a": torch.tensor([1.0, 1.0 + 2**-20])},
        {**state, "b": [1, [2.0, None]]},
        {**state, "b": [1, (2, None)]},
        {**state, "c": {"e": "text"}},
    ]
    assert len({checksum(other) for other in [state, *others]}) == 7
    with pytest.raises(CheckpointError, match="got set"):
        checksum({"a": {1, 2}})
