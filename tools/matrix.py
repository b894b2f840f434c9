"""Run the integration's tests against several versions of transformers, and write the table of docs/compatibility.md.

    make matrix                                                  # all versions, with the project's own tests
    python3 tools/matrix.py --versions 5.3.0 -- tests/trainer    # one version, other tests; prints the table only

Each version has an environment of its own in .matrix/, which a later call finds again. Standard library alone: it runs
with whatever Python is there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- make matrix -->\n", "<!-- end -->\n"

# transformers -> further versions that are tried with it: the oldest accelerate with the oldest transformers.
VERSIONS = {"5.3.0": ["accelerate==1.10.0"], "5.12.1": [], "5.24.0": []}
# Packages whose versions transformers decides, beside those of constraints.txt that hold for every row.
FREE = {"transformers", "accelerate", "huggingface_hub", "peft", "tokenizers"}
# The folders' tests need no more than this: no engine, no TRL.
TOOLS = ["hypothesis", "matplotlib", "peft", "psutil", "pytest", "pytest-timeout", "pytest-xdist", "tensorboard"]
TESTS = ["tests/trainer", "tests/clm", "--ignore=tests/trainer/test_ecosystem.py"]
SHOWN = ("transformers", "accelerate", "tokenizers", "huggingface_hub", "peft", "torch")


def constraints(version: str) -> list[str]:
    """constraints.txt without what this version of transformers decides, and the version's own lines."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return [
        *(line for line in lines if line.split("==")[0] not in FREE),
        f"transformers=={version}",
        *VERSIONS.get(version, []),
    ]


def install(version: str) -> Path:
    """The Python of the environment for this version, with hf_mars from this checkout and the tests' tools."""
    folder = ROOT / ".matrix" / version
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted = folder / "constraints.txt"
    wanted.write_text("\n".join(constraints(version)) + "\n")
    command = [python, "-m", "pip", "install", "--quiet", "-c", wanted, "-e", ROOT, *TOOLS]
    subprocess.run(command, cwd=ROOT, check=True)
    return python


def installed(python: Path) -> dict[str, str]:
    """Versions of the packages that the table shows."""
    code = f"from importlib.metadata import version\nfor name in {SHOWN!r}: print(version(name))"
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
    parser.add_argument(
        "--versions", nargs="+", metavar="VERSION", help=f"of transformers (default: {' '.join(VERSIONS)})"
    )
    parser.add_argument("tests", nargs="*", help=f"files or folders for pytest (default: {' '.join(TESTS)})")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for version in arguments.versions or VERSIONS:
        python = install(version)
        start = time.monotonic()
        counts = run_tests(python, arguments.tests or TESTS, ROOT / ".matrix" / version / "report.xml")
        minutes = (time.monotonic() - start) / 60
        rows.append({**installed(python), **counts, "minutes": f"{minutes:.1f}"})
        print(table(rows), flush=True)
    if not (arguments.versions or arguments.tests):
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        python_version = re.match(r"\d+\.\d+", sys.version)[0]
        text = f"\n{table(rows)}\nPython {python_version}, {os.cpu_count()} cores.\n\n"
        PAGE.write_text(before + BEGIN + text + END + after, encoding="utf-8")
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
