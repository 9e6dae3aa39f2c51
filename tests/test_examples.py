"""Examples run with ``--smoke`` and leave what they promise."""

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
