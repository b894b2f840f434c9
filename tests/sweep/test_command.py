"""Commands get `-m hf_mars` before their script; bad input is refused in one sentence."""

import shlex

import pytest
from sweep_helpers import GRID, QUICK, sweep

from hf_mars.sweep.command import given_twice, through_hf_mars
from hf_mars.sweep.errors import SweepError


@pytest.mark.parametrize(
    "command, expected",
    [
        ("python train.py --x 1", "python -m hf_mars train.py --x 1"),
        ("/usr/bin/python3.11 -u -X utf8 train.py", "/usr/bin/python3.11 -u -X utf8 -m hf_mars train.py"),
        ("python -m trl.scripts.sft --x 1", "python -m hf_mars -m trl.scripts.sft --x 1"),
        ("python -m hf_mars --mars_diagnostics train.py", "python -m hf_mars --mars_diagnostics train.py"),
        ("uv run python train.py", "uv run python -m hf_mars train.py"),
        ("torchrun --nproc_per_node 2 train.py a.py", "torchrun --nproc_per_node 2 -m hf_mars train.py a.py"),
        ("torchrun --nnodes 1 -m package.module --x", "torchrun --nnodes 1 -m hf_mars -m package.module --x"),
        ("torchrun -m hf_mars train.py", "torchrun -m hf_mars train.py"),
        (
            "accelerate launch --config_file c.yaml --cpu train.py --x 1",
            "accelerate launch --config_file c.yaml --cpu -m hf_mars train.py --x 1",
        ),
        ("accelerate launch --module package.module", "accelerate launch -m hf_mars -m package.module"),
        (
            "python -m torch.distributed.run --standalone train.py",
            "python -m torch.distributed.run --standalone -m hf_mars train.py",
        ),
    ],
)
def test_hf_mars_goes_before_the_script(command, expected):
    assert shlex.join(through_hf_mars(shlex.split(command))) == expected


@pytest.mark.parametrize("command", ["", "bash run.sh", "python -c 1", "python", "python -m", "accelerate launch x"])
def test_commands_without_a_visible_script(command):
    with pytest.raises(SweepError, match=r"script|command to compare"):
        through_hf_mars(shlex.split(command))


def test_arguments_that_the_command_has_too():
    command = ["python", "train.py", "--learning-rate=3", "--seed", "1", "--optimize"]
    assert given_twice(command, ["learning_rate", "optim", "seed"]) == ["learning_rate", "seed"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give the optimizers with --optim or in a --plan file"),
        (["--optim", "a"], "a has no learning rate"),
        (["--optim", "a", "--learning_rate", "-1"], "a: a learning rate is a number above 0, not '-1'"),
        (["--optim", "a", "a", "--learning_rate", "1"], "two optimizers are called 'a'"),
        (["--optim", "a", "--learning_rate", "1", "1.0"], "a has the same setting twice"),
        ([*GRID, "--seeds", "0"], "--seeds: must be a whole number of at least 1, not '0'"),
        ([*GRID, "--time_budget", "soon"], "must be a time such as 45s, 30m, 2h or 1h30m, not 'soon'"),
        ([*GRID, "--jop", "2"], "unrecognized arguments: --jop 2"),
        (["--plan", "no.yaml"], "cannot read the plan no.yaml: No such file"),
        ([*GRID, "--", "--unknown", "1"], "the command refuses its arguments (exit code 2): "),
        (
            ["--optim", "mars_admw", "--learning_rate", "1"],
            "mars_admw: optim='mars_admw': there is no such optimizer; ",
        ),
        ([*GRID, "--seeds", "3", "--final_seeds", "2"], "final_seeds 2: at least 3, the seeds that every setting"),
        (["--report"], "holds no sweep"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(tmp_path, arguments, message):
    done = sweep(tmp_path / "out", *arguments, code=2)
    assert message in done.stderr and done.stderr.splitlines()[-1].startswith("python -m hf_mars.sweep: ")


def test_a_program_that_is_not_there(tmp_path):
    done = sweep(tmp_path / "out", *GRID, script=("/no/python", "train.py"), code=2)
    assert done.stderr.splitlines()[-1].endswith("cannot start '/no/python': No such file or directory")


def test_a_command_that_was_refused_leaves_the_folder_free(tmp_path):
    sweep(tmp_path / "out", *GRID, *QUICK, "--", "--unknown", "1", code=2)
    sweep(tmp_path / "out", *GRID, *QUICK, "--seeds", "1")
