"""Examples run with ``--smoke`` and leave what they promise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import arviz
import pytest

ROOT = Path(__file__).parent.parent


def run(name, *options):
    """Run an example as a user would; returns what it printed."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_digits(tmp_path):
    printed = run("digits.py", "--smoke", "--out", tmp_path)
    rows = printed.splitlines()
    assert "clean NLL" in rows[0]
    labels = ["deep ensemble", "weight repulsion", "FoRDE-identity x1", "FoRDE-PCA x20 + noise"]
    for label in labels:
        row = next(row for row in rows if row.startswith(label))
        values = [float(cell) for cell in row[24:].split()]
        assert len(values) == 6
        assert values[2] > 0.5  # clean accuracy after two epochs
    data = arviz.from_netcdf(str(tmp_path / "digits.nc"))
    summary = arviz.summary(data, var_names=["net.4.bias"])
    assert len(summary) == 10
    assert data["log_likelihood"]["y"].sizes["data"] == 597
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_digits_tuned(tmp_path):
    printed = run("digits.py", "--smoke", "--tune", "--out", tmp_path)
    assert printed.startswith("seed 0: nll on validation data after 1, 2 epochs; best: strength=")
    rows = rows_of(printed, ["FoRDE tuned", "deep ensemble  "], 6)
    assert rows["FoRDE tuned"][2] > 0.5


def test_ablations_go_on_where_they_were_stopped(tmp_path):
    whole = run("ablations.py", "--smoke", "--runs", tmp_path)
    rows = [row for row in whole.splitlines() if "±" in row]
    assert len(rows) == 14
    assert rows[0].startswith("deep ensemble ")
    # Every row changes something; the heat equation's bandwidth is so small that nothing repels.
    assert len({row[32:] for row in rows}) == 13
    files = sorted(tmp_path.glob("*.json"))
    kept = {path: json.loads(path.read_text()) for path in files}
    files[3].unlink()
    content = kept[files[5]]
    files[5].write_text(json.dumps({**content, "seeds": content["seeds"][:1]}))
    assert run("ablations.py", "--smoke", "--runs", tmp_path) == whole
    assert {path: json.loads(path.read_text()) for path in files} == kept


def test_strength_goes_on_where_it_was_stopped(tmp_path):
    whole = run("strength.py", "--smoke", "--runs", tmp_path)
    rows = whole.splitlines()
    assert len(rows) == 2 * (1 + 9)
    assert all(float(row.split()[-1]) != 0 for row in rows if not row.endswith("x20"))
    files = sorted(tmp_path.glob("*.json"))
    kept = {path: json.loads(path.read_text()) for path in files}
    assert len(kept) == 2 * 9
    assert kept[files[0]]["seeds"][0]["force ratio"] == 0
    assert all(kept[path]["seeds"][0]["force ratio"] > 0 for path in files[1::2])
    files[3].unlink()
    assert run("strength.py", "--smoke", "--runs", tmp_path) == whole
    assert {path: json.loads(path.read_text()) for path in files} == kept


def test_regression_1d(tmp_path):
    printed = run("regression_1d.py", "--smoke", "--nuts", "--out", tmp_path)
    rows = printed.splitlines()
    assert "between" in rows[1]
    assert max(map(len, rows[:-1])) <= 80
    labels = ["deep ensemble", "weights, sge", "outputs at the data", "outputs, random points"]
    for label in [*labels, "features on a grid", "input gradients", "SVGD", "f-SVGD"]:
        row = next(row for row in rows if row.startswith(label))
        values = [float(cell) for cell in row[27:].split()]
        assert len(values) == 7
        assert min(values) > 0
    assert (tmp_path / "regression_1d.png").stat().st_size > 10_000
    made = json.loads((tmp_path / "regression_1d_nuts.json").read_text())
    stored = json.loads((ROOT / "examples" / "regression_1d_nuts.json").read_text())
    assert stored.keys() == made.keys()
    assert len(stored["sd"]) == len(made["sd"])


def test_regression_1d_of_a_random_network(tmp_path):
    printed = run("regression_1d.py", "--smoke", "--problem", "network", "--out", tmp_path)
    rows = printed.splitlines()
    assert all(len(numbers(row[27:], "")) == 7 for row in rows[3:-2])
    assert "R-hat of NUTS: at most 1.0" in rows[-2]
    assert (tmp_path / "regression_1d_network.png").stat().st_size > 10_000


def numbers(row, label):
    """The numbers of a table's row."""
    return [float(cell) for cell in row.removeprefix(label).split()]


def rows_of(printed, labels, count):
    """The rows of a table by label, each with as many numbers."""
    found = {}
    for label in labels:
        row = next(row for row in printed.splitlines() if row.startswith(label))
        found[label] = numbers(row, label)
        assert len(found[label]) == count, label
    return found


def test_eight_schools(tmp_path):
    printed = run("eight_schools.py", "--smoke", "--nuts", "--out", tmp_path)
    labels = ["NUTS", "SVI, AutoNormal", "particles, calibrated", "particles, by coordinate"]
    for values in rows_of(printed, labels, 9).values():
        assert min(values[1], values[6], values[8]) > 0  # standard deviations
        assert 0 <= values[2] <= values[3] <= values[4]  # quantiles of tau
    assert (tmp_path / "eight_schools.png").stat().st_size > 10_000
    same_layout(tmp_path, "eight_schools_nuts.json")


def test_hierarchical_logistic(tmp_path):
    printed = run("hierarchical_logistic.py", "--smoke", "--nuts", "--out", tmp_path)
    labels = ["NUTS", "SVI, AutoNormal", "by coordinate, all rows", "by coordinate, batches of 100"]
    rows = rows_of(printed, [*labels, "calibrated, joint", "calibrated, Additive"], 7)
    assert rows["NUTS"][:2] == [0, 1]
    for values in rows.values():
        assert 0.4 < values[6] < 1.5  # a coin has 0.69
    assert (tmp_path / "hierarchical_logistic.png").stat().st_size > 10_000
    same_layout(tmp_path, "hierarchical_logistic_nuts.json")


def test_classification_2d(tmp_path):
    printed = run("classification_2d.py", "--smoke", "--nuts", "--out", tmp_path)
    labels = ["NUTS", "deep ensemble", "weights, sge calibrated", "outputs anywhere x5"]
    for values in rows_of(printed, [*labels, "input gradients x10", "f-SVGD, outputs"], 9).values():
        assert values[1] > 0.5  # accuracy on the test set
        assert max(values[2:5]) <= 1.61  # entropy of five classes
    assert (tmp_path / "classification_2d.png").stat().st_size > 10_000
    same_layout(tmp_path, "classification_2d_nuts.json")


def same_layout(folder, name):
    """A file that was made has the keys and lengths of the one that is stored."""
    made, stored = (json.loads((f / name).read_text()) for f in (folder, ROOT / "examples"))
    assert stored.keys() == made.keys()
    for key in stored:
        assert type(stored[key]) is type(made[key])
        if isinstance(stored[key], list | dict):
            assert len(stored[key]) == len(made[key]), key


def test_toy_maps(tmp_path):
    run("toy_maps.py", "--smoke", "--out", tmp_path)
    for name in ("band", "decisions", "uncertainty"):
        assert (tmp_path / f"toy_{name}.png").stat().st_size > 5_000


def test_fashion_ood(tmp_path):
    """Runs, goes on where it was, and makes its page from the run file alone."""
    out = tmp_path / "run"
    printed = run("fashion_ood.py", "--smoke", "--out", out)
    for block in ("clean ", "corrupted ", "MNIST "):
        at = printed.index(f"\n{block}")
        for label in ("deep ensemble", "weight-RDE x1", "FoRDE-PCA x1 ", "FoRDE-PCA x"):
            assert f"\n{label}" in printed[at:]
    assert "Validation NLL by strength (seed 100): x10: " in printed
    pictures = ("curves", "reliability", "histograms", "training", "kernel", "gradients")
    for name in pictures:
        assert (out / f"fashion_{name}.png").stat().st_size > 3_000
    found = json.loads((out / "run.json").read_text())
    assert set(found["table"]["columns"]["severity"]) == {0, 1, 4, None}
    checkpoints = {path: path.stat().st_mtime_ns for path in out.rglob("scores.pt")}
    assert len(checkpoints) == 4
    again = run("fashion_ood.py", "--smoke", "--out", out)
    table = printed[: printed.rindex("\n\n")]
    assert again.startswith(table)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("scores.pt")} == checkpoints
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- from the run file: begin -->\nold\n<!-- end -->\nAfter.\n")
    run("fashion_ood.py", "--out", out, "--report", page)
    text = page.read_text()
    assert table in text
    assert "old" not in text
    assert text.startswith("Before.")
    assert text.endswith("After.\n")


def test_transfer(tmp_path):
    printed = run("transfer.py", "--smoke", "--out", tmp_path)
    labels = ["deep ensemble", "weight repulsion x1", "FoRDE-identity x1", "FoRDE-PCA x20"]
    for values in rows_of(printed, labels, 8).values():
        assert values[1] > 0.2  # accuracy on ten classes that differ in colour
        assert values[3] >= 0  # mutual information
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    assert list(tmp_path.glob("features-*-random-*.pt"))


def test_uci_goes_on_where_it_was_stopped(tmp_path):
    options = ("uci.py", "--smoke", "--out", tmp_path, "--runs", tmp_path / "runs")
    whole = run(*options)
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == 11
    kept = {path: json.loads(path.read_text()) for path in files}
    for path, content in list(kept.items())[:4]:
        path.write_text(json.dumps({**content, "splits": content["splits"][:1]}))
    files[-1].unlink()
    again = run(*options)
    assert again.splitlines()[:-1] == whole.splitlines()[:-1]
    for path, content in kept.items():
        assert len(content["splits"]) == 2
        found = json.loads(path.read_text())["splits"]
        assert [one["rmse"] for one in found] == [one["rmse"] for one in content["splits"]]
    assert (tmp_path / "uci.png").stat().st_size > 10_000


def test_cifar(tmp_path):
    """Trains, goes on with all options of a large machine, and goes on where it was."""
    printed = run("cifar.py", "--smoke", "--out", tmp_path)
    rows = rows_of(
        printed.replace("±", ""), ["clean", "gaussian_noise", "contrast", "corrupted"], 8
    )
    assert all(0 < values[0] < 10 and 0 <= values[2] <= 1 for values in rows.values())
    checkpoints = sorted((tmp_path / "checkpoints").iterdir())
    assert checkpoints
    assert run("cifar.py", "--smoke", "--out", tmp_path) == printed
    assert sorted((tmp_path / "checkpoints").iterdir()) == checkpoints
    options = ["--autocast", "--channels-last", "--every", 2, "--points", 0.5, "--chunk-size", 1]
    out = tmp_path / "other"
    printed = run("cifar.py", "--smoke", "--method", "forde-tuned", "--out", out, *options)
    assert rows_of(printed.replace("±", ""), ["clean", "corrupted"], 8)


def test_cifar_seeds_go_on_where_they_were_stopped(tmp_path):
    methods = ["deep ensemble", "FoRDE-PCA x10"]
    folders = ["--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    options = ["--smoke", "--methods", *methods, *folders]
    whole = run("cifar_seeds.py", *options)
    rows = rows_of(whole.replace("±", ""), methods, 9)
    assert rows["deep ensemble"][1] == 0  # less itself
    assert rows["FoRDE-PCA x10"][1] != 0
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == 2
    kept = [json.loads(path.read_text())["seeds"] for path in files]
    for seeds in kept:
        assert [one["seed"] for one in seeds] == [0, 1]
        assert {"clean", "gaussian_noise 3", "contrast", "corrupted"} <= seeds[0]["scores"].keys()
    content = json.loads(files[1].read_text())
    files[1].write_text(json.dumps({**content, "seeds": content["seeds"][:1]}))
    shutil.rmtree(tmp_path / "out")
    assert run("cifar_seeds.py", *options) == whole
    again = [json.loads(path.read_text())["seeds"] for path in files]
    for before, now in zip(kept, again, strict=True):
        assert [one["scores"] for one in now] == [one["scores"] for one in before]
    files[0].write_text(json.dumps({**json.loads(files[0].read_text()), "settings": {"width": 9}}))
    with pytest.raises(AssertionError, match="is of other settings"):
        run("cifar_seeds.py", *options)


def test_benchmark_of_the_memory_of_predictions():
    """At most two batches of activations, on a few small images."""
    sizes = ["--images", "100", "--batch", "50", "--particles", "3", "--side", "8"]
    command = [sys.executable, str(ROOT / "benchmarks" / "prediction_memory.py"), *sizes]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    rows = result.stdout.splitlines()[2:]
    assert [row.split()[0] for row in rows] == ["loop", "vmap"]
    for row in rows:
        one_batch, peak, _, ratio = map(float, row.split()[-5:-1])
        assert abs(ratio - peak / one_batch) < 0.1
        assert 1 <= ratio <= 2


def test_benchmark_of_deep_networks():
    """All tables but that of compiled steps, which takes long."""
    command = [sys.executable, str(ROOT / "benchmarks" / "deep.py"), "--smoke"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for title in ("CNN, 2 particles", "time under vmap", "MLP: FoRDE's time per particle"):
        assert title in result.stdout
    row = next(r for r in result.stdout.splitlines() if r.startswith("ours: FoRDE"))
    assert min(float(cell) for cell in row.split()[2:]) > 0
