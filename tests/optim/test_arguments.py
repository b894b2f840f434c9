"""Wrong arguments: one error that names the argument, the value and the allowed range."""

import re
import warnings

import pytest
import torch
from helpers import EVERY_CLASS, FEW_SHAPES, assert_equal, make_gradients, make_params, run_steps, tiny_gpt2, values

from hf_mars import param_groups
from hf_mars.optim import MarsShampoo, parameter_roles

NAN = float("nan")
WRONG = [
    # argument, value, words of the allowed range
    ("lr", -1.0, ["0"]),
    ("lr", NAN, ["0"]),
    ("lr", "fast", ["0"]),
    ("lr_1d", -1.0, ["0"]),
    ("betas", (1.0, 0.9), ["0", "1"]),
    ("betas", (0.9, 1.0), ["0", "1"]),
    ("betas", (-0.1, 0.9), ["0", "1"]),
    ("betas", (0.9,), ["0", "1"]),
    ("betas", (0.9, 0.95, 0.99), ["0", "1"]),
    ("betas", 0.9, ["0", "1"]),
    ("betas_1d", (0.9, 1.5), ["0", "1"]),
    ("betas_1d", (0.9,), ["0", "1"]),
    ("eps", -1.0, ["0"]),
    ("weight_decay", -1.0, ["0"]),
    ("weight_decay", float("inf"), ["0"]),
    ("gamma", -0.1, ["0", "1"]),
    ("gamma", 1.1, ["0", "1"]),
    ("gamma", NAN, ["0", "1"]),
    ("gamma", None, ["0", "1"]),
    ("max_norm", 0.0, ["0", "None"]),
    ("max_norm", -1.0, ["0", "None"]),
    ("max_norm", NAN, ["0", "None"]),
]
WRONG_IN_SHAMPOO = [
    ("ns_steps", 0, ["1"]),
    ("ns_steps", -3, ["1"]),
    ("ns_steps", 2.5, ["1"]),
    ("adjust_lr_fn", "foo", ["original", "match_rms_adamw"]),
]
WRONG_IN_A_GROUP = [
    ("kind", "matrx", ["matrix", "embedding", "1d"]),
    ("layout", "out", ["out_in", "in_out", "conv"]),
]


def refuses(argument, value, words):
    """A ValueError that names the argument, the value and, beside these two, the allowed range."""

    class Check:
        def __enter__(self):
            self.raises = pytest.raises(ValueError)
            self.info = self.raises.__enter__()

        def __exit__(self, *exception):
            assert self.raises.__exit__(*exception), f"{argument}={value!r} was accepted"
            message = str(self.info.value)
            assert re.search(rf"\b{argument}\b", message), message
            shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
            assert str(shown) in message or repr(value) in message, message
            rest = message.replace(repr(value), "", 1).replace(argument, "", 1)
            assert all(word in rest for word in words), message
            return True

    return Check()


@EVERY_CLASS
@pytest.mark.parametrize("argument, value, words", WRONG)
def test_wrong_values(cls, argument, value, words):
    with refuses(argument, value, words):
        cls(make_params([(3, 4), (5,)]), **{argument: value})
    if argument not in {"lr_1d", "betas_1d"}:
        with refuses(argument, value, words):
            cls([{"params": make_params([(3, 4), (5,)]), argument: value}])


@pytest.mark.parametrize("argument, value, words", WRONG_IN_SHAMPOO)
def test_wrong_values_of_shampoo(argument, value, words):
    with refuses(argument, value, words):
        MarsShampoo(make_params([(3, 4), (5,)]), **{argument: value})


@EVERY_CLASS
@pytest.mark.parametrize("argument, value, words", WRONG_IN_A_GROUP)
def test_wrong_values_of_a_group(cls, argument, value, words):
    with refuses(argument, value, words):
        cls([{"params": make_params([(3, 4)]), "kind": "matrix", argument: value}])


@EVERY_CLASS
def test_extreme_values_that_are_allowed(cls):
    params = make_params(FEW_SHAPES)
    optimizer = cls(params, lr=0, betas=(0.0, 0.0), eps=0, weight_decay=0, gamma=1, max_norm=1, lr_1d=0)
    before = values(params)
    assert_equal(run_steps(optimizer, params, make_gradients(params, 2)), before)


@EVERY_CLASS
def test_duplicates_are_refused(cls):
    (w,) = make_params([(3, 4)])
    with pytest.raises(ValueError, match=r"duplicate|more than one|twice"):
        cls([w, w])
    with pytest.raises(ValueError, match=r"duplicate|more than one|twice"):
        cls([{"params": [w]}, {"params": [w]}])


@EVERY_CLASS
def test_keyword_only(cls):
    """gamma by position could be taken for a beta."""
    params = make_params([(3, 4)])
    with pytest.raises(TypeError):
        cls(params, 1e-3, (0.95, 0.99), 1e-8, 0.0, 0.025)
    (group,) = cls(params, 1e-3, (0.9, 0.98), 1e-7, 0.2).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.98), 1e-7, 0.2)
    with pytest.raises(TypeError, match="gama"):
        cls(params, gama=0.1)


@EVERY_CLASS
def test_a_module_is_not_its_parameters(cls):
    with pytest.raises(TypeError, match=r"got a module \(Linear\); pass hf_mars.param_groups\(model\)"):
        cls(torch.nn.Linear(2, 2))


def test_shampoo_that_has_to_guess_warns_once_at_the_users_line():
    model = tiny_gpt2()
    with pytest.warns(UserWarning, match=r"pass hf_mars.param_groups\(model\)") as warned:
        MarsShampoo(model.parameters())
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MarsShampoo(param_groups(model))
        MarsShampoo(model.parameters(), roles=parameter_roles(model))
        MarsShampoo([{"params": make_params([(2, 3)]), "kind": "matrix"}])
        MarsShampoo(make_params([(3,)]))
