"""Runs that go on from a checkpoint."""

import json
import shutil

import pytest
import torch
from clm_helpers import DOCUMENTS, log_history, run_main, write_documents
from transformers import AutoModelForCausalLM

from hf_mars.clm import tokenizer


def weights_of(output_dir):
    return (output_dir / "model.safetensors").read_bytes()


def test_a_resumed_stream_goes_on_where_it_was(tmp_path):
    """The stream is read again up to there: more than one pass over it, since it ends after 4 steps."""
    train = write_documents(tmp_path / "train.jsonl", DOCUMENTS[:100])
    run = (
        *("--streaming", "--train_file", train, "--validation_split_percentage", 0, "--do_train", "--max_steps", 6),
        *("--cache_dir", tmp_path / "cache", "--learning_rate", 1e-2, "--save_steps", 3, "--logging_steps", 1),
        *("--max_train_samples", 32),
    )
    run_main(*run, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    run_main(*run, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert weights_of(tmp_path / "resumed") == weights_of(tmp_path / "whole")
    losses = [entry["loss"] for entry in log_history(tmp_path / "resumed") if "loss" in entry]
    assert len(losses) == 6


def test_a_resumed_run_ends_like_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    output_dir, _ = trained
    monkeypatch.delattr(tokenizer, "train_bpe")  # the tokenizer is the checkpoint's
    run_main(
        *("--output_dir", tmp_path / "out", "--resume_from_checkpoint", output_dir / "checkpoint-20"),
        *("--max_steps", 40, "--learning_rate", 1e-2, "--max_eval_samples", 21),
    )
    expected, actual = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (output_dir, tmp_path / "out")
    )
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert (output_dir / "tokenizer.json").read_text() == (tmp_path / "out" / "tokenizer.json").read_text()


@pytest.mark.parametrize(
    "length",
    [
        ("--max_steps", 5),
        ("--num_train_epochs", 1.5, "--max_train_samples", 24),  # 3 steps an epoch
        ("--max_steps", 5, "--streaming"),
        # The loss falls: the largest is the first.
        ("--max_steps", 5, "--load_best_model_at_end", "--greater_is_better", "true", "--eval_strategy", "steps"),
    ],
    ids=lambda length: " ".join(map(str, length)),
)
def test_a_finished_run_is_not_trained_on(tmp_path, length):
    train = ("--train_file", write_documents(tmp_path / "a.txt"), "--cache_dir", tmp_path / "cache")
    often = ("--learning_rate", 1e-2, "--max_eval_samples", 2, "--save_steps", 2, "--eval_steps", 2)
    run = (*train, *length, *often, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "auto")
    finished = run_main(*run)
    weights, history = weights_of(tmp_path / "out"), log_history(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()  # as if the job had been killed before it saved the model
    checkpoints = sorted(tmp_path.glob("out/checkpoint-*"))

    again = run_main(*run)
    assert weights_of(tmp_path / "out") == weights
    assert again["eval_loss"] == finished["eval_loss"]
    assert "train_loss" in finished and "train_loss" not in again
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["train_loss"] == finished["train_loss"]
    assert sorted(tmp_path.glob("out/checkpoint-*")) == checkpoints
    steps = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert [(entry["step"], entry["loss"]) for entry in log_history(tmp_path / "out") if "loss" in entry] == steps
    assert not [entry for entry in log_history(tmp_path / "out") if "train_loss" in entry]
    if "--load_best_model_at_end" in length:
        assert weights != weights_of(checkpoints[-1])


def test_a_finished_run_goes_on_when_its_steps_are_raised(trained, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-40", tmp_path / "checkpoint-40")
    run = ("--output_dir", tmp_path, "--max_eval_samples", 2, "--resume_from_checkpoint", "auto")
    metrics = run_main(*run, "--max_steps", 42)
    assert log_history(tmp_path)[-1]["step"] == 42 and metrics["train_loss"] > 0
    assert weights_of(tmp_path) != weights_of(tmp_path / "checkpoint-40")


def test_what_is_written_takes_effect_though_it_is_the_default(tmp_path):
    """`--weight_decay 0` after 0.1: transformers' default, and asked for."""
    run = ("--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--do_train", "--save_steps", 1)
    run = (*run, "--train_file", write_documents(tmp_path / "a.txt"))

    def decay_after(step, *arguments):
        run_main(*run, "--max_steps", step, *arguments)
        groups = torch.load(tmp_path / "out" / f"checkpoint-{step}" / "optimizer.pt")["param_groups"]
        return max(group["weight_decay"] for group in groups)

    assert decay_after(1, "--weight_decay", 0.1) == 0.1
    assert decay_after(2, "--resume_from_checkpoint", "true") == 0.1
    assert decay_after(3, "--resume_from_checkpoint", "true", "--weight_decay", 0) == 0
