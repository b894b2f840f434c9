"""Helpers of the tests of hf_mars.clm: a tiny model's arguments, a character tokenizer, text files, runs."""

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
from launch_helpers import ROOT

from hf_mars.clm import run as run_clm

TINY_MODEL = ["--config_overrides", "n_layer=1,n_head=2,n_embd=32,n_positions=32", "--vocab_size", "300"]
QUIET = ["--disable_tqdm", "true", "--report_to", "none", "--use_cpu", "true"]
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
DOCUMENTS = [f"Document {i}: {'word ' * (i % 7)}and an end." for i in range(2500)]


class CharacterTokenizer:
    """One token per character, its code point plus one; token 0 begins a text when special tokens are asked for."""

    is_fast = False
    eos_token_id = 255

    def __len__(self):
        return 2**8

    def __call__(self, texts, add_special_tokens=True, return_attention_mask=False, verbose=True):
        begin = [0] if add_special_tokens else []
        return {"input_ids": [begin + [1 + ord(character) for character in text] for text in texts]}

    def decode(self, ids):
        return "".join(chr(i - 1) for i in ids if i > 0)


def write_documents(path, documents=DOCUMENTS, column="text"):
    """One document per row, or line, in the format and the compression that the suffixes of path name."""
    if path.suffix in COMPRESS:
        plain = write_documents(path.with_suffix(""), documents, column)
        path.write_bytes(COMPRESS[path.suffix](plain.read_bytes()))
        plain.unlink()
        return path
    rows = [{"number": i, column: document, "other": "no"} for i, document in enumerate(documents)]
    lines = "".join(document + "\n" for document in documents)
    if path.suffix == ".txt":
        path.write_text(lines)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def write_token_bin(path, tokens):
    """A token file as nanoGPT writes it."""
    np.asarray(tokens, dtype=np.uint16).tofile(path)
    return path


def content(texts):
    return "".join(itertools.chain.from_iterable(texts.batches()))


def all_tokens(blocks):
    return np.concatenate([block["input_ids"].numpy() for block in blocks])


def parse(*arguments):
    return run_clm.parse_arguments([str(argument) for argument in arguments])


def run_main(*arguments):
    """A run in this process, on a tiny model unless the arguments name one; the metrics it returns."""
    tiny = [] if "--model_name_or_path" in arguments else TINY_MODEL
    return run_clm.main([*map(str, arguments), *tiny, *QUIET])


def run_script(*arguments, cwd, command=(str(ROOT / "run_clm.py"),)):
    """run_clm.py, or another command of python's, as a user starts it; the finished process with its output."""
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def log_history(output_dir):
    return json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
