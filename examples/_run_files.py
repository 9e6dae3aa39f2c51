"""Run files of the examples: JSON that grows by one repetition at a time, and is gone on with."""

import json
import sys
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_fordes


def opened(path: Path, head: dict[str, Any], settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """What is in a run file, or what a new one begins with.

    ``head`` says what was run; ``kind`` names the list of repetitions, such as ``"seeds"``. Ends
    the program if the file is of other settings: its repetitions could not be compared.
    """
    settings = json.loads(json.dumps(settings))
    if path.exists():
        content = json.loads(path.read_text())
        if content["settings"] != settings:
            sys.exit(f"{path} is of other settings, {content['settings']}; name another --runs")
        return content
    versions = {
        "pyro_fordes": pyro_fordes.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }
    return {**head, "settings": settings, "versions": versions, kind: []}


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a file at once, so that a kill leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)
