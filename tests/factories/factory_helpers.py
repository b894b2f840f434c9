"""A tiny model, tiny data, and the example's YAML file cut to two steps, for a tool's own command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from launch_helpers import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BIN = Path(sys.executable).parent
TEXTS = [f"The {animal} and the {thing}" for animal in ("cat", "dog", "bird") for thing in ("sun", "moon", "sea")]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"


def write_model(folder):
    """A Llama with one layer and its tokenizer of bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=[*special.values()], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=TEMPLATE, **special)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_chats(path):
    rows = [[{"role": "user", "content": "Say it"}, {"role": "assistant", "content": text}] for text in TEXTS]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def write_example(name, path, changes, without=()):
    """examples/NAME with some of its settings changed, and some left out."""
    settings = yaml.safe_load((ROOT / "examples" / name).read_text())
    path.write_text(yaml.safe_dump({k: v for k, v in {**settings, **changes}.items() if k not in without}))


def run(*command, folder, **environment):
    """What a command of this environment printed that must end well."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def assert_mars_trained(output_dir, gamma, processes=1):
    """Two steps with MARS-AdamW, of which the last saved everything."""
    (checkpoint,) = Path(output_dir).rglob("checkpoint-2")
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {group["gamma"] for group in optimizer["param_groups"]} == {gamma}
    assert {group["kind"] for group in optimizer["param_groups"]} >= {"matrix"}
    assert optimizer["state"] and all(int(state["step"]) == 2 for state in optimizer["state"].values())
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    assert len(list(checkpoint.glob("rng_state*.pth"))) == processes
