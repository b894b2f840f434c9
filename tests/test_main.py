"""python -m hf_mars: any script, unchanged."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent / "official_example.py"
# This checkout is imported from other folders too; python's errors stay plain.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}

SCRIPT = """
import sys
from transformers import HfArgumentParser, TrainingArguments
import neighbour
if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    print(args.optim.value, sys.argv[0], neighbour.value)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("value = 7")
    return tmp_path


def run(folder, *arguments):
    command = [sys.executable, "-m", "hf_mars", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("how", [["train.py"], ["-m", "train"]], ids=["script", "module"])
def test_names_argv_and_imports(folder, how):
    done = run(folder, *how, "--output_dir", "out", "--optim", "mars_lion")
    name, script, value = done.stdout.split()
    assert (name, value) == ("mars_lion", "7") and script.endswith("train.py"), done.stderr


@pytest.mark.parametrize("arguments, code", [([], 2), (["--help"], 0), (["missing.py"], 2)], ids=str)
def test_without_a_script(folder, arguments, code):
    done = run(folder, *arguments)
    assert done.returncode == code
    assert "python -m hf_mars" in done.stdout + done.stderr


# ---- as plain python does it ----

ENDINGS = {
    "exit": "import sys; sys.exit(3)",
    "error": "def f():\n    raise ValueError('wrong')\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    f()",
    "syntax": "x = = 1",
    "interrupted": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)",
}


@pytest.mark.parametrize(
    "ending, how",
    [*((ending, ["ends.py"]) for ending in ENDINGS), ("error", ["-m", "ends"])],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_exit_code_and_traceback_are_pythons(tmp_path, ending, how):
    (tmp_path / "ends.py").write_text(ENDINGS[ending])
    plain, ours = run_both(tmp_path, *how)
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    assert ours.stderr == without_runpy(plain.stderr)


def run_both(folder, *arguments):
    """The same command by python and by python -m hf_mars."""
    command = [sys.executable, *arguments]
    plain = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    return plain, run(folder, *arguments)


def without_runpy(stderr):
    """Plain `python -m` shows its own frames above the module's, which ours leaves out."""
    return re.sub(r'  File "<frozen runpy>".*\n', "", stderr)


def test_what_a_script_sees_of_itself(tmp_path):
    code = """
        import __main__, sys
        print(__name__, __doc__, __file__, __spec__, __package__, sys.argv, sys.path[0])
        print(__main__.__dict__ is globals())
    """
    (tmp_path / "me.py").write_text(textwrap.dedent(code))
    plain, ours = run_both(tmp_path, "./me.py", "-m", "--help")
    assert ours.stdout == plain.stdout, ours.stderr


# ---- processes that the script starts ----

CHILDREN = """
import multiprocessing, pickle, sys
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames


class Blocks(torch.utils.data.Dataset):  # unpickled in a spawned worker: found in the script that it runs again
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return TrainingArguments(output_dir="out", optim="mars_lion").optim.value


def child(pickled, grandchild, queue):
    made = TrainingArguments(output_dir="out", optim="mars_lion", optim_args="gamma=0.1")
    queue.put((pickle.loads(pickled).optim.value, made.optim.value, "hf_mars" in sys.modules))
    if grandchild:
        start(child, pickled, False, queue)


def start(function, *arguments):
    process = multiprocessing.get_context(method).Process(target=function, args=arguments)
    process.start()
    process.join()


# Before anything is unpickled from the parent.
assert "MARS_M" in OptimizerNames.__members__
if __name__ == "__main__":
    method = sys.argv[1]
    loader = torch.utils.data.DataLoader(Blocks(), batch_size=None, num_workers=1, multiprocessing_context=method)
    print(list(loader))
    queue = multiprocessing.get_context(method).Queue()
    start(child, pickle.dumps(TrainingArguments(output_dir="out", optim="mars_adamw")), True, queue)
    print(queue.get(timeout=60), queue.get(timeout=60))
else:
    method = "spawn"
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_know_the_names(tmp_path, method):
    """Data loader workers, children and their children; spawned ones run the script again before they unpickle."""
    (tmp_path / "train.py").write_text(CHILDREN)
    done = run(tmp_path, "train.py", method)
    child = ("mars_adamw", "mars_lion", True)
    assert done.stdout.splitlines() == ["['mars_lion', 'mars_lion']", f"{child} {child}"], done.stderr[-3000:]


# ---- launchers ----

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0".split(),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_official_example_on_two_processes(tmp_path, launcher):
    """tests/official_example.py, which knows nothing of hf_mars, with MARS, diagnostics and TensorBoard."""
    events = tmp_path / "events"
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "hf_mars", "--mars_diagnostics", str(EXAMPLE)]
    command += ["--output_dir", str(tmp_path / "out"), "--optim", "mars_adamw", "--use_cpu", "--max_steps", "2"]
    command += ["--logging_steps", "1", "--report_to", "tensorboard", "--per_device_train_batch_size", "4"]
    environment = {**ENVIRONMENT, "TENSORBOARD_LOGGING_DIR": str(events)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MarsAdamW on 2 processes" in done.stdout
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert log[1]["mars/correction_ratio"] > 0

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    (event,) = accumulator.Scalars("train/mars/gradient_cosine")
    assert event.value == pytest.approx(log[1]["mars/gradient_cosine"])
