"""Export to ArviZ: groups, dimensions, pointwise likelihoods. Runs on ArviZ 0.x and 1.x."""

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_fordes import RBF, ArgumentError, ParticleInference, Weights, to_arviz

NUM_DATA = 30


def model(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("large", dist.Normal(torch.zeros(5, 6), 1.0).to_event(2))
    with pyro.plate("groups", 3):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.1))
    pyro.deterministic("twice", 2 * w)
    pyro.factor("extra", -(w**2).sum())
    with pyro.plate("data", NUM_DATA, subsample_size=len(x)), poutine.scale(scale=3.0):
        mean = w[0] + w[1] * x + offset.mean()
        return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


@pytest.fixture
def trained():
    x = torch.linspace(-1, 1, 10)
    inference = ParticleInference(
        model, pyro.optim.Adam({"lr": 0.01}), 25, kernel=RBF(Weights()), seed=0
    )
    inference.run(5, x, x.sin(), progress_bar=False)
    return inference, x, x.sin()


def test_groups_dimensions_and_values(trained):
    inference, x, y = trained
    data = to_arviz(inference, x, y)
    posterior = data["posterior"]
    assert dict(posterior["w"].sizes) == {"chain": 1, "draw": 25, "w_dim_0": 2}
    assert posterior["offset"].dims == ("chain", "draw", "groups")
    samples = inference.get_samples()
    for name in ("w", "offset", "sigma", "large"):
        np.testing.assert_array_equal(posterior[name].values[0], samples[name].numpy())
    assert set(data["observed_data"].data_vars) == {"y"}
    np.testing.assert_array_equal(data["observed_data"]["y"].values, y.numpy())
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "data")
    np.testing.assert_allclose(
        data["sample_stats"]["lp"].values[0], inference.log_joint(x, y).numpy(), rtol=1e-6
    )


def test_log_likelihood_is_pointwise_and_not_scaled(trained):
    inference, x, y = trained
    s = inference.get_samples()
    mean = s["w"][:, :1] + s["w"][:, 1:] * x + s["offset"].mean(1, keepdim=True)
    expected = dist.Normal(mean, s["sigma"][:, None]).log_prob(y)
    found = to_arviz(inference, x, y)["log_likelihood"]["y"].values[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_large_sites_are_left_out_unless_named(trained):
    inference, x, y = trained
    data = to_arviz(inference, x, y, max_site_size=29)
    assert "large" not in data["posterior"]
    assert data["posterior"].attrs["omitted_sites"] == "large"
    named = to_arviz(inference, x, y, sites=["large"], max_site_size=1)
    assert list(named["posterior"].data_vars) == ["large"]
    for bad in (["nothing"], "large"):
        with pytest.raises(ArgumentError, match="names of latent sites"):
            to_arviz(inference, x, y, sites=bad)


def test_event_dimensions_of_observations(tmp_path):
    """A vector-valued observation has a batch dimension only in its log likelihood."""

    def vectors(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    y = torch.randn(4, 3)
    inference = ParticleInference(
        vectors, pyro.optim.Adam({"lr": 0.01}), 25, kernel=RBF(Weights()), seed=0
    )
    inference.run(2, y, progress_bar=False)
    data = to_arviz(inference, y)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "rows")
    assert data["observed_data"]["y"].dims == ("rows", "y_dim_1")
    path = tmp_path / "particles.nc"
    data.to_netcdf(str(path))
    back = arviz.from_netcdf(str(path))
    np.testing.assert_array_equal(
        back["posterior"]["mean"].values, data["posterior"]["mean"].values
    )
    assert len(arviz.summary(back)) == 3
