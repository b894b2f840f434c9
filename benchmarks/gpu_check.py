"""Everything about hf_mars that only a GPU can tell, in ten minutes: PASS and FAIL, each with its number.

    python benchmarks/gpu_check.py [--minutes 10] [--json FILE] [--text corpus.txt]
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --tiny       # a try, without a GPU

From a plain checkout with torch, triton, transformers, accelerate and pytest; nothing is built, no network is needed.
A GPU of CUDA or ROCm. The part "large" needs 28 GiB of its memory, and is left out, in so many words, where less is
free.
The parts come in order of what they are worth, each with its share of the minutes, and every line is printed and
written to the JSON file when it is known, so that a run that is cut short is worth having too:

    1 versions: the kernels run, without warnings      6 host: time, launches, idle gaps
    2 tests: those that need a GPU                     7 matrices: MarsShampoo beside Muon
    3 order: streams, subsets, graphs                  8 engines: FSDP2, GradScaler
    4 large: a tensor above 2^31 elements              9 trainer: tokens per second
    5 speed: bandwidth, beside AdamW                  10 training: GPT-2 small in the time that is left

PASS and FAIL of a time are about the targets in docs/performance.md. With --tiny, sizes are tiny and times mean
nothing: they are INFO. In names, "nothing clips" is where the norm of the gradient alone says so, "all clip" where
every tensor is clipped; "words" are numbers read or written per parameter.

Exit status: 0 without a FAIL, 1 with one, 2 for wrong arguments, 130 when interrupted.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # before hf_mars is imported: the checkout need not be installed
for offline in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ[offline] = "1"

import gpu_check_engines
import gpu_check_speed
import gpu_check_steps
import torch
from pretrain_gpu import NOVEL, number

from hf_mars.sweep.plan import replace_text

TESTS = [
    "tests/optim/test_gpu_kernels.py",
    "tests/optim/test_gpu_matrices.py",
    "tests/optim/test_kernels.py",
    "tests/optim/test_accelerators.py",
    "tests/optim/test_capture.py",
]
TINY_TESTS = ["tests/optim/test_gpu_kernels.py", "-k", "default_dtype or dividing"]


class Report:
    """Lines of results, printed and written as they come.

    Attributes:
        device: that is checked.
        is_tiny: whether sizes are tiny, and times mean nothing.
    """

    def __init__(self, device: torch.device, is_tiny: bool, file: Path | None, rows: list[dict] | None = None):
        self.device, self.is_tiny = device, is_tiny
        self._file, self.rows = file, rows or []
        self.part = ""

    def line(self, verdict: str, name: str, detail: str, **data: Any) -> None:
        print(f"{verdict} {self.part} {name}: {detail}", flush=True)
        self.rows.append({"verdict": verdict, "part": self.part, "name": name, "detail": detail, **data})
        if self._file:
            self.write(self._file)

    def write(self, file: Path) -> None:
        """All lines so far; the file is whole at any time."""
        replace_text(file, json.dumps(self.rows, indent=1, default=str))

    def info(self, name: str, detail: object, **data: Any) -> None:
        self.line("INFO", name, str(detail), **data)

    def check(self, name: str, holds: bool, detail: object) -> None:
        self.line("PASS" if holds else "FAIL", name, str(detail))

    def at_most(self, name: str, value: float, limit: float) -> None:
        """A target for a time."""
        self._target(name, value <= limit, f"{value:.3g} (target: at most {limit:g})")

    def at_least(self, name: str, value: float, limit: float) -> None:
        self._target(name, value >= limit, f"{value:.3g} (target: at least {limit:g})")

    def _target(self, name: str, holds: bool, detail: str) -> None:
        self.line("INFO" if self.is_tiny else "PASS" if holds else "FAIL", name, detail)

    @property
    def fails(self) -> int:
        return sum(row["verdict"] == "FAIL" for row in self.rows)


def versions(report: Report, seconds: float) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from hf_mars.optim.kernels import gpu

    for package in ("torch", "triton", "transformers", "accelerate"):
        try:
            report.info(package, version(package))
        except PackageNotFoundError:
            report.info(package, "missing")
    if report.device.type == "cuda":
        properties = torch.cuda.get_device_properties(report.device)
        report.info(
            "device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    report.info("date", time.strftime("%Y-%m-%d %H:%M"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        kernels = gpu.kernels_for(report.device)
        elapsed = time.perf_counter() - start
    ours = [str(warning.message) for warning in caught if "hf_mars" in str(warning.message)]
    report.check("kernels", kernels is not None, f"tried in {elapsed:.1f} s")
    report.check("no warnings", not ours, ours or "none")


def tests(report: Report, seconds: float) -> None:
    chosen = TINY_TESTS if report.is_tiny else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [*command, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(60, seconds)
        )
    except subprocess.TimeoutExpired as error:
        report.check("pytest", False, f"not done after {error.timeout:.0f} s")
        return
    summary = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line]
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            report.info("pytest", line[:300])
    report.check("pytest", done.returncode == 0, summary[-1] if summary else (done.stdout + done.stderr)[-300:])


def training(report: Report, seconds: float) -> None:
    minutes, model = seconds / 60, "a tiny GPT-2" if report.is_tiny else "GPT-2 small"
    command = [sys.executable, str(ROOT / "benchmarks" / "pretrain_gpu.py"), "--minutes", f"{minutes:.2f}"]
    command += ["--output_dir", str(ROOT / "out" / f"gpu_check-{os.getpid()}")]
    if report.is_tiny:
        command += ["--tiny", "--max_steps", "10"]
    elif TEXT:
        command += ["--text", str(TEXT)]
    if minutes < 1:
        report.info(model, f"no time left ({seconds:.0f} s)")
        return
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line.strip() or last
            if line.startswith("{"):
                row = json.loads(line)
                report.info(f"{model}, {told(row)}", outcome(row), data=row)
        process.wait()
    done = process.returncode == 0
    report.check(model, done, "losses against steps, seconds and tokens above" if done else last)


def told(row: dict[str, Any]) -> str:
    """Which run a line of pretrain_gpu.py is about."""
    rate = float((row if "eval_loss" in row else row["arguments"])["learning_rate"])
    return f"{row['optimizer']}, learning rate {rate:g}, seed {row['seed']}"


def outcome(row: dict[str, Any]) -> str:
    """Of an evaluation, or of a whole run."""
    if "eval_loss" in row:
        return f"step {row['step']}, {row['tokens']:,} tokens: evaluation loss {row['eval_loss']:.4f}"
    if row["final_loss"] is None:
        return f"{row['status']}: {row['problem']}"
    return f"{row['status']} after {row['seconds']:.0f} s: final loss {row['final_loss']:.4f}"


TEXT: Path | None = None  # of the last part; None: the novel that ships

# A kernel that fails so ends all work of the process on the device.
LOST_DEVICE = re.compile(r"(CUDA|HIP) error|Triton Error \[(CUDA|HIP)\]")

# name -> (minutes of ten, function); the last part has the time that is left
PARTS = {
    "versions": (0.3, versions),
    "tests": (2.5, tests),
    "order": (0.7, gpu_check_steps.order),
    "large": (0.4, gpu_check_steps.large),
    "speed": (1.5, gpu_check_speed.speed),
    "host": (0.5, gpu_check_speed.host),
    "matrices": (0.7, gpu_check_speed.matrices),
    "engines": (0.4, gpu_check_engines.engines),
    "trainer": (1.0, gpu_check_engines.trainer),
    "training": (2.0, training),
}


def run(report: Report, chosen: list[str], minutes: float, began: float) -> None:
    for name in chosen:
        share, function = PARTS[name]
        left = 60 * minutes - (time.monotonic() - began)
        seconds = left if name == "training" else min(left, share / 10 * 60 * minutes)
        report.part = name
        start = time.monotonic()
        try:
            function(report, seconds)
        except Exception as error:
            traceback.print_exc()
            report.check("ended", False, f"{type(error).__name__}: {str(error)[:300]}")
            remaining = chosen[chosen.index(name) + 1 :]
            if LOST_DEVICE.search(str(error)) and remaining:
                restart(report, remaining, minutes - (time.monotonic() - began) / 60)
        report.info("took", f"{time.monotonic() - start:.1f} s")


def restart(report: Report, remaining: list[str], minutes: float) -> None:
    """End with the other parts in a new process, which goes on from the lines so far."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.json"
        report.write(lines)
        command = [sys.executable, __file__, *sys.argv[1:], "--minutes", f"{max(minutes, 0.1):.2f}"]
        sys.stdout.flush()
        done = subprocess.run([*command, "--go_on_from", str(lines), "--parts", *remaining])
    raise SystemExit(done.returncode if done.returncode >= 0 else 1)


def check_files(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error where a file cannot be read or written, before the minutes begin."""
    try:
        with arguments.text.open("rb") as text:
            text.read(1)
    except OSError as error:
        parser.error(f"--text {arguments.text}: cannot be read: {error.strerror}")
    if arguments.json is None or arguments.go_on_from is not None:
        return
    if arguments.json.exists():
        parser.error(f"--json {arguments.json}: is there already; name another file")
    try:
        replace_text(arguments.json, "[]")
    except OSError as error:
        parser.error(f"--json {arguments.json}: cannot be written: {error.strerror}")


def main() -> None:
    global TEXT
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=number(float, 0.1), default=10.0, help="in all (default: 10)")
    parser.add_argument("--json", type=Path, help="write the lines to this new file too, as they come")
    parser.add_argument("--text", type=Path, default=NOVEL, help="UTF-8 text for the last part (default: the novel)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="these alone")
    parser.add_argument("--tiny", action="store_true", help="try it: tiny sizes, on the CPU with TRITON_INTERPRET=1")
    parser.add_argument("--go_on_from", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if arguments.tiny and not is_interpreted:
        parser.error("--tiny runs on the CPU, in Triton's interpreter: set TRITON_INTERPRET=1")
    if is_interpreted and not arguments.tiny:
        parser.error("TRITON_INTERPRET=1 keeps kernels off the GPU: unset it, or give --tiny")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm GPU that torch can use; try it with TRITON_INTERPRET=1 and --tiny")
    check_files(parser, arguments)
    TEXT = None if arguments.text == NOVEL else arguments.text
    rows = json.loads(arguments.go_on_from.read_text()) if arguments.go_on_from else None
    report = Report(torch.device("cpu" if arguments.tiny else "cuda:0"), arguments.tiny, arguments.json, rows)
    was_interrupted = False
    try:
        run(report, arguments.parts, arguments.minutes, began)
    except KeyboardInterrupt:
        was_interrupted = True
        report.check("ended", False, "interrupted")
    report.part = "all"
    report.info("FAILs", report.fails)
    sys.exit(130 if was_interrupted else 1 if report.fails else 0)


if __name__ == "__main__":
    main()
