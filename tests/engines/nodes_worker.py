"""One process of "two nodes with two processes each" for tests/engines/test_launch.py.

Usage: nodes_worker.py FOLDER MODEL, with the environment of torch.distributed. Node n works in FOLDER/node-n and
shares no disk but FOLDER/shared. What each run of hf_mars.clm returned, or how it failed, is written to
FOLDER/rank-RANK.json.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from clm_helpers import run_main, write_documents

from hf_mars.clm import blocks, splits, tokenizer
from hf_mars.clm.errors import UsageError

BLOCKS = (1, 3, 5, 9)  # with 4 processes and batches of 2, none of them fills the last batch


def attempt(*arguments):
    """What the script returns, or the exception that it raises."""
    try:
        return run_main(*arguments)
    except (UsageError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def evaluate(model):
    return {
        blocks: run_main(
            *("--do_eval", "--model_name_or_path", model, "--output_dir", "evaluated"),
            *("--per_device_eval_batch_size", 2, "--max_eval_samples", blocks),
        )
        for blocks in BLOCKS
    }


def refusals(rank):
    """Each fails on one node, or on one process, alone."""
    node = rank // 2
    write_documents(Path("differs.txt"), [f"Line {i}." for i in range(2000 + 10 * node)])
    if node == 0:
        write_documents(Path("text.txt"))
    else:
        Path("full").mkdir(exist_ok=True)
        Path("full/notes.txt").touch()
    run_main("--output_dir", "resumed", "--do_train", "--max_steps", 1, "--save_steps", 1, "--save_on_each_node")
    dist.barrier()
    if rank == 2:
        shutil.rmtree("resumed")
    dist.barrier()
    return {
        "missing text": attempt("--train_file", "text.txt", "--output_dir", "out"),
        "full folder": attempt("--output_dir", "full"),
        "no checkpoint": attempt("--output_dir", "resumed", "--resume_from_checkpoint", "auto"),
        "other text": attempt("--train_file", "differs.txt", "--cache_dir", "cache", "--output_dir", "out"),
    }


def resume(rank):
    """Weights at the end of a run that saves on each node, and of the same run resumed from the middle and the end."""

    def run(*arguments):
        run_main(
            "--output_dir",
            "disk",
            "--do_train",
            "--max_steps",
            4,
            "--save_steps",
            2,
            "--save_on_each_node",
            *arguments,
        )
        dist.barrier()
        return hashlib.sha256(Path("disk/model.safetensors").read_bytes()).hexdigest()

    undisturbed = run()
    if rank % 2 == 0:
        shutil.rmtree("disk/checkpoint-4")
    dist.barrier()
    return [undisturbed, *(run("--resume_from_checkpoint", "true") for _ in range(2))]


def failing(module, name, ranks):
    """Make a module's function of that name raise an OSError in the processes `ranks`."""
    function = getattr(module, name)

    def replacement(*arguments, **options):
        if dist.get_rank() in ranks:
            raise OSError("No space left on device")
        return function(*arguments, **options)

    setattr(module, name, replacement)
    return lambda: setattr(module, name, function)


def preparations(folder):
    """How often this process trained a tokenizer and tokenised, with node-local caches and with a shared one."""
    counts = {}

    def count(module, name):
        function = getattr(module, name)

        def counted(*arguments, **options):
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments, **options)

        setattr(module, name, counted)

    count(tokenizer, "train_bpe")
    count(blocks, "tokenize")
    results = {}
    caches = {"own disks": "own", "shared disk": folder / "shared", "again": folder / "shared"}
    for name, cache_dir in {**caches, "overwritten": folder / "shared"}.items():
        counts.clear()
        overwrite = ["--overwrite_cache"] if name == "overwritten" else []
        attempt(
            "--output_dir", f"prepared-{name}", "--max_steps", 1, "--do_train", "--cache_dir", cache_dir, *overwrite
        )
        results[name] = dict(counts)
    return results


def main(folder, model):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 4
    work = folder / f"node-{rank // 2}"
    work.mkdir(exist_ok=True)
    os.chdir(work)
    results = {"evaluations": evaluate(model), "refusals": refusals(rank), "resumed": resume(rank)}
    for module, name, ranks in ((splits, "load_texts", [3]), (tokenizer, "train_bpe", [0])):
        restore = failing(module, name, ranks)
        results["refusals"][f"{name} fails"] = attempt("--output_dir", "out")
        restore()
    results["files"] = sorted(str(path) for path in Path().rglob("*") if path.parent.name in ("evaluated", "out"))
    results["preparations"] = preparations(folder)
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # gloo can hang when a process group is torn down after DDP


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
