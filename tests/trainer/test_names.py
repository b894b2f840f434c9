"""The one list of MARS's names."""

import inspect

import pytest
from transformers import TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

from hf_mars import optim
from hf_mars.optim.mars import Mars
from hf_mars.trainer import registry
from hf_mars.trainer.names import VARIANTS, mars_name


def test_the_list_is_the_registered_names():
    assert list(VARIANTS) == ["mars_adamw", "mars_lion", "mars_shampoo", "mars_m"]
    assert [name.value for name in OptimizerNames if name.value.startswith("mars_")] == list(VARIANTS)
    handled = [name.value for name, handler in _OPTIMIZER_HANDLERS.items() if handler is registry._mars_handler]
    assert handled == list(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_stands_for_a_class_and_arguments_that_it_takes(name):
    cls = getattr(optim, VARIANTS[name].class_name)
    assert issubclass(cls, Mars) and cls.__name__ in optim.__all__
    assert set(VARIANTS[name].fixed) <= set(inspect.signature(cls).parameters)


@pytest.mark.parametrize(("name", "expected"), [("mars_lion", "mars_lion"), ("adamw_torch", None)])
def test_whether_arguments_ask_for_mars(tmp_path, name, expected):
    args = TrainingArguments(output_dir=str(tmp_path), optim=name)
    assert isinstance(args.optim, OptimizerNames) and mars_name(args) == expected
    args.optim = name  # as a script or a hyperparameter search may set it
    assert mars_name(args) == expected
