"""run_clm.py: what it refuses, what it keeps, what it reports, and whole runs."""

import json
import logging
import math
import re
import runpy
import shutil

import pytest
import torch
import yaml
from clm_helpers import (
    DOCUMENTS,
    QUIET,
    ROOT,
    TINY_MODEL,
    log_history,
    run_clm,
    run_main,
    run_script,
    write_documents,
    write_token_bin,
)
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from hf_mars.corpus import UsageError


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(output folder, metrics) of a short run on the novel, which tests must leave as it is."""
    output_dir = tmp_path_factory.mktemp("trained")
    metrics = run_main(
        *("--output_dir", output_dir, "--max_steps", 40, "--learning_rate", 1e-2, "--max_eval_samples", 21),
        *("--eval_strategy", "steps", "--eval_steps", 20, "--eval_on_start", "--save_steps", 20),
    )
    return output_dir, metrics


def parse(*arguments):
    return run_clm.parse_arguments([str(argument) for argument in arguments])


# ---- arguments ----


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], (True, True)),
        (["--eval_strategy", "steps"], (True, True)),
        (["--do_train"], (True, False)),
        (["--do_train", "--eval_strategy", "epoch"], (True, True)),
        (["--do_eval"], (False, True)),
        (["--do_eval", "--do_train"], (True, True)),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else "",
)
def test_training_and_evaluation_are_on_unless_one_is_chosen(arguments, expected):
    training_args = parse("--output_dir", "x", *arguments)[-1]
    assert (training_args.do_train, training_args.do_eval) == expected


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_file_of_arguments_and_the_command_line_on_top(tmp_path, suffix):
    values = {
        "output_dir": "x",
        "learning_rate": 1e-3,
        "do_eval": True,
        "streaming": False,
        "max_steps": 7,
        "label_names": ["labels"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "train_file": None,
    }
    path = tmp_path / f"arguments.{suffix}"
    path.write_text(json.dumps(values) if suffix == "json" else yaml.safe_dump(values))
    _, data_args, _, training_args = parse(path, "--max_steps", 9)
    assert (training_args.learning_rate, training_args.max_steps) == (1e-3, 9)
    assert (training_args.do_train, training_args.do_eval) == (False, True)
    assert (data_args.streaming, data_args.train_file) == (False, None)
    assert training_args.label_names == ["labels"]
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_a_file_of_arguments_includes_others(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.yaml").write_text("max_steps: 1\nseed: 1\noutput_dir: a")
    (tmp_path / "parts" / "b.json").write_text('{"seed": 2, "logging_steps": 2, "output_dir": "b"}')
    (tmp_path / "c.yaml").write_text("include: [parts/a.yaml, parts/b.json]\noutput_dir: c")
    training_args = parse(tmp_path / "c.yaml")[-1]
    assert (training_args.max_steps, training_args.seed, training_args.logging_steps) == (1, 2, 2)
    assert training_args.output_dir == "c"


FILE_VALUES = {
    "lr_scheduler_kwargs: {min_lr: 1e-5}": {"lr_scheduler_kwargs": {"min_lr": 1e-5}},
    "learning_rate: 2E-3": {"learning_rate": 2e-3},
    "seed: 010": {"seed": 10},
    "save_strategy: no": {"save_strategy": "no"},
    "do_eval: false\ndo_train: True": {"do_eval": False, "do_train": True},
    "dataset_config_name: 2024-01-01": {"dataset_config_name": "2024-01-01"},
    "sample_prompt: yes": {"sample_prompt": "yes"},
    "resume_from_checkpoint: true": {"resume_from_checkpoint": "true"},
    "tokenizer_name: ~\nsample_prompt: null": {"tokenizer_name": None, "sample_prompt": None},
    "lora_target_modules: [c_attn, c_fc]": {"lora_target_modules": "c_attn,c_fc"},
    "report_to: [none]\nlabel-names: [a, b]": {"report_to": [], "label_names": ["a", "b"]},
    "optim_args: {gamma: 1e-2, max_norm: none, exact: true}": {"optim_args": "gamma=0.01,max_norm=none,exact=true"},
    "optim_args: {max_norm: null}": {"optim_args": "max_norm=none"},
    "config_overrides: {n_layer: 2, scale_attn_weights: false}": {
        "config_overrides": "n_layer=2,scale_attn_weights=false"
    },
    "config_overrides: [n_layer=2, n_head=2]": {"config_overrides": "n_layer=2,n_head=2"},
}


@pytest.mark.parametrize("text, expected", FILE_VALUES.items(), ids=FILE_VALUES)
def test_values_of_a_file_arrive_as_they_are_written(tmp_path, text, expected):
    (tmp_path / "a.yaml").write_text(text)
    parsed = {name: value for arguments in parse(tmp_path / "a.yaml") for name, value in vars(arguments).items()}
    assert {name: parsed[name] for name in expected} == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a list", "must hold one mapping"),
        ("{unclosed", "cannot be read as a file of arguments"),
        (None, "cannot be read as a file of arguments"),
        ("report_to: []", r"report_to: \[\]: is an empty list; leave it out for the default"),
        ("include: parts/a.yaml", r"include: 'parts/a\.yaml': must be a list of files"),
        ("include: [1]", r"include: \[1\]: must be a list of files"),
        ("include: [b.yaml]", r"b\.yaml: include: arguments\.yaml: would include itself"),
        ("include: [missing.yaml]", r"missing\.yaml: cannot be read"),
    ],
)
def test_a_file_that_holds_no_arguments(tmp_path, text, message):
    path = tmp_path / "arguments.yaml"
    if text:
        path.write_text(text)
    (tmp_path / "b.yaml").write_text("include: [arguments.yaml]")
    with pytest.raises(UsageError, match=message):
        parse(path)


def test_files_on_the_command_line_replace_a_data_set_in_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("dataset_name: d\ndataset_config_name: c\noutput_dir: x")
    assert parse(path)[1].dataset_name == "d"
    data_args = parse(path, "--train_file", "train.bin")[1]
    assert (data_args.dataset_name, data_args.dataset_config_name, data_args.train_file) == (None, None, "train.bin")


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--global_batch_size 24", 3),
        ("--global_batch_size 8", 1),
        ("--global_batch_size 20", UsageError("--global_batch_size 20: must be a multiple of 8")),
        ("--global_batch_size 0", UsageError("--global_batch_size 0: must be a multiple of 8")),
        (
            "--global_batch_size 24 --gradient_accumulation_steps 2",
            UsageError("--global_batch_size 24: sets --gradient_accumulation_steps, which is given as 2"),
        ),
    ],
)
def test_the_global_batch_sets_the_accumulation(monkeypatch, options, expected):
    *_, run_args, training_args = parse("--output_dir", "x", "--per_device_train_batch_size", 4, *options.split())
    monkeypatch.setattr(type(training_args), "world_size", 2)
    monkeypatch.setattr(type(training_args), "n_gpu", 1)
    if isinstance(expected, UsageError):
        with pytest.raises(UsageError, match=str(expected)):
            run_clm.set_accumulation(run_args.global_batch_size, training_args)
    else:
        run_clm.set_accumulation(run_args.global_batch_size, training_args)
        assert training_args.gradient_accumulation_steps == expected


REFUSED = {
    "--save_strategy foo": "--save_strategy.* invalid choice: 'foo'.*steps",
    "--learning_rate abc": "--learning_rate.* invalid float value: 'abc'",
    "--lora 4": "ambiguous option: --lora could match --lora_r",
    "--seed": "--seed: expected one argument",
    "--train_file 1.jsonl 2.jsonl": "2.jsonl: belongs to no argument; .*pattern in quotes, .*file of arguments first",
    "--max_steps 3 a.yaml": "a.yaml: belongs to no argument; .*pattern in quotes, .*file of arguments first",
    "--optim_args gamm=0.1": r"'gamm'.*nearest.*'gamma'",
    "--optim_args gamma=abc": "gamma='abc'",
    "--learning_rat_ 1": "unknown argument --learning_rat_; the nearest valid one is --learning_rate",
    "--optim mars_adam": "mars_adam is not a valid OptimizerNames",
    "--model_type nosuch": "--model_type nosuch: .*Allowed: .*gpt2",
    "--model_type gpt2 --config_name c": "--model_type gpt2: --config_name c",
    "--model_type gpt2 --model_name_or_path m": "--model_type gpt2: .*--model_name_or_path m",
    "--config_overrides n_layer=1 --model_name_or_path m": "--config_overrides n_layer=1: .*--model_name_or_path m",
    "--config_overrides n_layers=1": "--config_overrides n_layers=1: .*the nearest is 'n_layer'",
    "--config_overrides n_layer": "--config_overrides n_layer: 'n_layer' must be key=value",
    "--config_overrides n_layer=many": "--config_overrides n_layer=many: .*many",
    "--vocab_size 300 --model_name_or_path m": "--vocab_size 300: .*--model_name_or_path brings one",
    "--vocab_size 300 --tokenizer_name t": "--vocab_size 300: .*--tokenizer_name brings one",
    "--vocab_size 100": "--vocab_size 100: must be at least 257",
    "--model_name_or_path ./nosuch": "--model_name_or_path ./nosuch: no model configuration there",
    "--config_name ./nosuch": "--config_name ./nosuch: no model configuration there",
    "--tokenizer_name ./nosuch": "--tokenizer_name ./nosuch: no tokenizer there",
    "--block_size 1": "--block_size 1: must be at least 2",
    "--block_size 64 --config_overrides n_positions=32": "--block_size 64: .* 32 positions; allowed: 2 to 32",
    "--block_size 2000 --model_type gpt2": "--block_size 2000: the model has 1024 positions",
    "--max_train_samples 0": "--max_train_samples 0: must be at least 1",
    "--max_eval_samples 0": "--max_eval_samples 0: must be at least 1",
    "--preprocessing_num_workers 0": "--preprocessing_num_workers 0: must be at least 1",
    "--validation_split_percentage 100": "--validation_split_percentage 100: must be between 0 and 99",
    "--validation_split_percentage 0": "--validation_split_percentage 0: leaves nothing to evaluate on",
    "--train_file a.doc": r"--train_file a.doc: .*\.parquet",
    "--train_file missing.txt": "--train_file missing.txt: there is no such file",
    "--train_file here.txt --dataset_name d": "--train_file here.txt: .*--dataset_name d",
    "--train_file here.txt": "--validation_split_percentage 5: 1 row",
    "--train_file two.txt": r"--block_size 128: the training text has only \d+ tokens",
    "--validation_file here.txt": "--validation_file here.txt: there is no text to train on",
    "--do_eval --validation_file two.txt": "--validation_file two.txt: is no text to train a tokenizer on",
    "--do_eval --dataset_name held_out": "--dataset_name held_out: has no train split, and a tokenizer is",
    "--dataset_name held_out --tokenizer_name tokenizer": "--dataset_name held_out: has no train split; .*--do_eval",
    "--validation_file here.txt --train_file two.txt --block_size 4": "--block_size 4: the validation text has only",
    "--streaming": "--streaming needs --max_steps, a positive number, not -1",
    "--streaming --max_steps 1 --dataloader_num_workers 2": "--dataloader_num_workers 2: .*at most 1",
    "--streaming --max_steps 1 --train_file two.txt --validation_file two.txt": "--block_size 128: .*fewer tokens",
    "--streaming --max_steps 1 --train_file two.txt": "128: .* first 500 rows, .*--validation_split_percentage 5",
    "--config_name untyped.json": "--config_name untyped.json: no model configuration there: .*model_type",
    "--dataset_name folder --validation_split_percentage 0": "--dataset_name folder: has no validation split",
    "--attn_implementation nosuch": "--attn_implementation nosuch: .*eager",
    "--text_column body --train_file two.jsonl": "--text_column body: --train_file two.jsonl has no such column",
    "--append_eos": "--append_eos: the lines of a txt file",
    "--lora_r 4": "--lora_r 4: adapts a pretrained model; give --model_name_or_path",
    "--lora_r 0": "--lora_r 0: must be at least 1",
    "--lora_r 4 --lora_dropout 1": r"--lora_dropout 1.0: must be in \[0, 1\)",
    "--lora_alpha 4": "--lora_alpha 4: needs --lora_r",
    "--lora_target_modules c_attn": "--lora_target_modules c_attn: needs --lora_r",
    "--train_file a.bin": "--train_file a.bin: there is no such file",
    "--train_file b.bin": r"--train_file .*b\.bin: 3 bytes are no tokens of 2 bytes each",
    "--train_file t.bin --block_size 4": "t.bin: holds token id 60000, but the model's embedding has 50257 rows",
    "--train_file t.bin --block_size 64": "--block_size 64: the training text has only 19 tokens",
    "--train_file t.bin --validation_file two.txt": "--validation_file two.txt: both files must hold tokens",
    "--train_file t.bin --streaming --max_steps 1": "--streaming True: token files",
    "--train_file t.bin --append_eos": "--append_eos True: the documents in token files",
    "--train_file t.bin --text_column body": "--text_column body: token files have no columns",
    "--train_file t.bin --vocab_size 300": "--vocab_size 300: no tokenizer is trained for token files",
    "--train_file t.bin --sample_prompt It": "--sample_prompt It: needs the tokenizer of the token files",
    "--train_file t.bin --validation_split_percentage 0": "--validation_split_percentage 0: leaves nothing",
    "--global_batch_size 12": "--global_batch_size 12: must be a multiple of 8, --per_device_train_batch_size 8 on 1",
    "--do_train false": "--do_train false --do_eval false: there is nothing to do",
    "--do_train --eval_on_start": "--eval_on_start true: needs evaluation",
    "--prediction_loss_only true": "--prediction_loss_only true: .*computed from the logits",
    "--resume_from_checkpoint true": "--resume_from_checkpoint true: there is no complete checkpoint",
    "--resume_from_checkpoint nosuch": "--resume_from_checkpoint nosuch: .*allowed: true, auto, false or the path",
    "--resume_from_checkpoint auto --overwrite_output_dir": "--resume_from_checkpoint auto: contradicts",
}


@pytest.mark.parametrize("arguments, message", REFUSED.items(), ids=REFUSED)
def test_what_cannot_work_is_refused_by_name(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("one")
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "held_out").mkdir()
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "[UNK]": 1}, "[UNK]"))
    run_clm.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "tokenizer")
    for name in ("two.jsonl", "folder/train.jsonl", "held_out/validation.jsonl"):
        write_documents(tmp_path / name, ["one", "two"])
    (tmp_path / "untyped.json").write_text('{"n_layer": 1}')
    (tmp_path / "b.bin").write_bytes(b"abc")
    write_token_bin(tmp_path / "t.bin", [60000] * 20)
    with pytest.raises(UsageError, match=message):
        run_clm.main(["--output_dir", "out", "--use_cpu", "--cache_dir", "cache", *arguments.split()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", ["--validation_split_percentage 0 --do_train", "--validation_file here.txt"])
def test_many_workers_may_read_a_stream_that_is_not_split(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("one")
    streaming = "--streaming --max_steps 1 --dataloader_num_workers 2 --train_file here.txt --output_dir out"
    model_args, data_args, run_args, training_args = parse(*streaming.split(), *options.split())
    run_clm.check_arguments(model_args, data_args, run_args, training_args)


def test_a_tokenizer_larger_than_the_embedding_is_refused(trained, tmp_path):
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(trained[0], vocab_size=200, ignore_mismatched_sizes=True).save_pretrained(
        model
    )
    with pytest.raises(
        UsageError, match=r"--tokenizer_name .* has 300 tokens, but .* 200 rows; allowed: .* at most 200"
    ):
        run_main("--output_dir", tmp_path / "out", "--model_name_or_path", model, "--tokenizer_name", trained[0])
    with pytest.raises(UsageError, match=r"--model_name_or_path .*: no tokenizer there; give --tokenizer_name"):
        run_main("--output_dir", tmp_path / "out", "--model_name_or_path", model)


# ---- the output folder ----


def make_checkpoint(folder, step, *, complete=True, optimizer=True):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    if complete:
        (checkpoint / "trainer_state.json").write_text("{}")
    if optimizer:
        (checkpoint / "optimizer.pt").touch()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Output folders in the present folder, each as a run may have left it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for step in (5, 10):
        make_checkpoint(tmp_path / "two", step)
    make_checkpoint(tmp_path / "cut", 9)
    make_checkpoint(tmp_path / "cut", 10, complete=False)
    make_checkpoint(tmp_path / "weights", 5, optimizer=False)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.txt").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()


BOTH_WAYS_OUT = "--resume_from_checkpoint true.*--overwrite_output_dir"


@pytest.mark.parametrize(
    "output_dir, options, expected",
    [
        ("new", "", None),
        ("empty", "", None),
        ("new", "--resume_from_checkpoint auto", None),
        ("logs", "--resume_from_checkpoint auto", None),
        ("two", "--resume_from_checkpoint true", "two/checkpoint-10"),
        ("two", "--resume_from_checkpoint True", "two/checkpoint-10"),
        ("two", "--resume_from_checkpoint auto", "two/checkpoint-10"),
        ("two", "--resume_from_checkpoint two/checkpoint-5", "two/checkpoint-5"),
        ("new", "--resume_from_checkpoint two/checkpoint-5", "two/checkpoint-5"),
        ("cut", "--resume_from_checkpoint true", "cut/checkpoint-9"),
        ("two", "--overwrite_output_dir", None),
        ("two", "", UsageError(BOTH_WAYS_OUT)),
        ("logs", "", UsageError(BOTH_WAYS_OUT)),
        ("model", "--resume_from_checkpoint false", UsageError(BOTH_WAYS_OUT)),
        ("model", "--resume_from_checkpoint auto", UsageError("finished model.*--overwrite_output_dir")),
        ("logs", "--resume_from_checkpoint two/checkpoint-5", UsageError("outside of --output_dir logs")),
        ("cut", "--resume_from_checkpoint cut/checkpoint-10", UsageError("no folder with a complete checkpoint")),
        ("weights", "--resume_from_checkpoint true", UsageError("no optimizer state.*--model_name_or_path")),
    ],
)
def test_where_a_run_starts(folders, output_dir, options, expected):
    _, _, run_args, training_args = parse("--output_dir", output_dir, *options.split())
    if isinstance(expected, UsageError):
        with pytest.raises(UsageError, match=str(expected)):
            run_clm.checkpoint_to_resume(training_args, run_args)
    else:
        assert run_clm.checkpoint_to_resume(training_args, run_args) == expected


def test_overwriting_removes_what_training_wrote_and_nothing_else(tmp_path, caplog):
    output_dir = tmp_path / "out"
    make_checkpoint(output_dir, 7)
    for name in ("notes.txt", "checkpoint-notes.txt", "all_results.json"):
        (output_dir / name).write_text("{}")
    with caplog.at_level(logging.WARNING, "run_clm"):
        run_main("--output_dir", output_dir, "--do_train", "--max_steps", 1, "--overwrite_output_dir")
    names = {path.name for path in output_dir.iterdir()}
    assert {"notes.txt", "checkpoint-notes.txt", "checkpoint-1", "model.safetensors"} <= names
    assert "checkpoint-7" not in names
    for name in ("checkpoint-7", "all_results.json"):
        assert f"removing {output_dir / name}" in caplog.text
    assert log_history(output_dir)[-1]["step"] == 1


def test_overwriting_spares_what_the_run_reads(trained):
    output_dir, _ = trained
    checkpoint = output_dir / "checkpoint-20"
    with pytest.raises(UsageError, match=f"would remove {checkpoint}, which this run reads"):
        run_main("--output_dir", output_dir, "--overwrite_output_dir", "--model_name_or_path", checkpoint)
    assert checkpoint.is_dir()


# ---- runs ----


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
    texts = run_clm.load_texts()["validation"]
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
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 0


def test_fine_tuning_starts_from_the_saved_model(trained, tmp_path, capsys):
    output_dir, metrics = trained
    tuned = run_main(
        *("--model_name_or_path", output_dir, "--output_dir", tmp_path / "tuned", "--max_steps", 20),
        *("--eval_on_start", "--max_eval_samples", 21, "--learning_rate", 3e-3, "--sample_prompt", "Mr. Darcy"),
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
    monkeypatch.delattr(run_clm, "train_bpe")  # the tokenizer is the checkpoint's
    run_main(
        *("--output_dir", tmp_path / "out", "--resume_from_checkpoint", output_dir / "checkpoint-20"),
        *("--max_steps", 40, "--learning_rate", 1e-2, "--max_eval_samples", 21),
    )
    expected, actual = (
        AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (output_dir, tmp_path / "out")
    )
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert (output_dir / "tokenizer.json").read_text() == (tmp_path / "out" / "tokenizer.json").read_text()


def weights_of(output_dir):
    return (output_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "length",
    [
        ("--max_steps", 5),
        ("--num_train_epochs", 1.5, "--max_train_samples", 24),  # 3 steps an epoch
        ("--max_steps", 5, "--streaming"),
        ("--max_steps", 5, "--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", 2),
    ],
    ids=lambda length: " ".join(map(str, length)),
)
def test_a_finished_run_is_not_trained_on(tmp_path, length):
    train = ("--train_file", write_documents(tmp_path / "a.txt"), "--cache_dir", tmp_path / "cache")
    # With a learning rate that climbs, the last of several models is worse than the first.
    rate = ("--learning_rate", 1.0, "--lr_scheduler_type", "constant", "--max_eval_samples", 2, "--save_steps", 2)
    run = (*train, *length, *rate, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "auto")
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
    run_clm.main(
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
    # However few blocks are used: what is reported are the tokens that no block could have held.
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
    metrics = run_clm.main(
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


def test_lora_trains_and_saves_adapters_only(trained, tmp_path):
    output_dir, _ = trained
    arguments = [
        *("--model_name_or_path", output_dir, "--output_dir", tmp_path, "--max_steps", 10, "--learning_rate", 1e-2),
        *("--lora_r", 4, "--lora_alpha", 8, "--lora_target_modules", "c_attn,c_fc", "--eval_on_start"),
        *("--max_eval_samples", 21, "--save_steps", 5),
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
    metrics = run_main(*arguments, "--learning_rate", 1e-1, "--lora_r", 4, "--max_eval_samples", 21)
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
    monkeypatch.setattr(run_clm.importlib.util, "find_spec", lambda name: None)
    assert refused(folder).startswith(f"--model_name_or_path {folder}: holds adapters, which need the package peft")


def test_lora_without_peft_says_how_to_install_it(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(run_clm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--lora_r 4: needs the package peft: pip install peft"):
        run_main("--model_name_or_path", trained[0], "--output_dir", tmp_path / "out", "--lora_r", 4)


def test_lora_of_modules_that_the_model_lacks(trained, tmp_path):
    with pytest.raises(UsageError, match="--lora_target_modules q_proj: "):
        run_main(
            *("--model_name_or_path", trained[0], "--output_dir", tmp_path, "--max_steps", 1),
            *("--lora_r", 4, "--lora_target_modules", "q_proj"),
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(trained, attention):
    model_args, *_ = parse("--output_dir", "x", "--model_name_or_path", trained[0], "--attn_implementation", attention)
    model = run_clm.load_model(run_clm.load_config(model_args, None), model_args)
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


def test_every_complaint_in_the_docs_names_a_test_that_exists():
    table = (ROOT / "docs" / "run_clm.md").read_text().split("## What users of the official script")[1]
    rows = [line for line in table.split("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 15
    for row in rows:
        tests = re.findall(r"`(test_\w+)\.py::(test_\w+)`", row)
        assert tests, row
        for module, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / f"{module}.py").read_text(), re.MULTILINE), row


# ---- as a command ----

LEARNING_RATES = {"mars_adamw": 1e-2, "mars_lion": 2e-3, "mars_shampoo": 3e-2, "mars_m": 1e-2}


@pytest.mark.parametrize("optim", LEARNING_RATES)
def test_the_command_trains_and_saves(optim, tmp_path):
    run = run_script(
        *("--optim", optim, "--learning_rate", LEARNING_RATES[optim], "--output_dir", "out", "--max_steps", 40),
        *("--logging_steps", 10, "--eval_on_start", "--max_eval_samples", 20, "--use_cpu", *TINY_MODEL),
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert "40/40" in run.stderr  # the progress bar
    history = log_history(tmp_path / "out")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert evaluations[-1] < evaluations[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("It is a truth", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, pad_token_id=0).shape[1] > 5


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--save_strategy", "foo"], "invalid choice: 'foo'"),
        (["unclosed.yaml"], "unclosed.yaml: cannot be read as a file of arguments: while parsing"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unclosed.yaml").write_text("{unclosed")
    monkeypatch.setattr("sys.argv", ["run_clm.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "run_clm.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("run_clm.py: error: ") and words in error
    assert error.count("\n") == 1 and error.endswith("\n")


def test_the_command_fails_in_one_line_before_anything_is_made(tmp_path):
    run = run_script("--optim", "mars_adamw", "--optim_args", "gamm=0.1", "--output_dir", "x", cwd=tmp_path)
    assert run.returncode == 2
    error = run.stderr.strip().splitlines()[-1]
    assert error.startswith("run_clm.py: error: ") and "'gamm'" in error and "'gamma'" in error
    assert "Traceback" not in run.stderr and "usage:" not in run.stderr
    assert not (tmp_path / "x").exists()
