"""MARS's names in transformers."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import NAMES
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments, trainer_optimizer
from transformers.training_args import OptimizerNames

import hf_mars
from hf_mars.trainer import registry
from hf_mars.trainer.versions import check_transformers


@pytest.mark.parametrize("name", NAMES)
def test_names_are_valid_everywhere(name, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim=name)
    assert args.optim == name and isinstance(args.optim, OptimizerNames)
    assert args.set_optimizer(name).optim == name
    for cls in (TrainingArguments, Seq2SeqTrainingArguments, hf_mars.MarsTrainingArguments):
        (parsed,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--optim", name])
        assert parsed.optim == name
    assert f'"optim": "{name}"' in args.to_json_string()
    assert name in list(OptimizerNames) and OptimizerNames[name.upper()] is OptimizerNames(name)


def test_an_unknown_name_is_still_refused(tmp_path):
    with pytest.raises(ValueError, match="mars_sgd"):
        TrainingArguments(output_dir=str(tmp_path), optim="mars_sgd")


def test_registering_again_changes_nothing():
    members, post_init = list(OptimizerNames), TrainingArguments.__post_init__
    hf_mars.register()
    assert list(OptimizerNames) == members and TrainingArguments.__post_init__ is post_init


def test_a_name_that_transformers_has_taken(monkeypatch, caplog):
    member = OptimizerNames("mars_lion")
    monkeypatch.setitem(trainer_optimizer._OPTIMIZER_HANDLERS, member, lambda ctx: None)
    monkeypatch.setattr(registry.logger, "propagate", True)
    hf_mars.register()
    assert OptimizerNames("mars_lion") is member
    assert trainer_optimizer._OPTIMIZER_HANDLERS[member] is registry._mars_handler
    assert "mars_lion" in caplog.text


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_members_stay_themselves_when_copied(copied):
    assert copied(OptimizerNames("mars_m")) is OptimizerNames("mars_m")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_training_args_bin_loads_where_hf_mars_was_never_imported(tmp_path, protocol):
    path = tmp_path / "training_args.bin"
    torch.save(TrainingArguments(output_dir=str(tmp_path), optim="mars_lion"), path, pickle_protocol=protocol)
    code = f"import torch; args = torch.load({str(path)!r}, weights_only=False); print(args.optim.value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "mars_lion", done.stderr


# ---- in every order of imports ----

ORDERS = {
    "hf_mars alone": "",
    "a callback first": "import hf_mars; from transformers import TrainerCallback",
    "the handlers first": "import hf_mars, transformers.trainer_optimizer",
    "the model card first": "import hf_mars; import transformers.modelcard",
    "the Trainer first": "import hf_mars; from transformers import Trainer",
    "MarsTrainer first": "from hf_mars import MarsTrainer",
    "the callbacks first": "import hf_mars.trainer.callbacks",
    "after transformers": "import transformers, hf_mars",
    "after its Trainer": "from transformers import Trainer; import hf_mars",
    "again": "import hf_mars, importlib, transformers.training_args as names; importlib.reload(names)",
    "while a thread imports it": """
import sys, threading, time
thread = threading.Thread(target=exec, args=("from transformers import Trainer",))
thread.start()
while "transformers.training_args" not in sys.modules:
    time.sleep(0)
import hf_mars
from transformers.training_args import OptimizerNames
assert "MARS_M" in OptimizerNames.__members__
thread.join()
""",
}
# Forked, so that what transformers needs is imported once for all.
EACH_ORDER = """
import os, sys, traceback
import accelerate.utils, torch._dynamo, torch.distributed.tensor
assert "transformers" not in sys.modules
names, orders = eval(sys.stdin.read())
for order, code in orders.items():
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        exec(code, {})
        import hf_mars
        from transformers import HfArgumentParser, TrainingArguments, modelcard
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
        from transformers.training_args import OptimizerNames
        assert hf_mars.MarsAdamW.__name__ in dir(hf_mars) and hf_mars.optim
        for name in names:
            (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--optim", name])
            assert args.optim is OptimizerNames(name) and args.optim in _OPTIMIZER_HANDLERS
        assert hasattr(modelcard.extract_hyperparameters_from_trainer, "_hf_mars")
        try:
            TrainingArguments(optim="mars_m", optim_args="gamma=x")
        except ValueError as error:
            assert "gamma='x'" in str(error), error
        else:
            raise AssertionError("not checked")
        print(order, flush=True)
    except BaseException:
        print(order, traceback.format_exc(), file=sys.stderr, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_the_names_are_there_in_every_order_of_imports():
    command, told = [sys.executable, "-c", EACH_ORDER], repr((NAMES, ORDERS))
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines() == list(ORDERS), done.stderr


def test_importing_hf_mars_imports_nothing_else():
    code = "import sys, hf_mars; print({'torch', 'transformers', 'numpy', 'multiprocessing'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "set()\n", done.stderr


def test_a_name_that_hf_mars_does_not_have():
    with pytest.raises(AttributeError, match="'hf_mars' has no attribute 'MarsAdam'"):
        hf_mars.MarsAdam  # noqa: B018


@pytest.mark.parametrize("version", ["4.57.1", "5.2.0", "6.0.0", "6.1.0.dev0"])
def test_an_unsupported_transformers_says_which_work(version):
    with pytest.raises(ImportError, match=rf"transformers>=5.3,<6.*{version}"):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.3.0", "5.23.0", "5.99.0.dev0"])
def test_supported_versions(version):
    check_transformers(version)


def test_the_stock_trainer_refuses_exact_mode_and_names_the_one_that_has_it(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim="mars_adamw", optim_args="exact=true")
    with pytest.raises(ValueError, match="MarsTrainer"):
        Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(2, 2))
    optimizer_cls, kwargs = hf_mars.MarsTrainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(2, 2))
    assert optimizer_cls is hf_mars.MarsAdamW and kwargs["exact"] is True
