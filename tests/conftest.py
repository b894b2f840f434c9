"""Set before any import: no test needs the network, and thread counts do not change results between machines."""

import gc
import os
import signal

# A shell that runs the tests in the background ignores it, and so would the scripts that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

for offline in ("HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[offline] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate.state import PartialState  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """TrainingArguments with DeepSpeed make one, of which later tests' arguments would be told."""
    before = dist.is_initialized()
    yield
    if dist.is_initialized() and not before:
        dist.destroy_process_group()
        PartialState._reset_state()


def pytest_collection_finish():
    """Every training run collects garbage: a quarter of a second with all the libraries' objects, nothing without."""
    gc.freeze()


if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton's interpreter cuts float32 off where GPUs round to the nearest bfloat16 (as test_triton.py sees they do).
    import triton.language as tl
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float

    def _rounded(values, from_dtype, to_dtype, mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return _convert_float(values, from_dtype, to_dtype, mode)
        return torch.tensor(values).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = _rounded
