"""The arguments of the command, beside those of `MarsTrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any

from .files import is_token_bin

DEFAULT_VOCAB_SIZE = 2048
LARGEST_VOCAB_SIZE = 2**24
DEFAULT_BLOCK_SIZE = 1024


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
        """Whether a model is fine-tuned, not a new one trained."""
        return self.model_name_or_path is not None

    @property
    def is_adapted(self) -> bool:
        """Whether adapters alone are trained and saved."""
        return self.lora_r is not None or self.base_model is not None

    @property
    def trains_tokenizer(self) -> bool:
        """Whether there is no tokenizer yet."""
        return self.tokenizer_name is None and not self.is_pretrained

    @property
    def hub_options(self) -> dict[str, Any]:
        """How transformers is to read from the Hub: keywords of its from_pretrained functions."""
        return {"cache_dir": self.cache_dir, "token": self.token, "trust_remote_code": self.trust_remote_code}


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
    """The output folder, the size of an update, and a sample at the end."""

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
