"""Build the sdist and the wheel into dist/, and check both as somebody who has pip alone would find out.

    make package                          # all of it: packages are installed, which takes minutes
    python tools/package.py --quick       # what needs no installation of torch and transformers

1. `python -m build`: the wheel is built from the sdist. Its tag says which Linux it runs on (auditwheel).
2. Metadata and README (twine), the wheel's size, the hook in the start of Python, and nothing left out of the sdist.
3. Every Python of this machine from 3.11 on loads the one compiled step and takes a step; each has the hook.
4. In an empty environment, from an empty folder: the sdist without a compiler, the sdist with one, the wheel. Each
   trains two steps of `python -m hf_mars.clm`, and says whether the step is compiled.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
MAX_BYTES = 1_000_000
TINY = "--max_steps 2 --config_overrides n_layer=1,n_head=2,n_embd=32,n_positions=32 --block_size 16".split()
TINY += "--vocab_size 300 --max_train_samples 20 --max_eval_samples 2 --per_device_train_batch_size 2".split()
TINY += (
    "--use_cpu --report_to none --save_strategy no --output_dir out --optim mars_adamw --learning_rate 1e-3".split()
)
# MARS-AdamW's first step on x = 1, g = 1, without clip and decay: m and v are g and g² after their bias corrections,
# so x = 1 − 0.1. torch, which brings OpenMP to hf_mars, is not there; the compiler's own is.
STEP = """
import array, ctypes
ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_cpu", sys.argv[1])
_cpu = importlib.util.module_from_spec(importlib.util.spec_from_loader("_cpu", loader))
x, m, v, g, count = (array.array("f", [value]) for value in (1, 0, 0, 1, 0))
address = lambda *tensors: array.array("q", [tensor.buffer_info()[0] for tensor in tensors])
finite = _cpu.step(array.array("q", [1]), address(x), address(m), address(v), address(g), None, None,
                   address(count), 0.0, 0.9, 0.99, 1e-8, 0.0, 0.1, 0.0, 1.0, False, 1)
assert finite == [True] and abs(x[0] - 0.9) < 1e-6 and count[0] == 1, (finite, x, count)
"""
HOOK = "import sys; sys.exit(0 if 'hf_mars' in sys.modules else 1)"


def run(*command: object, **options: object) -> str:
    """What a command printed that must end well."""
    print("$", *(str(word) for word in command if "\n" not in str(word)), flush=True)
    done = subprocess.run(list(map(str, command)), text=True, stdout=-1, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\nexit code {done.returncode}")
    return done.stdout


def check(condition: bool, words: str) -> None:
    if not condition:
        raise SystemExit(f"make package: {words}")


def build() -> tuple[Path, Path]:
    """dist/ anew: the sdist, and a wheel with the tag of the oldest Linux that it runs on."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    ((sdist,), (wheel,)) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    if sys.platform == "linux":
        tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel, env=tools)
        wheel.unlink()
        (wheel,) = DIST.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    for file in (sdist, wheel):
        print(f"{file.name}: {file.stat().st_size:,} bytes")
    check(wheel.stat().st_size < MAX_BYTES, f"{wheel.name} has {MAX_BYTES:,} bytes or more")
    check("abi3" in wheel.name, f"{wheel.name} is for one Python alone")
    names = zipfile.ZipFile(wheel).namelist()
    check("hf_mars.pth" in names, "the wheel lacks hf_mars.pth")
    check(
        any(name.endswith("_cpu.abi3.so") for name in names), "the wheel lacks the compiled step: is there a compiler?"
    )
    files = set(run("git", "ls-files", cwd=ROOT).splitlines())
    packed = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    missing = {name for name in files - packed if not name.startswith(".")}
    check(not missing, f"the sdist lacks {sorted(missing)}; MANIFEST.in says what goes into it")


def pythons() -> list[Path]:
    """This Python, and others from 3.11 on that lie beside it, as pyenv has them, or on PATH."""
    found = {sys.version_info[:2]: Path(sys.executable)}
    folders = [*map(str, Path(sys.base_prefix).parent.glob("*/bin")), *os.environ["PATH"].split(os.pathsep)]
    for minor in range(11, 20):
        path = next((path for folder in folders if os.access(path := Path(folder, f"python3.{minor}"), os.X_OK)), None)
        if path is not None:
            found.setdefault((3, minor), path)
    return [found[version] for version in sorted(found)]


def check_stable_abi(wheel: Path, folder: Path) -> None:
    for python in pythons():
        environment = folder / python.name
        run(python, "-m", "venv", environment)
        own = environment / "bin" / "python"
        run(own, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
        (compiled,) = environment.rglob("_cpu.abi3.so")
        run(own, "-c", STEP, compiled)
        run(own, "-c", HOOK, env={**os.environ, "HF_MARS": "1"})
        print(run(own, "--version").strip(), "loads the compiled step and has the hook")


def check_installations(sdist: Path, wheel: Path, folder: Path) -> None:
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    blind = {**os.environ, "PATH": str(environment / "bin"), "CC": "/bin/false"}
    for source, settings, compiled in ((sdist, blind, False), (sdist, None, True), (wheel, blind, True)):
        name = f"{source.name}, {'no compiler' if settings else 'a compiler'}"
        install = ["install", "--quiet", "--constraint", ROOT / "constraints.txt", source]
        run(python, "-m", "pip", *install, env=settings)
        empty = Path(tempfile.mkdtemp(dir=folder))
        printed = run(python, "-m", "hf_mars.clm", *TINY, cwd=empty, env=settings)
        warnings = printed.count("the compiled step of hf_mars is missing")
        check(warnings == (0 if compiled else 1), f"{name}: {warnings} warnings about the compiled step\n{printed}")
        check((empty / "out" / "trainer_state.json").is_file(), f"{name}: no run")
        print(f"{name}: trains two steps, {'compiled' if compiled else 'composed, with one warning'}")
        run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "hf_mars")
        check(not list(environment.rglob("hf_mars.pth")), "hf_mars.pth stays after an uninstallation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out the installations with torch and transformers")
    quick = parser.parse_args().quick
    sdist, wheel = build()
    check_contents(sdist, wheel)
    with tempfile.TemporaryDirectory() as folder:
        check_stable_abi(wheel, Path(folder))
        if not quick:
            check_installations(sdist, wheel, Path(folder))
    print(f"dist/{sdist.name} and dist/{wheel.name} are as they should be")


if __name__ == "__main__":
    main()
