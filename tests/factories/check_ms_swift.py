"""ms-swift's command, as it is typed: `make factories` runs this in an environment with ms-swift."""

import sys

import pytest
from factory_helpers import assert_mars_trained, run, write_example
from launch_helpers import ROOT
from model_files import write_chats, write_model

TINY = {"model": "model", "dataset": "chats.jsonl", "max_length": 64, "torch_dtype": "float32", "use_cpu": True}
TINY |= {"model_type": "llama", "template": "dummy", "max_steps": 2, "logging_steps": 1, "save_steps": 2}
TINY |= {"optim_args": "gamma=0.05", "gradient_accumulation_steps": 1, "per_device_train_batch_size": 2}
TINY |= {"split_dataset_ratio": 0, "report_to": "none"}
PLUGIN = {"external_plugins": str(ROOT / "examples" / "ms_swift_plugin.py"), "optimizer": "mars_adamw"}


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "model")
    write_chats(tmp_path / "chats.jsonl")
    return tmp_path


def test_one_process(folder):
    write_example("ms_swift.yaml", folder / "ms_swift.yaml", TINY)
    run(sys.executable, "-m", "hf_mars", "swift", "sft", "ms_swift.yaml", folder=folder)
    assert_mars_trained(folder / "out", 0.05)


def test_with_the_plugin(folder):
    write_example("ms_swift.yaml", folder / "ms_swift.yaml", {**TINY, **PLUGIN}, without=["optim"])
    run("swift", "sft", "ms_swift.yaml", folder=folder)
    assert_mars_trained(folder / "out", 0.05)
