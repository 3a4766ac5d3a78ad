"""What holds for every test: one seed, one thread, no network, and how long properties search."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before anything imports huggingface_hub, which reads it at import.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tensors here are tiny: threads cost more than they bring, and a sum over several is less exact.
torch.set_num_threads(1)

settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    stateful_step_count=20,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    parent=settings.get_profile("default"),
    max_examples=400,
    stateful_step_count=50,
    derandomize=False,
    print_blob=True,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed():
    """Give every test the same random numbers, in whichever order they run."""
    torch.manual_seed(0)
