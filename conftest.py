"""Names that doctests use without importing them."""

import math

import pytest
import torch


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    """Give doctests ``math``, ``torch`` and ``nn``."""
    doctest_namespace.update(math=math, torch=torch, nn=torch.nn)
