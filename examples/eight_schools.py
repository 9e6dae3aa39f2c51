"""Eight schools: an ordinary Pyro model, with particles in place of SVI.

The effects of a coaching programme in eight schools (Rubin 1981), with the spread between schools
unknown. The model is written as for any Pyro inference. It is fitted by SVI with a normal guide, by
particles in weight space with the calibrated rule, and by particles with a kernel per coordinate,
and compared with NUTS (stored in ``eight_schools_nuts.json``; ``--nuts`` runs it anew).
Prints a table; writes a figure.

What to expect: half a minute on one core. The spread tau has a long tail on both sides. A kernel
per coordinate follows it closely, SVI's guide misses small values, and the calibrated rule puts
some particles far out, which widens the interval of school A (docs/calibration.md, "Where it
fails").
"""

import argparse
import json
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_uniform
from torch import Tensor
from tqdm.auto import trange

from pyro_fordes import RBF, SVGD, WGD, ParticleInference, Weights

STORED = Path(__file__).with_name("eight_schools_nuts.json")
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
LEVELS = torch.linspace(0.025, 0.975, 39, dtype=torch.float64)
LOW, MIDDLE, HIGH = 1, 19, 37  # of LEVELS: 5 %, 50 % and 95 %


def model(error: Tensor, effect: Tensor | None = None) -> Tensor:
    """Effects of the schools are normal around mu; each is measured with a known error."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(error)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))  # not centred: theta in units of tau
        theta = pyro.deterministic("theta", mu + tau * eta)
        return pyro.sample("effect", dist.Normal(theta, error), obs=effect)


Samples = dict[str, Tensor]


def with_theta(samples: Samples) -> Samples:
    """What is reported: mu, tau and the effects theta."""
    mu, tau, eta = (samples[name].flatten() for name in ("mu", "tau", "eta"))
    eta = eta.reshape(len(mu), -1)
    return {"mu": mu, "tau": tau, "theta": mu[:, None] + tau[:, None] * eta}


def fit_svi(steps: int, draws: int) -> Samples:
    """Mean-field normal guide, then draws of it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(model)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(model, guide, decaying_adam(0.02, steps), elbo)
    for _ in trange(steps, desc="SVI"):
        svi.step(ERROR, EFFECT)
    draw = Predictive(model, guide=guide, num_samples=draws, return_sites=["mu", "tau", "eta"])
    return with_theta(draw(ERROR))


def fit_particles(steps: int, particles: int, calibrated: bool) -> Samples:
    """The same model, particles in place of the guide."""
    if calibrated:
        rule = {"kernel": RBF(Weights()), "transport": WGD("sge", whiten="full", calibrate=True)}
    else:
        rule = {"kernel": RBF(Weights(group="coordinate")), "transport": SVGD()}
    inference = ParticleInference(
        model, decaying_adam(0.2, steps), particles, init_loc_fn=init_to_uniform, seed=0, **rule
    )
    inference.run(steps, ERROR, EFFECT)
    return with_theta(inference.get_samples())


def decaying_adam(rate: float, steps: int) -> pyro.optim.PyroOptim:
    """Adam whose rate falls to a hundredth: at a constant one its noise stays in the spread."""
    return pyro.optim.ClippedAdam(
        {"lr": rate, "lrd": 0.01 ** (1 / steps), "betas": (0.9, 0.95), "clip_norm": 1e9}
    )


def run_nuts(warmup: int, samples: int, chains: int) -> dict[str, object]:
    """Quantiles of NUTS draws; what is stored."""
    draws, rhat = [], []
    for chain in range(chains):
        pyro.set_rng_seed(chain)
        kernel = NUTS(model, target_accept_prob=0.95, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, samples, warmup)
        mcmc.run(ERROR.double(), EFFECT.double())
        draws.append(with_theta(mcmc.get_samples()))
    joined = {name: torch.cat([one[name] for one in draws]).double() for name in draws[0]}
    for name in ("mu", "tau"):
        values = torch.stack([one[name] for one in draws])
        within, between = values.var(1).mean(), values.mean(1).var() if chains > 1 else 0.0
        rhat.append(float((1 - 1 / samples + between / within) ** 0.5))
    return {
        "made_by": f"--nuts: {chains} chains of {warmup} + {samples} steps",
        "rhat of mu and tau": [round(value, 4) for value in rhat],
        "mean": {name: rounded(value.mean(0)) for name, value in joined.items()},
        "sd": {name: rounded(value.std(0)) for name, value in joined.items()},
        "quantiles": {name: rounded(quantiles(value)) for name, value in joined.items()},
    }


def quantiles(values: Tensor) -> Tensor:
    """Quantiles at `LEVELS`, along a first axis."""
    return values.double().quantile(LEVELS, dim=0)


def rounded(values: Tensor) -> list:
    """Numbers for a file, to four significant digits at least."""
    return torch.round(values.double(), decimals=4).tolist()


def print_table(reference: dict, results: dict[str, Samples]) -> None:
    """Means and standard deviations, and quantiles of tau."""
    head = ("mu", "sd", "tau 5 %", "50 %", "95 %", "theta A", "sd", "theta H", "sd")
    print(f"{'':28}" + "".join(f"{name:>9}" for name in head))
    mean, sd, tau = (reference[key] for key in ("mean", "sd", "quantiles"))
    tau = [tau["tau"][level] for level in (LOW, MIDDLE, HIGH)]
    thetas = [one["theta"][school] for school in (0, 7) for one in (mean, sd)]
    print_row("NUTS", [mean["mu"], sd["mu"], *tau, *thetas])
    for label, samples in results.items():
        mu, theta = samples["mu"], samples["theta"]
        tau = quantiles(samples["tau"])[[LOW, MIDDLE, HIGH]].tolist()
        thetas = [f(theta[:, school]).item() for school in (0, 7) for f in (torch.mean, torch.std)]
        print_row(label, [mu.mean().item(), mu.std().item(), *tau, *thetas])


def print_row(label: str, values: list[float]) -> None:
    print(f"{label:28}" + "".join(f"{value:9.2f}" for value in values))


def draw(reference: dict, results: dict[str, Samples], path: Path) -> None:
    """Left: 90 % intervals of the effects. Right: quantiles of tau against NUTS's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    schools = torch.arange(len(EFFECT))
    found = {"NUTS": torch.tensor(reference["quantiles"]["theta"])}
    found |= {label: quantiles(samples["theta"]) for label, samples in results.items()}
    for number, (label, values) in enumerate(found.items()):
        x = schools + 0.16 * (number - (len(found) - 1) / 2)
        color = "black" if number == 0 else f"C{number - 1}"
        left.vlines(x, values[LOW], values[HIGH], color=color, label=label)
        left.plot(x, values[MIDDLE], "o", color=color, markersize=3)
    left.plot(schools, EFFECT, "x", color="grey", label="measured")
    left.set_xticks(schools, list("ABCDEFGH"))
    left.set_xlabel("school")
    left.set_ylabel("effect theta (points)")
    left.set_title("Median and 90 % interval")
    left.set_ylim(top=40)
    left.legend(frameon=False, fontsize=8, ncols=3)
    wanted = torch.tensor(reference["quantiles"]["tau"])
    right.loglog(wanted, wanted, "k--", linewidth=0.8, label="NUTS")
    for number, (label, samples) in enumerate(results.items()):
        right.loglog(wanted, quantiles(samples["tau"]), ".-", color=f"C{number}", label=label)
    right.set_xlabel("quantile of tau under NUTS")
    right.set_ylabel("the same quantile")
    right.set_title("Spread between schools, 2.5 % to 97.5 %")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--nuts", action="store_true", help="run NUTS and write its file to --out")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args()
    length = {"warmup": 1000, "samples": 2000, "chains": 4}
    if options.smoke:
        options.steps, options.particles = 20, 10
        length = {"warmup": 20, "samples": 20, "chains": 2}
    torch.set_num_threads(1)  # the model is small: more threads only wait for each other
    options.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    stored = STORED
    if options.nuts:
        stored = options.out / STORED.name
        stored.write_text(json.dumps(run_nuts(**length), indent=1))
    reference = json.loads(stored.read_text())
    results = {
        "SVI, AutoNormal": fit_svi(options.steps, draws=4000),
        "particles, calibrated": fit_particles(options.steps, options.particles, True),
        "particles, by coordinate": fit_particles(options.steps, options.particles, False),
    }
    print_table(reference, results)
    path = options.out / "eight_schools.png"
    draw(reference, results, path)
    print(
        f"{options.particles} particles, {options.steps} steps, "
        f"{time.perf_counter() - start:.0f} s; wrote {path}"
    )


if __name__ == "__main__":
    main()
