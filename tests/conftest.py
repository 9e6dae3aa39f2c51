"""Fixtures for every test: seeds, one thread, and guards on Pyro's global state."""

import pyro
import pytest
import torch
from pyro.infer.util import is_validation_enabled

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_pyro():
    """Seed everything, and fail the test that leaves something behind in Pyro's global state."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    before = (is_validation_enabled(), torch.distributions.Distribution._validate_args)
    yield
    after = (is_validation_enabled(), torch.distributions.Distribution._validate_args)
    pyro.enable_validation(True)
    pyro.clear_param_store()
    assert before == after, f"validation was {before} before the test and is {after} after it"
