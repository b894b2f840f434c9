"""Tokens per second of whole training steps in the Trainer, with adamw_torch_fused and with each MARS name.

    python benchmarks/trainer_throughput.py [--model gpt2-small] [--json FILE]

Every optimizer trains its own copy of the same model on the same batches; the trainers take turns, a few steps each,
so that the machine's other load falls on all alike; medians of the turns. The default is the model of `make demo`
(1.07M parameters, batch 16 × 128) in float32; gpt2-small is 124M parameters, batch 16 × 1,024, bfloat16, for a GPU.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_mars  # noqa: F401  registers the names

NAMES = ["adamw_torch_fused", "mars_adamw", "mars_lion", "mars_shampoo", "mars_m"]
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "demo": (GPT2Config(vocab_size=2048, n_layer=4, n_head=4, n_embd=128, n_positions=128, **DROPOUT), 16, {}),
    "gpt2-small": (GPT2Config(**DROPOUT), 16, {"bf16": True}),
}


class StepTimes(TrainerCallback):
    """Seconds of each step, from its first forward pass to the next step's."""

    def __init__(self, device):
        self.device, self.seconds, self.start = device, [], None

    def on_step_begin(self, *args, **kwargs):
        self.start = self.now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(self.now() - self.start)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def make(name, config, batch_size, settings, steps, folder):
    set_seed(0)
    model = GPT2LMHeadModel(config)
    args = TrainingArguments(
        output_dir=folder,
        optim=name,
        learning_rate=1e-4,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    tokens = torch.randint(config.vocab_size, (batch_size, config.n_positions))
    blocks = [{"input_ids": block, "labels": block} for block in tokens]
    times = StepTimes(args.device)
    return Trainer(model=model, args=args, train_dataset=blocks, callbacks=[times]), times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="steps of a turn; the first two are not counted")
    parser.add_argument("--json", help="write what was measured to this file")
    arguments = parser.parse_args()
    config, batch_size, settings = MODELS[arguments.model]
    tokens = batch_size * config.n_positions
    rates = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.turns + 1):
            for name in NAMES:
                trainer, times = make(name, config, batch_size, settings, arguments.steps, folder)
                trainer.train()
                if turn > 0:
                    rates[name].append(tokens / statistics.median(times.seconds[2:]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"torch {torch.__version__}, {device}, {arguments.model}: {batch_size} × {config.n_positions} tokens per step"
    )
    print("\n| optim | tokens per second | ratio to adamw_torch_fused, turn by turn |\n| --- | --- | --- |")
    report = {}
    for name, values in rates.items():
        ratios = [value / first for value, first in zip(values, rates[NAMES[0]], strict=True)]
        report[name] = {"tokens_per_second": values, "ratio": statistics.median(ratios)}
        print(f"| {name} | {statistics.median(values):.0f} | {statistics.median(ratios):.3f} |")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"torch": torch.__version__, "device": device, "rates": report}, file, indent=1)


if __name__ == "__main__":
    main()
