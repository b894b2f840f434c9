"""The compiled part, one C file, and the hook in the start of Python, one line. Everything else is in setup.cfg."""

import re
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build import build

# From 3.11 on the stable ABI has buffers: one wheel serves every later Python, but for those without a global lock.
STABLE_ABI = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")


def long_description():
    """README.md for a package index: without its picture, and with the names of its pages where links would break."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


class BuildHook(Command):
    """Puts hf_mars.pth beside the package: Python executes it at its start (hf_mars/trainer/start_up.py)."""

    user_options: ClassVar = []
    LINE = (
        'import os; os.environ.get("HF_MARS", "0") not in ("", "0") '
        'and __import__("hf_mars.trainer.start_up").trainer.start_up.start()\n'
    )

    def initialize_options(self):
        self.editable_mode = False  # setuptools sets it, as in every command that builds

    def finalize_options(self):
        pass

    def run(self):
        # An editable wheel is made from install_lib, and takes nothing from build_lib.
        folder = self.get_finalized_command("install").install_lib if self.editable_mode else self._build_lib()
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "hf_mars.pth").write_text(self.LINE, encoding="ascii")

    def _build_lib(self):
        return self.get_finalized_command("build").build_lib

    def get_source_files(self):
        return []

    def get_outputs(self):
        return [str(Path(self._build_lib(), "hf_mars.pth"))]

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_hook", None)]


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    cmdclass={"build": Build, "build_hook": BuildHook},
    ext_modules=[
        Extension(
            "hf_mars.optim.kernels._cpu",
            ["hf_mars/optim/kernels/_cpu.c"],
            # No -ffast-math: it would change the whole process's handling of tiny numbers, and NaN must stay NaN.
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else [],
            py_limited_api=STABLE_ABI,
            optional=True,  # without a C compiler the same steps are composed of torch's kernels
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
