"""MARS where Transformers users already are: TRL, PEFT, Seq2SeqTrainer, searches, model cards. Tiny local models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from datasets import Dataset
from helpers import NAMES, tiny_gpt2
from huggingface_hub.utils import filter_repo_objects
from launch_helpers import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from trainer_helpers import losses, make_trainer, optimizer_of, token_blocks, weights
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_mars import MarsAdamW, MarsDiagnosticsCallback, MarsLion, MarsShampoo, MarsTrainer

TEXTS = [f"the {animal} sees the {thing}" for animal in ("cat", "dog", "bird") for thing in ("sun", "moon", "sea")]
OPTIM = {"optim": "mars_adamw", "optim_args": "gamma=0.05", "learning_rate": 1e-3, "max_steps": 3}
RUN = {
    **OPTIM,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]", "[PAD]"]))
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, tokenizer):
    """A folder with a tiny GPT-2 and its tokenizer, and one beside it with a data set."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_gpt2(n_positions=32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def assert_mars_trained(trainer, before, optimizer_cls=MarsAdamW, gamma=0.05):
    optimizer = optimizer_of(trainer)
    assert type(optimizer) is optimizer_cls and optimizer.param_groups[0]["gamma"] == gamma
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert set(optimizer.state) == set(trained)
    assert all(torch.isfinite(torch.tensor(losses(trainer)))) and len(losses(trainer)) == trainer.args.max_steps
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def trainable(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


# ---- TRL ----


@pytest.mark.slow
@pytest.mark.parametrize("optim_args", ["gamma=0.05", "gamma=0.05,max_norm=none"])
def test_sft_trainer(tmp_path, tokenizer, optim_args):
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), **{**RUN, "optim_args": optim_args}, bf16=False, max_length=16)
    trainer = SFTTrainer(
        tiny_gpt2(), args=args, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer
    )
    MarsDiagnosticsCallback().attach(trainer)
    before = trainable(trainer.model)
    trainer.train()
    assert_mars_trained(trainer, before)
    assert trainer.state.log_history[1].keys() >= {"mean_token_accuracy", "mars/correction_ratio"}


@pytest.mark.slow
def test_dpo_trainer(tmp_path, tokenizer):
    from trl import DPOConfig, DPOTrainer

    pairs = {"prompt": TEXTS, "chosen": [" the sun"] * len(TEXTS), "rejected": [" the sea"] * len(TEXTS)}
    args = DPOConfig(output_dir=str(tmp_path), **RUN, bf16=False, max_length=16)
    model, reference = tiny_gpt2(), tiny_gpt2()
    trainer = DPOTrainer(
        model, reference, args=args, train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer
    )
    before, frozen = trainable(trainer.model), [p.detach().clone() for p in reference.parameters()]
    trainer.train()
    assert_mars_trained(trainer, before)
    assert all(torch.equal(a, b) for a, b in zip(frozen, reference.parameters(), strict=True))


@pytest.mark.slow
def test_grpo_trainer(tmp_path, tokenizer):
    """Completions are sampled, and rewarded for their length: their losses have gradients."""
    from trl import GRPOConfig, GRPOTrainer

    def reward(completion_ids, **kwargs):
        return [float(len(set(ids))) for ids in completion_ids]

    sizes = {"num_generations": 4, "max_completion_length": 6}
    args = GRPOConfig(output_dir=str(tmp_path), **RUN, **sizes, bf16=False)
    prompts = Dataset.from_dict({"prompt": TEXTS})
    tokenizer.padding_side = "left"
    trainer = GRPOTrainer(tiny_gpt2(), reward, args=args, train_dataset=prompts, processing_class=tokenizer)
    before = trainable(trainer.model)
    trainer.train()
    assert_mars_trained(trainer, before)


@pytest.mark.slow
@pytest.mark.parametrize("how", [["-m", "trl.scripts.sft"], ["trl", "sft"]], ids=["module", "command"])
def test_trls_command_line(tmp_path, saved_model, how):
    """A script of others, a local model, a local data set; `trl sft` starts the script as a new command."""
    command = [sys.executable, "-m", "hf_mars", "--mars_diagnostics", *how]
    command += ["--model_name_or_path", str(saved_model / "model"), "--dataset_name", str(saved_model / "data")]
    command += ["--output_dir", str(tmp_path), "--optim", "mars_adamw", "--optim_args", "gamma=0.05"]
    command += ["--max_steps", "3", "--logging_steps", "1", "--max_length", "16", "--use_cpu", "--bf16", "false"]
    command += ["--save_strategy", "steps", "--save_steps", "3", "--report_to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "Training completed" in done.stdout, done.stderr[-3000:]
    log = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if row.get("mars/correction_ratio", 0) > 0] == [2, 3]
    groups = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"]
    assert groups[0]["gamma"] == 0.05


# ---- Seq2Seq and PEFT ----


def test_seq2seq_trainer(tmp_path, tokenizer):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=2, eos_token_id=1))
    rows = [{"input_ids": tokenizer(text)["input_ids"], "labels": tokenizer(text)["input_ids"]} for text in TEXTS]
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), **RUN, predict_with_generate=True, generation_max_length=6
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, data_collator=collator, processing_class=tokenizer
    )
    before = trainable(model)
    trainer.train()
    assert_mars_trained(trainer, before)
    assert trainer.predict(rows).predictions.shape[0] == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("modules_to_save", [None, ["lm_head", "ln_f"]])
@pytest.mark.parametrize(("optim", "optimizer_cls"), [("mars_adamw", MarsAdamW), ("mars_m", MarsShampoo)])
def test_lora(tmp_path, optim, optimizer_cls, modules_to_save):
    """Adapters are matrices; a saved head is an embedding, a saved norm 1d; resuming is exact."""
    from peft import LoraConfig, get_peft_model

    def trained(resume=None):
        base = tiny_gpt2(tie_word_embeddings=modules_to_save is None)
        config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=modules_to_save, fan_in_fan_out=True)
        torch.manual_seed(1)
        model = get_peft_model(base, config)
        before = trainable(model)
        trainer = make_trainer(tmp_path, model=model, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, before

    settings = {**OPTIM, "optim": optim, "save_strategy": "steps", "save_steps": 2}
    trainer, before = trained()
    assert_mars_trained(trainer, before, optimizer_cls)
    names = {p: name for name, p in trainer.model.named_parameters()}
    kinds = {names[p]: group["kind"] for group in optimizer_of(trainer).param_groups for p in group["params"]}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {"matrix"}
    assert {kind for name, kind in kinds.items() if "ln_f" in name} == ({"1d"} if modules_to_save else set())
    if modules_to_save and optim == "mars_m":
        assert {kind for name, kind in kinds.items() if "lm_head" in name} == {"embedding"}
    resumed, _ = trained(str(tmp_path / "checkpoint-2"))
    for a, b in zip(trainable(trainer.model), trainable(resumed.model), strict=True):
        assert torch.equal(a, b)


# ---- what the Trainer does by itself ----


class OptimizerRecorder(TrainerCallback):
    """The optimizer's settings when each training begins."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        group = optimizer.param_groups[0]
        self.seen.append((type(optimizer), group["gamma"], group["betas"], group["initial_lr"]))


@pytest.mark.slow
@pytest.mark.parametrize("trainer_cls", [Trainer, MarsTrainer])
def test_hyperparameter_search_over_optim_args(tmp_path, trainer_cls):
    """What optuna chose is what each trial's new optimizer has; the best run can be trained again."""
    import optuna

    def space(trial):
        gamma = trial.suggest_float("gamma", 0.01, 0.1)
        beta1 = trial.suggest_categorical("beta1", [0.9, 0.95])
        chosen = {
            "optim": trial.suggest_categorical("optim", ["mars_adamw", "mars_lion"]),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
            "optim_args": f"gamma={gamma},beta1={beta1}",
        }
        trials.append(trial.params)
        return chosen

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    recorder, trials = OptimizerRecorder(), []
    trainer = make_trainer(tmp_path, trainer_cls, model=tiny_gpt2(), callbacks=[recorder], max_steps=2)
    trainer.model_init = lambda trial: tiny_gpt2()
    best = trainer.hyperparameter_search(
        space,
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=4,
        backend="optuna",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    classes = {"mars_adamw": MarsAdamW, "mars_lion": MarsLion}
    expected = [(classes[t["optim"]], t["gamma"], (t["beta1"], 0.99), t["learning_rate"]) for t in trials]
    assert len(trials) == 4 and {t["optim"] for t in trials} == set(classes)
    assert recorder.seen == [(c, pytest.approx(g), b, pytest.approx(lr)) for c, g, b, lr in expected]
    assert best.hyperparameters in trials


@pytest.mark.slow
@pytest.mark.parametrize("optim_args", ["gamma=0.05", "gamma=0.05,exact=true"])
def test_auto_find_batch_size(tmp_path, optim_args):
    """Out of memory in the middle of a run: it starts over with smaller batches. Weights and optimizer go on, as the
    Trainer has it for any optimizer."""

    class SmallMemory(MarsTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step >= 2 and len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().compute_loss(model, inputs, *args, **kwargs)

    def run(**settings):
        trainer = make_trainer(tmp_path, SmallMemory, max_steps=5, auto_find_batch_size=True, **settings)
        before = trainable(trainer.model)
        trainer.train()
        assert trainer._train_batch_size == 2 and trainer.state.global_step == 5
        steps = {int(state["step"]) for state in optimizer_of(trainer).state.values()}
        return trainer, before, steps

    trainer, before, steps = run(optim="mars_adamw", optim_args=optim_args)
    assert_mars_trained(trainer, before)
    assert steps == run(optim="adamw_torch")[2]
    assert all("mars/correction_ratio" in row for row in trainer.state.log_history if "loss" in row)


def test_load_best_model_at_end(tmp_path):
    """The "best" is the one with the highest loss, so that it is not the last."""
    evaluations = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, **{**OPTIM, "learning_rate": 3e-2}, **evaluations, **best)
    trainer.train()
    history = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = max(range(len(history)), key=history.__getitem__)
    assert best < len(history) - 1 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best + 1}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[best], rel=1e-6)
    assert all(torch.isfinite(w).all() for w in weights(trainer))


# ---- model cards ----


def card_of(trainer):
    trainer.create_model_card()
    return re.search(r"^- optimizer: (.*)$", (Path(trainer.args.output_dir) / "README.md").read_text(), re.M)[1]


@pytest.mark.parametrize("trainer_cls", [Trainer, MarsTrainer])
def test_model_card_states_the_runs_hyperparameters(tmp_path, trainer_cls):
    """transformers would print adam_beta1 and adam_beta2 (0.9, 0.999), which this run does not use."""
    args = TrainingArguments(
        str(tmp_path),
        **{**RUN, "optim_args": "gamma=0.05,max_norm=none,eps=1e-6,lr_1d=2e-3,beta2_1d=0.9,last_grad_dtype=bfloat16"},
    )
    trainer = trainer_cls(tiny_gpt2(), args, train_dataset=token_blocks(8))
    trainer.train()
    matrix, vector = card_of(trainer).split("; ")
    matrix_settings = ["lr=0.001", "betas=(0.9, 0.99)", "eps=1e-06", "gamma=0.05", "max_norm=None", "exact=False"]
    matrix_settings += ["last_grad_dtype=bfloat16"]
    assert all(setting in matrix for setting in ["MarsAdamW", "matrix", *matrix_settings])
    assert all(setting in vector for setting in ["1d", "adamw", "lr=0.002", "betas=(0.9, 0.9)", "eps=1e-06"])


@pytest.mark.parametrize("optim", NAMES)
def test_model_card_before_and_after_training_is_the_same(tmp_path, optim):
    trainer = make_trainer(tmp_path, optim=optim, optim_args="beta1=0.9", max_steps=1)
    before = card_of(trainer)
    trainer.train()
    assert card_of(trainer) == before
    assert "lr=0.01, betas=(0.9, 0.99)" in before and ("lr=0.005" in before) == (
        optim in ("mars_lion", "mars_shampoo")
    )


def test_what_push_to_hub_uploads(tmp_path, monkeypatch):
    """The folder that goes to the Hub has the weights and the card; no Hub here, but all that leads there."""
    hub, uploaded = MagicMock(), {}
    hub.create_repo.return_value.repo_id = "me/tiny"

    def upload_folder(repo_id, folder_path, ignore_patterns, **kwargs):
        paths = filter_repo_objects(map(str, Path(folder_path).rglob("*")), ignore_patterns=ignore_patterns)
        uploaded.update({Path(path).name: path for path in paths}, repo_id=repo_id)

    hub.upload_folder = upload_folder
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    trainer = make_trainer(tmp_path / "tiny", max_steps=1, hub_model_id="me/tiny", optim_args="gamma=0.05")
    trainer.train()
    trainer.push_to_hub()
    assert uploaded["repo_id"] == "me/tiny" and "model.safetensors" in uploaded
    card = Path(uploaded["README.md"]).read_text()
    assert re.search(r"^- optimizer: MarsAdamW .*betas=\(0\.9, 0\.99\).*gamma=0\.05", card, re.M), card
    assert "betas=(0.9,0.999)" not in card


def test_model_cards_of_other_optimizers_are_transformers_own(tmp_path):
    trainer = make_trainer(tmp_path, optim="adamw_torch", max_steps=1)
    trainer.train()
    assert "with betas=(0.9,0.999) and epsilon=1e-08" in card_of(trainer)


def test_model_card_of_an_optimizer_passed_in(tmp_path):
    model = tiny_gpt2()
    args = TrainingArguments(str(tmp_path), **{**RUN, "optim": "adamw_torch", "optim_args": None, "max_steps": 1})
    optimizer = MarsLion(model.parameters(), lr=1e-4, gamma=0.2)
    trainer = Trainer(model, args, train_dataset=token_blocks(8), optimizers=(optimizer, None))
    trainer.train()
    assert "MarsLion" in card_of(trainer) and "gamma=0.2" in card_of(trainer)
