"""Whole runs: from scratch and from a model, on texts, streams and tokens, and what they report."""

import json
import logging
import math
import re

import pytest
import torch
from clm_helpers import DOCUMENTS, QUIET, log_history, parse, run_main, write_documents, write_token_bin
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from hf_mars.clm.model import load_config, load_model
from hf_mars.clm.run import main
from hf_mars.clm.texts import load_texts


def test_every_evaluation_reports_loss_perplexity_and_accuracy(trained):
    output_dir, metrics = trained
    evaluations = [entry for entry in log_history(output_dir) if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 20, 40, 40]  # at the start, during training, at the end
    for entry in evaluations:
        assert entry["eval_perplexity"] == math.exp(entry["eval_loss"])
        assert 0 <= entry["eval_accuracy"] <= 1
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.5
    written = json.loads((output_dir / "all_results.json").read_text())
    assert written == metrics
    assert metrics["eval_samples"] == 21 and metrics["train_samples"] > 1000
    for name in ("train_results.json", "eval_results.json"):
        assert (output_dir / name).is_file()


def test_reported_metrics_are_those_of_the_saved_model(trained):
    output_dir, metrics = trained
    model = AutoModelForCausalLM.from_pretrained(output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    texts = load_texts()["validation"]
    text = "".join("".join(batch) for batch in texts.batches())
    blocks = torch.tensor(tokenizer(text)["input_ids"][: 21 * 32]).view(21, 32)
    with torch.no_grad():
        logits = model(blocks).logits[:, :-1]
    targets = blocks[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())


def test_a_new_model_fits_its_tokenizer(trained):
    model = AutoModelForCausalLM.from_pretrained(trained[0])
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    assert model.config.vocab_size == len(tokenizer) == 300
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert model.generation_config.eos_token_id in (0, [0])  # older versions of transformers make a list of it


def test_fine_tuning_starts_from_the_saved_model(trained, tmp_path, capsys):
    output_dir, metrics = trained
    tuned = run_main(
        *("--model_name_or_path", output_dir, "--output_dir", tmp_path / "tuned", "--max_steps", 20),
        *("--eval_on_start", "--max_eval_samples", 21, "--learning_rate", 1e-3, "--sample_prompt", "Mr. Darcy"),
    )
    start = log_history(tmp_path / "tuned")[0]
    assert start["step"] == 0 and start["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert tuned["eval_loss"] < start["eval_loss"]
    printed = capsys.readouterr().out
    assert f"perplexity {start['eval_perplexity']:.2f} before training; after 20 steps" in printed
    assert printed.splitlines()[-1].startswith("Mr. Darcy") or "\nMr. Darcy" in printed


def test_evaluation_alone_writes_results_only(trained, tmp_path):
    output_dir, metrics = trained
    evaluated = run_main(
        "--do_eval", "--model_name_or_path", output_dir, "--output_dir", tmp_path, "--max_eval_samples", 21
    )
    assert evaluated["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"all_results.json", "eval_results.json"}


def test_a_data_set_without_training_text_can_be_evaluated(trained, tmp_path):
    (tmp_path / "data").mkdir()
    write_documents(tmp_path / "data" / "validation.jsonl", DOCUMENTS[:200])
    arguments = ("--do_eval", "--model_name_or_path", trained[0], "--output_dir", tmp_path / "out")
    data = ("--dataset_name", tmp_path / "data", "--cache_dir", tmp_path / "cache")
    assert run_main(*arguments, *data)["eval_samples"] > 10


@pytest.mark.parametrize("own_validation", [False, True])
def test_streaming_of_local_files(tmp_path, own_validation):
    train = write_documents(tmp_path / "train.jsonl")
    validation = ["--validation_file", write_documents(tmp_path / "validation.txt", DOCUMENTS[:100])]
    metrics = run_main(
        *("--streaming", "--train_file", train, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"),
        *("--max_steps", 5, *(validation if own_validation else [])),
    )
    assert metrics["eval_samples"] > 10
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_other_model_types_with_another_tokenizer(trained, tmp_path, model_type):
    overrides = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,max_position_embeddings=48"
    overrides += ",intermediate_size=64,num_key_value_heads=2" if model_type == "llama" else ",ffn_dim=64"
    overrides += "" if model_type == "llama" else ",word_embed_proj_dim=32"
    main(
        [
            *("--model_type", model_type, "--config_overrides", overrides, "--tokenizer_name", str(trained[0])),
            *("--output_dir", str(tmp_path), "--max_steps", "1", "--max_eval_samples", "2", "--use_cpu"),
            *("--dtype", "bfloat16"),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.config.model_type, model.config.vocab_size, model.dtype) == (model_type, 300, torch.bfloat16)


def test_max_samples_count_blocks(tmp_path, caplog):
    caplog.set_level(logging.INFO, "run_clm")
    path = write_documents(tmp_path / "a.txt")
    metrics = run_main(
        *("--train_file", path, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"),
        *("--num_train_epochs", 1, "--max_train_samples", 12, "--max_eval_samples", 3),
    )
    assert (metrics["train_samples"], metrics["eval_samples"]) == (12, 3)
    # However few blocks are used: the report is of the tokens that no block could have held.
    reports = dict(re.findall(r"(training|validation): ([\d,]+ tokens, .*)", caplog.text))
    assert reports.keys() == {"training", "validation"}
    for split, blocks in (("training", 12), ("validation", 3)):
        pattern = rf"([\d,]+) tokens, {blocks} blocks of 32; (\d+) tokens after the last complete block are not used"
        tokens, dropped = (int(number.replace(",", "")) for number in re.fullmatch(pattern, reports[split]).groups())
        assert dropped == tokens % 32
    assert log_history(tmp_path / "out")[-1]["step"] == 2  # 12 blocks in batches of 8


def test_token_files_need_no_tokenizer(tmp_path):
    train = write_token_bin(tmp_path / "train.bin", list(range(30)) * 100)
    validation = write_token_bin(tmp_path / "val.bin", list(range(30)) * 10)
    metrics = main(
        [
            *("--train_file", str(train), "--validation_file", str(validation), "--output_dir", str(tmp_path / "out")),
            *("--config_overrides", "n_layer=1,n_head=2,n_embd=32,vocab_size=30", "--block_size", "30"),
            *("--max_steps", "40", "--learning_rate", "3e-2", "--save_steps", "20", *QUIET),
        ]
    )
    assert (metrics["train_samples"], metrics["eval_samples"]) == (100, 10)
    assert metrics["eval_accuracy"] > 0.9  # each number is followed by the next
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 30
    assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(trained, attention):
    model_args, *_ = parse("--output_dir", "x", "--model_name_or_path", trained[0], "--attn_implementation", attention)
    model = load_model(load_config(model_args, None), model_args)
    assert model.config._attn_implementation == attention


def test_an_evaluation_keeps_no_logits(trained, tmp_path, monkeypatch):
    """Metrics get two numbers a token at most, one batch at a time, whatever the vocabulary."""
    sizes = []

    def spy(predictions, label_ids, **others):
        parts = predictions if isinstance(predictions, tuple) else (predictions,)
        sizes.append(sum(part.numel() for part in parts) / label_ids.numel())
        return EvalPrediction(predictions, label_ids, **others)

    monkeypatch.setattr("transformers.trainer.EvalPrediction", spy)
    run_main("--do_eval", "--model_name_or_path", trained[0], "--output_dir", tmp_path, "--max_eval_samples", 21)
    assert len(sizes) == 3 and max(sizes) < 2  # 21 blocks in batches of 8
