"""What every test and doctest needs before it is collected."""

import math

import pytest
import torch

import tests.shapes  # noqa: F401  (pytest's option --jaxtyping-packages looks it up by attribute)


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    """Give doctests ``math``, ``torch`` and ``nn`` without an import."""
    doctest_namespace.update(math=math, torch=torch, nn=torch.nn)
