"""Arguments that cannot work, alone or together, as far as that shows before anything is loaded."""

import difflib
import importlib.util
import math
from collections.abc import Callable

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_mars import MarsTrainingArguments

from .arguments import LARGEST_VOCAB_SIZE, DataTrainingArguments, ModelArguments, RunArguments
from .bpe import SMALLEST_VOCAB_SIZE
from .errors import UsageError
from .files import file_format, is_token_bin

# What transformers takes as it is, to fail at later or to train with nonsense.
_POSITIVE: tuple[str, Callable[[float], bool]] = ("a number > 0", lambda v: v > 0)
_NOT_NEGATIVE: tuple[str, Callable[[float], bool]] = ("a number >= 0", lambda v: v >= 0)
_COUNT: tuple[str, Callable[[float], bool]] = ("at least 1", lambda v: v >= 1)
TRAINING_RANGES = {
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "num_train_epochs": _POSITIVE,
    "gradient_accumulation_steps": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "max_steps": ("at least 1, or -1 for num_train_epochs", lambda v: v >= 1 or v == -1),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _NOT_NEGATIVE),
    "dataloader_num_workers": _NOT_NEGATIVE,
    "seed": ("between 0 and 4294967295", lambda v: 0 <= v < 2**32),
}


def check_arguments(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    run_args: RunArguments,
    training_args: MarsTrainingArguments,
) -> None:
    """Raise UsageError for the first thing that cannot work."""
    _check_training(training_args)
    for arguments in (model_args, data_args):
        _check_not_empty(arguments)
    _check_model(model_args)
    _check_lora(model_args)
    _check_ranges(data_args)
    _check_files(data_args)
    if data_args.are_tokens:
        _check_token_bins(model_args, data_args, run_args)
    _check_splits(model_args, data_args, training_args)
    if data_args.streaming and training_args.do_train:
        _check_stream(data_args, training_args)


def _check_training(training_args: MarsTrainingArguments) -> None:
    if not (training_args.do_train or training_args.do_eval):
        raise UsageError("--do_train false --do_eval false: there is nothing to do; set one of them to true")
    if training_args.prediction_loss_only:
        raise UsageError(
            "--prediction_loss_only true: loss, perplexity and accuracy are computed from the logits; drop it "
            "(they are summed batch by batch, so it would save no memory)"
        )
    for name, (allowed, is_allowed) in TRAINING_RANGES.items():
        value = getattr(training_args, name)
        if value is not None and not (math.isfinite(value) and is_allowed(value)):  # eval_steps may be None
            raise UsageError(f"--{name} {value}: must be {allowed}")
    if training_args.fp16 and training_args.device.type == "cpu":
        raise UsageError("--fp16 true: needs a GPU; on CPUs give --bf16, or nothing for float32")
    _check_deepspeed(training_args)
    if training_args.eval_on_start and not training_args.do_eval:
        raise UsageError("--eval_on_start true: needs evaluation; give --do_eval too")
    if training_args.resume_from_checkpoint == "":
        raise UsageError(
            "--resume_from_checkpoint '': is empty; allowed: true, auto, false or the path of a checkpoint"
        )
    _check_schedule(training_args)


def _check_deepspeed(training_args: MarsTrainingArguments) -> None:
    plugin = training_args.deepspeed_plugin
    if training_args.save_only_model and training_args.load_best_model_at_end:
        if plugin is not None or training_args.fsdp_plugin_args is not None:
            engine = "FSDP" if plugin is None else "DeepSpeed"
            raise UsageError(
                f"--save_only_model true --load_best_model_at_end true: do not work together under {engine}, which "
                "loads a model from a whole checkpoint; drop one of the two"
            )
    if plugin is None:
        return
    check_deepspeed_agrees(training_args)
    if not training_args.do_train and plugin.zero_stage != 3:
        raise UsageError(
            f"--do_eval --deepspeed {training_args.deepspeed}: DeepSpeed evaluates alone under ZeRO stage 3, not "
            f"{plugin.zero_stage}; leave --deepspeed out"
        )


def check_deepspeed_agrees(training_args: TrainingArguments) -> None:
    """Raise UsageError where DeepSpeed's file has other values than the arguments, as far as transformers has compared
    them: those of the schedule when training starts, all others when TrainingArguments are made."""
    if mismatches := getattr(getattr(training_args, "hf_deepspeed_config", None), "mismatches", None):
        pairs = "; ".join(line.removeprefix("- ") for line in mismatches)
        raise UsageError(
            f"--deepspeed {training_args.deepspeed}: does not agree with the other arguments ({pairs}); make them "
            'equal, or write "auto" there'
        )


def _check_schedule(training_args: MarsTrainingArguments) -> None:
    """Make the schedule once, of a parameter that nobody trains."""
    name, given = SchedulerType(training_args.lr_scheduler_type), training_args.lr_scheduler_kwargs
    assert not isinstance(given, str)  # transformers has read it
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training_args.learning_rate)
    try:
        get_scheduler(name, optimizer, 0, 10, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--lr_scheduler_type {name.value} --lr_scheduler_kwargs {given}: {error}") from error


def _check_not_empty(arguments: ModelArguments | DataTrainingArguments) -> None:
    for name, value in vars(arguments).items():
        if value == "":
            raise UsageError(f"--{name} '': is empty; leave it out for the default")


def _check_model(model_args: ModelArguments) -> None:
    if model_args.is_pretrained:
        for name in ("model_type", "config_overrides"):
            if value := getattr(model_args, name):
                raise UsageError(
                    f"--{name} {value}: is for a new model, but --model_name_or_path {model_args.model_name_or_path} "
                    "brings its own configuration; drop one of the two"
                )
    if model_args.model_type is not None:
        if model_args.config_name is not None:
            raise UsageError(
                f"--model_type {model_args.model_type}: --config_name {model_args.config_name} already says it; "
                "drop one of the two"
            )
        if model_args.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            allowed = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
            nearest = difflib.get_close_matches(model_args.model_type, allowed, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"--model_type {model_args.model_type}: is not a causal language model that transformers knows; "
                f"the nearest is {nearest}. Allowed: {', '.join(allowed)}"
            )
    if model_args.vocab_size is not None and not model_args.trains_tokenizer:
        raise UsageError(
            f"--vocab_size {model_args.vocab_size}: is for a tokenizer that is trained here, but "
            f"{'--tokenizer_name' if model_args.tokenizer_name else '--model_name_or_path'} brings one; drop it"
        )
    if model_args.vocab_size is not None and not SMALLEST_VOCAB_SIZE <= model_args.vocab_size <= LARGEST_VOCAB_SIZE:
        raise UsageError(
            f"--vocab_size {model_args.vocab_size}: must be between {SMALLEST_VOCAB_SIZE}, for the 256 bytes and the "
            f"end of a text, and {LARGEST_VOCAB_SIZE}"
        )


def _check_lora(model_args: ModelArguments) -> None:
    if model_args.lora_r is None:
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
            if (value := getattr(model_args, name)) is not None:
                raise UsageError(f"--{name} {value}: needs --lora_r, the rank of the adapters")
        return
    if model_args.lora_r < 1:
        raise UsageError(f"--lora_r {model_args.lora_r}: must be at least 1")
    if model_args.lora_dropout is not None and not 0 <= model_args.lora_dropout < 1:
        raise UsageError(f"--lora_dropout {model_args.lora_dropout}: must be in [0, 1)")
    if not model_args.is_pretrained:
        raise UsageError(
            f"--lora_r {model_args.lora_r}: adapts a pretrained model; give --model_name_or_path, "
            "since the random weights of a new model would stay as they are"
        )
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"--lora_r {model_args.lora_r}: needs the package peft: pip install peft")


def _check_ranges(data_args: DataTrainingArguments) -> None:
    for name, smallest in (
        ("block_size", 2),
        ("max_train_samples", 1),
        ("max_eval_samples", 1),
        ("preprocessing_num_workers", 1),
    ):
        value = getattr(data_args, name)
        if value is not None and value < smallest:
            raise UsageError(f"--{name} {value}: must be at least {smallest}")
    if not 0 <= data_args.validation_split_percentage < 100:
        raise UsageError(
            f"--validation_split_percentage {data_args.validation_split_percentage}: must be between 0 and 99"
        )


def _check_files(data_args: DataTrainingArguments) -> None:
    if data_args.dataset_config_name is not None and data_args.dataset_name is None:
        raise UsageError(f"--dataset_config_name {data_args.dataset_config_name}: needs --dataset_name")
    for name in ("train_file", "validation_file"):
        if path := getattr(data_args, name):
            if not is_token_bin(path):
                file_format(path, f"--{name}")
            if data_args.dataset_name is not None:
                raise UsageError(
                    f"--{name} {path}: give either files or --dataset_name {data_args.dataset_name}, not both"
                )


def _check_token_bins(model_args: ModelArguments, data_args: DataTrainingArguments, run_args: RunArguments) -> None:
    for name in ("train_file", "validation_file"):
        path = getattr(data_args, name)
        if path is not None and not is_token_bin(path):
            raise UsageError(f"--{name} {path}: both files must hold tokens (.bin), or both texts")
    for arguments, name, reason in (
        (data_args, "streaming", "token files are not read as a whole in any case"),
        (data_args, "append_eos", "the documents in token files have their ends already"),
        (data_args, "text_column", "token files have no columns"),
        (model_args, "vocab_size", "no tokenizer is trained for token files; say --config_overrides vocab_size=…"),
    ):
        if value := getattr(arguments, name):
            raise UsageError(f"--{name} {value}: {reason}; drop it")
    if run_args.sample_prompt is not None and model_args.trains_tokenizer:
        raise UsageError(
            f"--sample_prompt {run_args.sample_prompt}: needs the tokenizer of the token files; give --tokenizer_name"
        )


def _check_splits(
    model_args: ModelArguments, data_args: DataTrainingArguments, training_args: MarsTrainingArguments
) -> None:
    if data_args.validation_file is not None and data_args.train_file is None:
        if training_args.do_train:
            raise UsageError(
                f"--validation_file {data_args.validation_file}: there is no text to train on; "
                "give --train_file too, or --do_eval without --do_train"
            )
        if model_args.trains_tokenizer and not data_args.are_tokens:
            raise UsageError(
                f"--validation_file {data_args.validation_file}: is no text to train a tokenizer on; "
                "give --model_name_or_path, --tokenizer_name or --train_file too"
            )
    has_validation = data_args.dataset_name is not None or data_args.validation_file is not None
    if training_args.do_eval and not has_validation and data_args.validation_split_percentage == 0:
        raise UsageError(
            "--validation_split_percentage 0: leaves nothing to evaluate on; "
            "give --validation_file, or a percentage between 1 and 99, or --do_train without --do_eval"
        )


def _check_stream(data_args: DataTrainingArguments, training_args: MarsTrainingArguments) -> None:
    if training_args.max_steps <= 0:
        raise UsageError(
            f"--streaming needs --max_steps, a positive number, not {training_args.max_steps}: "
            "a stream has no length that a number of epochs could be counted in"
        )
    may_split = data_args.validation_file is None and data_args.validation_split_percentage > 0
    if training_args.dataloader_num_workers > 1 and may_split:
        # Workers share out a stream by files, so that "all but its first rows" would mean other rows in each.
        raise UsageError(
            f"--dataloader_num_workers {training_args.dataloader_num_workers}: a stream is split into training "
            "and validation rows by one worker; use at most 1, or --validation_split_percentage 0"
        )


def set_accumulation(global_batch_size: int, training_args: MarsTrainingArguments) -> None:
    """Set gradient_accumulation_steps so that an update takes global_batch_size blocks.

    Raises:
        UsageError: that is no whole number of steps, or the number of steps is given already.
    """
    argument = f"--global_batch_size {global_batch_size}"
    if training_args.gradient_accumulation_steps != 1:
        raise UsageError(
            f"{argument}: sets --gradient_accumulation_steps, which is given as "
            f"{training_args.gradient_accumulation_steps}; drop one of the two"
        )
    if training_args.deepspeed is not None:
        # The file has been filled in with the number of steps when TrainingArguments were made.
        raise UsageError(
            f"{argument}: give --gradient_accumulation_steps with --deepspeed {training_args.deepspeed}, or start "
            "with accelerate launch and its own DeepSpeed configuration"
        )
    blocks = training_args.train_batch_size * training_args.world_size
    if global_batch_size < 1 or global_batch_size % blocks:
        raise UsageError(
            f"{argument}: must be a multiple of {blocks}, --per_device_train_batch_size "
            f"{training_args.per_device_train_batch_size} on {blocks // training_args.per_device_train_batch_size} "
            "device(s)"
        )
    training_args.gradient_accumulation_steps = global_batch_size // blocks
