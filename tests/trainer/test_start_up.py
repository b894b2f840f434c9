"""HF_MARS and `python -m hf_mars LAUNCHER`: the names in processes that others start, as new commands too."""

import os
import re
import shlex
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest
from launch_helpers import ROOT, free_port

from hf_mars.trainer.start_up import PTH, is_installed

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PLAIN = {name: value for name, value in os.environ.items() if name != "HF_MARS"} | {"PYTHONPATH": str(ROOT)}
# What waits for transformers to be imported.
REGISTERED = "import sys; print(sum(type(f).__module__ == 'hf_mars.trainer.on_import' for f in sys.meta_path))"
NAMES = """
import os, sys
from transformers import TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
args = TrainingArguments("out", optim=sys.argv[-1], use_cpu=True, report_to="none")
diagnostics = any(callback.__name__ == "MarsDiagnosticsCallback" for callback in DEFAULT_CALLBACKS)
print(f"{args.optim.value}, rank {os.environ.get('RANK')}, diagnostics {diagnostics}\\n", end="", flush=True)
"""


@pytest.fixture(autouse=True, scope="module")
def hook():
    assert is_installed(), f"no {PTH} in this environment: pip install -e . brings it"


def run(*command, folder=None, **environment):
    environment = {**PLAIN, **environment}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)


def the_line():
    return next(path for path in (Path(folder, PTH) for folder in sys.path) if path.is_file()).read_text()


# ---- the environment variable ----


@pytest.mark.parametrize("value, asked", [(None, 0), ("", 0), ("0", 0), ("1", 1), ("diagnostics", 1)])
def test_only_where_it_is_asked_for(value, asked):
    done = run(sys.executable, "-c", REGISTERED, **({} if value is None else {"HF_MARS": value}))
    assert (done.stdout, done.stderr) == (f"{asked}\n", "")


def test_a_value_that_means_nothing_ends_no_process():
    done = run(sys.executable, "-c", "print('done')", HF_MARS="yes")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr == "hf_mars: HF_MARS='yes' is none of 0, 1 and diagnostics; taken as 1\n"


def test_a_python_that_does_not_ask_only_looks_at_its_environment():
    """docs/ecosystem.md has the time that it takes."""
    assert the_line().startswith('import os; os.environ.get("HF_MARS", "0") not in ("", "0") and ')
    assert the_line().count("\n") == 1
    done = run(sys.executable, "-X", "importtime", "-c", "pass")
    assert "site" in done.stderr and not re.search(r"\| +hf_mars", done.stderr)  # pip install -e adds a finder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The python of a virtual environment with hf_mars as an installation leaves it, and no torch or transformers."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    (site_packages / PTH).write_text(the_line())
    (site_packages / "hf_mars").symlink_to(ROOT / "hf_mars")
    return str(folder / "bin" / "python")


@pytest.mark.parametrize("flag, asked", [("-I", 1), ("-E", 1), ("-s", 1), ("-S", 0), ("-IS", 0)])
def test_pythons_flags(environment, flag, asked):
    """Isolated mode leaves HF_MARS alone, which is none of python's variables; without `site` there is no hook."""
    done = run(environment, flag, "-c", REGISTERED, HF_MARS="1", PYTHONPATH="")
    assert (done.stdout, done.stderr) == (f"{asked}\n", "")


def test_however_deep(tmp_path):
    """A script, a shell, an isolated Python, another Python: only the first was asked."""
    (tmp_path / "last.py").write_text(NAMES)
    isolated = "import subprocess, sys; subprocess.run([sys.executable, 'last.py', 'mars_m'])"
    shell = shlex.join([sys.executable, "-I", "-c", isolated])
    (tmp_path / "first.py").write_text(f"import subprocess; subprocess.run({shell!r}, shell=True)")
    done = run(sys.executable, "-m", "hf_mars", "--mars_diagnostics", "first.py", folder=tmp_path)
    assert done.stdout == "mars_m, rank None, diagnostics True\n", done.stderr[-3000:]


# ---- launchers ----

TORCHRUN = ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT"]
LAUNCHERS = {
    "torchrun": TORCHRUN,
    "accelerate": "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port PORT".split(),
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
    # As llamafactory-cli and a script for SLURM do: the program that was asked starts a launcher as a new command.
    "a launcher of launchers": ["sh", "-c", f'{shlex.join(TORCHRUN)} "$@"', "sh"],
}


@pytest.mark.parametrize(
    "how, launcher",
    [
        *(("variable", launcher) for launcher in [*LAUNCHERS][1:]),
        pytest.param("variable", "torchrun", marks=pytest.mark.exhaustive),
        ("prefix", "torchrun"),
        *(pytest.param("prefix", launcher, marks=pytest.mark.exhaustive) for launcher in [*LAUNCHERS][1:]),
    ],
)
def test_what_launchers_start(tmp_path, launcher, how):
    """Commands as a user types them, with a script that knows nothing of hf_mars."""
    if launcher == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    (tmp_path / "train.py").write_text(NAMES)
    port = free_port()
    command = [word.replace("PORT", port) for word in LAUNCHERS[launcher]] + ["train.py", "mars_lion"]
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    if how == "prefix":
        done = run(sys.executable, "-m", "hf_mars", *command, folder=tmp_path, **settings)
    else:
        done = run("env", *command, folder=tmp_path, HF_MARS="1", **settings)  # which looks the command up in PATH
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("mars"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines == [f"mars_lion, rank {rank}, diagnostics False" for rank in (0, 1)], done.stdout


def test_a_command_takes_the_place_of_this_process():
    """Its arguments, its output and its exit code are its own."""
    done = run(sys.executable, "-m", "hf_mars", "sh", "-c", 'echo "$HF_MARS $0 $1"; exit 7', "a b", "--help")
    assert (done.returncode, done.stdout, done.stderr) == (7, "1 a b --help\n", "")


def test_a_command_of_this_environment_comes_first():
    """`python` beside this Python, although the environment is not activated."""
    done = run(
        sys.executable, "-m", "hf_mars", "python", "-c", "import sys; print(sys.executable)", PATH="/usr/bin:/bin"
    )
    assert Path(done.stdout.strip()).parent == BIN, done.stderr


def test_a_folder_that_cannot_run_does_not_hide_a_command(tmp_path):
    """A checkout of a launcher has a folder of its name."""
    (tmp_path / "sh").mkdir()
    done = run(sys.executable, "-m", "hf_mars", "sh", "-c", "exit 7", folder=tmp_path)
    assert done.returncode == 7, done.stderr


def test_a_script_comes_before_a_command_of_its_name(tmp_path):
    (tmp_path / "sh").write_text("print('the script')")
    done = run(sys.executable, "-m", "hf_mars", "sh", folder=tmp_path)
    assert done.stdout == "the script\n", done.stderr


@pytest.mark.parametrize("command, code", [("sh", 2), ("script.py", 0)])
def test_a_checkout_that_is_not_installed_says_so(tmp_path, command, code):
    """A launcher in vain is refused; a script itself knows the names."""
    (tmp_path / "script.py").write_text(REGISTERED)
    (tmp_path / "hf_mars").symlink_to(ROOT / "hf_mars")
    venv.create(tmp_path / "bare", symlinks=True)
    done = run(str(tmp_path / "bare" / "bin" / "python"), "-m", "hf_mars", command, folder=tmp_path, PYTHONPATH="")
    assert done.returncode == code and done.stdout == ("" if code else "1\n")
    assert done.stderr.startswith("python -m hf_mars: hf_mars is not installed in this environment")
    assert done.stderr.count("\n") == 1
