"""param_groups(model): what each parameter is, read off the module that holds it."""

import pytest
from helpers import tiny_conv_net, tiny_gpt2, tiny_llama
from torch import nn
from transformers import Trainer

from hf_mars import param_groups
from hf_mars.optim import MarsAdamW, MarsShampoo

MODELS = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "llama_tied": lambda: tiny_llama(tie_word_embeddings=True),
    "conv_net": tiny_conv_net,
}
EVERY_MODEL = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def labels(model, **options):
    """Name -> group, for every parameter that is in one; each is in no more than one."""
    names = {p: name for name, p in model.named_parameters()}
    found = {}
    for group in param_groups(model, **options):
        for p in group["params"]:
            assert names[p] not in found
            found[names[p]] = group
    return found


def check(found, suffixes):
    """Compare with rows of (end of the name, kind, layout); the first row that fits is the one; None is any layout."""
    for name, group in found.items():
        kind, layout = next((kind, layout) for suffix, kind, layout in suffixes if name.endswith(suffix))
        assert group["kind"] == kind, name
        if layout is not None:
            assert group.get("layout", "out_in") == layout, name


def test_gpt2():
    model = tiny_gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    check(
        labels(model, weight_decay=0.1),
        [
            ("wte.weight", "embedding", "out_in"),
            ("wpe.weight", "embedding", "out_in"),
            ("ln_1.weight", "1d", None),
            ("ln_2.weight", "1d", None),
            ("ln_f.weight", "1d", None),
            (".bias", "1d", None),
            (".weight", "matrix", "in_out"),
        ],
    )


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    found = labels(tiny_llama(tie_word_embeddings=tied), weight_decay=0.1)
    assert ("lm_head.weight" in found) is not tied
    check(
        found,
        [
            ("lm_head.weight", "embedding", "out_in"),
            ("embed_tokens.weight", "embedding", "out_in"),
            ("norm.weight", "1d", None),
            (".weight", "matrix", "out_in"),
        ],
    )


def test_the_head_is_what_the_model_says_it_is():
    """Not only what is called lm_head."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.hidden, self.last = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.last

    kinds = {name: group["kind"] for name, group in labels(Model(), weight_decay=0.1).items()}
    matrices = {"table.weight": "embedding", "hidden.weight": "matrix", "last.weight": "embedding"}
    assert kinds == {**matrices, "hidden.bias": "1d", "last.bias": "1d"}


def test_conv_net():
    found = labels(tiny_conv_net(), weight_decay=0.1)
    kinds = {name: (group["kind"], group.get("layout")) for name, group in found.items() if group["kind"] != "1d"}
    assert kinds == {"0.weight": ("matrix", "conv"), "4.weight": ("matrix", "conv"), "5.weight": ("matrix", "out_in")}


@EVERY_MODEL
def test_every_parameter_exactly_once(build):
    model = build()
    assert labels(model, weight_decay=0.1).keys() == {name for name, _ in model.named_parameters()}


@EVERY_MODEL
def test_frozen_parameters_are_left_out(build):
    model = build()
    frozen = {name for i, (name, _) in enumerate(model.named_parameters()) if i % 3 == 0}
    for name, p in model.named_parameters():
        p.requires_grad = name not in frozen
    assert labels(model, weight_decay=0.1).keys() == {name for name, _ in model.named_parameters()} - frozen


@EVERY_MODEL
def test_decay_is_the_trainers(build):
    model = build()
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    found = labels(model, weight_decay=0.1)
    assert {name: group["weight_decay"] for name, group in found.items()} == {
        name: 0.1 if name in decayed else 0.0 for name in found
    }
    assert {group["weight_decay"] for group in found.values()} == {0.0, 0.1}
    biases = [name for name in found if name.endswith("bias")]
    assert all(found[name]["weight_decay"] == 0.0 for name in biases)


def test_no_decay_by_default_of_zero():
    assert all(group["weight_decay"] == 0.0 for group in param_groups(tiny_gpt2(), weight_decay=0.0))


UPDATES = [
    # optimizer, options, update and learning rate of a matrix, an embedding, a vector
    (MarsAdamW, {}, ("adamw", 0.2), ("adamw", 0.2), ("adamw", 0.2)),
    (MarsAdamW, {"adjust_lr_fn": "original"}, ("adamw", 0.2), ("adamw", 0.2), ("adamw", 0.1)),
    (MarsShampoo, {}, ("shampoo", 0.2), ("adamw", 0.1), ("adamw", 0.1)),
    (MarsShampoo, {"orthogonalize_embeddings": True}, ("shampoo", 0.2), ("shampoo", 0.2), ("adamw", 0.1)),
    (MarsShampoo, {"adjust_lr_fn": "match_rms_adamw"}, ("shampoo", 0.2), ("adamw", 0.2), ("adamw", 0.2)),
]


@pytest.mark.parametrize("cls, options, matrix, embedding, vector", UPDATES)
def test_the_optimizer_reads_the_labels(cls, options, matrix, embedding, vector):
    model = tiny_gpt2()
    optimizer = cls(param_groups(model, weight_decay=0.1), lr=0.2, **options)
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[p] = (group["update"], group["lr"], group["weight_decay"], group.get("layout"))
    block = model.transformer.h[0]
    assert found[block.attn.c_attn.weight] == (*matrix, 0.1, "in_out")
    assert found[model.transformer.wte.weight][:3] == (*embedding, 0.1)
    assert found[block.attn.c_attn.bias][:3] == (*vector, 0.0)
    assert found[block.ln_1.weight][:3] == (*vector, 0.0)
