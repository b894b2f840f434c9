"""QLoRA on CPUs: a 4-bit base of bitsandbytes', LoRA, TRL; `make factories` runs this where bitsandbytes is installed."""

import json

import pytest
import torch
from datasets import Dataset
from model_files import TEXTS, write_model
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import hf_mars  # registers the names  # noqa: F401


def trained(folder, optim, **settings):
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=quantized, device_map="cpu")
    args = SFTConfig(
        str(folder / optim),
        optim=optim,
        max_steps=4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        max_length=32,
        **settings,
    )
    lora = LoraConfig(r=8, target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = Dataset.from_dict({"text": TEXTS * 4})
    trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    return trainer


def state_bytes(trainer):
    """Of the moving averages and previous gradients; steps are a number per tensor."""
    optimizer = trainer.optimizer.optimizer
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1)


@pytest.mark.parametrize(
    ("optim", "settings", "per_parameter"),
    [
        ("mars_adamw", {}, 12),
        ("mars_adamw", {"optim_args": "state_dtype=bfloat16,last_grad_dtype=bfloat16"}, 6),
        ("mars_m", {}, 4),
        ("mars_m", {"optim_args": "state_dtype=bfloat16"}, 2),
    ],
)
def test_qlora(tmp_path, optim, settings, per_parameter):
    write_model(tmp_path / "model")
    trainer = trained(tmp_path, optim, **settings)
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    assert "Linear4bit" in kinds
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    counted = state_bytes(trainer)
    print(json.dumps({"optim": optim, **settings, "bytes": counted, "per_parameter": counted / trainable}))
    assert counted == per_parameter * trainable


def test_paged_8_bit_adamw_beside_it(tmp_path):
    """bitsandbytes keeps states of tensors below 4,096 elements in 32 bit, as all adapters here are: 8 bytes."""
    write_model(tmp_path / "model")
    trainer = trained(tmp_path, "paged_adamw_8bit")
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    counted = state_bytes(trainer)
    print(json.dumps({"optim": "paged_adamw_8bit", "bytes": counted, "per_parameter": counted / trainable}))
