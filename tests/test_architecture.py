"""The import table of the package, held against the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pyro_fordes

PACKAGE = Path(pyro_fordes.__file__).parent

# Level by level; a module imports only from the modules listed for it.
ALLOWED = {
    "_checks": set(),
    "_random": set(),
    "randomness": set(),
    "particles": {"_checks"},
    "optimizers": {"_checks"},
    "bnn": {"_checks"},
    "lengthscales": {"_checks"},
    "dynamics": {"_checks"},
    "metrics": {"_checks"},
    "schedules": {"_checks", "particles"},
    "sites": {"_checks", "particles"},
    "bandwidths": {"_checks", "particles"},
    "kernels": {"_checks", "bandwidths"},
    "additive": {"_checks", "kernels"},
    "diagnostics": {"_checks", "particles", "bandwidths", "kernels"},
    "spaces": {"_checks", "particles"},
    "perturbation": {"_checks", "particles"},
    "precision": {"_checks", "randomness"},
    "second_order": set(),
    "input_gradients": {
        "_checks",
        "particles",
        "lengthscales",
        "perturbation",
        "sites",
        "spaces",
    },
    "function_spaces": {"_checks", "particles", "sites", "spaces"},
    "transports": {"_checks", "kernels"},
    "arguments": {"_checks"},
    "enumeration": set(),
    "engines": {"_checks", "_random", "particles", "randomness"},
    "prototype": {"_checks", "_random", "particles", "enumeration", "sites"},
    "runs": {"_checks", "particles", "prototype"},
    "log_joint": {
        "_checks",
        "_random",
        "particles",
        "arguments",
        "enumeration",
        "engines",
        "perturbation",
        "precision",
        "prototype",
        "randomness",
        "runs",
        "second_order",
        "sites",
    },
    "prediction": {
        "_checks",
        "_random",
        "loops",
        "metrics",
        "particles",
        "randomness",
        "sites",
        "state",
    },
    "labels": {"_checks"},
    "arviz_groups": {"_checks", "labels", "loops", "particles", "prediction", "sites", "state"},
    "io_arviz": {"_checks", "_random", "arviz_groups", "labels", "prediction", "state"},
    "trajectory": {"_checks", "sites", "state"},
    "summary": {"_checks", "particles", "sites"},
    "corruptions": {"_checks"},
    "tables": {"_checks", "estimates"},
    "resampling": set(),
    "estimates": {"_checks", "metrics", "resampling"},
    "point_scores": {
        "_checks",
        "loops",
        "metrics",
        "particles",
        "prediction",
        "prototype",
        "sites",
    },
    "evaluation": {
        "_checks",
        "_random",
        "checkpoint",
        "estimates",
        "metrics",
        "point_scores",
        "resampling",
        "tables",
    },
    "plots": {"_checks", "metrics", "tables"},
    "comparison": {"_checks", "estimates", "evaluation", "resampling", "tables"},
    "tuning": {
        "_checks",
        "_random",
        "estimates",
        "evaluation",
        "point_scores",
        "prototype",
        "tables",
    },
    "rollback": set(),
    "faults": {"_checks", "particles", "rollback"},
    "finite": {"kernels", "transports"},
    "forces": {
        "_checks",
        "_random",
        "finite",
        "input_gradients",
        "particles",
        "kernels",
        "diagnostics",
        "spaces",
        "transports",
        "log_joint",
    },
    "compiled": {"_random", "particles", "forces", "log_joint"},
    "checkpoint": {"_checks"},
    "watch": {"_checks"},
    "agreement": set(),
    "link": {"_checks", "agreement", "watch"},
    "distributed": {"_checks", "link", "particles"},
    "loops": {"_checks", "_random", "checkpoint", "particles"},
    "initial": {"_checks", "_random", "bnn", "particles", "prototype", "log_joint", "sites"},
    "state": {
        "_checks",
        "_random",
        "checkpoint",
        "faults",
        "loops",
        "optimizers",
        "particles",
        "prototype",
        "rollback",
        "spaces",
        "summary",
    },
    "update": {"_checks", "_random", "faults", "particles", "forces", "randomness", "rollback"},
    "options": {"_checks", "faults", "kernels", "particles", "transports"},
    "inference": {
        "precision",
        "compiled",
        "options",
        "faults",
        "rollback",
        "update",
        "_checks",
        "state",
        "_random",
        "bnn",
        "initial",
        "checkpoint",
        "loops",
        "particles",
        "optimizers",
        "sites",
        "kernels",
        "spaces",
        "summary",
        "input_gradients",
        "transports",
        "prototype",
        "log_joint",
        "forces",
    },
}
OPTIONAL = [
    "arviz",
    "xarray",
    "zarr",
    "matplotlib",
    "pandas",
    "sklearn",
    "torchvision",
    "torchmetrics",
]


def imports_of(path):
    """Names of the package's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            if (node.module or "").split(".")[0] == "pyro_fordes":
                assert node.module != "pyro_fordes", f"{path.name} imports from the package itself"
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("pyro_fordes") for alias in node.names)
    return found


def files_of(name):
    """The files of a module: one, or all in its folder."""
    folder = PACKAGE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]


def test_modules_import_only_what_the_table_allows():
    paths = [*PACKAGE.glob("*.py"), *(path.parent for path in PACKAGE.glob("*/__init__.py"))]
    assert {path.stem for path in paths} - {"__init__"} == set(ALLOWED)
    for name, allowed in ALLOWED.items():
        for path in files_of(name):
            assert imports_of(path) - {name} <= allowed, path


def test_the_table_has_levels():
    """Every module can be placed after those it imports, so there is no cycle."""
    placed = set()
    while len(placed) < len(ALLOWED):
        ready = {name for name in set(ALLOWED) - placed if ALLOWED[name] <= placed}
        assert ready, f"cycle among {set(ALLOWED) - placed}"
        placed |= ready


def test_only_modules_that_need_pyro_import_it():
    """Kernels, transports and metrics are tensors in, tensors out."""
    tensors_only = ("particles", "bandwidths", "kernels", "additive", "lengthscales", "transports")
    others = ("diagnostics", "schedules", "dynamics", "metrics")
    for name in ("_checks", "_random", "randomness", *tensors_only, *others):
        for path in files_of(name):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [getattr(node, "module", None) or ""] + [a.name for a in node.names]
                    assert not any(n == "pyro" or n.startswith("pyro.") for n in names), name


def test_import_loads_no_optional_package():
    code = f"import sys, pyro_fordes; print([m for m in {OPTIONAL} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_assert_checks_users_input():
    """Asserts vanish under ``python -O``."""
    for path in PACKAGE.rglob("*.py"):
        asserts = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
        assert not asserts, path.name


def test_public_names_are_documented_with_an_example():
    for name in dir(pyro_fordes):
        thing = getattr(pyro_fordes, name)
        if name.startswith("_") or not hasattr(thing, "__module__"):
            continue
        if thing.__module__.startswith("pyro_fordes") and not issubclass_of_error(thing):
            assert ">>>" in (thing.__doc__ or ""), f"{name} has no example"


def issubclass_of_error(thing):
    return isinstance(thing, type) and issubclass(thing, Exception)


def test_modules_stay_readable():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 700, f"{path.name}: time for a folder"
