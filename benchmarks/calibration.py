"""How close particle rules come to known posteriors: ours, ``pyro.infer.SVGD``, NumPyro's SVGD.

Every rule gets the same log densities, particle counts, start (uniform in (-2, 2)), number of steps
and Adam, whose learning rate falls from 0.1 to 0.001. Shown are the
mean over seeds and, after +-, their standard deviation.

* Every model is packed in one site of unconstrained values. ``pyro.infer.SVGD`` reads its vector of
  particles as one row per particle although its guide packs site after site, so with several sites
  its kernel compares rows that mix particles. With one site it does what it says. For eight schools
  the model with three sites is shown too.
* Gaussians: marginal standard deviations over the true ones, mean [smallest, largest] coordinate;
  the correlated one: smallest and largest eigenvalue of the covariance over the true ones.
* Banana: a ~ Normal(0, 1), b ~ Normal(a^2, 0.5).
* Eight schools: mu ~ Normal(0, 5), tau ~ HalfCauchy(5), effects not centred. The truth is
  from quadrature: given tau everything is Gaussian.

Run as ``python benchmarks/calibration.py``. Rows of NumPyro appear where it is installed; with
``--only numpyro`` it runs where torch is not. ``--dimensions`` prints another table: standard
Gaussians of 2 to 500 dimensions, 10 to 200 particles, 400 steps, marginal standard deviations.
"""

import argparse
import importlib.util
import math

import numpy as np

SEEDS, STEPS, LR = 3, 1500, 0.1
DIMENSIONS, PARTICLES, FEWER_STEPS = (2, 10, 50, 200, 500), (10, 50, 100, 200), 400
Y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=np.float32)
S = np.array([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=np.float32)
TAU_LOGS = np.linspace(-14, 6, 4001)


# ------------------------------------------------------------- targets, for numpy, torch and jax


def gaussian(sd):
    return lambda x, xp, as_array: -0.5 * ((x / as_array(sd)) ** 2).sum(-1)


def correlated(dimension=10, rho=0.9):
    covariance = rho * np.ones((dimension, dimension)) + (1 - rho) * np.eye(dimension)
    precision = np.linalg.inv(covariance).astype(np.float32)
    return lambda x, xp, as_array: -0.5 * ((x @ as_array(precision)) * x).sum(-1)


def banana(x, xp, as_array):
    a, b = x[..., 0], x[..., 1]
    return -0.5 * a**2 - 0.5 * ((b - a**2) / 0.5) ** 2


def eight_schools(x, xp, as_array):
    mu, log_tau, eta = x[..., :1], x[..., 1], x[..., 2:]
    tau = xp.exp(log_tau)
    prior = -0.5 * (mu[..., 0] / 5) ** 2 - xp.log1p((tau / 5) ** 2) + log_tau
    effect = mu + tau[..., None] * eta
    errors = ((as_array(Y) - effect) / as_array(S)) ** 2
    return prior - 0.5 * (eta**2).sum(-1) - 0.5 * errors.sum(-1)


def spread(sd):
    def show(x):
        ratio = x.std(0, ddof=1) / sd
        return [ratio.mean(), ratio.min(), ratio.max()]

    return show


def eigenvalues(x):
    found = np.linalg.eigvalsh(np.cov(x.T))
    return [found[0] / 0.1, found[-1] / 9.1]


def banana_moments(x):
    return [x[:, 0].std(ddof=1), x[:, 1].mean(), x[:, 1].std(ddof=1)]


def schools_moments(x):
    mu, tau, eta = x[:, 0], np.exp(x[:, 1]), x[:, 2:]
    return [mu.mean(), mu.std(ddof=1), np.median(tau), eta.std(0, ddof=1).mean()]


def exact_schools():
    """The four numbers by quadrature over log tau; (mu, eta) given tau is Gaussian."""
    tau = np.exp(TAU_LOGS)
    design = np.zeros((len(tau), 8, 9))
    design[:, :, 0] = 1
    design[:, range(8), range(1, 9)] = tau[:, None]
    prior = np.diag([25.0] + [1.0] * 8)
    scaled = design / S[:, None] ** 2
    covariance = np.linalg.inv(design.swapaxes(1, 2) @ scaled + np.linalg.inv(prior))
    mean = (covariance @ (scaled.swapaxes(1, 2) @ Y)[..., None])[..., 0]
    marginal = design @ prior @ design.swapaxes(1, 2) + np.diag(S**2)
    fit = np.einsum("i,tij,j->t", Y, np.linalg.inv(marginal), Y)
    log = -0.5 * (fit + np.linalg.slogdet(marginal)[1]) - np.log1p((tau / 5) ** 2) + TAU_LOGS
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    first = weight @ mean
    second = weight @ (np.diagonal(covariance, axis1=1, axis2=2) + mean**2)
    sd = np.sqrt(second - first**2)
    return [first[0], sd[0], tau[np.searchsorted(weight.cumsum(), 0.5)], sd[1:].mean()]


def ladder(dimension):
    return np.logspace(-1, 1, dimension).astype(np.float32)


SCHOOLS = "eight schools: mu, sd, median tau, sd eta"
# name: dimension, log density, statistics of particles, the truth
TARGETS = {
    **{
        f"Gaussian {d}-d, {name}": (d, gaussian(sd), spread(sd), [1, 1, 1])
        for d in (2, 10, 50)
        for name, sd in (("sd 1", np.ones(d, dtype=np.float32)), ("sd .1 to 10", ladder(d)))
    },
    "Gaussian 10-d, correlation .9": (10, correlated(), eigenvalues, [1, 1]),
    "banana: sd a, mean b, sd b": (2, banana, banana_moments, [1, 1, 1.5]),
    SCHOOLS: (10, eight_schools, schools_moments, exact_schools()),
}


# ------------------------------------------------------------------------------------- the rules


def ours(transport, kernel=None, steps=STEPS):
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide.initialization import init_to_uniform

    from pyro_fordes import RBF, ParticleInference, Weights

    def run(target, particles, seed):
        dimension, density, _, _ = TARGETS[target]
        inference = ParticleInference(
            torch_model(dist, pyro, torch, dimension, density),
            torch_adam(pyro, steps),
            particles,
            kernel=kernel or RBF(Weights()),
            transport=transport,
            init_loc_fn=init_to_uniform,
            seed=seed,
        )
        inference.run(steps, progress_bar=False)
        return inference.get_samples()["x"].numpy()

    return run


def pyro_svgd(mode):
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVGD, RBFSteinKernel

    def run(target, particles, seed):
        dimension, density, _, _ = TARGETS[target]
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        model = torch_model(dist, pyro, torch, dimension, density)
        svgd = SVGD(model, RBFSteinKernel(), torch_adam(pyro), particles, 0, mode=mode)
        start = 4 * torch.rand(particles * dimension) - 2
        svgd.guide()  # makes the particles
        with torch.no_grad():
            pyro.param("svgd_particles").copy_(start)
        for _ in range(STEPS):
            svgd.step()
        return pyro.param("svgd_particles").detach().reshape(particles, dimension).numpy()

    return run


def pyro_svgd_with_sites():
    """Pyro's default mode on eight schools as anyone would write the model: three sites."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVGD, RBFSteinKernel

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8, dim=-1):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            effect = mu + tau * eta
            pyro.sample("y", dist.Normal(effect, torch.tensor(S)), obs=torch.tensor(Y))

    def run(target, particles, seed):
        if target != SCHOOLS:
            return None
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        svgd = SVGD(model, RBFSteinKernel(), torch_adam(pyro), particles, 1)
        svgd.guide()  # makes the particles
        with torch.no_grad():
            pyro.param("svgd_particles").copy_(4 * torch.rand(particles * 10) - 2)
        for _ in range(STEPS):
            svgd.step()
        found = svgd.get_named_particles()
        found["tau"] = found["tau"].log()
        parts = [found[name].detach().reshape(particles, -1) for name in ("mu", "tau", "eta")]
        return torch.cat(parts, 1).numpy()

    return run


def torch_model(dist, pyro, torch, dimension, density):
    """The log density as a model with one site (the site's own density is divided out)."""
    flat = dist.Normal(torch.zeros(dimension), 1.0).to_event(1)

    def model():
        x = pyro.sample("x", flat)
        pyro.factor("target", density(x, torch, torch.as_tensor) - flat.log_prob(x))

    return model


def torch_adam(pyro, steps=STEPS):
    options = {"lr": LR, "lrd": 0.01 ** (1 / steps), "betas": (0.9, 0.95), "clip_norm": 1e9}
    return pyro.optim.ClippedAdam(options)


def numpyro_svgd(mode):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.einstein import SVGD, RBFKernel

    def run(target, particles, seed):
        dimension, density, _, _ = TARGETS[target]
        flat = dist.Normal(jnp.zeros(dimension), 1.0).to_event(1)

        def model():
            x = numpyro.sample("x", flat)
            numpyro.factor("target", density(x, jnp, jnp.asarray) - flat.log_prob(x))

        adam = numpyro.optim.Adam(lambda step: LR * 0.01 ** (step / STEPS), b1=0.9, b2=0.95)
        svgd = SVGD(model, adam, RBFKernel(mode=mode), num_stein_particles=particles)
        result = svgd.run(jax.random.key(seed), STEPS, progress_bar=False)
        return np.asarray(result.params["x_auto_loc"]).reshape(particles, dimension)

    return run


def rules(only):
    """Names and rules of what is installed."""
    found = {}
    if only != "numpyro" and importlib.util.find_spec("torch"):
        import torch

        from pyro_fordes import RBF, SVGD, WGD, Additive, Median, Weights

        torch.set_num_threads(1)
        wide = RBF(Weights(), Median(factor=4.0))
        white = SVGD(whiten="full", calibrate=True)
        for name, (transport, kernel) in {
            "wide": (white, wide),
            "wide Additive": (white, Additive(wide)),
            "wide, share 1": (white, Additive(wide, share=1.0)),
            "Additive .9": (white, Additive(RBF(Weights()), share=0.9)),
            "coordinate": (SVGD(calibrate=True), RBF(Weights(group="coordinate"))),
        }.items():
            found[f"ours: SVGD, calibrated, {name}"] = ours(transport, kernel)
        found["ours: sge, full, calibrated, Additive"] = ours(
            WGD("sge", whiten="full", calibrate=True), Additive(RBF(Weights()))
        )
        for whiten in ("full", "diag"):
            found[f"ours: sge, {whiten}, calibrated"] = ours(
                WGD("sge", whiten=whiten, calibrate=True)
            )
    if only not in ("numpyro", "ours") and importlib.util.find_spec("torch"):
        found["pyro.infer.SVGD, univariate (default)"] = pyro_svgd("univariate")
        found["pyro.infer.SVGD, the same, three sites"] = pyro_svgd_with_sites()
        found["pyro.infer.SVGD, multivariate"] = pyro_svgd("multivariate")
    if only in (None, "numpyro") and importlib.util.find_spec("numpyro"):
        found["NumPyro SVGD, RBF norm (default)"] = numpyro_svgd("norm")
        found["NumPyro SVGD, RBF vector"] = numpyro_svgd("vector")
    return found


def hybrid_svgd():
    """SVGD that smooths scores by the median kernel, and repels by one of twice its width.

    Mac Donald, Sisson & Pathiraja (TMLR 2025) propose to take two kernels; the width is ours.
    """
    from dataclasses import dataclass

    from pyro_fordes import RBF, SVGD, Median
    from pyro_fordes.transports import Repulsion

    @dataclass(frozen=True)
    class HybridSVGD(SVGD):
        def repel(self, kernel, everyone, rows=slice(None), step=0, *, scores=None, pooled=True):
            arguments = {"scores": scores, "pooled": pooled}
            wide = RBF(kernel.space, Median(factor=4.0))
            drive = super().repel(kernel, everyone, rows, step, **arguments)
            apart = super().repel(wide, everyone, rows, step, **arguments)
            return Repulsion(apart.velocity, drive.kernel, drive.driving)

    return HybridSVGD()


def show_dimensions(seeds, part):
    """Mean marginal standard deviation on standard Gaussians, a row for each rule."""
    import torch

    from pyro_fordes import RBF, SVGD, WGD, Additive, Median, Weights

    torch.set_num_threads(1)
    calibrated = WGD("sge", whiten="full", calibrate=True)
    joint = RBF(Weights())
    found = {
        "sge, full, calibrated": (calibrated, joint),
        "SVGD, calibrated, wide": (
            SVGD(whiten="full", calibrate=True),
            RBF(Weights(), Median(factor=4.0)),
        ),
        "sge, full, calibrated, Additive": (calibrated, Additive(joint)),
        "sge, diag, calibrated": (WGD("sge", whiten="diag", calibrate=True), joint),
        "SVGD, joint": (SVGD(), joint),
        "SVGD, a kernel per coordinate": (SVGD(), RBF(Weights(group="coordinate"))),
        "hybrid SVGD": (hybrid_svgd(), joint),
    }
    columns = " | ".join(str(particles) for particles in PARTICLES)
    print(f"| dimensions | rule | {columns} particles |")
    print("|---" * (2 + len(PARTICLES)) + "|")
    for dimension in DIMENSIONS:
        sd = np.ones(dimension, dtype=np.float32)
        target = f"Gaussian {dimension}-d, sd 1"
        TARGETS[target] = (dimension, gaussian(sd), spread(sd), [1, 1, 1])
        for name, (transport, kernel) in found.items():
            if part not in name:
                continue
            run = ours(transport, kernel, FEWER_STEPS)
            cells = []
            for particles in PARTICLES:
                ends = [spread(sd)(run(target, particles, seed)) for seed in range(seeds)]
                mean, low, high = np.mean(ends, axis=0)
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
            print(f"| {dimension} | {name} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("ours", "torch", "numpyro"), help="some rules only")
    parser.add_argument("--rule", default="", help="only rules whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--target", default="", help="only targets whose name contains this")
    parser.add_argument("--dimensions", action="store_true", help="2 to 500 dimensions instead")
    arguments = parser.parse_args()
    if arguments.dimensions:
        show_dimensions(arguments.seeds, arguments.rule)
        return
    competitors = rules(arguments.only)
    for target, (_, _, statistics, truth) in TARGETS.items():
        if arguments.target not in target:
            continue
        print(f"\n{target}; truth {show(truth)}")
        for particles in (100, 20):
            for name, run in competitors.items():
                if arguments.rule not in name:
                    continue
                ends = [run(target, particles, seed) for seed in range(arguments.seeds)]
                if ends[0] is None:
                    continue
                found = [statistics(x) for x in ends]
                sd = np.std(found, axis=0, ddof=1) if len(found) > 1 else [math.nan]
                print(
                    f"  {particles:4} {name:38} {show(np.mean(found, axis=0))}   +- {show(sd)}",
                    flush=True,
                )


def show(numbers):
    return " ".join(f"{number:6.2f}" for number in numbers)


if __name__ == "__main__":
    main()
