"""Run the integration's tests with versions of transformers and Python, and write the table of docs/compatibility.md.

    make matrix                                                        # all rows, with the project's own tests
    python3 tools/matrix.py --rows 5.3.0 3.13:5.24.0 -- tests/trainer  # some rows, other tests; prints the table only

A row is a version of transformers, with the Python that runs this or, before a colon, another one of this machine;
those that are not there are left out, and said to be. Each row has an environment of its own in .matrix/, which a
later call finds again. Standard library alone: it runs with whatever Python is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- make matrix -->\n", "<!-- end -->\n"

# Python:transformers -> further versions that are tried with it: the oldest accelerate with the oldest transformers.
# transformers 5.20 is the last for Python 3.10.
ROWS: dict[str, list[str]] = {
    "5.3.0": ["accelerate==1.10.0"],
    "5.12.1": [],
    "5.24.0": [],
    "3.10:5.20.2": [],
    "3.12:5.24.0": [],
    "3.13:5.24.0": [],
    "3.14:5.24.0": [],
}
# Packages whose versions transformers decides, beside those of constraints.txt that hold for every row.
FREE = {"transformers", "accelerate", "huggingface_hub", "peft", "tokenizers"}
# The folders' tests need no more than this: no engine, no TRL.
TOOLS = ["hypothesis", "matplotlib", "peft", "psutil", "pytest", "pytest-timeout", "pytest-xdist", "tensorboard"]
TESTS = ["tests/trainer", "tests/clm", "--ignore=tests/trainer/test_ecosystem.py"]
SHOWN = ("Python", "transformers", "accelerate", "tokenizers", "huggingface_hub", "peft", "torch")


def parts(row: str) -> tuple[str | None, str]:
    """A row's Python, None for the one that runs this, and its transformers."""
    python, _, version = row.rpartition(":")
    return python or None, version


def interpreter(python: str | None) -> str | None:
    """The command of a Python, as PATH or pyenv has it; None if there is none."""
    if python is None:
        return sys.executable
    beside = sorted(Path(sys.base_prefix).parent.glob(f"{python}*/bin/python{python}"))
    return str(beside[-1]) if beside else shutil.which(f"python{python}")


def constraints(row: str) -> list[str]:
    """constraints.txt without what this row decides, and the row's own lines. Other Pythons share torch's alone."""
    python, version = parts(row)
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    kept = [line for line in lines if line.split("==")[0] not in FREE]
    kept = kept if python is None else [line for line in kept if line.startswith("torch==")]
    return [*kept, f"transformers=={version}", *ROWS.get(row, [])]


def install(row: str, interpreter: str) -> Path:
    """The Python of the environment for this row, with hf_mars from this checkout and the tests' tools."""
    folder = ROOT / ".matrix" / row.replace(":", "-")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
    wanted = folder / "constraints.txt"
    wanted.write_text("\n".join(constraints(row)) + "\n")
    command = [python, "-m", "pip", "install", "--quiet", "-c", wanted, "-e", ROOT, *TOOLS]
    subprocess.run(command, cwd=ROOT, check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Versions that the table shows."""
    code = (
        "import platform\nfrom importlib.metadata import version\n"
        f"for name in {SHOWN!r}: print(platform.python_version() if name == 'Python' else version(name))"
    )
    lines = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(SHOWN, lines, strict=True))


def run_tests(python: Path, tests: list[str], report: Path) -> dict[str, int]:
    """Numbers of tests passed, failed and skipped. What pytest prints goes to the terminal."""
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", f"--junitxml={report}", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr).returncode
    if status not in (0, 1) or not report.exists():  # 1: tests failed; anything else: they did not run
        raise SystemExit(f"pytest ended with status {status} in {python.parent.parent}")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
    }


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table, its heads the keys of the rows."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(str, row.values())) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("tests", nargs="*", help=f"files or folders for pytest (default: {' '.join(TESTS)})")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    missing = []
    for row in arguments.rows or ROWS:
        found = interpreter(parts(row)[0])
        if found is None:
            missing.append(row)
            print(f"{row}: there is no Python {parts(row)[0]} here; left out", flush=True)
            continue
        python = install(row, found)
        start = time.monotonic()
        report = python.parent.parent / "report.xml"
        counts = run_tests(python, arguments.tests or TESTS, report)
        minutes = (time.monotonic() - start) / 60
        rows.append({**installed(python), **counts, "minutes": f"{minutes:.1f}"})
        print(table(rows), flush=True)
    if rows and not (arguments.rows or arguments.tests):
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        left_out = ", ".join(missing).replace(":", " with transformers ")
        left_out = left_out and f" Left out, since it was not on the machine: Python {left_out}."
        text = f"\n{table(rows)}\n{os.cpu_count()} cores.{left_out}\n\n"
        PAGE.write_text(before + BEGIN + text + END + after, encoding="utf-8")
    return 1 if not rows or any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
