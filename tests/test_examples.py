"""Examples run with ``--smoke`` and leave what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import arviz

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
