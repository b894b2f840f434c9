"""axolotl's command, as it is typed: `make factories` runs this in an environment with axolotl."""

import re
import sys

import pytest
import yaml
from factory_helpers import assert_mars_trained, run, write_example
from launch_helpers import ROOT
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


def test_the_section_of_fsdp2_is_accepted(folder):
    """Training with it asks for GPUs."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ecosystem.md").read_text(), re.DOTALL)
    (section,) = [yaml.safe_load(block) for block in blocks if "fsdp_config" in block]
    settings = yaml.safe_load((folder / "axolotl.yaml").read_text())
    (folder / "fsdp.yaml").write_text(yaml.safe_dump({**settings, **section}))
    code = (
        "from axolotl.cli.config import load_cfg; c = load_cfg('fsdp.yaml'); print(c.optimizer, c.fsdp_version, "
        "c.fsdp_config.transformer_layer_cls_to_wrap)"
    )
    printed = run(sys.executable, "-c", code, folder=folder, AXOLOTL_DO_NOT_TRACK="1")
    assert "mars_adamw 2 LlamaDecoderLayer" in printed
