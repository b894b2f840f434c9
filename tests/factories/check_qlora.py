"""QLoRA on CPUs: a 4-bit base of bitsandbytes', LoRA, TRL; `make factories` runs this in an environment with them."""

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
    lora = LoraConfig(r=128, target_modules="all-linear")
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


# TRL makes the adapters of a quantized model bfloat16; then Kahan summation takes two bytes more, unless it is off.
@pytest.mark.parametrize(
    ("optim", "settings", "per_parameter"),
    [
        ("mars_adamw", {}, 8),
        ("mars_adamw", {"optim_args": "kahan_sum=false"}, 6),
        ("mars_m", {}, 4),
        ("mars_m", {"optim_args": "kahan_sum=false"}, 2),
    ],
)
def test_mars(tmp_path, optim, settings, per_parameter):
    write_model(tmp_path / "model")
    trainer = trained(tmp_path, optim, **settings)
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    trainable = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert {p.dtype for _, p in trainable} == {torch.bfloat16}
    assert all(p.any() for name, p in trainable if "lora_B" in name)  # zero at first
    assert state_bytes(trainer) == per_parameter * sum(p.numel() for _, p in trainable)


def test_paged_8_bit_adamw_beside_it(tmp_path):
    """bitsandbytes keeps states of 4,096 elements and more in 8 bits, as all adapters here have; on CPUs unpaged."""
    write_model(tmp_path / "model")
    trainer = trained(tmp_path, "paged_adamw_8bit")
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    per_parameter = state_bytes(trainer) / trainable
    print(f"paged_adamw_8bit: {per_parameter:.2f} bytes per parameter")
    assert 2 <= per_parameter < 3
