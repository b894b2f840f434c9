"""LoRA adapters: new ones, those of a model, and those that cannot be used."""

import importlib.util
import json
import math
import shutil

import pytest
import torch
from clm_helpers import log_history, run_main
from transformers import AutoModelForCausalLM

from hf_mars.clm.errors import UsageError


def test_lora_trains_and_saves_adapters_only(trained, tmp_path):
    output_dir, _ = trained
    text, tmp_path = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("It is a truth universally acknowledged.\n" * 200)
    arguments = [
        *("--model_name_or_path", output_dir, "--output_dir", tmp_path, "--max_steps", 10, "--learning_rate", 1e-2),
        *("--lora_r", 4, "--lora_alpha", 8, "--lora_target_modules", "c_attn,c_fc", "--eval_on_start"),
        *("--train_file", text, "--validation_file", text, "--max_eval_samples", 21, "--save_steps", 5),
    ]
    metrics = run_main(*arguments)
    evaluations = [entry["eval_loss"] for entry in log_history(tmp_path) if "eval_loss" in entry]
    assert evaluations[-1] < evaluations[0]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["c_attn", "c_fc"])
    assert not (tmp_path / "model.safetensors").exists()
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    tuned = {name.replace(".base_layer", ""): tensor for name, tensor in tuned.items()}
    for name, tensor in AutoModelForCausalLM.from_pretrained(output_dir).state_dict().items():
        assert torch.equal(tuned[name], tensor)
    resumed = run_main(*arguments, "--resume_from_checkpoint", tmp_path / "checkpoint-5")
    assert resumed["eval_loss"] == metrics["eval_loss"]


@pytest.fixture(scope="module")
def adapters(trained, tmp_path_factory):
    """(output folder, metrics) of a run with --lora_r."""
    output_dir = tmp_path_factory.mktemp("adapters")
    arguments = ("--model_name_or_path", trained[0], "--output_dir", output_dir, "--max_steps", 5)
    metrics = run_main(*arguments, "--learning_rate", 3e-1, "--lora_r", 4, "--max_eval_samples", 21)
    return output_dir, metrics


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_model_with_adapters_is_evaluated(trained, adapters, tmp_path, has_tokenizer):
    folder = shutil.copytree(adapters[0], tmp_path / "adapters")
    if not has_tokenizer:  # then it is the base model's
        for path in folder.glob("tokenizer*"):
            path.unlink()
    arguments = ("--do_eval", "--output_dir", tmp_path / "out", "--max_eval_samples", 21)
    evaluated = run_main(*arguments, "--model_name_or_path", folder)
    assert evaluated["eval_loss"] == pytest.approx(adapters[1]["eval_loss"], rel=1e-6)
    assert abs(evaluated["eval_loss"] - trained[1]["eval_loss"]) > 1e-3


def test_fine_tuning_goes_on_with_the_adapters_of_a_model(trained, adapters, tmp_path, capsys):
    metrics = run_main(
        *("--model_name_or_path", adapters[0], "--output_dir", tmp_path, "--max_steps", 5, "--learning_rate", 1e-2),
        *("--eval_on_start", "--max_eval_samples", 21, "--sample_prompt", "Mr. Darcy"),
    )
    start = log_history(tmp_path)[0]
    assert start["step"] == 0 and start["eval_loss"] == pytest.approx(adapters[1]["eval_loss"], rel=1e-6)
    assert metrics["eval_loss"] != start["eval_loss"]
    assert "\nMr. Darcy" in capsys.readouterr().out
    old, new = (json.loads((path / "adapter_config.json").read_text()) for path in (adapters[0], tmp_path))
    assert (new["r"], new["base_model_name_or_path"]) == (4, str(trained[0])) and new["r"] == old["r"]
    assert not (tmp_path / "model.safetensors").exists()
    evaluated = run_main("--do_eval", "--model_name_or_path", tmp_path, "--output_dir", tmp_path / "evaluated")
    assert math.isfinite(evaluated["eval_loss"])


def test_adapters_that_cannot_be_used(adapters, tmp_path, monkeypatch):
    def refused(folder, *arguments):
        with pytest.raises(UsageError) as refusal:
            run_main("--model_name_or_path", folder, "--output_dir", tmp_path / "out", *arguments)
        return str(refusal.value)

    folder = shutil.copytree(adapters[0], tmp_path / "adapters")
    assert refused(folder, "--lora_r", 8).startswith(f"--lora_r 8: --model_name_or_path {folder} holds adapters")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    assert refused(folder).startswith(f"--model_name_or_path {folder}, adapters of ./gone: no model configuration")
    (folder / "config.json").write_text("{}")
    assert refused(folder).startswith(f"--model_name_or_path {folder}: holds a model (config.json) and adapters")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refused(folder).startswith(f"--model_name_or_path {folder}: holds adapters, which need the package peft")


def test_lora_without_peft_says_how_to_install_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--lora_r 4: needs the package peft: pip install peft"):
        run_main("--model_name_or_path", trained[0], "--output_dir", tmp_path / "out", "--lora_r", 4)


def test_lora_of_modules_that_the_model_lacks(trained, tmp_path):
    with pytest.raises(UsageError, match="--lora_target_modules q_proj: "):
        run_main(
            *("--model_name_or_path", trained[0], "--output_dir", tmp_path, "--max_steps", 1),
            *("--lora_r", 4, "--lora_target_modules", "q_proj"),
        )
