"""Distance of particles to long NUTS runs: every transport of ours and ``pyro.infer.SVGD``.

All rules move the same particles (uniform in -2 to 2, unconstrained) for the same number of steps,
one gradient per particle and step, with the same Adam and learning rates. They are then compared
with NUTS draws in unconstrained coordinates (of a network: its values on a grid, as its weights are
not identified), each coordinate scaled to the reference's mean 0 and standard deviation 1.

* SW2: sliced Wasserstein-2 distance, the root mean square over fixed random directions; on one
  coordinate of unit spread, a shift of all particles by s gives s.
* MMD: root of the squared maximum mean discrepancy (the biased one, between the two empirical
  measures), Gaussian kernel exp(-d / median of the reference's squared distances).
* "NUTS draws": the same for as many draws of the same run as there are particles, none of which is
  in the reference: what independent draws of the posterior reach.

``pyro.infer.SVGD`` keeps its particles site after site in one vector, and `step` cuts that into
rows: with several sites a row mixes values of several particles. It is run as it is, and in a fair
form, on a model with one latent site that holds all values ("one site").

``--make-references`` runs NUTS anew. Run as ``python benchmarks/against_nuts.py``; ``--help`` lists
the options.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from models import POSTERIORS, Layout, Posterior, packed
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.svgd import SVGD as PyroSVGD, RBFSteinKernel
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from tqdm import tqdm

import pyro_fordes
from pyro_fordes import RBF, SVGD, WGD, Additive, Median, Outputs, ParticleInference, Weights
from pyro_fordes.kernels import Kernel
from pyro_fordes.spaces import Space
from pyro_fordes.transports import Transport

REFERENCES = Path(__file__).parent / "references"
NUM_STORED = 1500  # two thirds are the reference, the others show what draws reach
ESTIMATORS = ("kde", "blob", "sge", "ssge")
FLOOR = "NUTS draws"
FUNCTIONS = "outputs on the grid"  # for posteriors with points
# Copies, steps to warm up, draws of each and tree depth, where they are not the usual ones.
NUTS_SIZE = {"network": (16, 200, 150, 7)}  # trees are deep, and a draw is far from the last


@dataclass(frozen=True)
class Settings:
    """What all rules have in common."""

    particles: int
    steps: int
    lr: float

    @property
    def optim(self) -> pyro.optim.PyroOptim:
        """Adam (nothing is clipped); the rate falls to a tenth, exponentially."""
        decay = 0.1 ** (1 / self.steps)
        return pyro.optim.ClippedAdam({"lr": self.lr, "lrd": decay, "clip_norm": math.inf})


# -------------------------------------------------------------------- rules


def ours(
    posterior: Posterior,
    settings: Settings,
    seed: int,
    transport: Transport,
    space: Space | None = None,
    steps: int | None = None,
    kernel: Kernel | None = None,
) -> dict[str, Tensor]:
    """Values of the sites of ``ParticleInference``."""
    inference = ParticleInference(
        posterior.model,
        settings.optim,
        settings.particles,
        kernel=kernel or RBF(space or Weights()),
        transport=transport,
        init_loc_fn=init_to_uniform,  # a draw from the prior of `tau` may lie thousands away
        seed=seed,
        diagnostics_every=settings.steps,
    )
    inference.setup(*posterior.data)
    for _ in range(settings.steps if steps is None else steps):
        inference.step(*posterior.data)
    return inference.get_samples()


def calibrated(estimator: str) -> Callable[[Posterior], Transport]:
    return lambda posterior: WGD(estimator, whiten=posterior.whiten, calibrate=True)


def pyros(
    posterior: Posterior, settings: Settings, seed: int, mode: str, one_site: bool
) -> dict[str, Tensor]:
    """Values of the sites of ``pyro.infer.SVGD``, from the particles that ours starts with."""
    start = ours(posterior, settings, seed, WGD(), steps=0)
    layout = Layout.of(posterior.model, posterior.data)
    pyro.clear_param_store()
    model = packed(posterior.model, posterior.data) if one_site else posterior.model
    svgd = PyroSVGD(model, RBFSteinKernel(), settings.optim, settings.particles, 0, mode)
    with torch.random.fork_rng(devices=()):
        svgd.loss(svgd.model, svgd.guide, *posterior.data)  # sets up the particles
    flat = layout.pack(start)
    sizes = [shape.numel() for shape in layout.shapes.values()]
    if not one_site:  # site after site
        flat = torch.cat([part.flatten() for part in flat.split(sizes, -1)])
    with torch.no_grad():
        pyro.param("svgd_particles").copy_(flat.flatten())
    for _ in range(settings.steps):
        svgd.step(*posterior.data)
    found = svgd.get_named_particles()
    return layout.unpack(found["packed"])[0] if one_site else found


Rule = Callable[[Posterior, Settings, int], dict[str, Tensor]]


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for e in ESTIMATORS:
        rules[f"WGD {e}"] = lambda p, s, seed, e=e: ours(p, s, seed, WGD(e))
    for e in ESTIMATORS:
        rules[f"WGD {e}, calibrated"] = lambda p, s, seed, e=e: ours(p, s, seed, calibrated(e)(p))
    rules["WGD sge, calibrated, Additive"] = lambda p, s, seed: ours(
        p, s, seed, calibrated("sge")(p), kernel=Additive(RBF(Weights()))
    )
    wide = RBF(Weights(), Median(factor=4.0))
    for name, kernel in {"wide": wide, "wide, Additive": Additive(wide)}.items():
        rules[f"SVGD, calibrated, {name}"] = lambda p, s, seed, k=kernel: ours(
            p, s, seed, SVGD(whiten=p.whiten, calibrate=True), kernel=k
        )
    for group in ("joint", "coordinate"):
        rules[f"SVGD, {group}"] = lambda p, s, seed, g=group: ours(
            p, s, seed, SVGD(), Weights(group=g)
        )
    for e in ("kde", "sge"):
        rules[f"WGD {e}, {FUNCTIONS}"] = lambda p, s, seed, e=e: ours(
            p, s, seed, WGD(e), Outputs(points=p.points)
        )
    for mode in ("univariate", "multivariate"):
        for one_site in (True, False):
            name = f"pyro {mode}, {'one site' if one_site else 'as it is'}"
            rules[name] = lambda p, s, seed, m=mode, o=one_site: pyros(p, s, seed, m, o)
    return rules


RULES = _rules()


# -------------------------------------------------------------------- distances


class Reference:
    """Draws of the posterior that particles are compared with, 500 directions from a fixed seed."""

    def __init__(self, draws: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(draws.shape[1], 500, generator=generator, dtype=draws.dtype)
        self.directions = directions / directions.norm(dim=0)
        self.mean, self.sd = draws.mean(0), draws.std(0)
        self.draws = (draws - self.mean) / self.sd
        self.sorted = (self.draws @ self.directions).sort(0).values
        squares = torch.cdist(self.draws, self.draws).square()
        self.width = squares[squares > 0].median()
        self.within = (-squares / self.width).exp().mean()

    def distances(self, particles: Tensor) -> dict[str, float]:
        """Everything the tables show; `particles` are ``(particle, coordinate)``."""
        if not particles.isfinite().all():
            return dict.fromkeys(("SW2", "MMD", "mean", "sd"), math.nan)
        x = (particles.to(self.draws.dtype) - self.mean) / self.sd
        return {
            "SW2": self.sliced_wasserstein(x),
            "MMD": self.mmd(x),
            "mean": x.mean(0).square().mean().sqrt().item(),
            "sd": x.std(0).log().mean().exp().item(),
        }

    def sliced_wasserstein(self, x: Tensor) -> float:
        """Exact in each direction: both quantile functions on a common grid of levels."""
        common = math.lcm(len(x), len(self.draws))
        a = (x @ self.directions).sort(0).values.repeat_interleave(common // len(x), 0)
        b = self.sorted.repeat_interleave(common // len(self.draws), 0)
        return (a - b).square().mean().sqrt().item()

    def mmd(self, x: Tensor) -> float:
        """Between the two empirical measures."""
        own, cross = (
            (-torch.cdist(x, rows).square() / self.width).exp().mean() for rows in (x, self.draws)
        )
        return (self.within + own - 2 * cross).clamp_min(0).sqrt().item()


# -------------------------------------------------------------------- NUTS


def reference_path(folder: Path, posterior: Posterior) -> Path:
    return folder / f"{posterior.name.replace(', ', '_').replace(' ', '_')}.npz"


def make_reference(posterior: Posterior, folder: Path, smoke: bool) -> str:
    """Run NUTS, check it and write thinned unconstrained draws; returns a line about the run.

    Pyro's NUTS samples the posterior of independent copies of the model: each copy is a chain with
    a start of its own, and a leapfrog step of all costs hardly more than one of a single chain.
    """
    copies, warmup, draws, depth = NUTS_SIZE.get(posterior.name, (32, 400, 400, 9))
    if smoke:
        copies, warmup, draws, depth = 4, 5, 5, 3

    def model(*data: Tensor) -> None:
        with pyro.plate("copies", copies):
            posterior.model(*data)

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    start = time.process_time()
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=depth)
    mcmc = MCMC(kernel, draws, warmup, disable_progbar=True)
    mcmc.run(*posterior.data)
    sites = {name: values.transpose(0, 1) for name, values in mcmc.get_samples().items()}
    compared = posterior.compared(sites)  # chain, draw, coordinate
    facts = {
        "copies": copies,
        "warmup": warmup,
        "draws": draws,
        "divergences": sum(map(len, mcmc.diagnostics()["divergences"].values())),
        "r_hat": split_gelman_rubin(compared).max().item(),
        "effective": effective_sample_size(compared).min().item(),
        "seconds": time.process_time() - start,
    }
    free = Layout.of(posterior.model, posterior.data).pack(sites).flatten(0, 1)
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        reference_path(folder, posterior),
        draws=free[order[:NUM_STORED]].numpy(),
        facts=json.dumps(facts),
    )
    return about(posterior, facts)


def about(posterior: Posterior, facts: dict) -> str:
    return (
        f"NUTS, {posterior.name}: {facts['copies']} chains of {facts['draws']} draws after "
        f"{facts['warmup']}, R-hat at most {facts['r_hat']:.3f}, effective size at least "
        f"{facts['effective']:.0f}, {facts['divergences']} divergences, {facts['seconds']:.0f} s"
    )


def load(posterior: Posterior, folder: Path) -> tuple[Reference, Tensor, dict]:
    """Reference, compared draws that are not in it, and facts about the run."""
    drawn = POSTERIORS[posterior.drawn_as] if posterior.drawn_as else posterior
    with np.load(reference_path(folder, drawn)) as stored:
        free = torch.from_numpy(stored["draws"]).double()
        facts = json.loads(str(stored["facts"]))
    sites, _ = Layout.of(drawn.model, drawn.data).unpack(free)
    compared = posterior.compared(posterior.from_drawn(sites) if posterior.from_drawn else sites)
    count = 2 * len(compared) // 3
    return Reference(compared[:count]), compared[count:], facts


# -------------------------------------------------------------------- tables

Results = dict[str, dict[str, dict[str, list[float]]]]  # rule, posterior, quantity, seed


def measure(
    posteriors: list[Posterior],
    settings: Settings,
    seeds: int,
    folder: Path,
    rules: list[str],
    keep: Path | None,
) -> Results:
    """Run everything that is not in the file `keep` yet, and add it there."""
    kept: dict[str, dict[str, float]] = {}
    if keep is not None and keep.exists():
        kept = json.loads(keep.read_text())
    references = {posterior.name: load(posterior, folder)[:2] for posterior in posteriors}
    results: Results = {rule: {p.name: {} for p in posteriors} for rule in [FLOOR, *rules]}
    for name, (reference, extra) in references.items():
        for index in range(min(len(extra) // settings.particles, 5)):
            block = extra[index * settings.particles :][: settings.particles]
            add(results[FLOOR][name], reference.distances(block))
    runs = tqdm(list(itertools.product(range(seeds), posteriors, rules)))
    for seed, posterior, rule in runs:
        if FUNCTIONS in rule and posterior.points is None:
            continue
        key = f"{posterior.name}; {rule}; {settings}; seed {seed}"
        runs.set_description(key)
        if key not in kept:
            sites = RULES[rule](posterior, settings, seed)
            particles = posterior.compared({k: v.detach() for k, v in sites.items()})
            kept[key] = references[posterior.name][0].distances(particles)
            if keep is not None:
                keep.write_text(json.dumps(kept))
        add(results[rule][posterior.name], kept[key])
    return results


def add(columns: dict[str, list[float]], found: dict[str, float]) -> None:
    for name, value in found.items():
        columns.setdefault(name, []).append(value)


def cell(values: list[float]) -> str:
    """Mean and standard error; a dash where a rule does not apply."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def table(results: Results, quantity: str, title: str) -> None:
    names = list(next(iter(results.values())))
    print(f"\n{title}\n\n| |" + "".join(f" {name} |" for name in names))
    print("|---|" + "---|" * len(names))
    for rule, row in results.items():
        print(f"| {rule} |" + "".join(f" {cell(row[name].get(quantity, []))} |" for name in names))


def summary(results: Results, quantity: str) -> None:
    """Best of ours and of Pyro's for each posterior, and their difference by seed."""
    print(f"\nClosest by {quantity}\n")
    print("| | NUTS draws | best of ours | | best of pyro.infer.SVGD | | ours - theirs |")
    print("|---|---|---|---|---|---|---|")
    for name in results[FLOOR]:
        found = {rule: row[name][quantity] for rule, row in results.items() if row[name]}
        floor = found.pop(FLOOR)
        closest = sorted(found, key=lambda rule: average(found[rule]))
        mine = next(rule for rule in closest if not rule.startswith("pyro"))
        theirs = next(rule for rule in closest if rule.startswith("pyro"))
        apart = [a - b for a, b in zip(found[mine], found[theirs], strict=True)]
        print(
            f"| {name} | {cell(floor)} | {cell(found[mine])} | {mine} | {cell(found[theirs])} | "
            f"{theirs.removeprefix('pyro ')} | {cell(apart)} |"
        )


def average(values: list[float]) -> float:
    """Mean, infinite where a run ended with values that are not finite."""
    mean = statistics.fmean(values)
    return math.inf if math.isnan(mean) else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(POSTERIORS), choices=POSTERIORS)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--particles", type=int, default=50)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--references", type=Path, default=REFERENCES, metavar="DIR")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="go on from what is in it")
    parser.add_argument("--make-references", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, numbers mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)  # for the time of pyro.infer.SVGD; ours does without anyway
    posteriors = [POSTERIORS[name] for name in options.models]
    if options.make_references:
        for posterior in (p for p in posteriors if p.drawn_as is None):
            print(make_reference(posterior, options.references, options.smoke), flush=True)
        return
    settings = Settings(options.particles, options.steps, options.lr)
    seeds = options.seeds
    if options.smoke:
        settings, seeds = Settings(10, 3, options.lr), 1
    print(
        f"pyro_fordes {pyro_fordes.__version__}, torch {torch.__version__}, pyro "
        f"{pyro.__version__}, Python {platform.python_version()}; {settings.particles} particles, "
        f"{settings.steps} steps, Adam from {settings.lr} to {settings.lr / 10:g}, {seeds} seeds\n"
    )
    for posterior in posteriors:
        print(about(posterior, load(posterior, options.references)[2]))
    results = measure(posteriors, settings, seeds, options.references, options.rules, options.keep)
    table(results, "SW2", "SW2 (mean ± standard error over seeds)")
    table(results, "MMD", "MMD")
    table(results, "mean", "Error of the mean, in standard deviations (root mean square)")
    table(results, "sd", "Standard deviation over the reference's (geometric mean)")
    if len({rule.startswith("pyro") for rule in options.rules}) == 2:
        for quantity in ("SW2", "MMD"):
            summary(results, quantity)


if __name__ == "__main__":
    main()
