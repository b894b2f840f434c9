"""Sweeps of scripts that train: one that knows nothing of hf_mars, TRL's, and a launcher's."""

import json
import subprocess
import sys

import pytest
from helpers import tiny_gpt2
from sweep_helpers import ENVIRONMENT, PLAIN, QUICK, rows_of, sweep

pytestmark = pytest.mark.slow

RUN = ["--max_steps", "6", "--report_to", "none", "--use_cpu", "--save_strategy", "no"]
TWO = ["--optim", "adamw_torch", "mars_adamw", "--learning_rate", "1e-2", "--seeds", "1", *QUICK]


def test_a_plain_script(tmp_path):
    """The same batches for both optimizers, in the same order; and the losses of a run without the sweep."""
    of_script = [*RUN, "--per_device_train_batch_size", "8", "--eval_strategy", "steps", "--eval_steps", "1"]
    order = tmp_path / "order"
    script = (sys.executable, str(PLAIN))
    done = sweep(tmp_path / "out", *TWO, "--", *of_script, script=script, env={"ORDER": str(order)})
    rows = rows_of(tmp_path / "out")
    assert [(row["optimizer"], row["status"], row["steps"]) for row in rows] == [
        ("adamw_torch", "complete", 6),
        ("mars_adamw", "complete", 6),
    ]
    assert all(len(row["evaluation"]) == 6 and row["loss_of"] == "evaluation" for row in rows)
    assert rows[1]["state_bytes"] > rows[0]["state_bytes"] > 0 and rows[0]["seconds"] < rows[0]["wall_seconds"]
    assert rows[0]["hardware"]["cores"] >= 1 and rows[0]["versions"]["transformers"]
    assert "mars_adamw" in done.stdout and "one seed" in done.stdout
    batches = [line.split(" ", 1) for line in order.read_text().splitlines()]
    of = {name: [batch for label, batch in batches if label == name] for name in ("adamw_torch", "mars_adamw")}
    assert of["adamw_torch"] == of["mars_adamw"] and len(of["adamw_torch"]) >= 12
    alone = [*of_script, "--optim", "adamw_torch", "--learning_rate", "1e-2", "--seed", "1", "--logging_steps", "1"]
    alone = subprocess.run(
        [*script, *alone, "--output_dir", str(tmp_path / "alone")], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    in_sweep = (tmp_path / "out" / rows[0]["folder"] / "stdout.txt").read_text()
    assert alone.stdout.splitlines()[-1] == in_sweep.splitlines()[-1]
    assert float(alone.stdout.split()[-1]) == pytest.approx(rows[0]["training"][-1][1], abs=1e-6)


@pytest.mark.exhaustive
def test_accelerate_launch(tmp_path):
    """On two processes, of which one writes the log."""
    script = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
    )
    script += ("1", "--mixed_precision", "no", "--dynamo_backend", "no", str(PLAIN))
    arguments = ["--optim", "mars_m", "--learning_rate", "1e-2", "--seeds", "1", *QUICK, "--", *RUN]
    sweep(tmp_path / "out", *arguments, script=script)
    (row,) = rows_of(tmp_path / "out")
    assert row["status"] == "complete" and row["hardware"]["processes"] == 2 and len(row["training"]) == 6


def test_trls_sft(tmp_path):
    pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[EOS]", "[PAD]", "the", "cat", "dog", "sees", "sun", "moon"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "model")
    tiny_gpt2(n_positions=32).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    texts = [f"the {animal} sees the {thing}" for animal in ("cat", "dog") for thing in ("sun", "moon")]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    of_script = [*RUN, "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data")]
    of_script += ["--max_length", "16", "--bf16", "false", "--per_device_train_batch_size", "2"]
    script = (sys.executable, "-m", "trl.scripts.sft")
    done = sweep(tmp_path / "out", *TWO, "--", *of_script, script=script, env={"HF_DATASETS_CACHE": str(tmp_path)})
    rows = rows_of(tmp_path / "out")
    assert [(row["status"], row["steps"]) for row in rows] == [("complete", 6)] * 2, done.stderr
    # TRL counts tokens by itself.
    assert rows[0]["final_loss"] != rows[1]["final_loss"] and rows[0]["training"][-1][3] > 0
    assert "tokens" in done.stdout
