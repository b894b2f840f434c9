"""Files of arguments, alone and with a command line on top."""

import json

import pytest
import yaml
from clm_helpers import parse

from hf_mars.clm.errors import UsageError


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
        (None, "there is no such file of arguments"),
        ("report_to: []", r"report_to: \[\]: is an empty list; leave it out for the default"),
        ("include: parts/a.yaml", r"include: 'parts/a\.yaml': must be a list of files"),
        ("include: [1]", r"include: \[1\]: must be a list of files"),
        ("include: [b.yaml]", r"b\.yaml: include: arguments\.yaml: would include itself"),
        ("include: [missing.yaml]", r"missing\.yaml: there is no such file"),
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
