"""The Trainer's engines: several processes give the numbers of one, checkpoints resume, and a dead rank ends the job.

Starting Python costs more than training, so that all runs of an engine share one launch (see engine_worker.py).
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import assert_close, assert_equal, tiny_gpt2
from launch_helpers import launch, start
from trainer_helpers import CountSteps, losses, train
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, modelcard

from hf_mars import MarsTrainer, MarsTrainingArguments
from hf_mars.trainer.names import VARIANTS

# One fixture starts up to four launches, each with a timeout of its own.
pytestmark = pytest.mark.timeout(1200)

OPTIONS = {
    "approx": {"optim_args": "gamma=0.5"},
    "unclipped": {"optim_args": "gamma=0.5,max_norm=none"},
    # Evaluations during training are a trap for exact mode: FSDP2 keeps what it has gathered for them.
    "exact": {"optim_args": "gamma=0.5,exact=true", "eval_strategy": "steps", "eval_steps": 2},
}
SETTINGS = {
    f"{optim} {option}": {"optim": optim, **settings}
    for optim in ("mars_adamw", "mars_lion", "mars_shampoo", "mars_m")
    for option, settings in OPTIONS.items()
}
# DeepSpeed takes no clip, no matrices and no second gradient.
UNCLIPPED = [name for name in SETTINGS if name.endswith("unclipped") and name.startswith(("mars_adamw", "mars_lion"))]
EVERY_SETTING = pytest.mark.parametrize("name", SETTINGS)
STOCK = [f"{name} Trainer" for name in SETTINGS if "exact" not in name]

# An epoch has four updates: training, and a checkpoint's resumption, cross its end.
COMMON = {"learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
DEEPSPEED = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
ZERO = {
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "stage 2 offload": {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False},
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
    return {**resumed(run, checkpoint, "finished"), "trainer": "FinishingTrainer"}


class Launches:
    """Runs of the engines, in one folder."""

    def __init__(self, folder):
        self.folder = folder
        # No dropout: ranks draw different masks.
        tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder / "model")

    def model(self):
        return GPT2LMHeadModel.from_pretrained(self.folder / "model")

    def alone(self, name, resume=None):
        """Without engine, in this process; what engine_worker.py saves of a run."""
        settings = {**SETTINGS[name], **of_engine(None, 1)}
        steps = CountSteps()
        folder = self.folder / "alone" / name
        trainer = train(folder, model=self.model(), resume=resume, callbacks=[steps], **settings)
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
        launch(processes, "engine_worker.py", path, **environment)
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


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    return Launches(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def alone(launches):
    return {name: launches.alone(name) for name in SETTINGS}


# ---- DDP ----


@pytest.fixture(scope="module")
def killed(launches):
    """A launch whose second rank dies in the middle of the fifth update."""
    name = "mars_adamw approx"
    path, _ = launches.plan("killed", "ddp", 2, [a_run(name, "ddp", 2, die_at=4)])
    return start(2, "engine_worker.py", path, timeout=100)


@pytest.fixture(scope="module")
def ddp(launches, alone, killed):
    runs = [a_run(name, "ddp", 2) for name in SETTINGS]
    for name in SETTINGS:
        run = a_run(name, "ddp", 2)
        runs.append(resumed(run, launches.checkpoint("ddp", name)))
        runs.append(resumed(run, launches.checkpoint("alone", name), "grown"))
    runs += [a_run(name.removesuffix(" Trainer"), "ddp", 2, label=name, trainer="Trainer") for name in STOCK]
    died = launches.checkpoint("killed", "mars_adamw approx")
    runs.append(a_run("mars_adamw approx", "ddp", 2, label="after the death", resume=died))
    return launches.together("ddp", "ddp", 2, runs)


@EVERY_SETTING
def test_ddp_equals_one_process(name, ddp, alone):
    """With gradient accumulation under no_sync and unequal numbers of labels on the ranks; float32."""
    check_same_numbers(ddp[name], alone[name])
    assert ddp[name]["state_keys"][0] == ddp[name]["state_keys"][1]


@pytest.mark.parametrize("name", STOCK)
def test_ddp_with_the_stock_trainer(name, ddp):
    check_same_numbers(ddp[name], ddp[name.removesuffix(" Trainer")], tolerance=0)


@EVERY_SETTING
def test_ddp_resumes(name, ddp):
    check_resumed(ddp[f"{name} resumed"], ddp[name], tolerance=0)


@EVERY_SETTING
def test_ddp_resumes_on_another_number_of_processes(name, launches, ddp, alone):
    check_resumed(ddp[f"{name} grown"], alone[name])
    shrunk = launches.alone(name, resume=launches.checkpoint("ddp", name))
    check_resumed(shrunk, alone[name])


def test_a_dead_rank_ends_the_job(killed):
    """The fixture's timeout is the test: a job that hangs fails there."""
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr


def test_after_a_death_training_resumes(ddp, killed):
    assert killed.returncode != 0
    check_resumed(ddp["after the death"], ddp["mars_adamw approx"], tolerance=0)


# ---- FSDP2 ----


@pytest.fixture(scope="module")
def fsdp2_of_one(launches):
    """One process of FSDP2, for its checkpoints: the Trainer takes them in no other engine."""
    runs = [
        a_run(name, "fsdp2", 1, label=f"{name} {state_dict}", state_dict=state_dict)
        for name in SETTINGS
        for state_dict in STATE_DICTS
    ]
    return launches.together("fsdp2_of_one", "fsdp2", 1, runs)


@pytest.fixture(scope="module")
def fsdp2(launches, fsdp2_of_one):
    runs = []
    for name in SETTINGS:
        for state_dict in STATE_DICTS:
            label = f"{name} {state_dict}"
            run = a_run(name, "fsdp2", 2, label=label, state_dict=state_dict)
            grown = resumed(run, launches.checkpoint("fsdp2_of_one", label), "grown")
            runs += [run, resumed(run, launches.checkpoint("fsdp2", label)), grown]
            if name == UNCLIPPED[0]:
                runs.append(finished(run, launches.checkpoint("fsdp2", label, 6)))
    runs += [a_run(name.removesuffix(" Trainer"), "fsdp2", 2, label=name, trainer="Trainer") for name in STOCK]
    return launches.together("fsdp2", "fsdp2", 2, runs)


@pytest.fixture(scope="module")
def fsdp2_shrunk(launches, fsdp2):
    runs = []
    for name in SETTINGS:
        for state_dict in STATE_DICTS:
            label = f"{name} {state_dict}"
            run = a_run(name, "fsdp2", 1, label=label, state_dict=state_dict)
            runs.append(resumed(run, launches.checkpoint("fsdp2", label), "shrunk"))
    return launches.together("fsdp2_shrunk", "fsdp2", 1, runs)


EVERY_STATE_DICT = pytest.mark.parametrize("state_dict", STATE_DICTS)


@EVERY_SETTING
@EVERY_STATE_DICT
def test_fsdp2_equals_one_process(name, state_dict, fsdp2, alone):
    """Sharded, with gradient accumulation and unequal numbers of labels on the ranks; float32."""
    check_same_numbers(fsdp2[f"{name} {state_dict}"], alone[name])
    keys = fsdp2[f"{name} {state_dict}"]["state_keys"]
    assert keys[0] == keys[1] and all(keys[0])


@pytest.mark.parametrize("name", STOCK)
def test_fsdp2_with_the_stock_trainer(name, fsdp2):
    check_same_numbers(fsdp2[name], fsdp2[f"{name.removesuffix(' Trainer')} FULL_STATE_DICT"], tolerance=0)


@EVERY_SETTING
@EVERY_STATE_DICT
def test_fsdp2_resumes(name, state_dict, fsdp2):
    """torch steps a fresh optimizer with zero gradients, for it to have state; loading must replace all of it."""
    check_resumed(fsdp2[f"{name} {state_dict} resumed"], fsdp2[f"{name} {state_dict}"], tolerance=0)


@EVERY_SETTING
@EVERY_STATE_DICT
def test_fsdp2_resumes_on_another_number_of_processes(name, state_dict, fsdp2, fsdp2_shrunk, alone):
    check_resumed(fsdp2[f"{name} {state_dict} grown"], alone[name])
    check_resumed(fsdp2_shrunk[f"{name} {state_dict} shrunk"], alone[name])


@EVERY_STATE_DICT
def test_fsdp2_leaves_a_finished_run_as_it_is(state_dict, fsdp2):
    run = f"{UNCLIPPED[0]} {state_dict}"
    check_same_numbers(fsdp2[f"{run} finished"], fsdp2[run], tolerance=0, steps=0)


# ---- DeepSpeed ----


@pytest.fixture(scope="module")
def deepspeed(launches):
    runs = []
    for name in UNCLIPPED:
        for zero in ZERO:
            run = a_run(name, "deepspeed", 2, label=f"{name} {zero}", zero=zero)
            runs += [run, resumed(run, launches.checkpoint("deepspeed", f"{name} {zero}"))]
            if name == UNCLIPPED[0]:
                runs.append(finished(run, launches.checkpoint("deepspeed", f"{name} {zero}", 6)))
        runs.append(a_run(name, "deepspeed", 2, label=f"{name} Trainer", zero="stage 1", trainer="Trainer"))
    return launches.together("deepspeed", "deepspeed", 2, runs, DS_ACCELERATOR="cpu")


NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
UNCLIPPED_SETTINGS = pytest.mark.parametrize("name", UNCLIPPED)
EVERY_STAGE = pytest.mark.parametrize("zero", ZERO)


@NEEDS_DEEPSPEED
@UNCLIPPED_SETTINGS
@EVERY_STAGE
def test_zero_equals_one_process(name, zero, deepspeed, alone):
    """Flat slices of groups, which the groups' kinds tell apart; in stage 3 the model is made in shards."""
    check_same_numbers(deepspeed[f"{name} {zero}"], alone[name])
    keys = deepspeed[f"{name} {zero}"]["state_keys"]
    assert keys[0] == keys[1] and all(keys[0])


@NEEDS_DEEPSPEED
@UNCLIPPED_SETTINGS
@EVERY_STAGE
def test_zero_resumes(name, zero, deepspeed):
    check_resumed(deepspeed[f"{name} {zero} resumed"], deepspeed[f"{name} {zero}"], tolerance=0)


@NEEDS_DEEPSPEED
@EVERY_STAGE
def test_zero_leaves_a_finished_run_as_it_is(zero, deepspeed):
    run = f"{UNCLIPPED[0]} {zero}"
    check_same_numbers(deepspeed[f"{run} finished"], deepspeed[run], tolerance=0, steps=0)


@NEEDS_DEEPSPEED
@UNCLIPPED_SETTINGS
@pytest.mark.parametrize("zero", ["stage 1"])
def test_zero_with_the_stock_trainer(name, zero, deepspeed):
    check_same_numbers(deepspeed[f"{name} Trainer"], deepspeed[f"{name} {zero}"], tolerance=0)


# ---- what is refused ----

ARGUMENTS = pytest.mark.parametrize("cls", [TrainingArguments, MarsTrainingArguments])
FORMS = pytest.mark.parametrize("optim_args", ["max_norm=none", "exact=true"], ids=["approx", "exact"])


@pytest.fixture
def make_arguments(tmp_path, monkeypatch):
    def make(cls=TrainingArguments, environment=(), **settings):
        for name, value in dict(environment).items():
            monkeypatch.setenv(name, value)
        return cls(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)

    return make


def refused(make_arguments, *parts, **settings):
    """Making the arguments raises a ValueError that says all ``parts``."""
    with pytest.raises(ValueError) as error:
        make_arguments(**settings)
    for part in parts:
        assert part in str(error.value)


@ARGUMENTS
@FORMS
@pytest.mark.parametrize("optim", VARIANTS)
def test_fsdp1_is_refused(cls, optim_args, optim, make_arguments):
    parts, settings = [f"optim={optim!r}", "FSDP1", "fsdp_version: 2"], {"optim": optim, "optim_args": optim_args}
    refused(make_arguments, *parts, cls=cls, **settings, fsdp=True, fsdp_config={"version": 1})
    # What `accelerate launch --use_fsdp` sets; accelerate's own reading of it wants a GPU.
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "true"}
    refused(make_arguments, *parts, cls=cls, **settings, environment=environment)
    make_arguments(cls, optim="adamw_torch")
    make_arguments(cls, {"FSDP_VERSION": "2"}, **settings)


def deepspeed_refuses(make_arguments, *parts, zero=1, config=(), **settings):
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": zero}, **dict(config)}
    refused(make_arguments, "DeepSpeed", *parts, deepspeed=config, **settings)


@NEEDS_DEEPSPEED
@ARGUMENTS
@pytest.mark.parametrize("zero", [1, 2, 3])
@FORMS
@pytest.mark.parametrize("optim", ["mars_shampoo", "mars_m"])
def test_deepspeed_refuses_shampoo(cls, zero, optim_args, optim, make_arguments):
    parts = [f"optim={optim!r}", "use FSDP2 (fsdp_version: 2)"]
    deepspeed_refuses(make_arguments, *parts, cls=cls, zero=zero, optim=optim, optim_args=optim_args)


@NEEDS_DEEPSPEED
@ARGUMENTS
@pytest.mark.parametrize("optim", ["mars_adamw", "mars_lion"])
def test_deepspeed_refuses_the_clip(cls, optim, make_arguments):
    for optim_args, max_norm in {None: 1.0, "max_norm=0.5": 0.5}.items():
        parts = [f"optim={optim!r} with max_norm={max_norm}", "--optim_args max_norm=none"]
        deepspeed_refuses(make_arguments, *parts, cls=cls, optim=optim, optim_args=optim_args)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("optim", ["mars_adamw", "mars_lion"])
def test_deepspeed_refuses_exact_mode(optim, make_arguments):
    deepspeed_refuses(make_arguments, "exact=true", optim=optim, optim_args="exact=true,max_norm=none")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("optim", ["mars_adamw", "mars_lion"])
def test_deepspeed_does_not_replace_the_optimizer(optim, make_arguments):
    settings = {"optim": optim, "optim_args": "max_norm=none"}
    adam = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    deepspeed_refuses(make_arguments, '"optimizer"', f"optim={optim!r}", config=adam, **settings)
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    parts = ["DeepSpeedCPUAdam", '"zero_force_ds_cpu_optimizer": false', "deepspeed_config_file"]
    deepspeed_refuses(make_arguments, *parts, config=offload, **settings)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("zero", [{"stage": 2, "offload_optimizer": None}, None], ids=["no offload", "no ZeRO"])
def test_null_in_a_deepspeed_configuration(zero, make_arguments):
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": zero}
    make_arguments(optim="mars_lion", optim_args="max_norm=none", deepspeed=config)


@NEEDS_DEEPSPEED
def test_deepspeed_of_the_launcher_is_refused_likewise(make_arguments):
    """`accelerate launch --use_deepspeed --zero_stage 2`; no DeepSpeed in the arguments."""
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    refused(make_arguments, "DeepSpeed", "use FSDP2", environment=environment, optim="mars_m")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("trainer", [Trainer, MarsTrainer])
def test_engines_are_checked_again_when_training_starts(trainer, make_arguments):
    """Arguments may have changed since they were made."""
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}
    args = make_arguments(optim="mars_adamw", optim_args="max_norm=none", deepspeed=config)
    args.optim = "mars_shampoo"
    with pytest.raises(ValueError, match="FSDP2"):
        trainer.get_optimizer_cls_and_kwargs(args, tiny_gpt2())


@pytest.mark.parametrize("optim", VARIANTS)
def test_exact_mode_with_several_gpus_in_one_process_is_refused(optim, make_arguments, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    parts = ["exact=true", "2 GPUs in one process", "torchrun --nproc_per_node 2"]
    refused(make_arguments, *parts, optim=optim, optim_args="exact=true")
    make_arguments(optim=optim)


ZERO_2 = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}
REFUSED = {
    "FSDP1": {"optim": "mars_adamw", "fsdp": True, "fsdp_config": {"version": 1}},
    "DeepSpeed, mars_shampoo or mars_m": {"optim": "mars_shampoo", "deepspeed": ZERO_2},
    "DeepSpeed, the clip": {"optim": "mars_adamw", "deepspeed": ZERO_2},
    "DeepSpeed, exact": {"optim": "mars_lion", "optim_args": "exact=true", "deepspeed": ZERO_2},
    "DeepSpeed, offload": {
        "optim": "mars_lion",
        "optim_args": "max_norm=none",
        "deepspeed": {**ZERO_2, "zero_optimization": OFFLOAD},
    },
    "DeepSpeed, its optimizer": {"optim": "mars_lion", "deepspeed": {**ZERO_2, "optimizer": {"type": "AdamW"}}},
    "DataParallel, exact": {"optim": "mars_lion", "optim_args": "exact=true"},
}


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("asked_for", REFUSED)
def test_the_documented_errors_are_the_printed_ones(asked_for, make_arguments, monkeypatch):
    if asked_for.startswith("DataParallel"):
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    document = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    (documented,) = re.findall(rf"^\| {asked_for} \| `(.*)` \|$", document, re.MULTILINE)
    with pytest.raises(ValueError) as error:
        make_arguments(**REFUSED[asked_for])
    assert str(error.value) == documented
