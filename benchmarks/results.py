"""Make ``docs/results.md`` from the run files in ``docs/results``: no number is typed by hand.

Run as ``python benchmarks/results.py``. ``--check`` writes nothing and fails if the page is not
what the files give. Examples write the run files, such as
``python examples/uci.py --runs docs/results/uci``.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"

BASE, PYRO = "deep ensemble", "pyro.infer.SVGD"
UCI_METHODS = (
    BASE,
    PYRO,
    "SVGD, by coordinate",
    "SVGD, weights",
    "WGD, weights",
    "WGD, weights, calibrated",
    "SVGD, weights, calibrated",
    "WGD, outputs",
    "WGD, outputs around the data",
    "FoRDE-PCA",
    "FoRDE-PCA, N/B",
)

# MC dropout with 10 times the epochs of the paper, mean and standard deviation over the 20 splits:
# https://github.com/yaringal/DropoutUncertaintyExps at 04604eb, readme, columns "updated".
MC_DROPOUT = {
    "log_likelihood": {
        "boston": (-2.39, 0.20),
        "concrete": (-2.94, 0.10),
        "energy": (-1.72, 0.07),
        "power": (-2.79, 0.04),
        "wine": (-0.92, 0.06),
        "yacht": (-1.38, 0.06),
    },
    "rmse": {
        "boston": (2.80, 0.84),
        "concrete": (4.81, 0.64),
        "energy": (1.09, 0.21),
        "power": (4.00, 0.17),
        "wine": (0.61, 0.04),
        "yacht": (0.72, 0.25),
    },
}
SPLITS = 20

# FoRDE, ICLR 2024 (arXiv 2306.02775), Table 2: ResNet-18, 10 members, 300 epochs, 5 seeds; under
# corruption the mean of 19 kinds at 5 severities. NLL, accuracy, the same under corruption.
CIFAR_PAPER = {
    "deep ensemble": ("0.117 ± 0.001", "96.3 ± 0.1 %", "0.78", "78.1 %"),
    "weight-RDE": ("0.117 ± 0.002", "96.2 ± 0.1 %", "0.78", "78.0 %"),
    "FoRDE-PCA": ("0.125 ± 0.001", "96.1 ± 0.1 %", "0.71", "80.5 %"),
    "FoRDE-Identity": ("0.113 ± 0.002", "96.3 ± 0.1 %", "0.80", "78.0 %"),
    "FoRDE-Tuned": ("0.114 ± 0.002", "96.4 ± 0.1 %", "0.74", "79.1 %"),
}

Runs = list[dict[str, Any]]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def cell(values: list[float]) -> str:
    """Mean and standard error as the table shows them."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def uci(runs: Runs) -> list[str]:
    """The section on UCI regression."""
    found = {(run["set"], run["method"]): run for run in runs}
    names = sorted({name for name, _ in found})
    splits = {
        name: min(len(run["splits"]) for (n, _), run in found.items() if n == name)
        for name in names
    }
    settings, versions = runs[0]["settings"], runs[0]["versions"]
    if any(run["settings"] != settings for run in runs):
        sys.exit("the UCI run files have different settings; make them with one command")
    counts = ", ".join(f"{name} {count} of {SPLITS}" for name, count in splits.items())
    lines = [
        "## UCI regression",
        "",
        "Network with one hidden layer of 50 units, latent noise scale, "
        f"{settings['particles']} particles, {settings['steps']} steps on minibatches of "
        f"{settings['batch']}, standard splits, seed of a split its number; nothing was "
        "tuned on any set. `python examples/uci.py --runs docs/results/uci` (it goes on where it "
        "was stopped), "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". Splits done: {counts}. ± is the standard error over splits.",
        "",
        "`pyro.infer.SVGD` is Pyro's class in its default mode on the same log joint with one "
        "latent site. MC dropout is published: Gal & Ghahramani's repository, ten times the epochs "
        "of their paper (its readme has standard deviations over splits, divided here by the root "
        "of 20); other optimiser, tuned dropout rate and noise.",
        "",
    ]
    for key, title in (("log_likelihood", "Test log likelihood"), ("rmse", "Test RMSE")):
        rows = []
        for label in UCI_METHODS:
            values = [one_cell(found, name, label, key, splits[name]) for name in names]
            if any(value != "" for value in values):
                rows.append([label, *values])
        published = []
        for name in names:
            mean, deviation = MC_DROPOUT[key].get(name, (math.nan, math.nan))
            published.append(f"{mean:.2f} ± {deviation / SPLITS**0.5:.2f}")
        rows.append(["MC dropout, published", *published])
        lines += [title, "", *markdown(["", *names], rows), ""]
    return [*lines, *against_pyro(found, names, splits)]


def one_cell(
    found: dict[tuple[str, str], dict], name: str, label: str, key: str, count: int
) -> str:
    """A cell of the table, empty where there is no run."""
    if (name, label) not in found or not count:
        return ""
    return cell([one[key] for one in found[name, label]["splits"][:count]])


def against_pyro(
    found: dict[tuple[str, str], dict], names: list[str], splits: dict[str, int]
) -> list[str]:
    """Differences to Pyro's SVGD in log likelihood, paired by split."""
    rows, reached = [], 0
    for name in names:
        if (name, PYRO) not in found or not splits[name]:
            continue

        def values(label: str, name: str = name) -> list[float]:
            return [one["log_likelihood"] for one in found[name, label]["splits"][: splits[name]]]

        ours = [
            label for label in UCI_METHODS if label not in (PYRO, BASE) and (name, label) in found
        ]
        best = max(ours, key=lambda label: statistics.fmean(values(label)))
        gain = [a - b for a, b in zip(values(best), values(PYRO), strict=True)]
        reached += statistics.fmean(gain) >= 0
        base = [a - b for a, b in zip(values(best), values(BASE), strict=True)]
        rows.append([name, best, cell(gain), cell(base)])
    if not rows:
        return []
    head = ["", "best of our particle methods", "minus pyro.infer.SVGD", "minus deep ensemble"]
    return [
        "Test log likelihood, paired by split. Which method is best was read off these numbers, "
        "out of nine.",
        "",
        *markdown(head, rows),
        "",
        f"The best is at least as good as `pyro.infer.SVGD` on {reached} of {len(rows)} sets.",
        "",
    ]


def ablations(runs: Runs) -> list[str]:
    """The section on digits with one thing changed at a time."""
    settings, versions = runs[0]["settings"], runs[0]["versions"]
    if any(run["settings"] != settings for run in runs):
        sys.exit("the ablations' run files have different settings; make them with one command")
    seeds = min(len(run["seeds"]) for run in runs)
    lines = [
        "## Digits, one thing changed at a time",
        "",
        f"scikit-learn's digits, {settings['particles']} networks, {settings['epochs']} epochs, "
        f"{seeds} seeds (each a split of its own); corrupted is the mean of five corruptions at "
        "five severities. The base is FoRDE-PCA at twenty times the published strength, with the "
        "median bandwidth per point, normalised gradients of the raw logit, all points, every "
        "step; each row below it changes one of these. ± is the standard error over seeds of the "
        "difference, which is paired. Strength was not tuned for any row, and the deep "
        "ensemble has neither tuned weight decay nor input noise: the next section has both. "
        f"`python examples/ablations.py --seeds {seeds} --runs docs/results/ablations`, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
    ]
    head = ["", "clean NLL", "minus deep ensemble", "minus base", "corrupted NLL",
            "minus deep ensemble", "minus base"]  # fmt: skip
    rows = []
    for place, run in enumerate(runs):
        row = [run["method"]]
        for key in ("clean NLL", "corrupted NLL"):
            own, ensemble, base = (
                [seed[key] for seed in one["seeds"][:seeds]] for one in (run, runs[0], runs[1])
            )
            row += [
                f"{statistics.fmean(own):.3f}",
                difference(own, ensemble) if place > 0 else "",
                difference(own, base) if place > 1 else "",
            ]
        rows.append(row)
    return [*lines, *markdown(head, rows), ""]


def strength(runs: Runs) -> list[str]:
    """The section on the strength of the repulsion, under several conditions."""
    found = {(run["condition"], run["strength"]): run for run in runs}
    conditions = list(dict.fromkeys(condition for condition, _ in found))
    strengths = sorted({number for _, number in found})
    seeds = min(len(run["seeds"]) for run in runs)
    settings, versions = runs[0]["settings"], runs[0]["versions"]
    lines = [
        "## Digits: how strong the repulsion should be",
        "",
        f"The digits of the section above, FoRDE-PCA at several strengths, in units of the "
        f"published one (N/B times the posterior's), under one changed condition in each row, "
        f"{seeds} seeds, as many steps as {settings['epochs']} epochs of batches of 100. Strength "
        f"0 is the deep ensemble under the same condition; ± is the standard error over seeds of "
        f"the difference to it, which is paired. Bold: the best of the row. Nothing was chosen on "
        f"other data, so the best of a row is a little too good. "
        f"`python examples/strength.py --seeds {seeds} --runs docs/results/strength`, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
    ]

    def values(condition: str, number: float, key: str) -> list[float]:
        return [seed[key] for seed in found[condition, number]["seeds"][:seeds]]

    for key in ("clean NLL", "corrupted NLL"):
        rows = []
        for condition in conditions:
            means = {n: statistics.fmean(values(condition, n, key)) for n in strengths}
            best, base = min(means, key=lambda n: means[n]), values(condition, 0, key)
            cells = [f"{means[0]:.3f}"]
            cells += [difference(values(condition, n, key), base) for n in strengths[1:]]
            place = strengths.index(best)
            cells[place] = f"**{cells[place]}**"
            rows.append([condition, *cells])
        head = [key, "deep ensemble", *(f"x{n:g}" for n in strengths[1:])]
        lines += [*markdown(head, rows), ""]
    rows = [
        [condition]
        + [f"{statistics.fmean(values(condition, n, 'force ratio')):.3f}" for n in strengths[1:]]
        for condition in conditions
    ]
    lines += [
        "The repulsive force over the driving one in the first half of the training, median over "
        "measured steps, mean over seeds:",
        "",
        *markdown(["force ratio", *(f"x{n:g}" for n in strengths[1:])], rows),
        "",
    ]
    return lines


def difference(values: list[float], others: list[float]) -> str:
    """Mean and standard error of a paired difference."""
    return cell([a - b for a, b in zip(values, others, strict=True)])


def cifar(runs: Runs) -> list[str]:
    """The section on CIFAR-10: each method beside the deep ensemble of the same seeds."""
    settings, versions = runs[0]["settings"], runs[0]["versions"]
    if any(run["settings"] != settings for run in runs):
        sys.exit("CIFAR's run files have different settings; make them with one command")
    kinds = settings["corruptions"]
    seeds = max(len(run["seeds"]) for run in runs[1:])
    lines = [
        "## CIFAR-10, small",
        "",
        f"{settings['particles']} PreActResNets of {len(settings['blocks'])} blocks from width "
        f"{settings['width']} on (first convolution with stride {settings['stride']}), "
        f"{settings['train']:,} training images, batches of {settings['batch']}, "
        f"{round(300 * settings['epochs'])} epochs of the paper's recipe; {settings['test']:,} "
        f"test images, clean and under {len(kinds)} corruptions at severities "
        + " and ".join(map(str, settings["severities"]))
        + ". FoRDE repels at a quarter of a batch's points; x1, x3 and x10 are in units of the "
        "published strength, and tuned lengthscales are those of alpha .2 (precisions averaged). A "
        "seed is a start and an order of batches, the same for all methods. "
        "± is the standard error over seeds, of differences the paired one. Nothing was chosen on "
        "the test images. Images were read from JPEG copies of CIFAR-10, so scores are near those "
        f"of the original files. `python examples/cifar_seeds.py --seeds {seeds} --runs "
        "docs/results/cifar` (`--methods` with the names below trains no others), "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
    ]
    groups = (("clean", "nll"), ("clean", "accuracy"), ("clean", "ece"))
    groups += tuple(("corrupted", metric) for _, metric in groups)
    head = ["", "seeds", *(f"{data} {metric}" for data, metric in groups)]
    rows = [
        [run["method"], str(len(run["seeds"])),
         *(cell(cifar_values(run, *group, len(run["seeds"]))) for group in groups)]
        for run in runs
    ]  # fmt: skip
    lines += [*markdown(head, rows), "", "Minus the deep ensemble of the same seeds:", ""]
    rows = [[run["method"], *(cifar_difference(run, runs[0], *group) for group in groups)]
            for run in runs[1:]]  # fmt: skip
    lines += [*markdown(["", *head[2:]], rows), ""]
    for metric, title in (("nll", "NLL"), ("accuracy", "Accuracy")):
        rows = [
            [run["method"], *(cifar_difference(run, runs[0], kind, metric) for kind in kinds)]
            for run in runs[1:]
        ]
        heads = [kind.replace("_", " ") for kind in kinds]
        lines += [f"{title} minus the deep ensemble's, by corruption:", ""]
        lines += [*markdown(["", *heads], rows), ""]
    lines += [*cifar_answer(runs), *cifar_verdict(runs), ""]
    published = [[name, *values] for name, values in CIFAR_PAPER.items()]
    head = ["the paper", "clean nll", "clean accuracy", "corrupted nll", "corrupted accuracy"]
    return [
        *lines,
        "Published, ResNet-18, 10 members, 50,000 images, 300 epochs, 19 corruptions at five "
        "severities (arXiv 2306.02775, Table 2):",
        "",
        *markdown(head, published),
        "",
    ]


def cifar_values(run: dict[str, Any], data: str, metric: str, count: int) -> list[float]:
    """A score of the first seeds."""
    return [seed["scores"][data][metric] for seed in run["seeds"][:count]]


def cifar_gains(run: dict[str, Any], base: dict[str, Any], data: str, metric: str) -> list[float]:
    """Differences to the base, seed by seed."""
    count = min(len(run["seeds"]), len(base["seeds"]))
    own, other = (cifar_values(one, data, metric, count) for one in (run, base))
    return [a - b for a, b in zip(own, other, strict=True)]


def cifar_difference(run: dict[str, Any], base: dict[str, Any], data: str, metric: str) -> str:
    """Mean and standard error of the differences to the base."""
    text = cell(cifar_gains(run, base, data, metric))
    return text if text.startswith("-") else f"+{text}"


# Two-sided 5 % points of Student's t by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def cifar_answer(runs: Runs) -> list[str]:
    """The question that the section is about, answered strength by strength."""
    named = {run["method"]: run for run in runs}
    lines = [
        "Does FoRDE-PCA beat a deep ensemble under corruption, at equal clean accuracy? "
        "Differences to the ensemble, with their standard errors:",
        "",
    ]
    for strength in (1, 3, 10):
        run = named.get(f"FoRDE-PCA x{strength}")
        if run is None:
            continue
        accuracy, nll, clean = (
            cifar_difference(run, runs[0], data, metric)
            for data, metric in (
                ("corrupted", "accuracy"),
                ("corrupted", "nll"),
                ("clean", "accuracy"),
            )
        )
        count = min(len(run["seeds"]), len(runs[0]["seeds"]))
        settled = {}
        for data in ("corrupted", "clean"):
            mean, error = mean_and_error(cifar_gains(run, runs[0], data, "accuracy"))
            settled[data] = abs(mean) > STUDENT[count] * error
        verdict = "yes" if settled["corrupted"] else f"not that {count} seeds could show"
        verdict += ", but not at equal clean accuracy" if settled["clean"] else ""
        lines.append(
            f"- At x{strength}, {verdict}: corrupted accuracy "
            f"{accuracy} and NLL {nll}, clean accuracy {clean}"
        )
    return [*lines, ""]


def cifar_verdict(runs: Runs) -> list[str]:
    """What the tables say, in words that follow from the numbers."""
    lines = [
        "By paired t tests at 5 %, one for each number above and not corrected for how many there "
        "are:",
        "",
    ]
    kinds = runs[0]["settings"]["corruptions"]
    for run in runs[1:]:
        seeds = min(len(run["seeds"]), len(runs[0]["seeds"]))
        if seeds not in STUDENT:
            continue
        parts = []
        for metric, title in (("nll", "NLL"), ("accuracy", "accuracy")):
            found: dict[str, list[str]] = {"lower": [], "higher": [], "not settled": []}
            for data in ("clean", "corrupted", *kinds):
                mean, error = mean_and_error(cifar_gains(run, runs[0], data, metric))
                clear = abs(mean) > STUDENT[seeds] * error
                where = "not settled" if not clear else "lower" if mean < 0 else "higher"
                found[where].append(data.replace("_", " "))
            parts += [
                f"{title} {where} for {', '.join(names)}" for where, names in found.items() if names
            ]
        gains = {k: statistics.fmean(cifar_gains(run, runs[0], k, "nll")) for k in kinds}
        ordered = sorted(gains, key=lambda kind: gains[kind])
        ratio = statistics.fmean(seed["force_ratio"] for seed in run["seeds"])
        lines.append(
            f"- {run['method']}, {seeds} seeds: {'; '.join(parts)}. The difference in NLL goes "
            f"from {gains[ordered[0]]:+.3f} ({ordered[0].replace('_', ' ')}) to "
            f"{gains[ordered[-1]]:+.3f} ({ordered[-1].replace('_', ' ')}). At the end of training "
            f"repulsion had {100 * ratio:.1f} % of the norm of the driving force."
        )
    return [
        *lines,
        "",
        "How noise and weight decay were chosen is [below](#a-tuned-deep-ensemble). The networks "
        "are small and far from trained to the end, so no number here says what the paper's recipe "
        "gives.",
    ]


def cifar_tuning(runs: Runs) -> list[str]:
    """How the deep ensemble's input noise and weight decay were chosen."""
    runs = [run for run in runs if run["method"].startswith(BASE)]
    seeds = min(len(run["seeds"]) for run in runs)
    groups = [(data, metric) for data in ("clean", "corrupted") for metric in ("nll", "accuracy")]
    means = [
        [statistics.fmean(cifar_values(run, *group, seeds)) for group in groups] for run in runs
    ]
    best = min(range(len(runs)), key=lambda i: means[i][0] + means[i][2])
    rows = [
        [run["method"], *(f"{value:.3f}" for value in values), f"{values[0] + values[2]:.3f}"]
        for run, values in zip(runs, means, strict=True)
    ]
    rows[best][-1] = f"**{rows[best][-1]}**"
    head = ["", *(f"{data} {metric}" for data, metric in groups), "both nll"]
    return [
        "### A tuned deep ensemble",
        "",
        f"The ensembles of the section above on {runs[0]['settings']['test']:,} training images "
        f"that were not trained on, clean and corrupted, seeds: {seeds}. Noise is added to the "
        "training inputs, in units of their standard deviation; weight decay is in units of the "
        "recipe's 0.0005. The best of each by the sum of both NLL is in the tables above. "
        "The best weight decay is the largest that was tried. "
        f"`python examples/cifar_seeds.py --validate --seeds {seeds} --runs "
        "docs/results/cifar_tuning --methods ...` with the names below.",
        "",
        *markdown(head, rows),
        "",
    ]


SECTIONS: dict[str, Callable[[Runs], list[str]]] = {
    "uci": uci,
    "cifar": cifar,
    "cifar_tuning": cifar_tuning,
    "ablations": ablations,
    "strength": strength,
}
"""What makes the section of each example; its run files are in the folder of that name."""


def page() -> str:
    """The whole page."""
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/results.py` from the run files in `docs/results`; do not edit. "
        "The demo's table is in the README, posteriors beside NUTS in "
        "[against NUTS](against_nuts.md) and [calibration](calibration.md), times in "
        "[benchmarks](benchmarks.md).",
        "",
    ]
    for name, section in SECTIONS.items():
        runs = [json.loads(path.read_text()) for path in sorted((RUNS / name).glob("*.json"))]
        if runs:
            lines += section(runs)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    made = page()
    if not options.check:
        PAGE.write_text(made)
    elif PAGE.read_text() != made:
        sys.exit("docs/results.md is not what its run files give; run python benchmarks/results.py")


if __name__ == "__main__":
    main()
