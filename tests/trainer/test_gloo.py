"""A finished run under gloo ends with 0: its threads have nothing left to do when the interpreter shuts down."""

import ctypes
import hashlib
import sys
import threading
import time

import pytest
from launch_helpers import run_together

from hf_mars.trainer.gloo import rest

PR_SET_NAME = 15


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_rest_waits_for_what_is_under_way(seconds):
    """For a thread of gloo's name that computes, outside of the interpreter's lock; not for one that waits."""
    end, waits = threading.Event(), threading.Event()

    def work():
        ctypes.CDLL(None).prctl(PR_SET_NAME, b"pt_gloo_runloop")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            hashlib.sha256(bytes(10_000_000))
        waits.set()
        end.wait()

    assert timed(rest) < 0.2  # there is no such thread
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.1)
    try:
        assert timed(rest) >= 0.2 and waits.is_set()
        assert timed(lambda: rest(longest=0.05)) < 0.2
    finally:
        end.set()
        thread.join()


def timed(function):
    start = time.monotonic()
    function()
    return time.monotonic() - start


UNWAITED = """
import atexit, torch, torch.distributed as dist
dist.init_process_group("gloo")
atexit.register(print, "the script's own exit handler")
for _ in range(30):
    dist.all_reduce(torch.ones(1 << 18), async_op=True)
"""


@pytest.mark.slow
def test_a_script_that_leaves_at_once_is_not_aborted(tmp_path):
    """Without hf_mars about two of five such pairs end with SIGABRT, torch 2.13 on two busy cores."""
    (tmp_path / "script.py").write_text(UNWAITED)

    def pair(port):
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        return [({**where, "RANK": str(rank)}, [sys.executable, "-m", "hf_mars", "script.py"]) for rank in range(2)]

    for _ in range(5):
        for printed in run_together(pair, tmp_path, timeout=120):
            assert "the script's own exit handler" in printed
