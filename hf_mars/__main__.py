"""``python -m hf_mars script.py …`` runs any training script with MARS's optimizer names registered."""

import runpy
import sys
from pathlib import Path

import hf_mars  # noqa: F401  registers the names

USAGE = """usage: python -m hf_mars [-m] SCRIPT [ARGUMENT …]

Run a training script, unchanged, with --optim mars_adamw, mars_lion, mars_shampoo and mars_m available.
SCRIPT is a file, or after -m a module, as for python itself. On several processes:
accelerate launch -m hf_mars SCRIPT …"""


def main(argv: list[str]) -> None:
    """Run the script that ``argv`` names as ``__main__``, with the rest of ``argv`` as its sys.argv."""
    as_module = argv[:1] == ["-m"]
    argv = argv[1:] if as_module else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    sys.argv = argv
    if as_module:
        sys.path[0] = str(Path.cwd())
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
        return
    if not Path(argv[0]).exists():
        sys.exit(f"python -m hf_mars: there is no script {argv[0]}")
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
