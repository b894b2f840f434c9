"""LLaMA-Factory's command, as it is typed: `make factories` runs this in an environment with LLaMA-Factory."""

import json
import sys

import pytest
from factory_helpers import assert_mars_trained, run, write_example
from model_files import TEXTS, write_model


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "model")
    rows = [{"instruction": "Say it", "input": "", "output": text} for text in TEXTS]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    tiny = {"model_name_or_path": "model", "dataset": "rows", "cutoff_len": 64, "bf16": False, "use_cpu": True}
    steps = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "optim_args": "gamma=0.05"}
    write_example("llama_factory.yaml", tmp_path / "llama_factory.yaml", {**tiny, **steps})
    return tmp_path


def test_one_process(folder):
    run(sys.executable, "-m", "hf_mars", "llamafactory-cli", "train", "llama_factory.yaml", folder=folder)
    assert_mars_trained(folder / "out", 0.05)


def test_processes_that_it_starts_with_torchrun(folder):
    several = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "HF_MARS": "1"}
    run("llamafactory-cli", "train", "llama_factory.yaml", folder=folder, **several)
    assert_mars_trained(folder / "out", 0.05, processes=2)
