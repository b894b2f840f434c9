"""What the engines refuse, in the words that docs/distributed.md quotes."""

import json
import logging
import re

import pytest
from helpers import tiny_gpt2
from launch_helpers import NEEDS_DEEPSPEED, ROOT
from transformers import Trainer, TrainingArguments

from hf_mars import MarsTrainer, MarsTrainingArguments
from hf_mars.trainer.checkpoint_saving import check_run
from hf_mars.trainer.checkpoints import MANIFEST, MANIFEST_FORMAT, ResumeError
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
@pytest.mark.parametrize("optim", VARIANTS)
def test_deepspeed_refuses_exact_mode(cls, zero, optim, make_arguments):
    deepspeed_refuses(make_arguments, "exact=true", cls=cls, zero=zero, optim=optim, optim_args="exact=true")


@NEEDS_DEEPSPEED
def test_deepspeed_refuses_tensor_parallelism(make_arguments):
    config = {"tensor_parallel": {"autotp_size": 2}}
    deepspeed_refuses(make_arguments, '"autotp_size": 2', "FSDP2", config=config, optim="mars_m")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("optim", VARIANTS)
def test_deepspeed_does_not_replace_the_optimizer(optim, make_arguments):
    adam = {"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}
    deepspeed_refuses(make_arguments, '"optimizer"', f"optim={optim!r}", config=adam, optim=optim)


def offloading(device, ratio=1.0, **more):
    return {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": device, "ratio": ratio}}, **more}


@NEEDS_DEEPSPEED
def test_offloading_keeps_the_optimizer(make_arguments, caplog):
    """DeepSpeed would insist on DeepSpeedCPUAdam; it is told not to, unless the user told it to."""
    config = {"train_micro_batch_size_per_gpu": 8, **offloading("cpu")}
    with caplog.at_level(logging.WARNING, "hf_mars.trainer.engines"):  # scripts set their levels later
        args = make_arguments(optim="mars_m", deepspeed=config)
    assert args.hf_deepspeed_config.config["zero_force_ds_cpu_optimizer"] is False
    assert config == {"train_micro_batch_size_per_gpu": 8, **offloading("cpu")}
    key = '"zero_force_ds_cpu_optimizer"'
    assert [record.message for record in caplog.records if key in record.message] == [
        f"DeepSpeed offloads to the CPU: {key} is set to false, so that optim='mars_m' takes the steps there"
    ]
    forced = offloading("cpu", zero_force_ds_cpu_optimizer=True)
    deepspeed_refuses(make_arguments, "DeepSpeedCPUAdam", f"{key}: true", config=forced, optim="mars_m")


@NEEDS_DEEPSPEED
def test_deepspeed_refuses_nvme(make_arguments):
    deepspeed_refuses(make_arguments, "NVMe", '"device": "cpu"', config=offloading("nvme"), optim="mars_adamw")
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "disk"}}}
    deepspeed_refuses(make_arguments, "NVMe", "offload_param", config=config, optim="mars_adamw")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("key, value", [("ratio", 0.3), ("super_offload", True)])
def test_deepspeed_does_not_take_part_of_the_steps(key, value, make_arguments):
    """By an AdamW of its own, beside ours."""
    config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", key: value}}}
    deepspeed_refuses(make_arguments, f'"{key}"', "AdamW", config=config, optim="mars_lion")
    config["zero_optimization"]["offload_optimizer"].update(ratio=1.0, super_offload=False)
    make_arguments(optim="mars_lion", deepspeed={"train_micro_batch_size_per_gpu": 8, **config})


@NEEDS_DEEPSPEED
def test_deepspeed_refuses_zenflow(make_arguments):
    config = {"zero_optimization": {**offloading("cpu")["zero_optimization"], "zenflow": {"topk_ratio": 0.1}}}
    deepspeed_refuses(make_arguments, '"zenflow"', config=config, optim="mars_adamw")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("optim", VARIANTS)
def test_universal_checkpoints_are_refused(optim, make_arguments):
    config = {"checkpoint": {"load_universal": True}}
    deepspeed_refuses(make_arguments, '"load_universal": true', "g_{t−1}", config=config, optim=optim)


def test_megatron_is_refused(make_arguments):
    """`accelerate launch --use_megatron_lm`, which is how to come by pipeline parallelism."""
    environment = {"ACCELERATE_USE_MEGATRON_LM": "true"}
    refused(make_arguments, "Megatron-LM", "pipeline", "FSDP2", environment=environment, optim="mars_m")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("zero", [{"stage": 2, "offload_optimizer": None}, None], ids=["no offload", "no ZeRO"])
def test_null_in_a_deepspeed_configuration(zero, make_arguments):
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": zero}
    make_arguments(optim="mars_lion", optim_args="max_norm=none", deepspeed=config)


@NEEDS_DEEPSPEED
def test_deepspeed_of_the_launcher_is_refused_likewise(make_arguments):
    """`accelerate launch --use_deepspeed --zero_stage 2`; no DeepSpeed in the arguments."""
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    refused(make_arguments, "DeepSpeed", "use FSDP2", environment=environment, optim="mars_m", optim_args="exact=true")


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("trainer", [Trainer, MarsTrainer])
def test_engines_are_checked_again_when_training_starts(trainer, make_arguments):
    """Arguments may have changed since they were made."""
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}
    args = make_arguments(optim="mars_adamw", deepspeed=config)
    args.optim_args = "exact=true"
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
    "DeepSpeed, exact": {"optim": "mars_lion", "optim_args": "exact=true", "deepspeed": ZERO_2},
    "DeepSpeed, offload by its own optimizer": {
        "optim": "mars_lion",
        "deepspeed": {**ZERO_2, **offloading("cpu", zero_force_ds_cpu_optimizer=True)},
    },
    "DeepSpeed, offload to NVMe": {"optim": "mars_lion", "deepspeed": {**ZERO_2, **offloading("nvme")}},
    "DeepSpeed, parameters offloaded to NVMe": {
        "optim": "mars_lion",
        "deepspeed": {**ZERO_2, "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
    },
    "DeepSpeed, SuperOffload": {
        "optim": "mars_lion",
        "deepspeed": {
            **ZERO_2,
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
        },
    },
    "DeepSpeed, tensor parallelism": {
        "optim": "mars_m",
        "deepspeed": {**ZERO_2, "tensor_parallel": {"autotp_size": 2}},
    },
    "DeepSpeed, a part offloaded": {
        "optim": "mars_lion",
        "deepspeed": {**ZERO_2, **offloading("cpu", ratio=0.5)},
    },
    "DeepSpeed, ZenFlow": {
        "optim": "mars_m",
        "deepspeed": {**ZERO_2, "zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
    },
    "DeepSpeed, universal checkpoint": {
        "optim": "mars_m",
        "deepspeed": {**ZERO_2, "checkpoint": {"load_universal": True}},
    },
    "DeepSpeed, its optimizer": {"optim": "mars_lion", "deepspeed": {**ZERO_2, "optimizer": {"type": "AdamW"}}},
    "Megatron-LM": {"optim": "mars_m"},
    "DataParallel, exact": {"optim": "mars_lion", "optim_args": "exact=true"},
}


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("asked_for", REFUSED)
def test_the_documented_errors_are_the_printed_ones(asked_for, make_arguments, monkeypatch):
    if asked_for.startswith("DataParallel"):
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    if asked_for == "Megatron-LM":
        monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ValueError) as error:
        make_arguments(**REFUSED[asked_for])
    assert str(error.value) == documented(asked_for)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("saved, stage, words", [(2, 3, "ZeRO stage 2, but this run has stage 3"), (1, 2, None)])
def test_a_checkpoint_of_another_stage_is_refused(saved, stage, words, make_arguments, tmp_path):
    """DeepSpeed has an AssertionError without words for it. Stages 1 and 2 have the same files."""
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}}
    args = make_arguments(deepspeed=config, optim="mars_m")
    manifest = {"optimizer": "mars_m", "engine": "DEEPSPEED", "zero_stage": saved}
    manifest |= {"format": MANIFEST_FORMAT, "files": {}}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    if words is None:
        check_run(tmp_path, args)
    else:
        with pytest.raises(ResumeError, match=words):
            check_run(tmp_path, args)
    del manifest["zero_stage"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    check_run(tmp_path, args)  # a manifest of before


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("stage, processes, is_refused", [(2, 4, True), (3, 4, True), (0, 4, False), (2, 1, False)])
def test_a_zero_checkpoint_of_other_processes_is_refused(stage, processes, is_refused, make_arguments, tmp_path):
    """DeepSpeed has a traceback for it. Without ZeRO every process has everything."""
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}}
    args = make_arguments(deepspeed=config, optim="mars_m")
    manifest = {"optimizer": "mars_m", "engine": "DEEPSPEED", "zero_stage": stage, "world_size": processes}
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "format": MANIFEST_FORMAT, "files": {}}))
    if is_refused:
        with pytest.raises(ResumeError, match="saved by 4 processes under ZeRO, but this run has 1, "):
            check_run(tmp_path, args)
    else:
        check_run(tmp_path, args)


def documented(asked_for):
    document = (ROOT / "docs" / "distributed.md").read_text()
    (text,) = re.findall(rf"^\| {re.escape(asked_for)} \| `(.*)` \|$", document, re.MULTILINE)
    return text


@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    ("asked_for", "manifest", "arguments"),
    [
        ("a checkpoint of DeepSpeed, without it", {"engine": "DEEPSPEED", "optimizer": "mars_m"}, {}),
        ("DeepSpeed, a checkpoint without it", {"engine": "NO", "optimizer": "mars_m"}, {"deepspeed": ZERO_2}),
        ("a checkpoint of another optimizer", {"engine": "NO", "optimizer": "mars_adamw"}, {}),
        (
            "DeepSpeed, another stage's checkpoint",
            {"engine": "DEEPSPEED", "zero_stage": 2},
            {"deepspeed": {**ZERO_2, "zero_optimization": {"stage": 3}}},
        ),
    ],
)
def test_the_documented_errors_of_checkpoints_are_the_printed_ones(
    asked_for, manifest, arguments, make_arguments, tmp_path
):
    args = make_arguments(optim="mars_m", **arguments)
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": MANIFEST_FORMAT, "files": {}}))
    with pytest.raises(ResumeError) as error:
        check_run(folder, args)
    assert str(error.value).replace(str(tmp_path), "out") == documented(asked_for)
