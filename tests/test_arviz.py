"""What ArviZ makes of exported particles: tables, plots, loo, compare, files. On 0.x and 1.x."""

import math

import arviz
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import nn

from pyro_fordes import (
    RBF,
    WGD,
    Ensemble,
    InputGradients,
    ParticleInference,
    Trajectory,
    Weights,
    bayesianize,
    to_arviz,
)
from tests.models import Regression

OLD = arviz.__version__.startswith("0.")
pytestmark = [
    # 1.x divides by the number of Pareto k's, which is 0 where all are left out.
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
NUM_DATA = 20
PRIOR_SD = 3.0


def conjugate(y):
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SD))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


Y = torch.randn(NUM_DATA, generator=torch.Generator().manual_seed(0)) + 1.0


def particles_of(model, count, seed=0, steps=150, callback=None, **options):
    options = {
        "kernel": RBF(Weights()),
        "transport": WGD("sge", whiten="diag", calibrate=True),
        "init_loc_fn": init_to_uniform(radius=2.0),
        **options,
    }
    inference = ParticleInference(model, pyro.optim.Adam({"lr": 0.05}), count, seed=seed, **options)
    inference.run(steps, Y, progress_bar=False, callback=callback)
    return inference


@pytest.fixture(scope="module")
def exported():
    return to_arviz(particles_of(conjugate, 200), Y, prior=50, predictions=(torch.zeros(3),))


@pytest.fixture(autouse=True)
def off_screen():
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def drawn():
    """Whether the last figure has a line, bar or patch of particles on it."""
    return any(axes.has_data() for axes in plt.gcf().axes)


def test_summary(exported):
    table = arviz.summary(exported)
    assert list(table.index) == ["mean"]
    variance = 1 / (PRIOR_SD**-2 + NUM_DATA)
    assert abs(float(table.loc["mean", "mean"]) - variance * float(Y.sum())) < 0.1
    assert abs(float(table.loc["mean", "sd"]) / math.sqrt(variance) - 1) < 0.25  # two digits
    assert math.isnan(float(table.loc["mean", "r_hat"]))  # a single chain


@pytest.mark.parametrize("name", ["forest", "trace", "posterior predictive", "prior predictive"])
def test_plots(exported, name):
    if name in ("forest", "trace"):
        getattr(arviz, f"plot_{name}")(exported)
    elif OLD:
        arviz.plot_ppc(exported, group=name.split()[0])
    else:
        arviz.plot_ppc_dist(exported, group=name.replace(" ", "_"))
    assert drawn()


def test_trace_of_a_trajectory():
    inference = particles_of(conjugate, 3, steps=30, callback=Trajectory(every=2))
    arviz.plot_trace(to_arviz(inference, Y, trajectory=True))
    assert drawn()


def exact_leave_one_out():
    """Log predictive density of each observation given the others."""
    densities = []
    for i in range(NUM_DATA):
        rest = torch.cat([Y[:i], Y[i + 1 :]])
        variance = 1 / (PRIOR_SD**-2 + len(rest))
        density = dist.Normal(variance * rest.sum(), math.sqrt(1 + variance)).log_prob(Y[i])
        densities.append(density.item())
    return np.array(densities)


def test_loo_is_the_exact_one(exported):
    """Within two of its standard errors; the particles themselves would allow far less."""
    found, exact = arviz.loo(exported), exact_leave_one_out()
    elpd = float(found.elpd_loo if OLD else found.elpd)
    assert abs(elpd - exact.sum()) < 2 * float(found.se)
    assert abs(elpd - exact.sum()) < 0.3
    assert abs(float(found.se) / (exact.std(ddof=1) * math.sqrt(NUM_DATA)) - 1) < 0.1


@pytest.mark.filterwarnings(
    "ignore:Estimated shape parameter of Pareto distribution",
    "ignore:The inplace keyword in DataFrame",  # pandas, of ArviZ 0.23
)
def test_compare_of_ensemble_and_forde():
    """As few networks as ArviZ 1.x's loo takes, on a curve."""
    x = torch.linspace(-2, 2, NUM_DATA)[:, None] * torch.tensor([[1.0, -0.5]])
    y = x[:, 0].sin()
    inputs = RBF(InputGradients("x"))
    compared = {}
    for name, options in {
        "ensemble": {"transport": Ensemble()},
        "forde": {"kernel": inputs},
    }.items():
        net = bayesianize(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
        inference = ParticleInference(
            Regression(net), pyro.optim.Adam({"lr": 0.02}), 25, seed=0, **options
        )
        inference.run(60, x, y, progress_bar=False)
        compared[name] = to_arviz(inference, x, y)
    table = arviz.compare(compared)
    assert set(table.index) == {"ensemble", "forde"}
    assert table["weight"].sum() == pytest.approx(1.0, abs=0.02)  # rounded
    assert np.isfinite(table["elpd_diff"].to_numpy(float)).all()


def r_hat(inferences, *args):
    return float(arviz.rhat(to_arviz(inferences, *args, groups=["posterior"]))["mean"])


def test_r_hat_of_restarts_that_agree():
    """Eight restarts on a Gaussian posterior."""
    restarts = [particles_of(conjugate, 20, seed=seed, steps=80) for seed in range(8)]
    assert r_hat(restarts, Y) < 1.05


def test_r_hat_of_restarts_in_two_modes():
    """The sign of the mean is not identified, and each restart keeps the one it began with."""

    def two_modes(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean.abs(), 1.0), obs=y + 2)

    restarts = []
    for seed in range(8):
        sign = 1.0 if seed % 2 else -1.0

        def near(site, sign=sign):
            return sign * (3.0 + torch.rand(()))

        restarts.append(particles_of(two_modes, 20, seed=seed, steps=50, init_loc_fn=near))
    assert r_hat(restarts, Y) > 1.5
    assert r_hat(restarts[::2], Y) < 1.05


def same(one, two):
    """All groups and variables of two exports are equal."""
    groups = one.groups() if OLD else list(one.children)
    assert set(groups) == set(two.groups() if OLD else two.children)
    assert len(groups) >= 9
    for group in groups:
        assert set(one[group].data_vars) == set(two[group].data_vars)
        for name in one[group].data_vars:
            np.testing.assert_array_equal(one[group][name].values, two[group][name].values)
            assert one[group][name].dims == two[group][name].dims
        assert {**two[group].attrs, **one[group].attrs} == dict(two[group].attrs)


def test_netcdf_round_trip(exported, tmp_path):
    exported.to_netcdf(str(tmp_path / "particles.nc"))
    same(exported, arviz.from_netcdf(str(tmp_path / "particles.nc")))


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_zarr_round_trip(exported, tmp_path):
    """ArviZ 0.x refuses zarr 3 in ``to_zarr`` itself and names this way through xarray."""
    path = str(tmp_path / "particles.zarr")
    if OLD:
        exported.to_datatree().to_zarr(path)
        back = arviz.InferenceData.from_datatree(xarray.open_datatree(path, engine="zarr"))
    else:
        exported.to_zarr(path)
        back = arviz.from_zarr(path)
    same(exported, back)
