"""``python -m hf_mars script.py …`` runs any training script with MARS's optimizer names registered."""

import os
import runpy
import sys
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path

from hf_mars.trainer.callbacks import diagnose_every_trainer
from hf_mars.trainer.children import register_in_children

USAGE = """usage: python -m hf_mars [--mars_diagnostics] [-m] SCRIPT [ARGUMENT …]

Run a training script, unchanged, with --optim mars_adamw, mars_lion, mars_shampoo and mars_m available.
SCRIPT is a file, or after -m a module, as for python itself. With --mars_diagnostics every Trainer logs, with the
loss, what MARS does at that step. On several processes: accelerate launch -m hf_mars SCRIPT …,
or torchrun -m hf_mars SCRIPT …"""


def main(argv: list[str]) -> None:
    """Run the script that ``argv`` names as ``__main__``, with the rest of ``argv`` as its sys.argv."""
    if argv[:1] == ["--mars_diagnostics"]:
        diagnose_every_trainer()
        argv = argv[1:]
    as_module = argv[:1] == ["-m"]
    argv = argv[1:] if as_module else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    if not as_module and not Path(argv[0]).is_file():
        print(f"python -m hf_mars: there is no file {argv[0]!r}", file=sys.stderr)
        sys.exit(2)  # python's own code for it
    sys.argv = argv
    sys.excepthook = _without_our_frames(sys.excepthook)
    register_in_children()
    if as_module:
        sys.path[0] = str(Path.cwd())
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(argv[0]).resolve().parent)
        _run_script(os.path.join(os.getcwd(), argv[0]))


def _run_script(path: str) -> None:
    """As python runs a file. runpy.run_path would change sys.argv[0], and restore the old ``__main__`` too early."""
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__loader__ = SourceFileLoader("__main__", path)
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _without_our_frames(excepthook):
    """Tracebacks begin at the script, as python's do, not at the frames that lead there."""
    ours = (__file__, runpy.run_module.__code__.co_filename)

    def hook(kind, error, traceback):
        while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
            traceback = traceback.tb_next
        excepthook(kind, error.with_traceback(traceback), traceback)

    return hook


if __name__ == "__main__":
    main(sys.argv[1:])
