"""inference.summary(): its table, and each warning both where it is due and where it is not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_uniform
from torch.utils.data import DataLoader, TensorDataset

from pyro_fordes import (
    RBF,
    SVGD,
    WGD,
    ArgumentError,
    Ensemble,
    ParticleInference,
    StateError,
    Weights,
)
from pyro_fordes.summary import (
    LossHistory,
    Site,
    Summary,
    collapsed,
    likelihood_scale,
    not_converged,
    repulsion,
)

Y = torch.randn(20, generator=torch.Generator().manual_seed(0)) + 1.0
ROWS = torch.arange(40.0)


def gaussian(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def scaled(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("data", 40, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def start(model=gaussian, count=10, lr=0.05, **options):
    options = {"kernel": RBF(Weights()), "init_loc_fn": init_to_uniform(radius=2.0), **options}
    return ParticleInference(model, pyro.optim.Adam({"lr": lr}), count, seed=0, **options)


def trained(steps=200, **options):
    inference = start(**options)
    inference.run(steps, Y, progress_bar=False)
    return inference


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("steps", [0, 7, 1200])
def test_a_loaded_state_shows_what_the_saved_one_did(steps, tmp_path):
    inference = start(diagnostics_every=5)
    loader = DataLoader(TensorDataset(Y), batch_size=5)
    inference.setup(Y)
    if steps:
        inference.fit(loader, 1, progress_bar=False)
        inference.run(steps - 4, Y, progress_bar=False)
    inference.save(tmp_path / "state.pt")
    optim = pyro.optim.Adam({"lr": 0.05})
    kernel = RBF(Weights())
    loaded = ParticleInference.load(tmp_path / "state.pt", gaussian, optim, kernel=kernel)
    for _ in range(2):
        if steps:
            torch.testing.assert_close(loaded.diagnostics(), inference.diagnostics())
            assert inference.diagnostics()["step"] == (steps - 1) // 5 * 5
        assert loaded._losses.losses().tolist() == inference._losses.losses().tolist()
        assert len(loaded._losses.losses()) == (300 if steps == 1200 else steps)
        assert loaded._batches_per_epoch == inference._batches_per_epoch == (4 if steps else 0)
        assert loaded.summary().diagnostics == pytest.approx(
            inference.summary().diagnostics, nan_ok=True
        )
        warnings = inference.summary().warnings
        warnings.pop("likelihood_scale", None)  # needs the model's arguments
        assert loaded.summary().warnings == warnings
        loaded.load_state_dict(loaded.state_dict())
    # A record of its own.
    before = inference._losses.losses()
    loaded.run(3, Y, progress_bar=False)
    assert inference._losses.losses().tolist() == before.tolist()


def test_the_numbers_are_those_of_the_particles():
    def two(y):
        pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, scale).expand([len(y)]).to_event(1), obs=y)

    inference = trained(3, model=two)
    found = inference.summary()
    samples = inference.get_samples()
    w = samples["w"].double()
    row = found.sites[0]
    assert (row.name, row.shape) == ("w", (2, 3))
    assert row.mean == pytest.approx(w.mean().item())
    assert row.sd == pytest.approx(w.var(0).mean().sqrt().item())
    assert (row.low, row.high) == (w.min().item(), w.max().item())
    assert found.sites[1].low == samples["scale"].double().min().item()  # constrained
    measured = inference.diagnostics()
    assert found.diagnostics["force ratio"] == measured["force_ratio"]
    assert found.diagnostics["log joint, sd"] == pytest.approx(measured["log_joint"].std().item())
    assert found.diagnostics["measured at step"] == 0
    assert found.title == "10 particles of 7 values, 3 steps, WGD, Weights"


def test_the_text_has_it_all_and_an_end():
    def many(y):
        for index in range(30):
            pyro.sample(f"{'a' * 50}{index}", dist.Normal(torch.zeros(1000), 1.0).to_event(1))

    inference = trained(1, model=many)
    text = str(inference.summary(max_sites=3))
    lines = text.splitlines()
    assert repr(inference.summary(max_sites=3)) == text
    assert lines[2].split() == ["site", "shape", "mean", "sd", "min", "max"]
    assert lines[3].split()[:2] == ["a" * 18 + "..." + "a" * 18 + "0", "(1000)"]
    assert "and 27 more sites" in lines
    assert any(line.startswith("force ratio") for line in lines)
    assert lines[-1] == "- not converged: only 1 steps were taken"
    assert len(lines) < 25
    assert max(map(len, lines)) < 100
    with pytest.raises(ArgumentError, match="max_sites"):
        inference.summary(max_sites=0)


def test_columns_are_aligned():
    rows = [Site("z", (), 0.1, math.nan, -2.0, 1e9), Site("long name", (2, 3), 1, 2, 3, 4)]
    lines = str(Summary("title", rows, {}, {}, 5)).splitlines()
    assert len({len(line) for line in lines[2:5]}) == 1
    assert "(2, 3)" in lines[4]
    assert "nan" in lines[3]


def test_a_summary_right_after_loading_and_before_a_step():
    with pytest.raises(StateError, match="no particles yet"):
        start().summary()
    inference = start()
    inference.setup(Y)
    found = inference.summary()
    assert found.diagnostics == {}
    assert set(found.warnings) == {"not_converged"}
    one = trained(30)
    two = start()
    two.load_state_dict(one.state_dict())
    found = two.summary()  # knows the particles and what was measured, and no more
    assert found.diagnostics == one.summary().diagnostics
    assert found.warnings == one.summary().warnings
    assert "30 steps" in found.title
    assert [site.mean for site in found.sites] == [site.mean for site in one.summary().sites]


def test_nothing_is_printed_and_nothing_moves(capsys):
    inference = trained(5)
    before, state = inference.get_samples()["mean"], torch.get_rng_state()
    inference.summary()
    assert capsys.readouterr() == ("", "")
    assert torch.equal(before, inference.get_samples()["mean"])
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- warnings, both ways


def test_a_good_run_has_no_warnings():
    inference = trained(300, count=20, transport=WGD("sge", whiten="diag", calibrate=True))
    assert inference.summary().warnings == {}


def test_collapsed_particles():
    """An ensemble on a posterior with one mode ends in that mode."""
    inference = trained(400, transport=Ensemble(), lr=0.1)
    assert "10 of 10 particles are nearly copies" in inference.summary().warnings["collapsed"]
    assert "collapsed" not in trained(5, transport=Ensemble()).summary().warnings


def test_the_rule_of_collapse():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(20, 8, generator=generator, dtype=torch.float64)
    density = -0.5 * draws.square().sum(1)
    copies, same = draws[:1] + 1e-3 * draws, torch.full((20,), -4.0)
    assert collapsed({"w": draws}, density) is None
    assert collapsed({"w": copies}, same) is not None
    # Narrow beside its mean, yet as wide as the posterior.
    assert collapsed({"w": 1000 + draws}, density) is None
    # Networks that differ by a permutation: the same log joint, far apart.
    assert collapsed({"w": draws}, same) is None
    # A mode at zero: close on the scale of 1.
    assert collapsed({"w": 1e-4 * draws}, same) is not None
    # Half of them is not more than half.
    some = torch.cat([copies[:10], 5 * draws[10:]])
    assert collapsed({"w": some}, same) is None
    assert "11 of 20" in collapsed({"w": torch.cat([copies[:11], 5 * draws[11:]])}, same)
    assert collapsed({"w": copies}, None) is None
    assert collapsed({"w": copies[:1]}, same[:1]) is None


@pytest.mark.parametrize(
    ("scale", "warns"), [(1e-6, "repulsion is negligible"), (1.0, None), (1e4, "dominates")]
)
def test_repulsion(scale, warns):
    inference = start(repulsion_scale=scale, diagnostics_every=1, lr=1e-3)
    inference.run(1, Y, progress_bar=False)
    ratio = inference.diagnostics()["force_ratio"]
    found = inference.summary().warnings.get("repulsion")
    if warns is None:
        assert 0.01 <= ratio <= 10
        assert found is None
    else:
        assert warns in found
        assert f"{ratio:.2g}" in found


def test_the_rule_of_repulsion():
    assert repulsion(0.0099, True) is not None
    assert repulsion(0.01, True) is None
    assert repulsion(10.0, True) is None
    assert repulsion(10.1, True) is not None
    assert repulsion(0.0, False) is None
    assert repulsion(math.nan, True) is None
    assert "repulsion" not in trained(1, transport=Ensemble()).summary().warnings
    assert trained(1, transport=SVGD()).summary().diagnostics["force ratio"] > 0


@pytest.mark.parametrize(
    ("model", "batch", "options", "due"),
    [
        (gaussian, 10, {}, True),  # four batches, each taken for all data
        (scaled, 10, {}, False),
        (gaussian, 40, {}, False),  # one batch is all data
        (gaussian, 40, {"num_data": 40}, False),
        (gaussian, 40, {"num_data": 60}, True),
        (poutine.scale(gaussian, 4.0), 10, {}, False),  # scaled by hand
    ],
    ids=["batches", "scaled", "all rows", "num_data", "more data", "by hand"],
)
def test_likelihood_scale(model, batch, options, due):
    inference = start(model, **options)
    loader = DataLoader(TensorDataset(ROWS), batch_size=batch)
    inference.fit(loader, 1, progress_bar=False)
    found = inference.summary().warnings.get("likelihood_scale")
    assert (found is not None) == due
    if due:
        assert "likelihood scale looks wrong" in found
        assert "'y'" in found
        assert f"subsample_size={batch}" in found


def test_the_rule_of_the_likelihood_scale():
    assert likelihood_scale({}, {}, 100, 7) is None  # nothing is observed
    assert likelihood_scale({"y": 1.0}, {"y": 8}, None, 0) is None  # steps by hand
    assert likelihood_scale({"y": 1.0}, {"y": 8}, None, 1) is None
    assert "fit took 2 batches" in likelihood_scale({"y": 1.0}, {"y": 8}, None, 2)
    assert "num_data is 9" in likelihood_scale({"y": 1.0}, {"y": 8}, 9, 0)
    assert likelihood_scale({"y": 1.0, "z": 3.0}, {"y": 1, "z": 8}, 9, 5) is None


def test_convergence_of_a_run():
    found = trained(60, lr=1e-3).summary().warnings["not_converged"]
    assert "the loss still falls" in found
    assert "not_converged" not in trained(400).summary().warnings


def test_the_rule_of_convergence():
    """Noise alone: three standard errors of 100 losses, so 1 in 370 seeds would warn."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, generator=generator, dtype=torch.float64)
    falling = torch.linspace(100, 0, 500, dtype=torch.float64)
    assert not_converged(torch.zeros(0), 19, 1) == "not converged: only 19 steps were taken"
    assert not_converged(torch.zeros(0), 20, 1) is None  # just loaded
    assert not_converged(noise, 500, 1) is None
    assert "falls, by 10 " in not_converged(falling, 500, 10)
    assert "rises" in not_converged(falling.flip(0), 500, 10)
    assert not_converged(falling, 500, 20_200) is None  # 0.1 sqrt(D / 2) is 10.05, the change 10.02
    assert not_converged(falling, 500, 19_000) is not None
    assert not_converged(falling + 100 * noise, 500, 1) is None  # drowned in noise
    faulty = noise.clone()
    faulty[::7] = math.nan
    assert not_converged(faulty, 500, 1) is None
    bend = torch.cat([falling[:400], falling[400].expand(100)])
    assert not_converged(bend, 500, 1) is None


def test_the_history_is_bounded_and_even():
    history = LossHistory(limit=16)
    for step in range(1000):
        history.add(torch.tensor(float(step)))
    kept = history.losses()
    assert 8 <= len(kept) <= 16
    assert len(kept.diff().unique()) == 1
    assert kept[0] == 0
    assert kept[-1] >= 1000 - 2 * kept.diff()[0]
    history.clear()
    assert len(history.losses()) == 0
    history.add(torch.tensor(1.0))
    assert history.losses().tolist() == [1.0]
