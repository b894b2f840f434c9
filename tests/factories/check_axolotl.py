"""axolotl's command, as it is typed: `make factories` runs this in an environment with axolotl."""

import pytest
from factory_helpers import assert_mars_trained, run, write_example
from model_files import write_chats, write_model


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "model")
    write_chats(tmp_path / "chats.jsonl")
    data = {"path": "chats.jsonl", "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
    tiny = {"base_model": "model", "datasets": [data], "sequence_len": 64, "bf16": False, "use_cpu": True}
    steps = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "optim_args": {"gamma": 0.05, "max_norm": None}}
    batch = {"micro_batch_size": 2, "gradient_accumulation_steps": 1}
    on_cpus = {f"lora_{kernel}_kernel": False for kernel in ("mlp", "qkv", "o")}  # axolotl's own are for GPUs
    write_example("axolotl.yaml", tmp_path / "axolotl.yaml", {**tiny, **steps, **batch, **on_cpus})
    return tmp_path


def test_with_the_plugin(folder):
    run("axolotl", "train", "axolotl.yaml", folder=folder, AXOLOTL_DO_NOT_TRACK="1")
    assert_mars_trained(folder / "out", 0.05)
