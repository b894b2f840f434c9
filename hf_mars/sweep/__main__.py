"""The command line of `python -m hf_mars.sweep`."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .command import given_twice, through_hf_mars
from .errors import SweepError
from .phases import Sweep
from .plan import Plan
from .plan_file import make_plan, read_plan_file
from .report import report
from .runner import RUNS, Runner, remove_abandoned
from .store import RESULTS, Store, read_results

DESCRIPTION = """Compare optimizers for a training script: every optimizer gets the same number of settings, the same
seeds and full schedules. The command after -- is run with --optim, --learning_rate, --seed and --output_dir
added; its script needs no change. The same command goes on where a sweep was stopped."""
EXAMPLE = """example:
  python -m hf_mars.sweep --optim adamw_torch_fused mars_adamw mars_m --learning_rate 1e-4 3e-4 1e-3 \\
      --seeds 2 --jobs 2 --time_budget 2h --output_dir sweep -- python train.py --max_steps 500"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SweepError(message)


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python -m hf_mars.sweep",
        usage="%(prog)s --optim NAME … --learning_rate X … [options] -- COMMAND …\n       "
        "%(prog)s --plan FILE [options] -- COMMAND …\n       %(prog)s --report [--output_dir DIR]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--optim", nargs="+", metavar="NAME", help="the optimizers; the first is the baseline")
    made.add_argument("--learning_rate", nargs="+", metavar="X", help="the learning rates of each")
    made.add_argument(
        "--plan", metavar="FILE", help="a YAML plan instead of --optim, with more settings (docs/sweep.md)"
    )
    made.add_argument("--seeds", type=_at_least(1), metavar="N", help="seeds 1 to N for each setting (default: 2)")
    made.add_argument(
        "--final_seeds", type=_at_least(1), metavar="N", help="seeds 1 to N for the best settings (default: --seeds)"
    )
    made.add_argument("--jobs", type=_at_least(1), default=1, metavar="N", help="runs at a time (default: 1)")
    made.add_argument(
        "--time_budget", type=_seconds, metavar="T", help="such as 30m or 2h: no run is begun that would end later"
    )
    made.add_argument(
        "--max_extensions",
        type=_at_least(0),
        default=2,
        metavar="N",
        help="how often all grids grow where a best learning rate is the outermost (default: 2)",
    )
    made.add_argument(
        "--timing_steps",
        type=_at_least(0),
        default=30,
        metavar="N",
        help="steps of the runs that time the best settings alone, 0 for none (default: 30)",
    )
    made.add_argument("--output_dir", default="sweep", metavar="DIR", help="where everything goes (default: sweep)")
    made.add_argument("--report", action="store_true", help="report on what has been run so far, and run nothing")
    made.add_argument("--retry_failed", action="store_true", help="make failed runs again")
    made.add_argument("--keep_outputs", action="store_true", help="keep what the runs saved, such as models")
    return made


def _at_least(least: int) -> Any:
    def whole(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return int(text)

    return whole


def _seconds(text: str) -> float:
    """90, 90s, 30m, 2h or 1h30m in seconds."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text)
    total = sum(float(n) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True) if n) if found else 0
    if total <= 0:
        raise argparse.ArgumentTypeError(f"must be a time such as 45s, 30m, 2h or 1h30m, not {text!r}")
    return total


def main(argv: list[str]) -> int:
    """Run, or report on, a sweep. Returns the exit code."""
    began = time.monotonic()
    own, command = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    try:
        arguments = parser().parse_args(own)
        folder = Path(arguments.output_dir)
        if arguments.report:
            print(report(folder))
            return 0
        return _run(arguments, command, folder, began)
    except SweepError as error:
        print(f"python -m hf_mars.sweep: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on, --report tells what there is", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace, command: list[str], folder: Path, began: float) -> int:
    through_hf_mars(command)
    plan = plan_of(arguments, command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"cannot make the output_dir {folder}: {error.strerror}") from None
    lock = _lock(folder)
    stored = Plan.load(folder)
    rows = read_results(folder) if (folder / RESULTS).is_file() else []
    if stored is not None and rows:  # else no run of it ever ended
        plan = plan.added_to(stored, {row["optimizer"] for row in rows})
    plan.save(folder)
    names = {name for settings in plan.optimizers.values() for s in settings for name, _ in s.arguments}
    for name in given_twice(command, sorted({*names, "seed", "output_dir"})):
        print(f"--{name} of the command gives way to the sweep's", file=sys.stderr)
    store = Store(folder)
    for run in remove_abandoned(folder, store.rows.values()):
        print(f"ended {run}, which a sweep that was killed had left running", file=sys.stderr)
    if arguments.retry_failed:
        store.forget_failed()
    runner = Runner(
        command,
        folder,
        store,
        jobs=arguments.jobs,
        deadline=None if arguments.time_budget is None else began + arguments.time_budget,
        keep_outputs=arguments.keep_outputs,
        commit=_git_commit(),
    )
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)  # the runs end with the sweep
    grids = plan.runs()
    to_make = sum(run.key not in store.rows for run in grids)
    print(f"{to_make} of {len(grids)} runs of the grids are to be made; logs: {folder / RUNS}", file=sys.stderr)
    with lock:
        done = Sweep(plan, folder, store, runner, arguments.max_extensions, arguments.timing_steps).run()
        print(report(folder))
    if not done:
        print("the time budget is used up; the same command goes on", file=sys.stderr)
    if store.rows and all(row["status"] == "failed" for row in store.rows.values()):
        print(f"every run failed; {folder / 'report.md'} has their last lines", file=sys.stderr)
        return 1
    return 0


def plan_of(arguments: argparse.Namespace, command: list[str]) -> Plan:
    """The plan that the command line, or the file that it names, asks for."""
    if (arguments.plan is None) == (arguments.optim is None):
        raise SweepError("give the optimizers with --optim or in a --plan file, one of the two")
    file: dict[str, Any] = (
        {"optimizers": arguments.optim} if arguments.plan is None else read_plan_file(arguments.plan)
    )
    rates = arguments.learning_rate or file.get("learning_rate")
    return make_plan(
        command,
        file["optimizers"],
        rates,
        file.get("arguments"),
        seeds=arguments.seeds or file.get("seeds", 2),
        final_seeds=arguments.final_seeds or file.get("final_seeds"),
        equal_budget=file.get("equal_budget", True),
    )


def _lock(folder: Path) -> TextIO:
    """An open file that no other sweep can have; a sweep that dies lets it go."""
    import fcntl

    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SweepError(f"another sweep is running in {folder}") from None
    return lock


def _git_commit() -> str | None:
    """The commit of the present folder, with "+changes" where files differ from it."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes.stdout.strip() else commit


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
