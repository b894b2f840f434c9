"""What ranks tell each other in a step: norms of sharded tensors, and matrices that one rank works on for all."""

import json

import pytest
from launch_helpers import launch

pytestmark = pytest.mark.slow

MATRICES = 7  # of sharing_worker.py
STEPS = 6  # of kernel_worker.py


@pytest.mark.parametrize("world", [2, 4])
def test_sharing(world):
    """The worker checks the values: tall, wide, square and stacked matrices, uneven and empty shards; and pieces."""
    found = json.loads(launch(world, "engines/sharing_worker.py").strip().splitlines()[-1])
    # Each matrix is worked on once; in each row of a hybrid mesh once; where it cannot be shared out, on every rank.
    expected = {"rows": 1, "columns": 1, "hybrid": 2, "replicated": world, "both": world}
    if world == 2:  # the grid is 2 x 1
        expected["hybrid"] = 2
    for name, times in expected.items():
        assert found[f"{name}: worked on by all ranks"] == times * MATRICES, name
        assert found[f"{name}: reductions"] == {"replicated": 0, "both": 2}.get(name, 1), name
    assert found["replicas: messages a step"] == {"broadcast": min(world, 4)}  # of four matrices
    assert found["sharded MarsAdamW: messages a step"] == {"all_reduce": 1}
    # The sides of one matrix are too short for bfloat16: of it float32 is sent in each of two steps, there and back or
    # to every rank.
    for engine, times in (("sharded", 2), ("replicated", world)):
        in_bfloat16, in_float32 = found[f"{engine}: bytes in bfloat16, in float32"]
        short = 2 * times * 8 * 8 * 4
        assert in_bfloat16 - short == (in_float32 - short) / 2
    assert found["sharded MarsShampoo: messages a step"] == {"all_reduce": 1, "all_to_all_single": 2}


@pytest.mark.parametrize(
    "world, engine, interpreted",
    [
        pytest.param(2, "fsdp2", False, id="fsdp2-cpu"),
        pytest.param(2, "fsdp2", True, id="fsdp2-triton", marks=pytest.mark.exhaustive),
        pytest.param(4, "hsdp", False, id="hsdp-cpu"),
        pytest.param(4, "hsdp", True, id="hsdp-triton", marks=pytest.mark.exhaustive),
        pytest.param(2, "one rank cannot", False, id="one rank cannot-cpu", marks=pytest.mark.exhaustive),
        pytest.param(2, "one rank cannot", True, id="one rank cannot-triton"),
    ],
)
def test_sharded_steps_in_compiled_kernels(world, engine, interpreted):
    """They give the numbers of the composed step. Ranks that do not agree about the kernels would wait for ever."""
    environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
    found = json.loads(launch(world, "engines/kernel_worker.py", engine, **environment).strip().splitlines()[-1])
    for name, (batches, difference, reductions) in found.items():
        clips = "clipped" in name
        expected = STEPS - 1 if clips else STEPS  # one of them changes nothing
        asks = clips or interpreted  # whether the ranks agree before they take the kernels
        assert batches == (0 if engine == "one rank cannot" and asks else expected), name
        assert difference < (2e-3 if "Lion" in name else 1e-5), name
        assert reductions == clips, name
