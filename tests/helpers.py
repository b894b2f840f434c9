"""What the tests share: the methods, parameters, gradient sequences, a loop, comparisons, tiny models."""

import math

import pytest
import torch
from torch import nn

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo

# The paper's settings, which tests/reference.py has by default.
PAPER = {"betas": (0.95, 0.99), "gamma": 0.025, "max_norm": 1.0, "adjust_lr_fn": "original"}

# name -> (class, the keywords that make it this method, the name of its update in tests/reference.py)
METHODS = {
    "mars_adamw": (MarsAdamW, {}, "adamw"),
    "mars_lion": (MarsLion, {}, "lion"),
    "mars_shampoo": (MarsShampoo, {}, "shampoo"),
    "mars_m": (MarsShampoo, {"adjust_lr_fn": "match_rms_adamw"}, "shampoo"),
}
NAMES = list(METHODS)
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
CLASSES = [MarsAdamW, MarsLion, MarsShampoo]
EVERY_CLASS = pytest.mark.parametrize("cls", CLASSES)
UPDATE = {MarsAdamW: "adamw", MarsLion: "lion", MarsShampoo: "shampoo"}

SHAPES = {
    "tall": (7, 4),
    "wide": (4, 7),
    "square": (5, 5),
    "tall_again": (7, 4),
    "wide_as_the_convolution": (6, 12),
    "vector": (6,),
    "scalar": (),
    "stack": (3, 4, 6),
    "convolution": (6, 3, 2, 2),
}
FEW_SHAPES = [(4, 3), (3, 5), (6,), ()]


def make(method, params, *, lr=0.02, **options):
    """The optimizer of METHODS, with the paper's settings where `options` say nothing else."""
    cls, keywords, _ = METHODS[method]
    settings = {**PAPER, **keywords, **options}
    if cls is MarsLion:
        settings.pop("adjust_lr_fn")
    return cls(params, lr=lr, **settings)


def kinds(optimizer):
    return [group["kind"] for group in optimizer.param_groups]


def make_params(shapes=None, *, dtype=torch.float64, seed=0):
    """Normal entries; one parameter of each of SHAPES where no shapes are given."""
    shapes = SHAPES.values() if shapes is None else shapes
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def make_gradients(params, steps, *, scales=(1.0,), seed=1):
    """For each step a list of gradients, one a parameter; step t is scaled by the t-th of `scales`, in a cycle."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (scales[t % len(scales)] * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
            for p in params
        ]
        for t in range(steps)
    ]


def run_steps(optimizer, params, gradients, scheduler=None):
    """Feed the gradients, one list a step, and return the parameters' values at the end."""
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values(params)


def values(params):
    return [p.detach().clone() for p in params]


def assert_close(actual, expected, tolerance):
    """max |actual - expected| <= tolerance * max |expected|, tensor by tensor."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = (a.detach().double() - e.double()).abs().max().item()
        assert error <= tolerance * e.abs().max().item(), f"tensor {i} {tuple(e.shape)}: error {error}"


def assert_equal(actual, expected):
    """Bit for bit."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"tensor {i} {tuple(e.shape)}: error {(a - e).abs().max().item()}"


def assert_same_state(actual, expected):
    """Two optimizers' groups and states are equal bit for bit."""
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for key, value in state.items():
            loaded = actual["state"][index][key]
            if torch.is_tensor(value):
                assert loaded.dtype == value.dtype, key
                assert torch.equal(loaded, value), key
            else:
                assert loaded == value, key


def factor(t):
    """A learning-rate factor that rises for five steps, then falls as a cosine that never reaches zero."""
    return (t + 1) / 5 if t < 5 else 0.6 + 0.4 * math.cos(math.pi * (t - 5) / 40)


class TiedLanguageModel(nn.Module):
    """Next-token logits with one weight used twice: as the embedding and as the head."""

    def __init__(self, vocabulary=11, width=6):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.hidden(self.embedding(tokens)))))


def tiny_gpt2(**config):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **config}))


def tiny_llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **config}))


def tiny_conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), nn.Conv1d(4, 5, 2), nn.Linear(8, 2)
    )
