"""Sphinx builds the docs with this: ``make docs``."""

import ast
from pathlib import Path
from typing import Any

import pyro_fordes

project = "pyro_fordes"
author = "the pyro_fordes authors"
copyright = author
version = release = pyro_fordes.__version__

extensions = [
    "myst_parser",  # the pages are Markdown, readable on GitHub as well
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pyro_fordes {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# A name in single backticks is a link where it is documented, and code where it is not.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def write_example_pages(app: Any) -> None:
    """A page for each script of ``examples/``: its docstring, its figure and its code.

    Nothing is run: the scripts are command-line programs, some of which take hours, and the
    figures are those of a full run. What begins with an underscore is no script.
    """
    folder = HERE / "examples"
    folder.mkdir(exist_ok=True)
    names = [script.stem for script in sorted(EXAMPLES.glob("[!_]*.py"))]
    for old in folder.glob("*.rst"):
        if old.stem not in names:
            old.unlink()
    for name in names:
        source = (EXAMPLES / f"{name}.py").read_text()
        title, _, text = (ast.get_docstring(ast.parse(source)) or name).partition("\n")
        title = f"{name}.py: {title.rstrip('.')}"
        lines = [title, "=" * len(title), "", text.strip(), ""]
        if (HERE / "images" / f"{name}.png").exists():
            lines += [f".. image:: ../images/{name}.png", ""]
        lines += [
            f"Run it as ``python examples/{name}.py``; ``--help`` lists its options.",
            "",
            f".. literalinclude:: ../../examples/{name}.py",
            "   :language: python",
            "",
        ]
        page, written = folder / f"{name}.rst", "\n".join(lines)
        if not page.exists() or page.read_text() != written:
            page.write_text(written)


def find_short_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Resolve `WGD` in a docstring to ``pyro_fordes.WGD``, and `metrics.nll` likewise."""
    if node.get("reftype") != "obj":
        return None
    domain = env.domains["py"]
    owner = node.get("py:class")
    candidates = [f"pyro_fordes.{node['reftarget']}"]
    candidates += [f"{node.get('py:module')}.{node['reftarget']}", f"{owner}.{node['reftarget']}"]
    candidates += [f"pyro_fordes.ParticleInference.{node['reftarget']}"]
    for name in candidates:
        if name in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", name, node, contnode
            )
    return None


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("builder-inited", write_example_pages)
    app.connect("missing-reference", find_short_name)
