"""`python -m hf_mars script.py …` or `python -m hf_mars launcher …` trains with MARS's optimizer names registered.

Imports nothing that reads environment variables, which are the script's to set.
"""

import builtins
import os
import pkgutil
import runpy
import shutil
import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

from hf_mars.trainer.names import RUN_LOG_VARIABLE
from hf_mars.trainer.registry import log_every_trainer
from hf_mars.trainer.start_up import is_installed, prepare

USAGE = """usage: python -m hf_mars [--mars_diagnostics] SCRIPT [ARGUMENT …]
       python -m hf_mars [--mars_diagnostics] -m MODULE [ARGUMENT …]
       python -m hf_mars [--mars_diagnostics] LAUNCHER [ARGUMENT …]

Run a training script or a command that starts one, unchanged, with --optim mars_adamw, mars_lion, mars_shampoo and
mars_m available, in it and in every Python process below it. SCRIPT is a file, a folder or zip file with a
__main__.py; LAUNCHER is a command such as accelerate, torchrun, trl, axolotl, llamafactory-cli or srun, looked for
beside this Python and then on PATH. With --mars_diagnostics every Trainer logs, with the loss, what MARS does at that
step. The environment variable HF_MARS=1 (or HF_MARS=diagnostics) does the same without this command."""

_NOT_INSTALLED = "hf_mars is not installed in this environment (pip install -e . in its folder does it)"


def main(argv: list[str]) -> None:
    """Run a script as `__main__`, as python itself would, or a command in place of this process.

    Args:
        argv: the arguments of `python -m hf_mars`; those after the script become its own.

    Raises:
        SystemExit: `argv` asks for help (code 0) or names nothing that can be run (code 2). Errors and exits of the
            script itself pass through.
    """
    diagnostics = argv[:1] == ["--mars_diagnostics"]
    argv = argv[1:] if diagnostics else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    command = None
    if argv[0] == "-m":
        if len(argv) == 1 or argv[1].startswith("-"):
            _refuse(f"after -m comes the name of a module, not {' '.join(argv[1:2]) or 'nothing'}")
    elif argv[0].startswith("-"):
        _refuse(f"{argv[0]} is none of its options, which are --mars_diagnostics and then -m; python's go before them")
    elif not _is_script(argv[0]):
        command = _command(argv[0])
        if command is None and not Path(argv[0]).exists():
            _refuse(f"there is no file {argv[0]!r}, and no command of that name")
    if not is_installed():
        if command is not None:
            _refuse(f"{_NOT_INSTALLED}, so that {argv[0]} would not know the names")
        print(
            f"python -m hf_mars: {_NOT_INSTALLED}; processes that {argv[0]} starts do not know the names",
            file=sys.stderr,
        )
    if command is not None:
        prepare(diagnostics)
        os.execv(command, [command, *argv[1:]])
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


def _is_script(name: str) -> bool:
    """A folder is one if it can be run: launchers have names, too, that folders in their source trees have."""
    path = Path(name)
    return path.is_file() or (path / "__main__.py").is_file()


def _command(name: str) -> str | None:
    """The path of a command, of this environment first: it may be in use without having been activated."""
    beside = os.path.dirname(sys.executable)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


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
