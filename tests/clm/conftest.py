"""A run that many tests look at, and texts with a cache of their own."""

import pytest
from clm_helpers import run_main

from hf_mars.clm.texts import load_texts


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(output folder, metrics) of a short run on the novel, which tests must leave as it is."""
    output_dir = tmp_path_factory.mktemp("trained")
    metrics = run_main(
        *("--output_dir", output_dir, "--max_steps", 40, "--learning_rate", 1e-2, "--max_eval_samples", 21),
        *("--eval_strategy", "steps", "--eval_steps", 20, "--eval_on_start", "--save_steps", 20),
    )
    return output_dir, metrics


@pytest.fixture
def load(tmp_path):
    return lambda **options: load_texts(cache_dir=str(tmp_path / "cache"), **options)
