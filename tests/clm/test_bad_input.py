"""Bad input is one sentence that names the argument and its value; `command` prints it and exits with 2."""

import logging
import os
import sys

import numpy as np
import pytest
import torch
from clm_helpers import QUIET, write_token_bin
from helpers import tiny_gpt2
from safetensors.torch import load_file, save_file

from hf_mars.clm.errors import UsageError
from hf_mars.clm.run import command, main

SIZES = "n_layer=1,n_head=2,n_embd=32,n_positions=32"
TINY = ("--config_overrides", SIZES, "--vocab_size", "300")
RUN = ("--do_train", "--max_steps", "1", "--save_strategy", "no")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files and folders with something wrong with each, in the present folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("folder.bin", "adapter", "adapter_list", "tokenizer_list", "config_list"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty.json").touch()
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    tokens = np.arange(4000) % 200
    tokens[-40] = 60000
    write_token_bin(tmp_path / "bad.bin", tokens)
    (tmp_path / "itself.yaml").write_text("config_overrides: &x\n  n_layer: *x\n")
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "deep.yaml").write_text("[" * 5000 + "]" * 5000)
    (tmp_path / "python.yaml").write_text("learning_rate: !!python/object/apply:os.mkdir ['executed']\n")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{broken")
    (tmp_path / "adapter_list" / "adapter_config.json").write_text("[]")
    (tmp_path / "tokenizer_list" / "tokenizer_config.json").write_text("[]")
    (tmp_path / "config_list" / "config.json").write_text("[]")
    return tmp_path


def overrides(text):
    return ("--config_overrides", text, "--vocab_size", "300", *RUN)


def with_tiny(*arguments):
    return (*arguments, *TINY, *RUN)


CASES = {
    "--train_file empty.json: is empty": with_tiny("--train_file", "empty.json"),
    "--train_file folder.bin: there is no such file": ("--train_file", "folder.bin", *TINY[:2], *RUN),
    "--train_file loop.txt: there is no such file": with_tiny("--train_file", "loop.txt"),
    "config_overrides: is nested too deeply for a value, or holds itself": ("itself.yaml",),
    "deep.json: .* nested too deeply": ("deep.json",),
    "deep.yaml: .* nested too deeply": ("deep.yaml",),
    "python.yaml: cannot be read as a file of arguments": ("python.yaml",),
    "--dataset_name '': is empty": with_tiny("--dataset_name", ""),
    "--dataset_config_name x: needs --dataset_name": with_tiny("--dataset_config_name", "x"),
    "--vocab_size 0: must be between 257": ("--config_overrides", SIZES, "--vocab_size", "0", *RUN),
    "--vocab_size 1000000000000: must be": ("--config_overrides", SIZES, "--vocab_size", "1000000000000", *RUN),
    "--block_size=--: is no value": ("--block_size=--", *RUN),
    "n_head=0: is no gpt2 model": overrides("n_head=0"),
    "n_embd=63,n_head=2: is no gpt2 model": overrides("n_embd=63,n_head=2"),
    "--config_overrides resid_pdrop=2": overrides("resid_pdrop=2"),
    "--config_overrides activation_function=nope": overrides("activation_function=nope"),
    "n_layer=-1: is no gpt2 model: ValueError: -1 layers": overrides("n_layer=-1"),
    "--model_name_or_path adapter: adapter_config.json": ("--model_name_or_path", "adapter", *RUN),
    "--model_name_or_path adapter_list: adapter_config.json": ("--model_name_or_path", "adapter_list", *RUN),
    "--tokenizer_name tokenizer_list: no tokenizer there": (
        *("--tokenizer_name", "tokenizer_list", "--config_overrides", SIZES),
        *RUN,
    ),
    "--config_name config_list: no model configuration there": ("--config_name", "config_list", *RUN),
}
NUMBERS = {
    "weight_decay": ("-1", "nan"),
    "learning_rate": ("-1", "nan"),
    "max_grad_norm": ("nan",),
    "logging_steps": ("-3", "nan", "inf"),
    "eval_steps": ("-3", "nan", "inf"),
    "save_steps": ("-3", "nan", "inf"),
    "num_train_epochs": ("-1", "0", "nan"),
    "gradient_accumulation_steps": ("-1", "0", "nan"),
    "per_device_train_batch_size": ("0", "-2"),
    "max_steps": ("0", "-7"),
    "dataloader_num_workers": ("-1",),
    "seed": ("-1",),
}


@pytest.mark.parametrize("message", CASES)
def test_one_sentence(files, message):
    with pytest.raises(UsageError, match=message):
        main([*CASES[message], *QUIET])
    assert not (files / "executed").exists()


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_out_of_range(tmp_path, name, value):
    with pytest.raises(UsageError, match=f"{name}.*{value}"):
        main(["--output_dir", str(tmp_path), *TINY, "--do_train", f"--{name}", value, *QUIET])


@pytest.mark.parametrize(
    "words, message",
    [
        (("--lr_scheduler_kwargs", '{"a": 1}'), r"lr_scheduler_type linear --lr_scheduler_kwargs .*'a'"),
        (("--lr_scheduler_type", "cosine_with_min_lr"), "lr_scheduler_type cosine_with_min_lr.*One of min_lr"),
        (("--resume_from_checkpoint", ""), "resume_from_checkpoint '': is empty"),
    ],
)
def test_what_the_trainer_would_stumble_over(tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        main(["--output_dir", str(tmp_path), *TINY, "--do_train", *words, *QUIET])


@pytest.mark.slow
def test_a_token_of_another_vocabulary_found_by_a_data_loader_s_worker(files, monkeypatch, capsys):
    """The worker's traceback comes with its error, and is left out of the line."""
    run = ("--train_file", "bad.bin", "--config_overrides", f"{SIZES},vocab_size=300", "--block_size", "16")
    workers = ("--dataloader_num_workers", "1", "--validation_split_percentage", "0", "--output_dir", "out")
    steps = ("--do_train", "--num_train_epochs", "1", "--save_strategy", "no")
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *run, *workers, *steps, *QUIET])
    with pytest.raises(SystemExit) as end:
        command("run_clm.py")
    assert end.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run_clm.py: error:")]
    assert "holds token id 60000" in line and "Traceback" not in line


@pytest.fixture
def model_run(tmp_path, trained):
    """From a change of a tiny model's tensors to the arguments of a run with them."""

    def arguments(change):
        tiny_gpt2(vocab_size=300, n_positions=32).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        write_token_bin(tmp_path / "tokens.bin", np.arange(2000) % 200)
        model = ("--model_name_or_path", tmp_path, "--tokenizer_name", trained[0], "--output_dir", tmp_path / "out")
        return [*map(str, (*model, "--train_file", tmp_path / "tokens.bin", "--block_size", 16, *RUN, *QUIET))]

    return arguments


def test_weights_that_are_not_finite(model_run):
    def spoil(tensors):
        tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = torch.nan

    with pytest.raises(UsageError, match=r"its weights are not finite .* in transformer.h.0.mlp.c_fc.weight"):
        main(model_run(spoil))


def test_weights_that_are_missing(model_run, caplog):
    run = model_run(lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
    with caplog.at_level(logging.WARNING, "run_clm"):
        main(run)
    assert "1 of its tensors are missing and begin at random: transformer.h.1.mlp.c_fc.weight" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_weights_that_cannot_be_read(model_run, tmp_path, damage):
    run = model_run(lambda tensors: None)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2) if damage == "cut" else path.unlink()
    with pytest.raises(UsageError, match=f"--model_name_or_path {tmp_path}: its weights cannot be loaded"):
        main(run)


@pytest.mark.slow
def test_a_checkpoint_of_another_optimizer(tmp_path, monkeypatch, capsys):
    write_token_bin(tmp_path / "tokens.bin", np.arange(2000) % 200)
    data = ("--train_file", str(tmp_path / "tokens.bin"), "--validation_split_percentage", "0", "--block_size", "16")
    model = ("--config_overrides", f"{SIZES},vocab_size=300", "--output_dir", str(tmp_path / "out"), "--do_train")
    steps = ("--save_steps", "1", "--resume_from_checkpoint", "auto", *QUIET)
    main([*data, *model, "--optim", "mars_shampoo", "--max_steps", "1", *steps])
    run = [*data, *model, "--optim", "mars_m", "--max_steps", "2", *steps]
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *run])
    with pytest.raises(SystemExit) as end:
        command("run_clm.py")
    assert end.value.code == 2
    assert "checkpoint-1: the checkpoint was saved with optim='mars_shampoo', but this run" in capsys.readouterr().err
