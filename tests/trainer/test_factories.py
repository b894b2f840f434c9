"""The files for axolotl, LLaMA-Factory and ms-swift in examples/; `make factories` runs the tools themselves."""

import re
import sys
from importlib import import_module
from types import ModuleType

import pytest
import yaml
from launch_helpers import ROOT
from transformers import TrainingArguments

from hf_mars.trainer.names import VARIANTS

FILES = {"axolotl.yaml": "optimizer", "llama_factory.yaml": "optim", "ms_swift.yaml": "optim"}


@pytest.mark.parametrize("file", FILES)
def test_a_files_optimizer_and_its_settings_are_valid(file, tmp_path):
    settings = yaml.safe_load((ROOT / "examples" / file).read_text())
    optim_args = settings["optim_args"]
    if isinstance(optim_args, dict):  # as axolotl writes them
        optim_args = ",".join(f"{key}={value}" for key, value in optim_args.items())
    learning_rate = float(settings["learning_rate"])
    common = {"lr_scheduler_type": settings["lr_scheduler_type" if file != "axolotl.yaml" else "lr_scheduler"]}
    TrainingArguments(
        str(tmp_path), optim=settings[FILES[file]], optim_args=optim_args, learning_rate=learning_rate, **common
    )
    with pytest.raises(ValueError, match="gama"):
        TrainingArguments(str(tmp_path), optim=settings[FILES[file]], optim_args=f"{optim_args},gama=1")


@pytest.mark.parametrize("value", ["None", "none"])
def test_a_yaml_null_reaches_optim_args_as_none(value, tmp_path):
    """axolotl writes `max_norm: null` as max_norm=None, and `true` as True."""
    TrainingArguments(str(tmp_path), optim="mars_adamw", optim_args=f"max_norm={value},optimize_1d=True")


def test_axolotls_plugin_is_one_of_its_plugins(monkeypatch):
    """Loaded as axolotl does, by module and class; a class in place of axolotl's own is its base."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name, module in {
        "axolotl": ModuleType("axolotl"),
        "axolotl.integrations": ModuleType("i"),
        base.__name__: base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hf_mars.axolotl", raising=False)
    (name,) = yaml.safe_load((ROOT / "examples" / "axolotl.yaml").read_text())["plugins"]
    module, _, plugin = name.rpartition(".")
    assert isinstance(getattr(import_module(module), plugin)(), base.BasePlugin)
    monkeypatch.delitem(sys.modules, "hf_mars.axolotl")


def test_the_plugin_for_ms_swift_has_every_name():
    text = (ROOT / "examples" / "ms_swift_plugin.py").read_text()
    (names,) = re.findall(r"for name in \((.*?)\):", text)
    assert re.findall(r'"(\w+)"', names) == list(VARIANTS)
