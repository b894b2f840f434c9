"""What the engines refuse, in the words that docs/distributed.md quotes."""

import re

import pytest
from engine_helpers import NEEDS_DEEPSPEED, OFFLOAD
from helpers import tiny_gpt2
from launch_helpers import ROOT
from transformers import Trainer, TrainingArguments

from hf_mars import MarsTrainer, MarsTrainingArguments
from hf_mars.trainer.names import VARIANTS

ARGUMENTS = pytest.mark.parametrize("cls", [TrainingArguments, MarsTrainingArguments])
FORMS = pytest.mark.parametrize("optim_args", ["", "max_norm=1.0", "exact=true"], ids=["default", "clip", "exact"])


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
    parts = [f"optim={optim!r} with max_norm=0.5", "--optim_args max_norm=none"]
    deepspeed_refuses(make_arguments, *parts, cls=cls, optim=optim, optim_args="max_norm=0.5")


@NEEDS_DEEPSPEED
@ARGUMENTS
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("optim", ["mars_adamw", "mars_lion"])
def test_deepspeed_takes_the_defaults(cls, zero, optim, make_arguments):
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": zero}}
    make_arguments(cls, optim=optim, deepspeed=config)


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
    "DeepSpeed, the clip": {"optim": "mars_adamw", "optim_args": "max_norm=1.0", "deepspeed": ZERO_2},
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
    document = (ROOT / "docs" / "distributed.md").read_text()
    (documented,) = re.findall(rf"^\| {asked_for} \| `(.*)` \|$", document, re.MULTILINE)
    with pytest.raises(ValueError) as error:
        make_arguments(**REFUSED[asked_for])
    assert str(error.value) == documented
