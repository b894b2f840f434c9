"""`python -m hf_mars script.py …` runs any training script with MARS's optimizer names registered.

Imports nothing that reads environment variables, which are the script's to set.
"""

import builtins
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

from hf_mars.trainer.children import prepare
from hf_mars.trainer.names import RUN_LOG_VARIABLE
from hf_mars.trainer.registry import log_every_trainer

USAGE = """usage: python -m hf_mars [--mars_diagnostics] [-m] SCRIPT [ARGUMENT …]

Run a training script, unchanged, with --optim mars_adamw, mars_lion, mars_shampoo and mars_m available.
SCRIPT is a file, a folder or zip file with a __main__.py, or after -m a module, as for python itself. With
--mars_diagnostics every Trainer logs, with the loss, what MARS does at that step. On several processes:
accelerate launch -m hf_mars SCRIPT …, or torchrun -m hf_mars SCRIPT …"""


def main(argv: list[str]) -> None:
    """Run a script as `__main__`, as python itself would.

    Args:
        argv: the arguments of `python -m hf_mars`; those after the script become its own.

    Raises:
        SystemExit: `argv` asks for help (code 0) or names no script that can be run (code 2). Errors and exits of the
            script itself pass through.
    """
    diagnostics = argv[:1] == ["--mars_diagnostics"]
    argv = argv[1:] if diagnostics else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    if argv[0] == "-m":
        if len(argv) == 1 or argv[1].startswith("-"):
            _refuse(f"after -m comes the name of a module, not {' '.join(argv[1:2]) or 'nothing'}")
    elif argv[0].startswith("-"):
        _refuse(f"{argv[0]} is none of its options, which are --mars_diagnostics and then -m; python's go before them")
    elif not Path(argv[0]).exists():
        _refuse(f"there is no file {argv[0]!r}")
    sys.excepthook = _without_our_frames(sys.excepthook)
    prepare(diagnostics)
    if RUN_LOG_VARIABLE in os.environ:
        log_every_trainer()
    if argv[0] == "-m":
        _run_module(argv)
    else:
        _run_path(argv)


def _refuse(message: str) -> NoReturn:
    print(f"python -m hf_mars: {message}", file=sys.stderr)
    sys.exit(2)  # python's own code for it


# Python itself calls this function for modules, folders and zip files. The public functions of runpy would change
# sys.argv and restore the old `__main__` while threads and exit handlers of the script still need it.
_run_module_as_main = runpy._run_module_as_main  # type: ignore[attr-defined]  # no stub has a private name


def _run_module(argv: list[str]) -> None:
    sys.argv = ["-m", *argv[2:]]
    _new_main()
    _run_module_as_main(argv[1])


def _run_path(argv: list[str]) -> None:
    sys.argv = argv
    path = os.path.join(os.getcwd(), argv[0])
    has_path_of_ours = not getattr(sys.flags, "safe_path", False)  # sys.path[0], which python -m hf_mars began with
    if has_path_of_ours:
        del sys.path[0]
    if pkgutil.get_importer(path) is not None:  # a folder or a zip file
        sys.path.insert(0, path)
        _new_main()
        _run_module_as_main("__main__", alter_argv=False)
        return
    if has_path_of_ours:
        sys.path.insert(0, str(Path(path).resolve().parent))
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    module = _new_main()
    vars(module).update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    exec(code, vars(module))


def _new_main() -> ModuleType:
    """The empty `__main__` that python starts with."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    vars(module).update(__builtins__=builtins, __annotations__={})
    return module


ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def _without_our_frames(excepthook: ExceptHook) -> ExceptHook:
    """Tracebacks begin at the script, as python's do, not at the frames that lead there."""
    ours = (__file__, runpy.run_module.__code__.co_filename)

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
            traceback = traceback.tb_next
        excepthook(kind, error.with_traceback(traceback), traceback)

    return hook


if __name__ == "__main__":
    main(sys.argv[1:])
