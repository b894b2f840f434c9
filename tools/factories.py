"""Run axolotl, LLaMA-Factory and ms-swift with MARS, each in an environment of its own.

    make factories
    python3 tools/factories.py llama_factory        # one of them

Each is installed without its dependencies, and then those that its training of texts takes: the tools pin dozens of
packages for interfaces, media and clouds. The checks are tests/factories/check_*.py. Standard library alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Factory(NamedTuple):
    """A tool: its packages at the versions that it asks for, and modules that are imported and never used."""

    packages: str
    stand_ins: tuple[str, ...] = ()


FACTORIES = {
    "axolotl": Factory(
        "axolotl==0.19.0 transformers==5.16.1 accelerate==1.13.0 peft==0.20.0 datasets==4.8.4 trl==1.9.0 "
        "tokenizers==0.23.1 huggingface_hub==1.17.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 "
        "posthog==6.7.11 schedulefree==1.4.1 kernels==0.16.0 optimum==1.16.2 addict fire termcolor colorama einops "
        "python-dotenv art coloredlogs humanfriendly httpx httpcore kernels-data six backoff distro numba llvmlite "
        "bitsandbytes fastcore wandb opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions "
        "trackio==0.19.0 pillow platformdirs protobuf triton"
    ),
    # torchaudio has no build for CPUs; LLaMA-Factory imports it for audio.
    "llama_factory": Factory(
        "llamafactory==0.9.5 transformers==5.6.0 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 datasets==4.0.0 "
        "fsspec==2025.3.0 dill==0.3.8 multiprocess==0.70.16 tokenizers==0.22.2 huggingface_hub==1.10.0 omegaconf "
        "antlr4-python3-runtime==4.9.3 fire einops termcolor av==16.0.0 httpx httpcore",
        stand_ins=("torchaudio",),
    ),
    "ms_swift": Factory(
        "ms-swift==4.6.0 transformers==5.19.0 trl==0.29.1 peft==0.20.0 datasets==4.8.4 modelscope json_repair dacite "
        "binpacking attrdict addict einops sortedcontainers simplejson tiktoken "
        "modelscope_hub httpx httpcore cryptography cffi pycparser pillow"
    ),
    # A base in 4 bits on CPUs, with TRL.
    "qlora": Factory("bitsandbytes==0.50.2"),
}


def install(name: str) -> Path:
    """The Python of the environment: hf_mars with its dependencies, then the tool's packages over them."""
    folder = ROOT / ".matrix" / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    factory = FACTORIES[name]
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run(
        [*pip, "-c", "constraints.txt", "-e", ".", "peft", "trl", "pytest", "pytest-timeout"], cwd=ROOT, check=True
    )
    subprocess.run([*pip, "--no-deps", *factory.packages.split()], check=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    for module in factory.stand_ins:
        (site_packages / f"{module}.py").write_text('"""A stand-in: imported, and never used."""\n')
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(FACTORIES)}")
    status = {}
    for name in parser.parse_args().names or FACTORIES:
        python = install(name)
        command = [
            python,
            "-m",
            "pytest",
            "-q",
            f"tests/factories/check_{name}.py",
            "-o",
            "pythonpath=. tests tests/factories",
            "-o",
            "timeout=1200",  # their imports alone take a minute on a busy machine
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        status[name] = subprocess.run(command, cwd=ROOT, env=environment).returncode
    for name, code in status.items():
        print(f"{FACTORIES[name].packages.split()[0]}: {'trains' if code == 0 else f'pytest ended with {code}'}")
    return max(status.values())


if __name__ == "__main__":
    sys.exit(main())
