#!/usr/bin/env python
"""Train a causal language model with MARS: from scratch or from a pretrained model, on the Hub's data or local files.

    python run_clm.py --output_dir out --max_steps 20                                  # a small GPT-2, a novel
    python run_clm.py --output_dir out --model_name_or_path gpt2 --train_file my.txt   # fine-tuning
    python run_clm.py recipe.yaml --output_dir out                                     # arguments from a file

docs/run_clm.md describes every argument.
"""

import difflib
import importlib.util
import json
import logging
import re
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from hf_mars import MarsTrainer, MarsTrainingArguments
from hf_mars.argument_files import arguments_of, values_of_file
from hf_mars.corpus import (
    END_OF_TEXT,
    TokenBlocks,
    TokenStream,
    UsageError,
    collate_blocks,
    file_format,
    is_token_bin,
    load_texts,
    load_token_bins,
    train_bpe,
)
from hf_mars.metrics import ComputeLanguageModelMetrics, losses_and_tokens
from hf_mars.processes import all_or_none, check_same, main_processes_first

logger = logging.getLogger("run_clm")

DEFAULT_VOCAB_SIZE = 2048
DEFAULT_BLOCK_SIZE = 1024
# What is trained when the command line says nothing about the model: minutes on two CPU cores.
SMALL_GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128}
SAMPLE_TOKENS = 100


# ---- arguments ----


@dataclass
class ModelArguments:
    """Which model and tokenizer. With none of them, a small GPT-2 is trained from scratch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Fine-tune this model: a folder or a name on the Hub."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Train a new model of this type (gpt2, llama, …) from scratch."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Settings of a new model, such as n_embd=256,n_layer=6,resid_pdrop=0.0."},
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train a new model with this configuration: a folder, a file or a name on the Hub."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer, if not the model's own: a folder or a name on the Hub."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "help": "Size of the byte-level BPE that is trained when a new model comes with no tokenizer "
            f"({DEFAULT_VOCAB_SIZE} if not given)."
        },
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and data sets are kept."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a tokenizer of the tokenizers library."})
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the Hub, and of its tokenizer."}
    )
    token: str | None = field(default=None, metadata={"help": "Access token of the Hub, if not the saved login."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model and tokenizer code that comes from the Hub."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the weights; if not given, that of the checkpoint, float32 for a new model.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention: eager, sdpa, flash_attention_2, flex_attention, …; if not given, the model's."},
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank instead of the model's own weights."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Scale of the adapters times their rank (peft's default if not given)."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the adapters (0 if not given)."}
    )
    lora_target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Modules to adapt: names with commas between them, or all-linear; if not given, peft's choice for "
            "the model's type."
        },
    )

    # (name, revision) of the model that the adapters in model_name_or_path are for, if there are any.
    base_model: tuple[str, str | None] | None = field(default=None, init=False)

    @property
    def is_pretrained(self) -> bool:
        return self.model_name_or_path is not None

    @property
    def trains_tokenizer(self) -> bool:
        return self.tokenizer_name is None and not self.is_pretrained


@dataclass
class DataTrainingArguments:
    """Which texts. With none of them, the novel that comes with hf_mars."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training text: a txt, csv, json, jsonl or parquet file, or a glob pattern; or tokens: a bin file "
            "of uint16, as nanoGPT writes it."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation text, as for train_file."})
    text_column: str | None = field(
        default=None, metadata={"help": 'Column of the text; if not given, "text", else the first of strings.'}
    )
    append_eos: bool = field(
        default=False, metadata={"help": "End each document with the tokenizer's end-of-text token."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many blocks only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many blocks only."})
    streaming: bool = field(
        default=False, metadata={"help": "Read and tokenise the training text while training; needs max_steps."}
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in a training example; if not given, what the model has positions for, at most "
            f"{DEFAULT_BLOCK_SIZE}."
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again, whatever is in the cache."})
    validation_split_percentage: int = field(
        default=5,
        metadata={"help": "Share of the training text to hold out when there is no validation text; 0 for none."},
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    keep_linebreaks: bool = field(
        default=True, metadata={"help": "Keep the line breaks of txt files; otherwise they become spaces."}
    )

    @property
    def are_tokens(self) -> bool:
        """Whether the data are token files instead of texts."""
        return is_token_bin(self.train_file or self.validation_file)


@dataclass
class RunArguments:
    """What to do with the output folder, and after training."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in an output_dir that is not empty: its checkpoints and results are removed."},
    )
    sample_prompt: str | None = field(
        default=None, metadata={"help": "At the end, print how the model continues this text."}
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Blocks in an update, over all processes: sets gradient_accumulation_steps from "
            "per_device_train_batch_size and the number of processes."
        },
    )


ARGUMENT_FILES = (".json", ".yaml", ".yml")


class ArgumentParser(HfArgumentParser):
    def error(self, message: str):
        raise UsageError(message)  # argparse would print all arguments before the message


def parse_arguments(argv: list[str]):
    """(ModelArguments, DataTrainingArguments, RunArguments, MarsTrainingArguments) from the command line.

    A first argument that ends in .json, .yaml or .yml is a file of arguments; those on the command line come on top,
    and files of text or tokens there take the place of a data set in the file.
    Training and evaluation are both on unless do_train or do_eval says otherwise.
    """
    parser = ArgumentParser(
        (ModelArguments, DataTrainingArguments, RunArguments, MarsTrainingArguments),
        description=__doc__.split("\n")[0] + " Does both training and evaluation unless do_train or do_eval is given.",
    )
    # None tells "not given" from "false", which TrainingArguments cannot. A job has one log, not one a node.
    parser.set_defaults(do_train=None, do_eval=None, log_on_each_node=False)
    if argv and argv[0].endswith(ARGUMENT_FILES):
        values, argv = values_of_file(Path(argv[0])), argv[1:]
        if any(argument.startswith(("--train_file", "--validation_file")) for argument in argv):
            for name in ("dataset_name", "dataset_config_name"):
                values.pop(name, None)
        of_many_values = {action.dest for action in parser._actions if action.nargs == "+"}
        argv = arguments_of(values, of_many_values) + argv
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if unknown and not unknown[0].startswith("-"):
        raise UsageError(
            f"{unknown[0]}: belongs to no argument; put a pattern in quotes, and a file of arguments first of all"
        )
    if unknown:
        names = [f.name for arguments in parsed for f in fields(arguments) if f.init]
        key = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
        raise UsageError(f"unknown argument {unknown[0]}; the nearest valid one is --{nearest}")
    training_args = parsed[-1]
    if training_args.do_train is None and training_args.do_eval is None:
        training_args.do_train = training_args.do_eval = True
    training_args.do_train = bool(training_args.do_train)
    training_args.do_eval = bool(training_args.do_eval) or training_args.eval_strategy != "no"
    return parsed


def set_accumulation(global_batch_size: int, training_args) -> None:
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


def check_arguments(model_args, data_args, run_args, training_args) -> None:
    """Raise UsageError for whatever cannot work, as far as that shows before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval):
        raise UsageError("--do_train false --do_eval false: there is nothing to do; set one of them to true")

    if training_args.prediction_loss_only:
        raise UsageError(
            "--prediction_loss_only true: loss, perplexity and accuracy are computed from the logits; drop it "
            "(they are summed batch by batch, so it would save no memory)"
        )

    if training_args.eval_on_start and not training_args.do_eval:
        raise UsageError("--eval_on_start true: needs evaluation; give --do_eval too")

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

    check_lora(model_args)
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

    for name in ("train_file", "validation_file"):
        if path := getattr(data_args, name):
            if not is_token_bin(path):
                file_format(path, f"--{name}")
            if data_args.dataset_name is not None:
                raise UsageError(
                    f"--{name} {path}: give either files or --dataset_name {data_args.dataset_name}, not both"
                )
    if data_args.are_tokens:
        check_token_bins(model_args, data_args, run_args)
    has_validation = data_args.dataset_name is not None or data_args.validation_file is not None
    if data_args.validation_file is not None and data_args.train_file is None and training_args.do_train:
        raise UsageError(
            f"--validation_file {data_args.validation_file}: there is no text to train on; "
            "give --train_file too, or --do_eval without --do_train"
        )
    if data_args.validation_file is not None and data_args.train_file is None:
        if model_args.trains_tokenizer and not data_args.are_tokens:
            raise UsageError(
                f"--validation_file {data_args.validation_file}: is no text to train a tokenizer on; "
                "give --model_name_or_path, --tokenizer_name or --train_file too"
            )
    if training_args.do_eval and not has_validation and data_args.validation_split_percentage == 0:
        raise UsageError(
            "--validation_split_percentage 0: leaves nothing to evaluate on; "
            "give --validation_file, or a percentage between 1 and 99, or --do_train without --do_eval"
        )
    if data_args.streaming and training_args.do_train:
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


def check_lora(model_args) -> None:
    """Raise UsageError where the LoRA arguments cannot work; without them peft need not be installed."""
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


def check_token_bins(model_args, data_args, run_args) -> None:
    """Raise UsageError for arguments that do not go with token files."""
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


# ---- output folder ----

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RESULT_FILES = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def checkpoint_to_resume(training_args, run_args) -> str | None:
    """The checkpoint to go on from; None to start at step 0.

    Raises:
        UsageError: the checkpoint asked for does not exist or is incomplete, or the run would write over what is
            already in output_dir without having been asked to.
    """
    output_dir = Path(training_args.output_dir)
    asked = str(training_args.resume_from_checkpoint)
    mode = asked.lower()
    content = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []

    if mode in ("none", "false"):
        if content and not run_args.overwrite_output_dir:
            raise UsageError(
                f"--output_dir {output_dir}: is not empty ({', '.join(content[:5])}{', …' if content[5:] else ''}); "
                "go on from its last checkpoint with --resume_from_checkpoint true, start anew and remove its "
                "checkpoints with --overwrite_output_dir, or choose another folder"
            )
        return None
    if run_args.overwrite_output_dir:
        raise UsageError(
            f"--resume_from_checkpoint {asked}: contradicts --overwrite_output_dir, which removes the checkpoints; "
            "drop one of the two"
        )
    if mode in ("true", "auto"):
        checkpoint = last_checkpoint(output_dir)
        if checkpoint is None and mode == "true":
            raise UsageError(
                f"--resume_from_checkpoint {asked}: there is no complete checkpoint in --output_dir {output_dir}; "
                "with auto the run would start anew"
            )
        if checkpoint is None and {"config.json", "adapter_config.json"} & set(content):
            raise UsageError(
                f"--resume_from_checkpoint {asked}: --output_dir {output_dir} holds a finished model but no complete "
                "checkpoint; replace the model with --overwrite_output_dir, or choose another folder"
            )
    else:
        checkpoint = Path(asked)
        if not (checkpoint / "trainer_state.json").is_file():
            raise UsageError(
                f"--resume_from_checkpoint {asked}: is no folder with a complete checkpoint; "
                "allowed: true, auto, false or the path of a checkpoint-N folder"
            )
        if content and checkpoint.resolve().parent != output_dir.resolve():
            raise UsageError(
                f"--resume_from_checkpoint {asked}: lies outside of --output_dir {output_dir}, which is not empty; "
                "choose an empty folder, or the checkpoint's own"
            )
    if checkpoint is None:
        return None
    if not [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]:
        raise UsageError(
            f"--resume_from_checkpoint {asked}: {checkpoint} has no optimizer state (was it saved with "
            "--save_only_model?); start a new run from its weights with --model_name_or_path"
        )
    return str(checkpoint)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint-N with the largest N. The trainer state is written last, so it marks a complete one."""
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if (path / "trainer_state.json").is_file():
            return path
        logger.warning(f"{path} is incomplete and is passed over")
    return None


def files_of_previous_run(output_dir: Path, sources: list[str | None]) -> list[Path]:
    """What --overwrite_output_dir deletes: the checkpoints and result files in output_dir, and nothing else.

    The model and the tokenizer there stay until those of the new run replace them.

    Raises:
        UsageError: one of sources (the model, configuration and tokenizer of the new run) is among them.
    """
    stale = [path for path in output_dir.glob("*") if CHECKPOINT.fullmatch(path.name)]
    stale += [output_dir / name for name in RESULT_FILES if (output_dir / name).exists()]
    for source in filter(None, sources):
        for path in stale:
            if Path(source).resolve().is_relative_to(path.resolve()):
                raise UsageError(
                    f"--overwrite_output_dir: would remove {path}, which this run reads; choose another --output_dir"
                )
    return stale


# ---- model and tokenizer ----


def hub_options(model_args) -> dict:
    return {
        "cache_dir": model_args.cache_dir,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def find_base_model(model_args) -> None:
    """Set base_model where model_name_or_path holds adapters, as runs with --lora_r leave them."""
    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir, "token": model_args.token}
    try:
        path = find_adapter_config_file(name, **options)
    except (OSError, ValueError):
        return  # load_config says what is wrong
    if path is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"--model_name_or_path {name}: holds adapters, which need the package peft: pip install peft")
    if model_args.lora_r is not None:
        raise UsageError(
            f"--lora_r {model_args.lora_r}: --model_name_or_path {name} holds adapters, which are trained further; "
            "drop it, or give the model that they are for"
        )
    if (Path(name) / "config.json").is_file():
        raise UsageError(
            f"--model_name_or_path {name}: holds a model (config.json) and adapters (adapter_config.json); "
            "remove the one that a later run was to replace"
        )
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    model_args.base_model = config["base_model_name_or_path"], config.get("revision")


def load_config(model_args, block_size: int | None):
    """The model's configuration, still without the vocabulary of a tokenizer that is to be trained."""
    argument = "config_name" if model_args.config_name else "model_name_or_path"
    if name := getattr(model_args, argument):
        source, revision = f"--{argument} {name}", None if model_args.config_name else model_args.model_revision
        if argument == "model_name_or_path" and model_args.base_model:
            name, revision = model_args.base_model
            source += f", adapters of {name}"
        try:
            config = AutoConfig.from_pretrained(name, revision=revision, **hub_options(model_args))
        except (OSError, ValueError) as error:
            raise UsageError(f"{source}: no model configuration there: {error}") from error
    elif model_args.model_type is not None:
        config = CONFIG_MAPPING[model_args.model_type]()
    else:
        config = GPT2Config(**{**SMALL_GPT2, "n_positions": block_size or SMALL_GPT2["n_positions"]})
        logger.info(f"no model is named: training a small GPT-2 from scratch ({SMALL_GPT2})")
    if model_args.config_overrides:
        override_config(config, model_args.config_overrides)
    return config


def override_config(config, overrides: str) -> None:
    """Apply "key=value,key=value" to a configuration, in place."""
    for entry in overrides.split(","):
        key, equals, _ = entry.partition("=")
        if not equals or not hasattr(config, key):
            nearest = difflib.get_close_matches(key, config.to_dict(), n=1, cutoff=0.0)[0]
            raise UsageError(
                f"--config_overrides {overrides}: {entry!r} must be key=value with a key of the {config.model_type} "
                f"configuration; the nearest is {nearest!r}"
            )
    try:
        config.update_from_string(overrides)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--config_overrides {overrides}: {error}") from error


def choose_block_size(block_size: int | None, config) -> int:
    """The block size asked for, or what the model has positions for up to DEFAULT_BLOCK_SIZE."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if block_size is None:
        return min(DEFAULT_BLOCK_SIZE, positions or DEFAULT_BLOCK_SIZE)
    if positions is not None and block_size > positions:
        raise UsageError(f"--block_size {block_size}: the model has {positions} positions; allowed: 2 to {positions}")
    return block_size


def load_tokenizer(model_args, data_args, checkpoint: str | None):
    """The tokenizer that is named, or that a resumed run trained; None if one is to be trained, or not needed."""
    if model_args.trains_tokenizer:
        return AutoTokenizer.from_pretrained(checkpoint) if checkpoint and not data_args.are_tokens else None
    if name := model_args.tokenizer_name:
        return read_tokenizer(f"--tokenizer_name {name}", name, None, model_args)
    name = model_args.model_name_or_path
    try:
        return read_tokenizer(f"--model_name_or_path {name}", name, model_args.model_revision, model_args)
    except UsageError:
        if model_args.base_model is None:
            raise
        base, revision = model_args.base_model
        return read_tokenizer(f"--model_name_or_path {name}, adapters of {base}", base, revision, model_args)


def read_tokenizer(source: str, name: str, revision: str | None, model_args):
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=model_args.use_fast_tokenizer, revision=revision, **hub_options(model_args)
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"{source}: no tokenizer there: {error}") from error
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):
        # Without its files, transformers makes a tokenizer of nothing but special tokens.
        raise UsageError(f"{source}: no tokenizer there; give --tokenizer_name")
    return tokenizer


def train_tokenizer(texts, vocab_size: int, block_size: int, show_progress: bool):
    """A byte-level BPE trained on the main process and sent to the others."""
    trained = [None]
    with all_or_none():
        if PartialState().is_main_process:
            trained = [train_bpe(texts, vocab_size, show_progress=show_progress).to_str()]
    broadcast_object_list(trained)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained[0]),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=block_size,
    )
    logger.info(f"trained a byte-level BPE of {len(tokenizer):,} tokens on the training text")
    return tokenizer


def fit_vocabulary(config, tokenizer, model_args) -> None:
    """Give a new model the tokenizer's vocabulary; make sure that any model's embedding holds it."""
    text_config = config.get_text_config()
    if not model_args.is_pretrained:
        overridden = {entry.partition("=")[0] for entry in (model_args.config_overrides or "").split(",")}
        if "vocab_size" not in overridden and (model_args.trains_tokenizer or model_args.config_name is None):
            text_config.vocab_size = len(tokenizer)
        text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if (text_config.pad_token_id or 0) >= text_config.vocab_size:
            text_config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > text_config.vocab_size:
        source = f"--tokenizer_name {model_args.tokenizer_name}" if model_args.tokenizer_name else "the tokenizer"
        raise UsageError(
            f"{source}: has {len(tokenizer)} tokens, but the model's embedding has {text_config.vocab_size} rows; "
            f"allowed: a tokenizer of at most {text_config.vocab_size} tokens"
            + ("" if model_args.is_pretrained else f", or --config_overrides vocab_size={len(tokenizer)}")
        )


def load_model(config, model_args):
    """The pretrained model, or a new one with random weights."""
    options = {} if model_args.dtype is None else {"dtype": model_args.dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    try:
        if model_args.is_pretrained:
            name, revision = model_args.base_model or (model_args.model_name_or_path, model_args.model_revision)
            model = AutoModelForCausalLM.from_pretrained(
                name, config=config, revision=revision, **options, **hub_options(model_args)
            )
        else:
            if model_args.dtype == "auto":
                del options["dtype"]
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_args.trust_remote_code, **options)
    except (ImportError, ValueError) as error:
        if model_args.attn_implementation is None:
            raise
        raise UsageError(f"--attn_implementation {model_args.attn_implementation}: {error}") from error
    if model.loss_type is None:
        # transformers derives this from the class's name, and GPT2LMHeadModel says nothing. Trainer would then divide
        # by all labels although the first of each block is no target: losses too small by 1/block_size.
        model.loss_type = "ForCausalLM"
    kind = "fine-tuning" if model_args.is_pretrained else "new model"
    logger.info(f"{kind}: {type(model).__name__} with {model.num_parameters():,} parameters in {model.dtype}")
    if model_args.base_model is None and model_args.lora_r is None:
        return model
    model = load_adapters(model, model_args) if model_args.base_model else new_adapters(model, model_args)
    trained, total = model.get_nb_trainable_parameters()
    logger.info(f"{trained:,} of {total:,} parameters are trained, those of the adapters")
    return model


def load_adapters(model, model_args):
    """The model with the adapters in model_name_or_path, which are trained further."""
    from peft import PeftModel

    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir, "token": model_args.token}
    try:
        return PeftModel.from_pretrained(model, name, is_trainable=True, **options)
    except (RuntimeError, ValueError) as error:  # of another shape, or for other modules
        raise UsageError(f"--model_name_or_path {name}: the adapters do not fit their model: {error}") from error


def new_adapters(model, model_args):
    """The model with LoRA adapters, which alone are trained and saved."""
    from peft import LoraConfig, get_peft_model

    modules = model_args.lora_target_modules
    scale = {} if model_args.lora_alpha is None else {"lora_alpha": model_args.lora_alpha}
    config = LoraConfig(
        r=model_args.lora_r,
        lora_dropout=model_args.lora_dropout or 0.0,
        target_modules=modules if modules in (None, "all-linear") else modules.split(","),
        task_type="CAUSAL_LM",
        **scale,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:  # no such modules, or no choice of peft's for this model
        raise UsageError(f"--lora_target_modules {modules}: {error}") from error
    logger.info(f"LoRA adapters of {', '.join(sorted(model.active_peft_config.target_modules))}")
    return model


# ---- training ----


def set_up_logging(training_args) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for name in ("run_clm", "hf_mars"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.WARNING)
    transformers_logging.set_verbosity(training_args.get_process_log_level())
    logger.info(
        f"{training_args.world_size} process(es), {training_args.parallel_mode}, {training_args.device}, "
        f"optimizer {training_args.optim.value}"
    )


def load_blocks(texts, tokenizer, block_size: int, data_args, training_args):
    """(training blocks or None, validation blocks or None), as far as they are to be used.

    Args:
        texts: what load_texts or load_token_bins returned.
        tokenizer: not used for the latter, and may be None.
    """
    train_blocks = eval_blocks = None
    options = {
        "num_proc": data_args.preprocessing_num_workers,
        # The first process of a node tokenises; the others take what it wrote.
        "overwrite_cache": data_args.overwrite_cache and training_args.local_process_index == 0,
    }

    def stored_blocks(split: str, max_blocks: int | None) -> TokenBlocks:
        if data_args.are_tokens:
            return TokenBlocks(texts[split], block_size, max_blocks)
        return TokenBlocks.from_texts(
            texts[split],
            tokenizer,
            block_size,
            max_blocks=max_blocks,
            description=f"Tokenising the {split} text",
            **options,
        )

    with all_or_none(), main_processes_first(training_args, desc="tokenising"):
        if training_args.do_train and data_args.streaming:
            train_blocks = TokenStream(texts["train"], tokenizer, block_size, data_args.max_train_samples)
            if next(iter(train_blocks), None) is None:
                source = texts["train"].source
                raise UsageError(f"--block_size {block_size}: {source} has fewer tokens than that")
        elif training_args.do_train:
            train_blocks = stored_blocks("train", data_args.max_train_samples)
        if training_args.do_eval:
            eval_blocks = stored_blocks("validation", data_args.max_eval_samples)
    for name, blocks in (("training", train_blocks), ("validation", eval_blocks)):
        if isinstance(blocks, TokenBlocks):
            check_same(blocks.total_tokens, f"the number of tokens of the {name} text")
            if len(blocks) == 0:
                raise UsageError(
                    f"--block_size {block_size}: the {name} text has only {blocks.total_tokens} tokens; "
                    f"allowed: 2 to {blocks.total_tokens}"
                )
            blocks[0]  # finds tokens of another vocabulary before a model is made
            rest = f"; {blocks.dropped_tokens} tokens after the last complete block are not used"
            logger.info(
                f"{name}: {blocks.total_tokens:,} tokens, {len(blocks):,} blocks of {block_size}"
                + ("" if data_args.streaming else rest)
            )
    return train_blocks, eval_blocks


class FinishingTrainer(MarsTrainer):
    """MarsTrainer that takes no step where the checkpoint it resumes has all of them.

    Trainer asks whether a run is at its end only after a step, so it would train a finished run by one step more, each
    time it is resumed. Here everything is as in any resumed run, for every engine, except for the steps.
    """

    is_finished = False

    def _init_training_state(self, *args, **kwargs):
        progress = super()._init_training_state(*args, **kwargs)
        self.is_finished = self.state.global_step >= self.state.max_steps
        if self.is_finished:
            logger.info(f"step {self.state.global_step} of {self.state.max_steps}: there is nothing left to train")
        return progress

    def _run_epoch(self, *args, **kwargs):
        if self.is_finished:
            self.control.should_training_stop = True  # a stream has epochs without end
        else:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if not (self.is_finished and "train_loss" in logs):  # the loss of no step would be logged as 0
            super().log(logs, *args, **kwargs)


def generate_sample(trainer, tokenizer, prompt: str) -> str:
    """The prompt and up to SAMPLE_TOKENS tokens that the model continues it with, drawn with the run's seed."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if input_ids.shape[1] == 0:
        input_ids = input_ids.new_tensor([[tokenizer.eos_token_id]])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:  # leave room for at least as many new tokens as the prompt has
        input_ids = input_ids[:, -(positions // 2) :]
    new_tokens = SAMPLE_TOKENS if positions is None else min(SAMPLE_TOKENS, positions - input_ids.shape[1])
    set_seed(trainer.args.seed)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=input_ids.new_ones(input_ids.shape).to(model.device),
        do_sample=True,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def summarize(trainer) -> str:
    """What the run reached, in a line."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_perplexity" in entry]
    if not evaluations:
        return f"trained {trainer.state.global_step} steps"
    last = evaluations[-1]
    before = ""
    if evaluations[0]["step"] == 0 and trainer.state.global_step > 0:
        before = f"perplexity {evaluations[0]['eval_perplexity']:.2f} before training; "
    after = f"after {last['step']} steps: loss {last['eval_loss']:.4f}, perplexity {last['eval_perplexity']:.2f}"
    accuracy = f", next-token accuracy {last['eval_accuracy']:.4f}" if "eval_accuracy" in last else ""
    return before + after + accuracy


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script with the given command line (default: the process's own).

    Returns:
        The metrics of training and evaluation, as in all_results.json.

    Raises:
        UsageError: the arguments cannot work.
    """
    model_args, data_args, run_args, training_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    set_up_logging(training_args)
    checkpoint, stale = None, []
    # No process may write to output_dir before every process has looked at it.
    with all_or_none():
        check_arguments(model_args, data_args, run_args, training_args)
        if run_args.global_batch_size is not None:
            set_accumulation(run_args.global_batch_size, training_args)
        if training_args.do_train:
            checkpoint = checkpoint_to_resume(training_args, run_args)
            if run_args.overwrite_output_dir:
                sources = [model_args.model_name_or_path, model_args.config_name, model_args.tokenizer_name]
                stale = files_of_previous_run(Path(training_args.output_dir), sources)
    # Nodes that do not share output_dir may have different checkpoints, or none.
    name = checkpoint and Path(checkpoint).name
    check_same(name, f"the checkpoint that --resume_from_checkpoint {training_args.resume_from_checkpoint} finds")
    if checkpoint:
        logger.info(f"resuming from {checkpoint}")

    with all_or_none():
        if model_args.is_pretrained:
            find_base_model(model_args)
        config = load_config(model_args, data_args.block_size)
        block_size = choose_block_size(data_args.block_size, config)
        tokenizer = load_tokenizer(model_args, data_args, checkpoint)
        if tokenizer is not None:
            fit_vocabulary(config, tokenizer, model_args)

    with all_or_none(), main_processes_first(training_args, desc="loading the texts"):
        files = {
            "train_file": data_args.train_file,
            "validation_file": data_args.validation_file,
            "validation_split_percentage": data_args.validation_split_percentage,
        }
        if data_args.are_tokens:
            texts = load_token_bins(**files, vocab_size=config.get_text_config().vocab_size)
        else:
            texts = load_texts(
                **files,
                dataset_name=data_args.dataset_name,
                dataset_config_name=data_args.dataset_config_name,
                streaming=data_args.streaming,
                keep_linebreaks=data_args.keep_linebreaks,
                text_column=data_args.text_column,
                append_eos=data_args.append_eos,
                cache_dir=model_args.cache_dir,
                token=model_args.token,
            )
        if training_args.do_train and "train" not in texts:
            raise UsageError(
                f"--dataset_name {data_args.dataset_name}: has no train split; give another data set, or --do_eval "
                "without --do_train"
            )
        if tokenizer is None and not data_args.are_tokens and "train" not in texts:
            raise UsageError(
                f"--dataset_name {data_args.dataset_name}: has no train split, and a tokenizer is not trained on "
                "validation text; give --model_name_or_path or --tokenizer_name"
            )
        if training_args.do_eval and "validation" not in texts:
            raise UsageError(
                f"--dataset_name {data_args.dataset_name}: has no validation split; "
                "give --validation_split_percentage between 1 and 99, or --do_train without --do_eval"
            )
    if tokenizer is None and not data_args.are_tokens:
        vocab_size = model_args.vocab_size or DEFAULT_VOCAB_SIZE
        tokenizer = train_tokenizer(
            texts["train"], vocab_size, block_size, show_progress=not training_args.disable_tqdm
        )
        fit_vocabulary(config, tokenizer, model_args)
    if data_args.append_eos and tokenizer.eos_token_id is None:
        raise UsageError("--append_eos true: the tokenizer has no end-of-text token; give another --tokenizer_name")
    train_blocks, eval_blocks = load_blocks(texts, tokenizer, block_size, data_args, training_args)

    set_seed(training_args.seed)
    model = load_model(config, model_args)
    if training_args.save_on_each_node:
        # transformers 5.23 lets the job's first process alone write weights, whomever Trainer has chosen.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process

    if training_args.should_save:
        for path in stale:
            logger.warning(f"--overwrite_output_dir: removing {path}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # Losses and accuracy are summed batch by batch: neither logits nor predictions pile up.
    training_args.batch_eval_metrics = True
    trainer = FinishingTrainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=collate_blocks,
        compute_metrics=ComputeLanguageModelMetrics(),
        preprocess_logits_for_metrics=losses_and_tokens,
    )
    if not trainer.is_world_process_zero():  # without progress bars, Trainer prints logs on every node
        trainer.remove_callback(PrinterCallback)
    results = {}
    if training_args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        if not trainer.is_finished:
            if not data_args.streaming:
                metrics["train_samples"] = len(train_blocks)
            trainer.log_metrics("train", metrics)
            trainer.save_metrics("train", metrics)
            results.update(metrics)
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(eval_blocks)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        results.update(metrics)
    if training_args.do_train:
        trainer.save_state()
    if training_args.push_to_hub:
        trainer.push_to_hub(tasks="text-generation", dataset=data_args.dataset_name)

    # gloo aborts now and then where a process ends right after it has reduced tensors.
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        print(f"{summarize(trainer)}; see {training_args.output_dir}")
        if run_args.sample_prompt is not None:
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                logger.warning("--sample_prompt: no sample, since no process holds the whole model")
            else:
                print(generate_sample(trainer, tokenizer, run_args.sample_prompt))
    return results


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        print(f"run_clm.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
