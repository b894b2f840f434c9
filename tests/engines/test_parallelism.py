"""Models sharded along several mesh dimensions in the Trainer: four processes give the numbers of one."""

import dataclasses
import json

import pytest
import torch
from engine_helpers import SETTINGS
from helpers import assert_close, assert_equal
from launch_helpers import launch
from parallel_models import load, save
from trainer_helpers import losses, make_trainer, train

distributed = pytest.importorskip("transformers.distributed")

SHARDS_WHEN_LOADING = {"tp_size", "fsdp_size", "ep_size"} <= {
    field.name for field in dataclasses.fields(distributed.DistributedConfig)
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # for all names
    pytest.mark.skipif(not SHARDS_WHEN_LOADING, reason="this transformers does not shard models when it loads them"),
]

PROCESSES = 4
# Processes that see the same data, of four: their batches are as many times larger.
SAME_DATA = {"tensor parallel": 4, "FSDP2 and tensor parallel": 2}
WAYS = ["HSDP", "CPU offload", "tensor parallel", "HSDP, loaded", "FSDP2 and tensor parallel", "expert parallel"]
RESUMED = ["HSDP", "CPU offload"]  # transformers saves no optimizer of models that were sharded when loaded
EVERY_TIME = ["mars_m approx"]
NAMES = [pytest.param(n, marks=[] if n in EVERY_TIME else [pytest.mark.exhaustive]) for n in SETTINGS]


def settings_of(name, way=None):
    per_device = 4 // PROCESSES * SAME_DATA.get(way, 1) if way else 4
    common = {"learning_rate": 1e-3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": per_device}
    return {**common, **SETTINGS[name]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def together(request, folder):
    """Runs of every way, for the names that this session asks for."""
    wanted = {item.callspec.params["name"] for item in request.session.items if "together" in item.fixturenames}
    runs = []
    for way in WAYS:
        for name in wanted:
            saves = {"save_strategy": "steps", "save_steps": 3} if way in RESUMED else {"save_strategy": "no"}
            run = {"name": f"{way} {name}", "way": way, "settings": settings_of(name, way) | saves}
            runs.append(run)
            if way in RESUMED:
                checkpoint = str(folder / run["name"] / "checkpoint-3")
                runs.append({**run, "name": f"{run['name']} resumed", "resume": checkpoint})
                runs[-1]["settings"] = {**run["settings"], "save_strategy": "no", "eval_strategy": "no"}
    (folder / "plan.json").write_text(json.dumps(runs))
    launch(PROCESSES, "engines/parallel_worker.py", folder, timeout=400 + 200 * len(wanted))
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_one_process(name, way, together, folder, tmp_path):
    trainer = train(tmp_path, model=load(folder, way), **settings_of(name))
    found = together[f"{way} {name}"]
    assert found["losses"] == pytest.approx(losses(trainer), rel=1e-4, abs=0) and len(found["losses"]) == 6
    expected = {key: param.detach() for key, param in trainer.model.named_parameters()}
    assert found["weights"].keys() == expected.keys()
    assert_close(*zip(*((found["weights"][key], value) for key, value in expected.items()), strict=True), 1e-4)


@pytest.mark.parametrize("way", RESUMED)
@pytest.mark.parametrize("name", NAMES)
def test_it_resumes(name, way, together):
    found, expected = together[f"{way} {name} resumed"], together[f"{way} {name}"]
    assert found["losses"] == expected["losses"]
    assert_equal(list(found["weights"].values()), list(expected["weights"].values()))


@pytest.mark.parametrize("name", SETTINGS)
def test_pipelines_are_refused(name, tmp_path, folder):
    """A stage of one process is enough to be told of."""
    model = load(folder, "pipeline")
    model.config.distributed_config = distributed.DistributedConfig(pp_size=2)
    optim = SETTINGS[name]["optim"]
    with pytest.raises(ValueError, match=rf"optim='{optim}' does not work with pipeline parallelism \(pp_size=2\)"):
        make_trainer(tmp_path, model=model, **SETTINGS[name]).create_optimizer()
