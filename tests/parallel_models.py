"""Tiny models with plans for tensor and expert parallelism, which GPT-2 has not."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def save(folder):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(folder / "dense")
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(folder / "experts")


def load(folder, way, **options):
    if way == "expert parallel":
        return MixtralForCausalLM.from_pretrained(folder / "experts", **options)
    return LlamaForCausalLM.from_pretrained(folder / "dense", **options)
