"""Runs of the Trainer under its engines: their settings, their launches, their comparison.

Starting Python costs more than training, so that all runs of an engine share one launch (see engine_worker.py).
"""

import json

import pytest
import torch
from helpers import METHODS, assert_close, assert_equal, tiny_gpt2
from launch_helpers import launch
from peft import LoraConfig, get_peft_model
from trainer_helpers import CountSteps, losses, train
from transformers import GPT2LMHeadModel, modelcard

OPTIONS = {
    "approx": {"optim_args": "gamma=0.5,max_norm=1.0"},
    "unclipped": {"optim_args": "gamma=0.5"},
    # Evaluations during training are a trap for exact mode: FSDP2 keeps what it has gathered for them.
    "exact": {"optim_args": "gamma=0.5,max_norm=1.0,exact=true", "eval_strategy": "steps", "eval_steps": 2},
}
SETTINGS = {
    f"{optim} {option}": {"optim": optim, **settings} for optim in METHODS for option, settings in OPTIONS.items()
}
APPROX = [name for name in SETTINGS if "exact" not in name]  # DeepSpeed takes no second gradient
# In them each variant is and each option; the others wait for `make test-engines`.
EVERY_TIME = [
    "mars_adamw approx",
    "mars_m approx",
    "mars_lion unclipped",
    "mars_shampoo unclipped",
    "mars_adamw exact",
    "mars_m exact",
]


def each(names):
    """A parametrisation by names of SETTINGS."""
    marks = {name: () if name in EVERY_TIME else pytest.mark.exhaustive for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


# What tests take that have no parameter for it.
UNASKED = {"mars_adamw approx", "mars_m approx"}


def asked(request, names, parameter="name"):
    """Those of `names` that the tests of this session ask for in this module by a parameter, and those of UNASKED."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    found = UNASKED.union(item.callspec.params.get(parameter) for item in items)
    return [name for name in names if name in found]


EVERY_SETTING = each(SETTINGS)

# An epoch has four updates: training, and a checkpoint's resumption, cross its end.
COMMON = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
DEEPSPEED = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
ZERO = {
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "stage 2 offload": {"zero_optimization": OFFLOAD},
}
STATE_DICTS = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


def of_engine(engine, processes, state_dict="FULL_STATE_DICT", zero=None):
    """The settings of a run whose updates see the same data on any number of processes."""
    settings = {**COMMON, "per_device_train_batch_size": 4 // processes}
    if engine == "fsdp2":
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": state_dict}
        settings = {**settings, "fsdp": True, "use_cpu": False, "fsdp_config": config}
    if zero is not None:
        settings["deepspeed"] = {**DEEPSPEED, **ZERO[zero]}
    return settings


def a_run(name, engine, processes, *, label=None, state_dict="FULL_STATE_DICT", zero=None, **more):
    settings = {**SETTINGS[name], **of_engine(engine, processes, state_dict, zero)}
    return {"name": label or name, "settings": settings, **more}


def resumed(run, checkpoint, what="resumed"):
    """The same run from a checkpoint on. What it would save itself nobody reads, and evaluations change nothing."""
    settings = {**run["settings"], "save_strategy": "no", "eval_strategy": "no"}
    return {"name": f"{run['name']} {what}", "settings": settings, "resume": checkpoint}


def finished(run, checkpoint):
    """The same run from its last checkpoint on, as run_clm.py resumes it."""
    return resumed(run, checkpoint, "finished")


def with_lora(model):
    """The model with adapters, all else frozen; no dropout."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=3, target_modules=["c_attn", "c_fc"], init_lora_weights=False))


class Launches:
    """Runs of the engines, in one folder."""

    def __init__(self, folder):
        self.folder = folder
        # No dropout: ranks draw different masks.
        tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder / "model")

    def model(self):
        return GPT2LMHeadModel.from_pretrained(self.folder / "model")

    def alone(self, name, resume=None, lora=False):
        """Without engine, in this process; what engine_worker.py saves of a run."""
        settings = {**SETTINGS[name], **of_engine(None, 1)}
        steps = CountSteps()
        folder = self.folder / "alone" / (f"{name} LoRA" if lora else name)
        model = with_lora(self.model()) if lora else self.model()
        trainer = train(folder, model=model, resume=resume, callbacks=[steps], **settings)
        assert trainer.args.world_size == 1
        weights = {key: param.detach().clone() for key, param in trainer.model.named_parameters()}
        card = modelcard.extract_hyperparameters_from_trainer(trainer)["optimizer"]
        return {"losses": losses(trainer), "steps": steps.taken, "weights": weights, "card": card}

    def plan(self, title, engine, processes, runs):
        results = self.folder / f"{title}.pt"
        plan = {"engine": engine, "processes": processes, "folder": self.folder / title, "runs": runs}
        path = self.folder / f"{title}.json"
        path.write_text(json.dumps({**plan, "model": self.folder / "model", "results": results}, default=str))
        return path, results

    def together(self, title, engine, processes, runs, **environment):
        """On a number of processes; what the worker saved of each run."""
        path, results = self.plan(title, engine, processes, runs)
        launch(processes, "engines/engine_worker.py", path, **environment)
        return torch.load(results)

    def checkpoint(self, title, name, step=3):
        return str(self.folder / title / name / f"checkpoint-{step}")


def check_same_numbers(actual, expected, tolerance=1e-4, steps=6):
    """A tolerance of zero asks for the same bits. A run that was resumed took 3 of the 6 steps itself.

    Model cards say the same of the optimizer, too: MARS's own hyperparameters.
    """
    assert (actual["steps"], expected["steps"]) == (steps, 6)
    assert len(expected["losses"]) == 6
    assert actual["card"] == expected["card"] and expected["card"].startswith("Mars")
    assert actual["losses"] == pytest.approx(expected["losses"], rel=tolerance, abs=0)
    assert actual["weights"].keys() == expected["weights"].keys()
    pairs = [(actual["weights"][key], value) for key, value in expected["weights"].items()]
    check = assert_equal if tolerance == 0 else lambda a, e: assert_close(a, e, tolerance)
    check(*zip(*pairs, strict=True))


def check_resumed(actual, expected, tolerance=1e-4):
    check_same_numbers(actual, expected, tolerance, steps=3)
