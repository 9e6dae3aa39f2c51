"""Export to ArviZ: groups, values, dimensions, filters. Runs on ArviZ 0.x and 1.x."""

import sys

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from torch import nn

from pyro_fordes import (
    RBF,
    ArgumentError,
    Ensemble,
    MissingDependencyError,
    ParticleInference,
    StateError,
    Trajectory,
    Weights,
    bayesianize,
    to_arviz,
)
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.particles import OneProcess
from tests.models import Classifier

NUM_DATA = 30
GROUPS = {"posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data"}


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


X = torch.linspace(-1, 1, 10)
Y = X.sin()


def start(model, count=25, seed=0, **options):
    options = {"kernel": RBF(Weights()), **options}
    return ParticleInference(model, pyro.optim.Adam({"lr": 0.01}), count, seed=seed, **options)


def groups_of(data):
    return set(data.groups()) if hasattr(data, "_groups_all") else set(data.children)


@pytest.fixture(scope="module")
def trained():
    inference = start(model)
    inference.run(5, X, Y, progress_bar=False)
    return inference


def test_groups_dimensions_and_values(trained):
    data = to_arviz(trained, X, Y)
    assert groups_of(data) == GROUPS | {"constant_data"}
    posterior = data["posterior"]
    assert dict(posterior["w"].sizes) == {"chain": 1, "draw": 25, "w_dim_0": 2}
    assert posterior["offset"].dims == ("chain", "draw", "groups")
    samples = trained.get_samples()
    for name in ("w", "offset", "sigma", "large"):
        np.testing.assert_array_equal(posterior[name].values[0], samples[name].numpy())
    np.testing.assert_array_equal(posterior["twice"].values[0], 2 * samples["w"].numpy())
    assert set(posterior.data_vars) == {"w", "offset", "sigma", "large", "twice"}
    assert set(data["observed_data"].data_vars) == {"y"}
    np.testing.assert_array_equal(data["observed_data"]["y"].values, Y.numpy())
    assert data["observed_data"]["y"].dims == ("data",)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "data")
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "data")
    assert list(data["constant_data"].data_vars) == ["x"]
    np.testing.assert_array_equal(data["constant_data"]["x"].values, X.numpy())
    assert data["constant_data"]["x"].dims == ("data",)


def test_statistics_of_the_particles(trained):
    stats = to_arviz(trained, X, Y)["sample_stats"]
    measured = trained.diagnostics()
    np.testing.assert_allclose(stats["lp"].values[0], trained.log_joint(X, Y).numpy(), rtol=1e-6)
    for name in ("driving_force", "repulsive_force"):
        np.testing.assert_array_equal(stats[name].values[0], measured[name].numpy())
    for name in ("force_ratio", "effective_particles", "bandwidth"):
        np.testing.assert_allclose(stats[name].values, np.full((1, 25), measured[name]), rtol=1e-6)
    assert stats.attrs["measured_step"] == measured["step"]
    alone = start(model, 3, transport=Ensemble())
    alone.setup(X, Y)
    assert list(to_arviz(alone, X, Y)["sample_stats"].data_vars) == ["lp"]
    alone.step(X, Y)
    stats = to_arviz(alone, X, Y)["sample_stats"]
    assert set(stats.data_vars) == {"lp", "driving_force", "repulsive_force", "force_ratio"}


def test_log_likelihood_is_pointwise_and_not_scaled(trained):
    s = trained.get_samples()
    mean = s["w"][:, :1] + s["w"][:, 1:] * X + s["offset"].mean(1, keepdim=True)
    expected = dist.Normal(mean, s["sigma"][:, None]).log_prob(Y)
    found = to_arviz(trained, X, Y)["log_likelihood"]["y"].values[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_predictions_are_drawn_for_each_particle(trained):
    """Residuals over sd of 25 x 30 draws: mean and variance within 5 standard errors."""
    new = torch.linspace(-3, 3, NUM_DATA)
    data = to_arviz(trained, X, Y, predictions=(new,), seed=1)
    s = trained.get_samples()
    for group, x in (("posterior_predictive", X), ("predictions", new)):
        mean = s["w"][:, :1] + s["w"][:, 1:] * x + s["offset"].mean(1, keepdim=True)
        draws = torch.tensor(data[group]["y"].values[0])
        assert draws.shape == (25, len(x))
        z = (draws - mean) / s["sigma"][:, None]
        assert abs(z.mean()) < 5 / z.numel() ** 0.5
        assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5
    assert data["predictions"]["y"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(data["predictions_constant_data"]["x"].values, new.numpy())
    assert data["predictions_constant_data"]["x"].dims == ("data",)
    for given in ({"x": new}, new, [new, new]):  # keywords, one argument, observations included
        again = to_arviz(trained, X, Y, predictions=given, seed=1)
        np.testing.assert_array_equal(
            again["predictions"]["y"].values, data["predictions"]["y"].values
        )


def test_draws_come_from_the_seed_and_leave_everything_as_it_was(trained):
    before = torch.get_rng_state()
    step, samples = trained._step, trained.get_samples()
    first, again = (to_arviz(trained, X, Y, prior=3) for _ in range(2))
    other = to_arviz(trained, X, Y, prior=3, seed=1)
    for group, name in (("posterior_predictive", "y"), ("prior", "w"), ("prior_predictive", "y")):
        assert (first[group][name].values == again[group][name].values).all()
        assert (first[group][name].values != other[group][name].values).all()
    assert torch.equal(before, torch.get_rng_state())
    assert trained._step == step
    for name, value in trained.get_samples().items():
        assert torch.equal(value, samples[name])


def test_prior_is_the_models():
    """2,000 draws: moments within 5 standard errors."""
    data = to_arviz(_set_up(), X, Y, prior=2000)
    prior = data["prior"]
    assert prior["offset"].dims == ("chain", "draw", "groups")
    assert set(prior.data_vars) == {"w", "large", "offset", "sigma", "twice"}
    w, y = prior["w"].values, data["prior_predictive"]["y"].values
    assert w.shape == (1, 2000, 2)
    assert abs(w.mean()) < 5 / 4000**0.5
    assert abs(w.var() - 1) < 5 * (2 / 4000) ** 0.5
    np.testing.assert_allclose(prior["twice"].values, 2 * w, rtol=1e-6)
    # y = w0 + w1 x + mean of three offsets + noise; the noise's variance is exp(2 * 0.1^2).
    wanted = 1 + X[0] ** 2 + 1 / 3 + np.exp(0.02)
    assert abs(y[0, :, 0].var() / wanted - 1) < 5 * (2 / 2000) ** 0.5
    assert dict(data["posterior"].sizes)["draw"] == 2


def _set_up():
    inference = start(model, 2)
    inference.setup(X, Y)
    return inference


def test_sites_by_name_pattern_and_size(trained):
    def exported(**options):
        return set(to_arviz(trained, X, Y, groups=["posterior"], **options)["posterior"].data_vars)

    assert exported(sites=["w", "twice"]) == {"w", "twice"}
    assert exported(sites=["*e", "sig?a"]) == {"large", "twice", "sigma"}
    assert exported(sites=["large"], max_site_size=1) == {"large"}  # a name is a wish
    with pytest.warns(UserWarning, match="left out the sites 'large' for their size"):
        assert exported(sites=["*e"], max_site_size=29) == {"twice"}  # a pattern is none
    for bad in (["nothing"], "large", ["no*"], [3]):
        with pytest.raises(ArgumentError, match=r"names or patterns of sites.*'large'"):
            exported(sites=bad)


def test_nothing_large_is_left_out_silently(trained):
    with pytest.warns(UserWarning, match=r"name them in sites=\[...\], or raise max_site_size"):
        data = to_arviz(trained, X, Y, max_site_size=29)
    assert "large" not in data["posterior"]
    assert data["posterior"].attrs["omitted_sites"] == "large"
    with pytest.warns(UserWarning, match="raise max_size") as warned:
        data = to_arviz(trained, X, Y, max_size=200)  # the 250 of 25 particles and 10 rows are more
    message = str(warned[0].message)
    for part in ("posterior_predictive['y'] (250 values)", "log_likelihood['y']", "raise max_size"):
        assert part in message
    assert groups_of(data) == {"posterior", "sample_stats", "observed_data", "constant_data"}
    with pytest.warns(
        UserWarning, match=r"observed_data\['y'\] \(10 values\), constant_data\['x'\]"
    ):
        to_arviz(trained, X, Y, max_size=9)
    data = to_arviz(trained, X, Y, max_size=1, groups=["log_likelihood"])  # named, so wanted
    assert groups_of(data) == {"log_likelihood"}
    sites = {f"site {i}": 9 for i in range(5)}

    def many():
        for name in sites:
            pyro.sample(name, dist.Normal(torch.zeros(9), 1.0).to_event(1))

    inference = start(many, 2)
    inference.setup()
    with pytest.warns(UserWarning, match="'site 0', 'site 1', 'site 2' and 2 more"):
        assert "posterior" not in groups_of(to_arviz(inference, max_site_size=5))


def test_dimensions_and_coordinates_from_the_user(trained):
    data = to_arviz(
        trained,
        X,
        Y,
        predictions=(X[:4],),
        dims={"w": ["feature"], "y": ["row"], "x": ["row"]},
        coords={"feature": ["bias", "slope"], "groups": list("abc"), "row": np.arange(10) * 10},
    )
    assert (
        float(data["posterior"]["w"].sel(feature="slope")[0, 3]) == trained.get_samples()["w"][3, 1]
    )
    assert list(data["posterior"]["offset"].coords["groups"].values) == ["a", "b", "c"]
    for group in ("observed_data", "log_likelihood", "posterior_predictive", "constant_data"):
        assert list(data[group].coords["row"].values) == list(range(0, 100, 10))
    assert list(data["predictions"].coords["row"].values) == [0, 1, 2, 3]  # other rows
    for bad, match in (
        ({"dims": {"v": ["feature"]}}, "dims=.*must give a list of names for each variable"),
        ({"dims": {"w": "feature"}}, "must give a list of names"),
        ({"dims": {"w": ["a", "b"]}}, "gives 'w' the 2 dimensions.*but it has 1"),
        ({"coords": {"group": ["a", "b", "c"]}}, "names .'group'., but the dimensions are"),
        ({"coords": {"groups": ["a", "b"]}}, "'groups' 2 labels, but its length is 3"),
    ):
        with pytest.raises(ArgumentError, match=match):
            to_arviz(trained, X, Y, **bad)
    # Coordinates of a site that is left out are no mistake.
    to_arviz(trained, X, Y, sites=["w"], coords={"groups": list("abc")})


def test_event_dimensions_of_observations():
    """A vector-valued observation has a batch dimension only in its log likelihood."""

    def vectors(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    y = torch.randn(4, 3)
    inference = start(vectors)
    inference.run(2, y, progress_bar=False)
    data = to_arviz(inference, y)
    assert "constant_data" not in groups_of(data)  # its only argument is the observation
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "rows")
    assert data["observed_data"]["y"].dims == ("rows", "y_dim_1")
    data = to_arviz(inference, y, dims={"y": ["row", "column"]})
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "row", "column")


def test_names_that_clash():
    """A plate called as an argument, and sites of other lengths in plates of one name."""

    def clashing(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("x", 3):
            pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    inference = start(clashing, 2)
    x = torch.arange(12.0).reshape(3, 4)
    inference.setup(x[0], x[1])
    data = to_arviz(inference, x[0], x[1])
    assert data["constant_data"]["x"].dims == ("rows",)
    assert data["posterior"]["u"].dims == ("chain", "draw", "x")
    data = to_arviz(inference, x[0], x[1], dims={"x": ["x"]})
    assert data["constant_data"]["x"].dims == ("x_dim_0",)


def test_data_of_this_call_not_of_an_earlier_one(trained):
    """Runs of the model are remembered by the shapes of their arguments."""
    other = Y + 1
    np.testing.assert_array_equal(to_arviz(trained, X, other)["observed_data"]["y"], other.numpy())
    np.testing.assert_array_equal(to_arviz(trained, X, Y)["observed_data"]["y"], Y.numpy())


def test_arguments_of_every_kind():
    def nested(tables, n, name, y=None, flag=True):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", n):
            return pyro.sample("y", dist.Bernoulli(logits=w * tables["a"][0]), obs=y)

    inference = start(nested, 2)
    tables = {"a": [torch.ones(3), torch.zeros(2, 3)]}
    y = torch.tensor([True, False, True])
    inference.setup(tables, 3, "name", y.float())
    data = to_arviz(inference, tables, 3, "name", y=y.float())
    assert set(data["constant_data"].data_vars) == {"tables_a_0", "tables_a_1", "n"}
    assert data["constant_data"]["tables_a_0"].dims == ("rows",)
    assert data["constant_data"]["tables_a_1"].dims == ("tables_a_1_dim_0", "tables_a_1_dim_1")


def test_a_minibatch_that_the_model_draws_is_the_same_in_all_groups():
    rows = torch.arange(100.0)

    def draws(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=7) as index:
            pyro.deterministic("index", index.float())
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    inference = start(draws, 4)
    inference.setup(rows)
    data = to_arviz(inference, rows)
    y = torch.tensor(data["observed_data"]["y"].values)
    assert (torch.tensor(data["posterior"]["index"].values[0]) == y).all()
    mean = inference.get_samples()["mean"]
    expected = dist.Normal(mean[:, None], 1.0).log_prob(y)
    np.testing.assert_allclose(data["log_likelihood"]["y"].values[0], expected, rtol=1e-5)
    expected = dist.Normal(0.0, 1.0).log_prob(mean) + expected.sum(1) * 100 / 7
    np.testing.assert_allclose(data["sample_stats"]["lp"].values[0], expected, rtol=1e-5)


def test_networks_are_in_eval_mode_meanwhile():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    inference = start(Classifier(bayesianize(net)), 4)
    x, y = torch.randn(6, 2), torch.arange(6) % 3
    inference.run(3, x, y, progress_bar=False)
    buffers = {name: value.clone() for name, value in inference._buffers.items()}
    first, again = (to_arviz(inference, x, y, seed=seed) for seed in (0, 1))
    assert (first["log_likelihood"]["y"].values == again["log_likelihood"]["y"].values).all()
    assert (first["sample_stats"]["lp"].values == again["sample_stats"]["lp"].values).all()
    assert inference.model.training
    for name, value in buffers.items():
        assert torch.equal(inference._buffers[name], value)
    with torch.no_grad():
        logits = [inference.module(i).eval()(x) for i in range(4)]
    expected = torch.stack(logits).log_softmax(-1)[:, range(6), y]
    np.testing.assert_allclose(
        first["log_likelihood"]["y"].values[0], expected.numpy(), rtol=1e-4, atol=1e-5
    )
    assert first["posterior"]["logits"].dims == ("chain", "draw", "logits_dim_0", "logits_dim_1")


def test_restarts_are_chains(trained):
    other = start(model, seed=1)
    other.run(5, X, Y, progress_bar=False)
    data = to_arviz([trained, other], X, Y, prior=10)
    for group, count in (("posterior", 25), ("log_likelihood", 25), ("sample_stats", 25)):
        assert dict(data[group].sizes)["chain"] == 2
        assert dict(data[group].sizes)["draw"] == count
    for index, inference in enumerate((trained, other)):
        w = inference.get_samples()["w"].numpy()
        np.testing.assert_array_equal(data["posterior"]["w"].values[index], w)
        np.testing.assert_allclose(
            data["sample_stats"]["lp"].values[index], inference.log_joint(X, Y), rtol=1e-6
        )
    assert dict(data["prior"].sizes)["chain"] == 1
    y = data["posterior_predictive"]["y"].values
    assert (y[0] != y[1]).all()
    smaller = _set_up()
    for bad, match in (
        ([], "empty list"),
        ([trained, smaller], "number 0 has .*'w': .25, 2.*, number 1 has .*'w': .2, 2."),
        ([trained, "x"], "needs a ParticleInference or a list of them, got str"),
    ):
        with pytest.raises(ArgumentError, match=match):
            to_arviz(bad, X, Y)


def test_a_loaded_inference_is_exported_at_once(trained, tmp_path):
    trained.save(tmp_path / "state.pt")
    loaded = ParticleInference.load(
        tmp_path / "state.pt", model, pyro.optim.Adam({"lr": 0.01}), kernel=RBF(Weights())
    )
    one, two = to_arviz(trained, X, Y), to_arviz(loaded, X, Y)
    for group in ("posterior", "log_likelihood", "posterior_predictive", "sample_stats"):
        assert list(one[group].data_vars) == list(two[group].data_vars)
        for name in one[group].data_vars:
            np.testing.assert_array_equal(one[group][name].values, two[group][name].values)


def test_names_with_slashes():
    """As ``pyro.contrib.autoname.scope`` makes them."""

    def scoped():
        with scope(prefix="a"):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    inference = start(scoped, 3)
    inference.setup()
    posterior = to_arviz(inference)["posterior"]
    np.testing.assert_array_equal(
        posterior["a.z"].values[0], inference.get_samples()["a/z"].numpy()
    )


def test_what_cannot_be_exported_says_so(trained):
    with pytest.raises(StateError, match="no particles yet"):
        to_arviz(start(model), X, Y)
    with pytest.raises(ArgumentError, match=r"groups=.*must be a list of names from"):
        to_arviz(trained, X, Y, groups=["posteriors"])
    with pytest.raises(ArgumentError, match="must be a list of names from"):
        to_arviz(trained, X, Y, groups="posterior")
    with pytest.raises(ArgumentError, match="the model takes"):
        to_arviz(trained, X, Y, site=["w"])  # a typo reaches the model
    with pytest.raises(ArgumentError, match="prior must be an integer of at least 1"):
        to_arviz(trained, X, Y, prior=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dims": ["w"]}, "dims=.*must be a mapping"),
        ({"dims": {"w": [3]}}, "must give a list of names"),
        ({"dims": {"w": None}}, "must give a list of names"),
        ({"dims": {"w": ["draw"]}}, "must differ from each other and from 'chain'"),
        ({"dims": {"large": ["a", "a"]}}, "must differ from each other"),
        ({"coords": ["a"]}, "coords=.*must be a mapping"),
        ({"coords": {"groups": 3}}, "must give a list of labels"),
        ({"coords": {"groups": "abc"}}, "must give a list of labels"),
        ({"coords": {"groups": [[1], [2], [3]]}}, "must give a list of labels"),
        ({"coords": {"groups": [[1], [2, 3], []]}}, "must give a list of labels"),
        ({"groups": 3}, "must be a list of names from"),
        ({"sites": 3}, "must be a list of names or patterns"),
        ({"seed": None}, "seed must be an integer"),
        ({"seed": 2**70}, "seed must be an integer"),
    ],
)
def test_bad_options_say_what_is_wanted(trained, options, match):
    with pytest.raises(ArgumentError, match=match):
        to_arviz(trained, X, Y, **options)


def test_an_inference_is_no_two_chains(trained):
    with pytest.raises(ArgumentError, match="got an inference twice"):
        to_arviz([trained, trained], X, Y)


def test_deterministic_sites_are_named_after_plates():
    """Pyro takes all of their axes for event axes unless told otherwise."""

    def plates(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("outside", w * x)
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.deterministic("both", w * x.expand(3, 4))
            pyro.deterministic("event", w * torch.ones(3, 4, 2))
            pyro.deterministic("told", w * torch.ones(3, 4, 4), event_dim=1)
            pyro.deterministic("other", w * torch.ones(7))

    inference = start(plates, 2)
    inference.setup(X[:4])
    posterior = to_arviz(inference, X[:4])["posterior"]
    assert posterior["outside"].dims[2:] == ("outside_dim_0",)
    assert posterior["both"].dims[2:] == ("rows", "columns")
    assert posterior["event"].dims[2:] == ("rows", "columns", "event_dim_2")
    assert posterior["told"].dims[2:] == ("rows", "columns", "told_dim_2")
    assert posterior["other"].dims[2:] == ("other_dim_0",)


def test_a_trajectory_of_no_site():
    inference = start(model, 2, diagnostics_every=1)
    inference.run(3, X, Y, progress_bar=False, callback=Trajectory(sites=[]))
    data = to_arviz(inference, X, Y, trajectory=True)
    assert groups_of(data) == {"sample_stats", "observed_data", "constant_data"}
    assert dict(data["sample_stats"]["lp"].sizes) == {"chain": 2, "draw": 3}


def test_a_trajectory_has_no_densities():
    inference = start(model, 2)
    inference.run(3, X, Y, progress_bar=False, callback=Trajectory())
    data = to_arviz(inference, X, Y, trajectory=True, groups=["log_likelihood", "constant_data"])
    assert groups_of(data) == {"constant_data"}
    with pytest.raises(ArgumentError, match="sites must be a list"):
        Trajectory(sites=3)


def test_without_arviz_the_error_has_the_command(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'pyro-fordes\[arviz\]'"):
        to_arviz(trained, X, Y)


# ---------------------------------------------------------------- trajectories


def test_trajectory_has_a_chain_for_each_particle():
    inference = start(model, 4, diagnostics_every=1)
    trajectory, kept = Trajectory(every=3), []

    def callback(inference, step, loss):
        trajectory(inference, step, loss)
        if step % 3 == 0:
            kept.append((inference.get_samples(), inference.diagnostics(), loss))

    inference.run(10, X, Y, progress_bar=False, callback=callback)
    data = to_arviz(inference, X, Y, trajectory=True)
    posterior, stats = data["posterior"], data["sample_stats"]
    assert posterior["offset"].dims == ("chain", "draw", "groups")
    assert dict(posterior["w"].sizes) == {"chain": 4, "draw": 4, "w_dim_0": 2}
    assert list(posterior.coords["draw"].values) == trajectory.steps == [0, 3, 6, 9]
    for record, (samples, measured, loss) in enumerate(kept):
        np.testing.assert_array_equal(posterior["w"].values[:, record], samples["w"].numpy())
        np.testing.assert_allclose(stats["lp"].values[:, record], measured["log_joint"].numpy())
        np.testing.assert_allclose(stats["loss"].values[:, record], loss)
        np.testing.assert_allclose(stats["bandwidth"].values[:, record], measured["bandwidth"])
    assert groups_of(data) == {"posterior", "sample_stats", "observed_data", "constant_data"}
    chosen = to_arviz(inference, X, Y, trajectory=True, sites=["w"])
    assert list(chosen["posterior"].data_vars) == ["w"]
    with pytest.raises(ArgumentError, match="one inference, got 2"):
        to_arviz([inference, inference], X, Y, trajectory=True)


def test_trajectory_measures_what_was_measured():
    """Steps between measured ones have a loss only."""
    inference = start(model, 2, diagnostics_every=4)
    trajectory = Trajectory(every=2)
    inference.run(8, X, Y, progress_bar=False, callback=trajectory)
    stats = trajectory.stats()
    assert stats["lp"].isnan().all(1).tolist() == [False, True, False, True]
    assert not stats["loss"].isnan().any()


def test_trajectory_keeps_its_limit():
    inference = start(model, 2)
    trajectory = Trajectory(limit=8, sites=["w", "l*"], max_site_size=29)
    for _ in range(3):
        inference.run(17, X, Y, progress_bar=False, callback=trajectory)
        assert len(trajectory.steps) <= 8
    assert trajectory.steps == [0, 8, 16, 24, 32, 40, 48]
    assert trajectory.samples()["w"].shape == (7, 2, 2)
    with pytest.warns(UserWarning, match="left out the sites 'large'"):
        to_arviz(inference, X, Y, trajectory=True)
    assert Trajectory(every=10, limit=2).limit == 2


def test_only_the_sites_that_are_asked_for_are_gathered(trained, monkeypatch):
    """Under torchrun each would travel, at every record."""
    gathered, constrained = [], []
    call, constrain = OneProcess.__call__, LogJoint.constrain

    def counting(self, values, latents):
        constrained.extend(values)
        return constrain(self, values, latents)

    def gathering(self, local):
        gathered.append(tuple(local.shape))
        return call(self, local)

    monkeypatch.setattr(LogJoint, "constrain", counting)
    monkeypatch.setattr(OneProcess, "__call__", gathering)
    trajectory = Trajectory(sites=["w", "l*"], max_site_size=29)
    trajectory(trained, 0, 1.0)
    assert constrained == ["w"]
    assert gathered == [(25, 2)]
    assert trajectory.omitted == ["large"]
    torch.testing.assert_close(trajectory.samples()["w"][0], trained.get_samples()["w"])
    del constrained[:]
    to_arviz(trained, X, Y, sites=["sigma"], groups=["posterior"])
    assert constrained == ["sigma"]
    del constrained[:]
    to_arviz(trained, X, Y, groups=["observed_data"])
    assert constrained == []


def test_trajectory_measures_values_in_their_support():
    """A simplex has one number more than the line that it is mapped to."""

    def weights():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    inference = start(weights, 2)
    for size, kept in ((3, True), (2, False)):
        trajectory = Trajectory(max_site_size=size)
        inference._trajectory = None
        inference.run(1, progress_bar=False, callback=trajectory)
        assert ("p" in trajectory.samples()) == kept


def test_trajectory_says_what_it_cannot_do():
    inference, other = start(model, 2), start(model, 2, seed=1)
    inference.setup(X, Y)
    with pytest.raises(StateError, match=r"callback=Trajectory\(every=...\)"):
        to_arviz(inference, X, Y, trajectory=True)
    with pytest.raises(StateError, match="recorded nothing yet"):
        Trajectory().samples()
    trajectory = Trajectory()
    inference.run(1, X, Y, progress_bar=False, callback=trajectory)
    with pytest.raises(ArgumentError, match="records one inference"):
        other.run(1, X, Y, progress_bar=False, callback=trajectory)
    with pytest.raises(ArgumentError, match=r"Trajectory\(sites=...\) must be a list"):
        other.run(1, X, Y, progress_bar=False, callback=Trajectory(sites=["v"]))
    for bad in ({"every": 0}, {"limit": 1}, {"max_site_size": 0}, {"sites": "w"}):
        with pytest.raises(ArgumentError):
            Trajectory(**bad)


def test_the_installed_arviz_is_the_one_for_this_python():
    """0.x on Python 3.11, 1.x from 3.12 on: each is tested somewhere."""
    assert arviz.__version__.startswith("0.") == (sys.version_info < (3, 12))
