"""No command of README.md and docs/ is stale: docs/checks.md says how each is checked. The site builds, by itself."""

import argparse
import ast
import configparser
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from clm_helpers import DOCUMENTS, run_clm, run_main, write_documents, write_token_bin
from launch_helpers import ROOT
from test_support_table import functions_of
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser, TrainingArguments

import hf_mars.__main__
from hf_mars import plot
from hf_mars.clm.errors import UsageError
from hf_mars.sweep.__main__ import parser as sweep_parser
from hf_mars.sweep.__main__ import plan_of
from hf_mars.sweep.command import through_hf_mars
from hf_mars.sweep.errors import SweepError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "torchrun", "accelerate", "sbatch", "make", "pip")
WITH_VALUE = ("--model_name_or_path", "--tokenizer_name")  # names on the Hub or folders of an earlier command


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands_of(page):
    """The words of every command, without comments and what stands for arguments of the reader's."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    if page.name != "checks.md":  # which names only beginnings
        lines += re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`", prose)
    for line in lines:
        words = shlex.split(re.sub(r"\[.*?\]|…", "", line), comments=True)
        if words:
            yield tuple(words)


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))
ROWS = re.findall(r"^\| `(.+?)` \| `(test_\w+\.py)::(test_\w+)` \|$", (ROOT / "docs" / "checks.md").read_text(), re.M)


def begins_with(command, row):
    beginning = tuple(shlex.split(row[0]))
    return command[: len(beginning)] == beginning


# ---- one check for each program ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model in place of every name on the Hub."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    run_main("--output_dir", folder, "--max_steps", 1, "--max_eval_samples", 1, "--save_strategy", "no")
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that the commands name."""
    for name in ("docs", "recipes", "benchmarks", "run_clm.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_documents(tmp_path / "my.txt", DOCUMENTS)
    for name in ("train.bin", "val.bin"):
        write_token_bin(tmp_path / name, [i % 50 for i in range(5000)])
    (yaml_block,) = blocks(ROOT / "docs" / "run_clm.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(yaml_block)
    zero = next(block for block in blocks(ROOT / "docs" / "distributed.md", "json") if "zero_optimization" in block)
    (tmp_path / "zero.json").write_text(zero)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without(arguments, *names):
    """The arguments without those options that are followed by a value."""
    arguments = list(arguments)
    for name in names:
        while name in arguments:
            i = arguments.index(name)
            del arguments[i : i + 2]
    return arguments


def execute_run_clm(arguments, model):
    """Every argument as it is but for names on the Hub, data sets there, and the size."""
    arguments = list(arguments)
    run_clm.check_arguments(*run_clm.parse_arguments([*arguments, "--use_cpu"]))
    for i, argument in enumerate(arguments[:-1]):
        if argument in WITH_VALUE:
            arguments[i + 1] = model
    if "--dataset_name" in arguments:
        arguments = [*without(arguments, "--dataset_name"), "--train_file", "my.txt"]
    pretrained = "--model_name_or_path" in arguments
    tiny = [] if pretrained else ["--config_overrides", "n_layer=1,n_head=2,n_embd=32,n_positions=64"]
    size = ["--max_steps", "1", "--max_eval_samples", "2", "--per_device_train_batch_size", "2", "--block_size", "16"]
    run_clm.main([*arguments, *tiny, *size, "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"])


def check_launched(script, arguments):
    """A script that a launcher starts: there, and its own parser takes the arguments."""
    assert (ROOT / script).is_file(), script
    if script == "run_clm.py":
        # DeepSpeed's file is read by the tests of engines; here it would mark this process as one of DeepSpeed's.
        arguments = without(arguments, "--deepspeed")
        run_clm.check_arguments(*run_clm.parse_arguments([*arguments, "--use_cpu", "--bf16", "false"]))
    else:
        parse_benchmark(script, arguments)


class Parsed(Exception):
    pass


def parse_benchmark(script, arguments):
    """Run the script until its parser has taken the arguments; one without a parser takes none."""
    assert re.fullmatch(r"benchmarks/\w+\.py", script), script
    if "ArgumentParser" not in (ROOT / script).read_text():
        assert not arguments and (ROOT / script).is_file()
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        raise Parsed(parse_args(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


def draw(arguments):
    """Every word before the first option is a run's folder."""
    log = [{"step": 1, "loss": 2.0, **{key: 0.5 for _, lines in plot.PANELS for key in lines}}]
    state = json.dumps({"global_step": 1, "log_history": log})
    for output_dir in itertools.takewhile(lambda argument: not argument.startswith("-"), arguments):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        (Path(output_dir) / "trainer_state.json").write_text(state)
    plot.main(list(arguments))


def parse_hf_mars(arguments):
    """What follows `-m hf_mars`: its own parser takes it, and the launcher's and the script's take the rest."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "excepthook", sys.excepthook)
        patch.setattr(hf_mars.__main__, "prepare", lambda diagnostics: None)
        patch.setattr(hf_mars.__main__, "is_installed", lambda: True)
        patch.setattr(hf_mars.__main__, "_command", lambda name: name)
        patch.setattr(os, "execv", lambda path, argv: seen.append(argv))
        for run in ("_run_module", "_run_path"):
            patch.setattr(hf_mars.__main__, run, lambda argv: seen.append(argv))
        script = next(argument for argument in arguments if not argument.startswith("-"))
        if script not in LAUNCHERS:
            Path(script).touch()
        hf_mars.__main__.main(list(arguments))
    first, *rest = seen[0]
    if first in LAUNCHERS:
        first, rest = LAUNCHERS[first](rest)
    elif first == "-m":
        first, *rest = rest
    if first == "trl.scripts.sft":
        from trl.scripts.sft import make_parser

        make_parser().parse_args_and_config([*rest, "--bf16", "false"])  # its default, which wants a GPU
    else:
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(rest)


def torchrun(arguments):
    args = get_args_parser().parse_args(arguments)
    return args.training_script, args.training_script_args


def accelerate(arguments):
    assert arguments[0] == "launch"
    args = launch_command_parser().parse_args(arguments[1:])
    return args.training_script, args.training_script_args


def deepspeed(arguments):
    from deepspeed.launcher.runner import parse_args

    args = parse_args(arguments)
    # The file is read by the tests of engines; here it would mark this process as one of DeepSpeed's.
    return args.user_script, without(args.user_args, "--deepspeed")


def trl(arguments):
    return f"trl.scripts.{arguments[0]}", arguments[1:]


def factory(arguments):
    """A tool with a file of settings, of which two are MARS's."""
    settings = yaml.safe_load((ROOT / arguments[1]).read_text())
    return "", ["--optim", settings["optim"], "--optim_args", settings["optim_args"], "--output_dir", "out"]


# From a launcher's arguments to the script that it starts, and to those of the script.
LAUNCHERS = {
    "torchrun": torchrun,
    "accelerate": accelerate,
    "deepspeed": deepspeed,
    "trl": trl,
    "llamafactory-cli": factory,
    "swift": factory,
}


def parse_sweep(arguments):
    """The sweep's own arguments make a plan, and the command's script takes those of every run."""
    own = list(itertools.takewhile(lambda argument: argument != "--", arguments))
    parsed, command = sweep_parser().parse_args(own), arguments[len(own) + 1 :]
    if parsed.report:
        assert not command
        return
    started = through_hf_mars(command)
    for run in plan_of(parsed, command).runs():
        parse_hf_mars([*started[started.index("hf_mars") + 1 :], *run.arguments(), "--output_dir", "out"])


def check(command, model):
    program, *arguments = command
    if "hf_mars" in arguments:
        assert any(begins_with(command, row) for row in ROWS), f"docs/checks.md has no row for: {shlex.join(command)}"
        if program in LAUNCHERS:
            assert "-m" in arguments
            launched, arguments = LAUNCHERS[program](arguments)
        else:
            launched, arguments = arguments[1], arguments[2:]
        assert launched == "hf_mars", launched
        if arguments:  # a sentence may name the beginning alone
            parse_hf_mars(arguments)
    elif program == "export":
        assert any(begins_with(command, row) for row in ROWS), f"docs/checks.md has no row for: {shlex.join(command)}"
    elif program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif command[:2] == ("pip", "install"):
        names = {name for name in arguments[1:] if not name.startswith("-")}
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        known = " ".join([*setup["options.extras_require"].values(), setup["options"]["install_requires"]]).split()
        assert all(name == "." or name in known for name in names - {"-e"}), names
    elif command[:2] == ("python", "run_clm.py"):
        execute_run_clm(arguments[1:], model)
    elif command[:3] == ("python", "-m", "hf_mars.clm"):
        execute_run_clm(arguments[2:], model)
    elif command[:3] == ("python", "-m", "hf_mars.plot"):
        draw(arguments[2:])
    elif command[:3] == ("python", "-m", "hf_mars.sweep"):
        parse_sweep(arguments[2:])
    elif program == "python" and arguments[0].startswith("benchmarks/"):
        parse_benchmark(arguments[0], arguments[1:])
    elif program == "torchrun":
        args = get_args_parser().parse_args(arguments)
        check_launched(args.training_script, args.training_script_args)
    elif command[:2] == ("accelerate", "launch"):
        parser = launch_command_parser()
        if any(argument.endswith(".py") for argument in arguments):
            args = _validate_launch_command(parser.parse_args(arguments[1:]))[0]
            check_launched(args.training_script, args.training_script_args)
        else:  # options that a sentence speaks of
            known = {option for action in parser._actions for option in action.option_strings}
            assert {argument for argument in arguments[1:] if argument.startswith("-")} <= known
    elif program == "sbatch":
        script = next(i for i, argument in enumerate(arguments) if argument.endswith(".sh"))
        assert (ROOT / arguments[script]).is_file()
        check_launched("run_clm.py", arguments[script + 1 :])
    else:
        pytest.fail(f"docs/checks.md has no class for: {shlex.join(command)}")


# ---- tests ----


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_command(command, model, folder):
    check(command, model)


@pytest.mark.parametrize(
    "command, error, words",
    [
        (
            "python run_clm.py --optim mars_adamv --output_dir out",
            UsageError,
            "--optim mars_adamv: there is no such optimizer",
        ),
        ("torchrun --nproc_per_node 2 run_clm.py --optimm mars_m --output_dir out", UsageError, "unknown argument"),
        ("torchrun --nprocs 2 run_clm.py --output_dir out", SystemExit, "2"),
        ("accelerate launch --num_procs 2 run_clm.py --output_dir out", SystemExit, "2"),
        ("python benchmarks/step_time.py --stepz 3", SystemExit, "2"),
        ("python benchmarks/state_bytes.py --steps 3", AssertionError, "--steps"),
        ("python benchmarks/none.py", FileNotFoundError, "none.py"),
        ("python -m hf_mars.plot out --outputs loss.png", SystemExit, "2"),
        ("python -m hf_mars.sweep --optims mars_m -- python train.py", SweepError, "--optims"),
        ("python -m hf_mars train.py --optim mars_adamv --output_dir out", SystemExit, "2"),
        ("python -m hf_mars --mars_diagnostic train.py --optim mars_adamw --output_dir out", SystemExit, "2"),
        ("python -m hf_mars train.py --optim mars_adamw --optim_args gama=1 --output_dir out", ValueError, "gama"),
        ("python -m hf_mars -m trl.scripts.sft --datset_name ./data --output_dir out", ValueError, "--datset_name"),
        ("torchrun --nprocs 2 -m hf_mars train.py --output_dir out", AssertionError, "no row"),
        ("python -m hf_mars.sweep --optim a --learning_rates 1 -- python train.py", SweepError, "--learning_rates"),
        ("python -m hf_mars.sweep --optim mars_b --learning_rate 1 -- python train.py", SweepError, "mars_b"),
        ("python -m hf_mars.sweep --optim adam_b --learning_rate 1 -- python train.py", SystemExit, "2"),
        ("torchrun --nproc_per_node 2 -m hf_mars train.py --optim mars --output_dir out", SystemExit, "2"),
        ("accelerate launch -m hf_mars train.py --optim mars --output_dir out", SystemExit, "2"),
        ("python -m hf_mars torchrun --nprocs 2 train.py --output_dir out", SystemExit, "2"),
        ("python -m hf_mars torchrun train.py --optim mars --output_dir out", SystemExit, "2"),
        ("python -m hf_mars trl sft --datset_name ./data --output_dir out", ValueError, "--datset_name"),
        ("make nothing", subprocess.CalledProcessError, "nothing"),
        ("pip install nothing", AssertionError, "nothing"),
        ("pip install dataset", AssertionError, "dataset"),
        ("nothing at all", pytest.fail.Exception, "no class for: nothing at all"),
    ],
)
def test_a_stale_command_fails(command, error, words, model, folder):
    with pytest.raises(error, match=re.escape(words)):
        check(tuple(command.split()), model)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_is_overlooked(page):
    others = re.sub(r"^```bash\n.*?^```", "", page.read_text(), flags=re.M | re.S)
    assert not re.findall(rf"^(?: {{4}}|```\n)(?:{'|'.join(PROGRAMS[:4])}) .*", others, flags=re.M)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_of_the_table_has_its_test_and_its_command(row):
    assert row[2] in functions_of(row[1])
    assert any(begins_with(command, row) for command in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_import_what_there_is(page):
    for block in blocks(page, "python"):
        run_imports(block)


def run_imports(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), {})


def test_a_stale_import_fails():
    with pytest.raises(ImportError, match="Gone"):
        run_imports("def f():\n    from hf_mars import Gone")


@pytest.mark.slow
def test_the_site_builds_and_takes_nothing_from_outside(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "site").rglob("*") if path.suffix in (".html", ".css")]
    assert {page.with_suffix(".html").name for page in PAGES[1:]} | {"index.html"} <= {path.name for path in files}
    outside = r"<(?:link|script|img|iframe)[^>]*(?:href|src)=[\"']?(?:https?:)?//|url\(['\"]?(?:https?:)?//|@import"
    for path in files:
        assert not re.search(outside, path.read_text()), path
    shown = "".join(path.read_text(encoding="utf-8") for path in files if path.suffix == ".html")
    assert not re.findall(r"<a [^>]*>(?:docs/)?\w+\.md</a>", shown)  # titles, not names of files
    assert all("css/site.css" in path.read_text() for path in files if path.name in ("index.html", "run_clm.html"))
