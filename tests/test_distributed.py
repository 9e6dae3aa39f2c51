"""Particles on several ranks: the same numbers as on one, what is sent, and ranks that fail."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, DistributedSampler

from pyro_fordes import (
    RBF,
    ArgumentError,
    CheckpointError,
    Ensemble,
    ParticleInference,
    Weights,
    distributed,
)
from pyro_fordes.agreement import checksum, fingerprint
from pyro_fordes.distributed import Ranks, blocks, step_bytes
from pyro_fordes.initial import check_shares
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.particles import OneProcess
from tests import ranks

TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of all cases."""
    out = tmp_path_factory.mktemp("alone") / "out.pt"
    ranks.compare(str(out))
    return torch.load(out)


def check_ended(codes, printed):
    assert not any(codes), "\n".join(printed)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_the_particles_of_one_process(size, alone, tmp_path):
    """Seven particles: 4 + 3, and 2 + 2 + 2 + 1."""
    check_ended(*ranks.run_ranks("compare", tmp_path / "out.pt", size))
    found = torch.load(tmp_path / "out.pt")
    assert set(found) == set(alone) == set(ranks.cases())
    for case, values in alone.items():
        assert set(found[case]) == set(values)
        for name, value in values.items():
            torch.testing.assert_close(
                found[case][name],
                value,
                rtol=0,
                atol=TOLERANCE,
                equal_nan=True,
                msg=f"{case} {name}",
            )


EXACT = [
    name
    for name, (_, options) in ranks.cases().items()
    if not {"dropout", "batch_norm"} & set(options)
]
BRIEF = ["ensemble", "wgd weights", "wgd gradients", "svgd weights", "svgd outputs", "shared"]


@pytest.mark.parametrize(("size", "cases"), [(2, EXACT), (4, BRIEF)])
def test_shares_of_a_batch_give_the_particles_of_the_whole_batch(size, cases, alone, tmp_path):
    """Two shares: of all particles in every rank, and of half of them. Ranks check their rows."""
    options = {"only": cases, "data_ranks": 2}
    check_ended(*ranks.run_ranks("compare", tmp_path / "out.pt", size, **options))
    found = torch.load(tmp_path / "out.pt")
    assert set(found) == set(cases)
    for case, values in found.items():
        assert set(values) == set(alone[case])
        for name, value in values.items():
            wanted = alone[case][name]
            if name.startswith("likelihood"):  # of the points that rank 0 sees
                wanted = wanted[:, : wanted.shape[1] // 2]
            torch.testing.assert_close(
                value,
                wanted,
                rtol=TOLERANCE,
                atol=TOLERANCE,
                equal_nan=True,
                msg=f"{case} {name}",
            )


def test_statistics_of_shares_are_averaged(tmp_path):
    """BatchNorm sees a share: means are those of the batch, variances are within shares."""
    options = {"only": ["batch norm"], "num_steps": 1, "num_particles": 2}
    ranks.compare(str(tmp_path / "one.pt"), **options)
    check_ended(*ranks.run_ranks("compare", tmp_path / "two.pt", 2, data_ranks=2, **options))
    one, two = (torch.load(tmp_path / f"{name}.pt")["batch norm"] for name in ("one", "two"))
    mean, variance = "buffer net.1.running_mean", "buffer net.1.running_var"
    torch.testing.assert_close(two[mean], one[mean])
    ratio = ((two[variance] - 0.9) / (one[variance] - 0.9)).mean()  # 0.9 of the 1 they began with
    assert not torch.allclose(ratio, torch.ones_like(ratio))
    assert two["buffer net.1.num_batches_tracked"].equal(one["buffer net.1.num_batches_tracked"])


def test_ranks_of_a_row_stay_equal_with_masks_of_their_own(tmp_path):
    """The ranks check that they are."""
    options = {"only": ["wgd gradients dropout"], "num_steps": 3, "data_ranks": 2}
    check_ended(*ranks.run_ranks("compare", tmp_path / "out.pt", 2, **options))


def test_cases_differ(alone):
    """They would not if, say, dropout or repulsion did nothing."""
    ends = [values["losses"][-1].item() for values in alone.values()]
    assert len({round(end, 6) for end in ends}) == len(ends)


@pytest.mark.parametrize("svgd", [False, True])
def test_bytes_of_a_step(svgd, tmp_path):
    """Those that the formula says, by the messages' sizes and by what the process has written."""
    points, features = (1, 2000) if svgd else (10, 200)
    options = {"num_particles": 5, "num_features": features, "num_points": 10, "svgd": svgd}
    check_ended(*ranks.run_ranks("count_bytes", tmp_path / "out.pt", 3, **options))
    found = torch.load(tmp_path / "out.pt")
    formula = step_bytes(5, 3, points, features, num_sites=1, scores=svgd)
    # The first step is measured, and so is none of the twenty after it.
    assert found["payload"] == formula
    assert formula <= found["written"] <= 1.05 * formula + 2000


@pytest.mark.parametrize("svgd", [False, True])
def test_bytes_of_a_step_on_a_mesh(svgd, tmp_path):
    """Two rows, of three particles and two, and two shares of the batch."""
    points, features = (1, 2000) if svgd else (10, 200)
    options = {"num_particles": 5, "num_features": features, "num_points": 10, "svgd": svgd}
    check_ended(*ranks.run_ranks("count_bytes", tmp_path / "out.pt", 4, data_ranks=2, **options))
    found = torch.load(tmp_path / "out.pt")
    shape = {"num_sites": 1, "scores": svgd, "data": 2, "num_values": features}
    formula = step_bytes(5, 4, points, features, of_batch=not svgd, **shape)
    assert found["payload"] == formula
    assert formula <= found["written"] <= 1.05 * formula + 3000


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A fit by one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out.pt"
    ranks.train(str(out))
    return torch.load(out, weights_only=True)


def check_same(found, wanted):
    for name in set(wanted) - {"state"}:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=TOLERANCE)


def test_a_checkpoint_of_three_ranks_is_continued_by_any_number(undisturbed, tmp_path):
    """Optimiser state, BatchNorm's buffers and the loader's order included."""
    begin = {"epochs": 2, "checkpoint": str(tmp_path / "run")}
    check_ended(*ranks.run_ranks("train", tmp_path / "three.pt", 3, **begin))
    state = torch.load(tmp_path / "three.pt", weights_only=True)["state"]
    assert {len(value) for value in state["particles"].values()} == {5}
    go_on = {"epochs": 3, "checkpoint": str(tmp_path / "run")}
    check_ended(*ranks.run_ranks("train", tmp_path / "two.pt", 2, **go_on))
    ranks.train(str(tmp_path / "one.pt"), checkpoint=str(tmp_path / "run"))
    check_same(torch.load(tmp_path / "one.pt", weights_only=True), undisturbed)


def test_restarted_by_torchrun(undisturbed, tmp_path):
    """A rank is killed while a checkpoint is written; the others stop, and all begin again."""
    failure = '["SIGKILL", "collect", 1, 6]'
    options = f'{{"checkpoint": "{tmp_path}/run", "failure": {failure}, "silence": 5}}'
    script = ranks.ROOT / "tests" / "ranks.py"
    run = ranks.torchrun(
        2, script, "train", tmp_path / "out.pt", options, options=["--max-restarts", "1"]
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"rank:?\s*1.*SIGKILL|exitcode: -9", run.stderr)
    check_same(torch.load(tmp_path / "out.pt", weights_only=True), undisturbed)


def test_a_checkpoint_of_shares_is_continued_by_one_process(tmp_path):
    """The order of the data, which samplers take from the number of the epoch, included."""
    ranks.train_shares(str(tmp_path / "whole.pt"))
    begin = {"epochs": 2, "checkpoint": str(tmp_path / "run"), "data_ranks": 2}
    check_ended(*ranks.run_ranks("train_shares", tmp_path / "mesh.pt", 4, **begin))
    ranks.train_shares(str(tmp_path / "one.pt"), checkpoint=str(tmp_path / "run"))
    check_same(torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "whole.pt"))


def test_samplers_learn_the_epoch():
    """`DistributedSampler` gives every epoch the same order otherwise."""
    sampler = DistributedSampler(range(8), 1, 0)
    loader = DataLoader(torch.arange(8.0), batch_size=8, sampler=sampler)
    seen = []

    def model(x):
        seen.append(tuple(x.tolist()))
        pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))

    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.1}), 2, transport=Ensemble(), vectorize="loop"
    )
    inference.fit(loader, 3, progress_bar=False)
    assert len(set(seen)) == 3


# ---------------------------------------------------------------- failures


SHARES = {
    "sampler": "rank 3 has other number of batches per epoch than the others, at: fit",
    "end": r"rank 3 is at: the end of an epoch after 2 batches, the others at: step 2.*as many",
    "shapes": "rank 3 has other data and shapes of data than the others, at: step 1.*drop_last",
    "data": "rank 3 has other data than the others, at: step 0.*multiple of 2",
    "start": "rank 3 has other particles than the others, at: the start",
}


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Exit codes and texts of four ranks, the last of which is not like the others."""

    def run(odd):
        out = tmp_path_factory.mktemp("unequal") / "out.pt"
        return ranks.run_ranks("train_shares", out, 4, timeout=60, data_ranks=2, odd=odd)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SHARES, pool.map(run, SHARES), strict=True))


@pytest.mark.parametrize("odd", SHARES)
def test_shares_that_are_not_alike_are_named(odd, unequal):
    codes, printed = unequal[odd]
    assert codes == [1] * 4, printed
    for text in printed:
        assert re.search(f"RankError: .*{SHARES[odd]}", text), text


@pytest.mark.parametrize("nan", ["raise", "skip"])
def test_a_share_that_is_not_finite(nan, tmp_path):
    """All ranks say so, keep what they had and go on."""
    options = {"odd": "nan", "nan": nan, "data_ranks": 2, "epochs": 1}
    codes, printed = ranks.run_ranks("train_shares", tmp_path / "out.pt", 4, **options)
    check_ended(codes, printed)
    found = torch.load(tmp_path / "out.pt")
    assert found["faults"].tolist() == [1] * 5
    for text in printed:
        assert "at step 1 the log joint of particle 0 is nan" in text
        assert ("NumericalError" in text) == (nan == "raise")
    assert found["losses"].isnan().tolist() == (
        [False] * 2 if nan == "raise" else [False, True, False]
    )


FAILURES = {
    "killed in a step": (
        {"failure": ["SIGKILL", "together", 1, 5]},
        "rank 1 has given no sign of life for 5 seconds",
    ),
    "killed in an all-gather": (
        {"failure": ["SIGKILL", "gather", 2, 5]},
        "rank 2 has given no sign of life for 5 seconds",
    ),
    "killed in a checkpoint": (
        {"failure": ["SIGKILL", "collect", 1, 4]},
        "rank 1 has given no sign of life for 5 seconds",
    ),
    "killed with the store": ({"failure": ["SIGKILL", "gather", 0, 5]}, "rank 0 .*died"),
    "hangs": (
        {"failure": ["hang", "gather", 1, 5]},
        r"rank 1 \(at: step 5\) kept the others waiting for more than 8 seconds",
    ),
    "raises": (
        {"failure": ["raise", "gather", 1, 5]},
        "rank 1 stopped at: step 5, with ValueError: no more",
    ),
    "sees other data": ({"data_of": 2}, "rank 2 has other data than the others, at: step 0"),
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Exit codes, texts and checkpoints of runs that fail, some at the same time."""

    def run(options, folder):
        culprit = options["failure"][2] if "failure" in options else options["data_of"]
        times = {"patience": 8, "silence": 5, "checkpoint": str(folder / "run")}
        codes, printed = ranks.run_ranks(
            "train", folder / "out.pt", 3, timeout=60, stuck=[culprit], **times, **options
        )
        others = {rank: (codes[rank], printed[rank]) for rank in {0, 1, 2} - {culprit}}
        left = [path.name for path in (folder / "run").glob("step-*.pt")]
        return others, left

    with ThreadPoolExecutor(3) as pool:
        folders = [tmp_path_factory.mktemp("failed") for _ in FAILURES]
        results = pool.map(run, [options for options, _ in FAILURES.values()], folders)
    return dict(zip(FAILURES, results, strict=True))


@pytest.mark.parametrize("name", FAILURES)
def test_a_rank_that_fails_is_named_by_the_others(name, failed):
    others, left = failed[name]
    for code, printed in others.values():
        assert code == 1, printed
        assert re.search(f"RankError: .*{FAILURES[name][1]}", printed), printed
    assert bool(left) == (name != "sees other data")


def test_a_signal_to_one_rank_lets_all_save_and_end(undisturbed, tmp_path):
    options = {"checkpoint": str(tmp_path / "run"), "failure": ["SIGTERM", "gather", 1, 5]}
    codes, printed = ranks.run_ranks("train", tmp_path / "out.pt", 2, **options)
    assert codes == [143, 143], printed
    assert (tmp_path / "run" / "step-000000006.pt").exists()
    ranks.train(str(tmp_path / "one.pt"), checkpoint=str(tmp_path / "run"))
    check_same(torch.load(tmp_path / "one.pt", weights_only=True), undisturbed)


# ---------------------------------------------------------------- in one process


def test_blocks_cover_all_particles_evenly():
    for num_particles in range(1, 12):
        for size in range(1, num_particles + 1):
            found = blocks(num_particles, size)
            assert [index for block in found for index in block] == list(range(num_particles))
            assert {len(block) for block in found} <= {len(found[0]), len(found[0]) - 1}
            assert len(found) == size


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 5},
        {"timeout": timedelta(0)},
        {"silence": timedelta(seconds=1)},
        {"data": 0},
        {"data": 2.0},
    ],
)
def test_options_of_ranks_are_checked(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Ranks(**options)


def test_gather_must_be_a_part():
    with pytest.raises(ArgumentError, match="write Ranks"):
        ParticleInference(lambda: None, pyro.optim.Adam({}), 2, gather=Ranks)


def test_fewer_particles_than_ranks(monkeypatch):
    monkeypatch.setattr(Ranks, "size", 3)
    with pytest.raises(ArgumentError, match="2 particles cannot be spread over 3 ranks"):
        Ranks().split(2)


def test_ranks_that_make_no_mesh(monkeypatch):
    for ask in (lambda: Ranks(data=2).data_rank, lambda: Ranks(data=2).split(4)):
        with pytest.raises(ArgumentError, match="that 2 divides, got 1"):
            ask()
    monkeypatch.setattr(Ranks, "size", 6)
    monkeypatch.setattr(Ranks, "rank", 5)
    assert Ranks(data=3).data_rank == 2
    assert Ranks(data=2).data_rank == 1
    with pytest.raises(ArgumentError, match="2 particles cannot be spread over 3 ranks"):
        Ranks(data=2).split(2)


def test_alone_is_one_process():
    assert Ranks().size == 1
    assert Ranks().rank == 0
    inference = ParticleInference(
        lambda: pyro.sample("z", pyro.distributions.Normal(0.0, 1.0)),
        pyro.optim.Adam({"lr": 0.1}),
        3,
        kernel=RBF(Weights()),
        gather=Ranks(),
    )
    inference.setup()
    assert inference.get_samples(gather=True)["z"].shape == (3,)


def shard(rank=0, size=2, num_particles=4):
    """A shard that must not send anything."""
    attributes = {"rank": rank, "row": rank, "share": 0, "data": 1, "size": size}
    link = type("Link", (), {**attributes, "first": lambda self, make: make()})()
    return distributed.Shard(link, blocks(num_particles, size))


def model_in_a_plate(size, scale=1.0, discrete=None):
    """Ten rows of a batch in a plate of some size."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        if discrete == "outside":  # Pyro itself refuses other scales of site and observations
            with poutine.scale(scale=scale):
                mean = mean + pyro.sample("z", dist.Bernoulli(0.5))
        with poutine.scale(scale=scale), pyro.plate("data", size, subsample_size=len(x)):
            if discrete == "inside":
                mean = mean + pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x)

    return model


def check_on_two_shares(model, space=None):
    prototype = LogJoint(model).prototype((torch.zeros(10),), {})
    check_shares(prototype, space or Weights(), SimpleNamespace(shares=2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 10}, r"observed sites \['y'\] are not in a plate"),
        ({"size": 19}, r"observed sites \['y'\] are not in a plate"),
        (
            {"size": 10, "scale": 2.0, "discrete": "outside"},
            r"discrete sites \['z'\] are not in a plate",
        ),
    ],
)
def test_models_that_shares_would_change_are_refused(options, match):
    model = model_in_a_plate(**options)
    with pytest.raises(ArgumentError, match=match):
        check_on_two_shares(model)
    check_shares(LogJoint(model).prototype((torch.zeros(10),), {}), Weights(), OneProcess())


@pytest.mark.parametrize(
    "options",
    [
        {"size": 20},
        {"size": 10, "scale": 2.0},
        {"size": 20, "scale": 0.1},
        {"size": 20, "discrete": "inside"},
    ],
)
def test_models_that_add_up_to_the_batch_are_taken(options):
    check_on_two_shares(model_in_a_plate(**options))


def test_spaces_must_say_how_shares_are_joined():
    with pytest.raises(ArgumentError, match=r"SimpleNamespace does not say .* share_axis"):
        check_on_two_shares(model_in_a_plate(20), SimpleNamespace())


def test_shares_of_a_minibatch_are_parts_of_one():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(12)[rows])

    def drawn(share):
        torch.manual_seed(0)
        return LogJoint(model, share=share).draw((), {}).subsamples["data"].indices

    assert torch.cat([drawn(share) for share in range(3)]).sort().values.equal(torch.arange(12))


def test_shares_have_masks_of_their_own():
    """The same rows, seed and particle: without dropout the log joints are equal."""
    for dropout in (0.0, 0.5):
        model = ranks.model(dropout)
        found = []
        for share in (0, 0, 1):
            log_joint = LogJoint(model, share=share)
            torch.manual_seed(0)
            latents = log_joint.prototype(ranks.data(), {}).latents
            values = {name: torch.ones(1, *one.shape).double() for name, one in latents.items()}
            values = {name: one.cumsum(-1) / 7 for name, one in values.items()}
            found.append(log_joint.evaluate(values, ranks.data(), {}).log_joint)
        assert found[0].equal(found[1])
        assert found[0].equal(found[2]) == (dropout == 0)


class Split:
    def split(self, num_particles):
        return shard(num_particles=num_particles)

    first = None


def test_what_cannot_be_split_is_refused():
    arguments = {"transport": Ensemble(), "gather": Split()}
    adam = pyro.optim.Adam({"lr": 0.1})
    with pytest.raises(ArgumentError, match="nan='reset'"):
        ParticleInference(lambda: None, adam, 4, nan="reset", **arguments)
    clipping = pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})
    with pytest.raises(ArgumentError, match="clip_args"):
        ParticleInference(lambda: None, clipping, 4, **arguments)
    with pytest.raises(ArgumentError, match="compile=True"):
        ParticleInference(lambda: None, adam, 4, compile=True, **arguments)


def test_fingerprints_tell_data_apart():
    x = torch.arange(6.0)
    trees = [
        x,
        x.reshape(2, 3),
        x.double(),
        x.flip(0),
        (x, x),
        {"x": x},
        (x, 1),
        (x, 2),
        (x, None),
        x.numpy(),
        torch.zeros(0),
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees) - 1  # numpy's is the tensor's
    assert fingerprint(x[::2]) == fingerprint(x[::2].contiguous())


def test_checksums_on_devices_depend_on_order():
    x = torch.arange(6.0)
    assert checksum(x) == checksum(x.clone())
    assert checksum(x) != checksum(x.flip(0))


def test_errors_of_the_first_process_keep_their_kind(tmp_path):
    with pytest.raises(CheckpointError):
        ParticleInference.load(
            tmp_path / "none.pt", lambda: None, pyro.optim.Adam({}), gather=Ranks()
        )


def test_the_example_gives_the_same_on_one_process_and_two(tmp_path):
    """Started as a user would start it."""
    script = ranks.ROOT / "examples" / "distributed.py"
    common = ["--smoke", "--particles", "3", "--out"]
    run = ranks.torchrun(2, script, *common, tmp_path / "two.pt", options=["--standalone"])
    assert run.returncode == 0, run.stderr
    assert "3 particles on 2 processes" in run.stdout
    alone = subprocess.run(
        [sys.executable, script, *common, tmp_path / "one.pt"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ranks.ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "3 particles on 1 processes" in alone.stdout
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert {value.shape[0] for value in two.values()} == {3}
    assert set(one) == set(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=TOLERANCE)


def test_the_example_on_shares_of_batches(tmp_path):
    options = {"arguments": ["--smoke", "--particles", "3", "--data", "2"]}
    codes, printed = ranks.run_ranks("example", tmp_path / "out.pt", 2, **options)
    check_ended(codes, printed)
    found = re.search(
        r"3 particles on 2 processes with 2 shares of a batch, accuracy 0\.(\d)", "".join(printed)
    )
    assert found is not None, printed
    assert int(found[1]) >= 7
    assert {value.shape[0] for value in torch.load(tmp_path / "out.pt").values()} == {3}
