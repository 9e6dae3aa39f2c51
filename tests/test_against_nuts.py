"""The comparison with NUTS: its log joints, its distances, and that it runs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer.mcmc.util import TraceEinsumEvaluator

from pyro_fordes import RBF, ParticleInference, Weights

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPT = FOLDER / "against_nuts.py"
NAMES = ("schools, centred", "schools, not centred", "logistic", "mixture", "network")


@pytest.fixture(scope="module")
def script():
    """The script as a module, its models in double precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        for name in ("models", "against_nuts"):
            patch.delitem(sys.modules, name, raising=False)
        torch.set_default_dtype(torch.float64)
        try:
            yield importlib.import_module("against_nuts")
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_one_site_has_the_log_joint_of_many(script, name):
    """Fair form of ``pyro.infer.SVGD``: same density of the same particles."""
    posterior = script.POSTERIORS[name]
    inference = ParticleInference(
        posterior.model, pyro.optim.Adam({"lr": 0.1}), 4, kernel=RBF(Weights()), seed=0
    )
    wanted = inference.log_joint(*posterior.data)
    flat = script.Layout.of(posterior.model, posterior.data).pack(inference.get_samples())
    one_site = script.packed(posterior.model, posterior.data)
    with pyro.plate("particles", 4):
        trace = poutine.trace(poutine.condition(one_site, {"packed": flat})).get_trace(
            *posterior.data
        )
    trace.compute_log_prob()
    found = sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")
    torch.testing.assert_close(found, wanted)


def test_layout_inverts_itself(script):
    posterior = script.POSTERIORS["mixture"]
    layout = script.Layout.of(posterior.model, posterior.data)
    flat = torch.randn(7, layout.size)
    torch.testing.assert_close(layout.pack(layout.unpack(flat)[0]), flat)


def test_mixture_summed_out_is_the_enumerated_one(script):
    models = sys.modules["models"]
    (y,) = models.mixture_data()
    sites = poutine.trace(models.mixture_marginal).get_trace(y)
    sites = {name: sites.nodes[name]["value"] for name in ("weights", "first", "gaps", "scale")}
    marginal = poutine.trace(poutine.condition(models.mixture_marginal, sites)).get_trace(y)
    enumerated = poutine.enum(poutine.condition(models.mixture, sites), first_available_dim=-2)
    trace = poutine.trace(enumerated).get_trace(y)
    evaluator = TraceEinsumEvaluator(trace, has_enumerable_sites=True, max_plate_nesting=1)
    torch.testing.assert_close(evaluator.log_prob(trace), marginal.log_prob_sum())


def test_centred_draws_have_the_density_of_the_others(script):
    """log p(mu, tau, theta, y) = log p(mu, tau, eta, y) - 8 log tau."""
    models = sys.modules["models"]
    data = models.schools_data()
    trace = poutine.trace(models.eight_schools_noncentred).get_trace(*data)
    sites = {name: trace.nodes[name]["value"] for name in ("mu", "tau", "eta")}
    centred = poutine.condition(models.eight_schools, models.centre(sites))
    found = poutine.trace(centred).get_trace(*data).log_prob_sum()
    torch.testing.assert_close(found, trace.log_prob_sum() - 8 * sites["tau"].log())


def test_distances_of_what_is_known(script):
    """A shift in one dimension, a copy of the reference, and more draws than the reference has."""
    draws = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)) * 3 + 5
    reference = script.Reference(draws)
    found = reference.distances(draws + 1.5 * draws.std(0))
    assert found["SW2"] == pytest.approx(1.5)
    assert found["mean"] == pytest.approx(1.5)
    assert found["sd"] == pytest.approx(1)
    same = reference.distances(draws.repeat(2, 1))
    assert same["SW2"] == pytest.approx(0, abs=1e-12)
    assert same["MMD"] == pytest.approx(0, abs=1e-7)
    # All points at the upper of two, which are sqrt(2) apart in units of their own: half of the
    # levels differ.
    apart = script.Reference(torch.tensor([[-1.0], [1.0]]))
    assert apart.distances(torch.ones(2, 1))["SW2"] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_references_are_made(script, tmp_path):
    posterior = script.POSTERIORS["schools, not centred"]
    assert "4 chains of 5 draws" in script.make_reference(posterior, tmp_path, smoke=True)
    reference, others, _ = script.load(script.POSTERIORS["schools, centred"], tmp_path)
    assert reference.draws.shape == (13, 10)
    assert others.shape == (7, 10)


def test_it_runs():
    command = [sys.executable, str(SCRIPT), "--smoke", "--models", "mixture", "network"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| WGD sge |")]
    assert len(rows) == 4  # SW2, MMD, mean, sd
    assert all(float(cell) > 0 for row in rows for cell in row[2:4])
    assert "ours - theirs" in result.stdout
