"""The recipes: the paper's hyperparameters, a batch that fits 8 and 16 processes, two steps of each on local text."""

import re
import sys
from pathlib import Path

import pytest
from clm_helpers import QUIET, log_history, run_clm, write_documents
from launch_helpers import ROOT, run_together
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from hf_mars.clm.argument_files import values_of_file
from hf_mars.clm.bpe import END_OF_TEXT, train_bpe
from hf_mars.clm.texts import Texts
from hf_mars.trainer.options import parse_optim_args

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# Per size: layers, heads, width, learning rates of MARS and AdamW, the authors' smallest learning rate.
SIZES = {
    "small": (12, 12, 768, 6e-3, 6e-4, 3e-5),
    "medium": (24, 16, 1024, 3e-3, 3e-4, 6e-5),
    "large": (36, 20, 1280, 2e-3, 2e-4, 1e-5),
    "xl": (48, 25, 1600, 2e-3, 2e-4, 1e-5),
}
DATA = {
    "openwebtext": ("Skylion007/openwebtext", None),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-100BT"),
}
# Validation losses at 50B tokens of OpenWebText: MARS-AdamW, AdamW.
PUBLISHED = {"small": ("2.849", "2.885"), "medium": ("2.636", "2.691"), "large": ("2.518", "2.561")}
ON_A_CPU = ("--bf16", "false", "--use_cpu")


def parse(path, *arguments):
    return run_clm.parse_arguments([str(path), *ON_A_CPU, *arguments])


def test_there_is_a_recipe_for_every_size_optimizer_and_data_set():
    expected = {
        f"gpt2_{size}_{optimizer}_{data}" for size in SIZES for optimizer in ("mars", "adamw") for data in DATA
    }
    assert {path.stem for path in RECIPES} == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_hyperparameters_are_the_papers(path):
    _, size, optimizer, data = path.stem.split("_", 3)
    layers, heads, width, mars_lr, adamw_lr, min_lr = SIZES[size]
    model_args, data_args, run_args, training_args = parse(path)

    config = run_clm.load_config(model_args, data_args.block_size)
    assert (config.model_type, config.n_layer, config.n_head, config.n_embd) == ("gpt2", layers, heads, width)
    assert config.n_positions == data_args.block_size == 1024
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0
    assert (data_args.dataset_name, data_args.dataset_config_name) == DATA[data]
    assert run_args.global_batch_size == 480

    assert (training_args.max_steps, training_args.warmup_steps) == (100_000, 2_000)
    assert training_args.lr_scheduler_type == "cosine_with_min_lr"
    assert training_args.lr_scheduler_kwargs == {"min_lr": min_lr}
    assert training_args.max_grad_norm == 1.0
    assert (training_args.ddp_timeout, training_args.save_total_limit) == (86_400, 2)
    betas = (training_args.adam_beta1, training_args.adam_beta2)
    if optimizer == "mars":
        assert training_args.optim == "mars_adamw"
        assert (training_args.learning_rate, training_args.weight_decay, betas) == (mars_lr, 0.01, (0.95, 0.99))
        stated = {key: values_of_file(path)[key] for key in ("adam_beta1", "adam_beta2")}
        assert stated == {"adam_beta1": 0.95, "adam_beta2": 0.99}  # and not left to any default
        assert parse_optim_args(training_args.optim_args, "mars_adamw") == {
            "gamma": 0.025,
            "max_norm": 1.0,
            "adjust_lr_fn": "original",
            "lr_1d": mars_lr / 2,
        }
    else:
        assert training_args.optim == "adamw_torch_fused"
        assert (training_args.learning_rate, training_args.weight_decay, betas) == (adamw_lr, 0.1, (0.9, 0.95))
        assert training_args.optim_args is None
    assert values_of_file(path)["bf16"] is True
    assert training_args.output_dir == f"out/{path.stem}"


@pytest.mark.parametrize("path", [path for path in RECIPES if "openwebtext" in path.stem], ids=lambda path: path.stem)
def test_published_losses_stand_in_the_recipe(path):
    _, size, optimizer, _ = path.stem.split("_", 3)
    comment = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert "github.com/AGI-Arena/MARS" in comment
    losses = re.findall(r"\b2\.\d{3}\b", comment)
    assert losses == list(PUBLISHED.get(size, ())[:: 1 if optimizer == "mars" else -1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("processes", [8, 16])
def test_an_update_takes_480_sequences_on_8_and_16_processes(monkeypatch, size, processes):
    *_, run_args, training_args = parse(ROOT / "recipes" / f"gpt2_{size}_mars_openwebtext.yaml")
    monkeypatch.setattr(type(training_args), "world_size", processes)
    run_clm.set_accumulation(run_args.global_batch_size, training_args)
    per_step = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    assert per_step * processes == 480


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """Arguments that put a small text and its tokenizer in the place of a recipe's."""
    folder = tmp_path_factory.mktemp("local")
    path = write_documents(folder / "text.jsonl")
    trained = train_bpe(Texts([{"text": "Document 1: word and an end."}]), 260)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained.to_str()), eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return (
        *("--train_file", path, "--tokenizer_name", folder / "tokenizer", "--cache_dir", folder / "cache"),
        *("--config_overrides", "n_layer=1,n_head=2,n_embd=32,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"),
        *("--block_size", 32, "--per_device_train_batch_size", 2, "--global_batch_size", 4, "--max_eval_samples", 4),
        *("--preprocessing_num_workers", 1, "--max_steps", 2, "--warmup_steps", 1, "--logging_steps", 1),
        *("--save_strategy", "no"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps_at_reduced_size(path, local, tmp_path):
    run_clm.main([str(argument) for argument in (path, *ON_A_CPU, *QUIET, *local, "--output_dir", tmp_path)])
    check_two_steps(path, tmp_path)


def check_two_steps(path, output_dir):
    history = log_history(output_dir)
    training_args = parse(path)[-1]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == [0.0, training_args.learning_rate]  # the warmup's start and its end
    assert {entry["step"] for entry in history if "eval_loss" in entry} == {2}


@pytest.mark.slow
def test_a_recipe_on_two_processes_with_a_sample(local, tmp_path):
    """As docs/recipes.md starts it; one process of the two prints a sample."""
    path = ROOT / "recipes" / "gpt2_small_mars_openwebtext.yaml"
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", *flags.split()]
    command = [*launch, "--main_process_port", "0", ROOT / "run_clm.py", path, *ON_A_CPU, *QUIET, *local]
    command += ["--per_device_train_batch_size", 1, "--sample_prompt", "Document 1", "--output_dir", tmp_path / "out"]
    (printed,) = run_together(lambda port: [({}, list(map(str, command)))], tmp_path)
    assert "INFO run_clm: 2 processes on cpu, " in printed
    check_two_steps(path, tmp_path / "out")
    assert len(re.findall("^Document 1", printed, flags=re.M)) == 1
