"""Checkpoints of earlier versions (tests/data/make_checkpoints.py): loaded bit for bit; a step from them as it was.

Also where the optimizer that loads them was made with today's defaults: the settings in the checkpoint count.

The step is compared to rounding, not bit for bit: norms and matrix products are added up in an order that depends on
the processor's vector units, and the files come from one processor. Where they were written, the bits are equal too.
"""

import pytest
import torch
from data.make_checkpoints import give, groups_of, in_vectors
from helpers import assert_close
from launch_helpers import TESTS
from torch import nn

import hf_mars.optim

FILES = sorted((TESTS / "data" / "checkpoints").glob("*/*.pt"))
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name} {path.stem}")
MADE_WITH = pytest.mark.parametrize("defaults", [False, True], ids=["its settings", "today's defaults"])


def load(path, defaults):
    """What the file holds, and parameters and optimizer that have it."""
    saved = torch.load(path, weights_only=True)
    params = [nn.Parameter(value.clone()) for value in saved["params"]]
    settings = {} if defaults else saved["settings"]
    optimizer = getattr(hf_mars.optim, saved["class"])(groups_of(params), **settings)
    optimizer.load_state_dict(saved["optimizer"])
    return saved, params, optimizer


def test_there_are_files_of_every_variant():
    names = {path.stem for path in FILES if path.parent.name == "0.1.0"}
    methods = ("mars_adamw", "mars_lion", "mars_shampoo", "mars_m")
    assert names >= {f"{method}_{form}" for method in methods for form in ("approx", "no_clip", "exact")}
    assert names >= {"mars_adamw_bfloat16", "mars_lion_half_state"}


@MADE_WITH
@EVERY_FILE
def test_what_is_loaded_is_what_was_saved(path, defaults):
    saved, params, optimizer = load(path, defaults)
    expected, actual = torch.load(path, weights_only=True)["optimizer"], optimizer.state_dict()
    assert actual["state"].keys() == expected["state"].keys() == set(range(len(params)))
    for index, state in expected["state"].items():
        assert actual["state"][index].keys() == state.keys()
        for key, value in state.items():
            loaded = actual["state"][index][key]
            assert (loaded.dtype, loaded.shape) == (value.dtype, value.shape), key
            assert torch.equal(loaded, value), key
    for group, wanted in zip(actual["param_groups"], expected["param_groups"], strict=True):
        assert {key: group[key] for key in wanted} == wanted
        if saved["class"] == "MarsAdamW" and path.parent.name == "0.1.0":
            assert group["adjust_lr_fn"] == "original"  # which 0.1.0 did not save, since there was no other
    assert saved["settings"]["gamma"] == 0.3


@pytest.mark.parametrize("foreach", [None, True], ids=["default", "composed"])
@MADE_WITH
@EVERY_FILE
def test_a_step_goes_where_it_went(path, defaults, foreach):
    saved, params, optimizer = load(path, defaults)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    assert optimizer.needs_previous_point == (saved["previous_gradients"] is not None)
    if optimizer.needs_previous_point:
        with optimizer.previous_point():
            give(params, saved["previous_gradients"])
    give(params, saved["gradients"])
    optimizer.step()
    actual = in_vectors(params, optimizer)
    assert actual.keys() == saved["after"].keys()
    if "compensation" in actual:  # where x is rounded the other way, its compensation differs by as much
        for values in (actual, saved["after"]):
            values["param"] = values["param"] + values.pop("compensation")
    wide = saved["params"][0].dtype == torch.float32
    for key, expected in saved["after"].items():
        if key in ("last_grad", "last_param", "step"):  # copies, and a count
            tolerance = 0.0
        elif key == "param":  # Kahan summation gives bfloat16 parameters 16 bits, with their compensation
            tolerance = 1e-6 if wide else 2**-16
        else:  # a bfloat16 average may be rounded the other way
            tolerance = 1e-6 if wide and "state_dtype" not in saved["settings"] else 2**-8
        assert_close([actual[key]], [expected], tolerance)
