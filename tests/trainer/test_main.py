"""python -m hf_mars: any script, unchanged."""

import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest
from launch_helpers import ROOT, TESTS

pytestmark = pytest.mark.slow

EXAMPLE = TESTS / "trainer" / "official_example.py"
# This checkout is imported from other folders too; python's errors stay plain.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

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
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("how", [["train.py"], ["-m", "train"]], ids=["script", "module"])
def test_names_argv_and_imports(folder, how):
    done = run(folder, *how, "--output_dir", "out", "--optim", "mars_lion")
    name, script, value = done.stdout.split()
    assert (name, value) == ("mars_lion", "7") and script.endswith("train.py"), done.stderr


@pytest.mark.parametrize("arguments, code", [([], 2), (["--help"], 0)], ids=str)
def test_without_a_script(tmp_path, arguments, code):
    done = run(tmp_path, *arguments)
    assert done.returncode == code and done.stdout.startswith("usage: python -m hf_mars")


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
    plain = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    return plain, run(folder, *arguments)


def without_runpy(stderr):
    """Plain `python -m` shows its own frames above the module's, which ours leaves out."""
    return re.sub(r'  File "(<frozen runpy>".*\n|.*/runpy\.py".*\n    .*\n)', "", stderr)  # frozen from 3.11 on


SELF = """
import __main__, sys
print(__name__, __doc__, __file__, __spec__ and __spec__.name, __package__, sys.argv, sys.path)
print(__main__.__dict__ is globals(), sorted(globals()), __builtins__, __annotations__, __cached__)
"""
KINDS_OF_SCRIPTS = {
    "script": ["./me.py", "-m", "--help"],
    "module": ["-m", "me", "-m", "--help"],
    "package": ["-m", "folder", "-m"],
    "folder": ["folder", "-m"],
    "zip": ["./me.zip", "-m"],
    "no module": ["-m", "nosuch"],
    "no module in a package": ["-m", "folder.nosuch"],
    "package that cannot run": ["-m", "empty"],
    "folder that cannot run": ["empty"],
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("folder", "empty"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
    for path in ("me.py", "folder/__main__.py"):
        (folder / path).write_text(SELF)
    with zipfile.ZipFile(folder / "me.zip", "w") as archive:
        archive.writestr("__main__.py", SELF)
    return folder


@pytest.mark.parametrize("kind", KINDS_OF_SCRIPTS)
@pytest.mark.parametrize("safe_path", ["", "1"], ids=["", "PYTHONSAFEPATH"])
def test_what_a_script_sees_of_itself(scripts, kind, safe_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONSAFEPATH", safe_path)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{scripts}")
    plain, ours = run_both(scripts, *KINDS_OF_SCRIPTS[kind])
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


AT_EXIT = """
import atexit, pickle
class Mine: pass
atexit.register(lambda: print(type(pickle.loads(pickle.dumps(Mine()))), flush=True))
"""


@pytest.mark.parametrize("how", [["ends.py"], ["-m", "ends"], ["."]], ids=["script", "module", "folder"])
def test_main_outlives_the_script(tmp_path, how):
    """Exit handlers and threads that go on still find the script's classes in __main__."""
    for name in ("ends.py", "__main__.py"):
        (tmp_path / name).write_text(AT_EXIT)
    done = run(tmp_path, *how)
    assert done.stdout == "<class '__main__.Mine'>\n", done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.py"], "there is no file 'missing.py'"),
        (["-c", "print(1)"], "-c is none of its options, which are --mars_diagnostics and then -m"),
        (["-"], "- is none of its options"),
        (["-m"], "after -m comes the name of a module, not nothing"),
        (["-m", "--mars_diagnostics", "ends"], "after -m comes the name of a module, not --mars_diagnostics"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused_in_one_line(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"python -m hf_mars: {message}")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


# ---- what is imported, and when ----

HEAVY = "[name for name in ('torch', 'transformers', 'accelerate', 'numpy') if name in sys.modules]"


def test_environment_variables_that_the_script_sets_count(tmp_path):
    """Libraries read them when they are imported: nothing may have imported one before the script."""
    code = f"""
        import os, sys
        print({HEAVY})
        os.environ.update(OMP_NUM_THREADS="3", HF_HOME="elsewhere", HF_HUB_OFFLINE="0")
        import torch
        from transformers import TrainingArguments
        from huggingface_hub import constants
        print(torch.get_num_threads(), constants.HF_HOME, constants.HF_HUB_OFFLINE)
    """
    (tmp_path / "train.py").write_text(textwrap.dedent(code))
    plain, ours = run_both(tmp_path, "train.py")
    assert ours.stdout == plain.stdout, ours.stderr
    assert ours.stdout.startswith("[]\n") and ours.stdout.endswith("elsewhere False\n")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_worker_that_needs_nothing_imports_nothing(tmp_path, method):
    code = f"""
        import multiprocessing, sys
        def child():
            print("hf_mars" in sys.modules, {HEAVY}, flush=True)
        if __name__ == "__main__":
            process = multiprocessing.get_context({method!r}).Process(target=child)
            process.start()
            process.join()
    """
    (tmp_path / "train.py").write_text(textwrap.dedent(code))
    done = run(tmp_path, "--mars_diagnostics", "train.py")
    assert done.stdout == "True []\n", done.stderr


# ---- processes that the script starts ----

CHILDREN = """
import multiprocessing, pickle, sys
import torch
from transformers import TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.training_args import OptimizerNames


class Blocks(torch.utils.data.Dataset):  # unpickled in a spawned worker: found in the script that it runs again
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return TrainingArguments(output_dir="out", optim="mars_lion").optim.value


def child(pickled, grandchild, queue):
    made = TrainingArguments(output_dir="out", optim="mars_lion", optim_args="gamma=0.1")
    queue.put((pickle.loads(pickled).optim.value, made.optim.value, DEFAULT_CALLBACKS[-1].__name__))
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
    print(queue.get(timeout=240), queue.get(timeout=240))
else:
    method = "spawn"
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_know_the_names(tmp_path, method):
    """Data loader workers, children and their children; spawned ones run the script again before they unpickle.
    Diagnostics are on in all of them."""
    (tmp_path / "train.py").write_text(CHILDREN)
    done = run(tmp_path, "--mars_diagnostics", "train.py", method)
    child = ("mars_adamw", "mars_lion", "MarsDiagnosticsCallback")
    assert done.stdout.splitlines() == ["['mars_lion', 'mars_lion']", f"{child} {child}"], done.stderr[-3000:]


# ---- launchers ----

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0".split(),
}


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.exhaustive), "accelerate"])
def test_an_official_example_on_two_processes(tmp_path, launcher):
    """tests/trainer/official_example.py, which knows nothing of hf_mars, with MARS, diagnostics and TensorBoard."""
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
