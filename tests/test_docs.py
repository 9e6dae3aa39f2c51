"""Code in README and docs runs, block by block, and prints what the page shows."""

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import pyro
import pytest

import pyro_fordes

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    page for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if "_build" not in page.parts
]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
# A block of code, and the block of text right below it, which is what it prints.
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", flags=re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def agrees(printed, shown):
    """Equal but for numbers, which may differ by a twentieth or two units of the last place.

    Training amplifies the rounding of other machines and versions; a text that was typed by hand
    or has gone stale is further off than that. Effective sample sizes of particles follow from
    their order and nothing else: they may differ by a fifth.
    """
    if NUMBER.split(printed) != NUMBER.split(shown):
        return False
    for row, wanted in zip(printed.splitlines(), shown.splitlines(), strict=True):
        share = 0.2 if wanted.startswith("ess_") else 0.05
        for one, other in zip(NUMBER.findall(row), NUMBER.findall(wanted), strict=True):
            decimals = len(other.partition(".")[2])
            close = share * abs(float(other)) + 2 * 10**-decimals
            whole = share * abs(float(other))
            if one != other and abs(float(one) - float(other)) > (close if decimals else whole):
                return False
    return True


# On some machines one shape of a Pareto tail is above ArviZ's limit.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for code, shown in BLOCK.findall(page.read_text()):
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(code, page.name, "exec"), namespace)
        # ArviZ 1.x has other columns than the 0.x whose tables this page shows.
        other = page.name == "diagnostics.md" and not version("arviz").startswith("0.")
        assert other or agrees(output.getvalue().rstrip(), shown.rstrip()), (
            f"printed:\n{output.getvalue()}\nshown:\n{shown}"
        )
    pyro.clear_param_store()
    if page.name == "README.md":
        assert namespace["losses"][-1] < namespace["losses"][0] / 2
        assert namespace["samples"]["net.0.weight"].shape == (5, 32, 64)
        assert namespace["idata"]["log_likelihood"]["y"].shape == (1, 5, 1797)


def test_the_comparison_of_outputs_can_fail():
    shown = "clean: NLL 0.280, accuracy 0.923, size 10\n"
    assert agrees(shown.replace("0.280", "0.284"), shown)
    assert not agrees(shown.replace("0.280", "0.310"), shown)
    assert not agrees(shown.replace("10", "11"), shown)
    assert not agrees(shown.replace("NLL", "loss"), shown)
    assert not agrees("", shown)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_exist(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)\)", prose):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_every_page_is_in_a_table_of_contents():
    """A page that no toctree names is found by nobody."""
    listed = (DOCS / "index.md").read_text().splitlines()
    for page in PAGES[1:]:
        path = page.relative_to(DOCS).with_suffix("").as_posix()
        assert path == "index" or path in listed, path


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.rst"))
    entries = re.findall(r"^\.\. auto\w+:: (\w+)$", reference, flags=re.MULTILINE)
    documented = set(entries)
    classes = [name for name in entries if name[0].isupper()]
    assert len(classes) == len(set(classes)), "a class is documented twice"
    for name, thing in vars(pyro_fordes).items():
        if getattr(thing, "__module__", "").startswith("pyro_fordes") and name[0] != "_":
            assert name in documented, name
    modules = (pyro_fordes.metrics, pyro_fordes.diagnostics, pyro_fordes.corruptions)
    for module in (*modules, pyro_fordes.plots):
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "").startswith(module.__name__) and name[0] != "_":
                assert name in documented, name
    members = re.search(r"ParticleInference\n   :members: (.*)", reference).group(1).split(", ")
    public = {name for name in vars(pyro_fordes.ParticleInference) if name[0] != "_"}
    assert set(members) == public


def test_the_results_page_is_what_its_run_files_give():
    command = [sys.executable, str(ROOT / "benchmarks" / "results.py"), "--check"]
    subprocess.run(command, check=True)


def test_the_citation_has_the_version_of_the_package():
    assert f"version: {pyro_fordes.__version__}\n" in (ROOT / "CITATION.cff").read_text()
