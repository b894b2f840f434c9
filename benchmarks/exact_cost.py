"""What exact mode costs: time per step and bytes in memory, of MarsTrainer with exact=false and exact=true.

    python benchmarks/exact_cost.py                     # the table in docs/exact.md; about two minutes on two cores
    python benchmarks/exact_cost.py --device cuda --n_layer 12 --n_embd 768 --batch 8 --block 1024 --vocab 50257

A GPT-2 with random weights trains on random tokens. The two forms take turns in one process, a few steps each, so that
whatever else the machine does hits both alike; the first turn of each is left out. Times are medians. Memory is
counted when step() begins, where it is at its most outside of the forward and backward passes: parameters, their
gradients, those of the previous point, and the optimizer's state. Activations are the same in both forms.
"""

import argparse
import statistics
import tempfile
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from hf_mars import MarsTrainer, MarsTrainingArguments

MIB = 2**20


class Meter(TrainerCallback):
    """The seconds of every step, and the bytes of parameters, gradients and state when step() begins."""

    def __init__(self, device: str):
        self.device, self.seconds, self.bytes = device, [], {}

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args, **kwargs):
        self.start = self.now()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(self.now() - self.start)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        parameters = list(model.parameters())
        kept = [value for entries in optimizer.state.values() for value in entries.values()]
        counted = {
            "parameters": parameters,
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "gradients at x_{t−1}": optimizer.previous_grads.values(),
            "state": [value for value in kept if isinstance(value, torch.Tensor)],
        }
        self.bytes = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in counted.items()}


def make_trainer(optim_args: str, arguments: argparse.Namespace) -> tuple[MarsTrainer, Meter]:
    torch.manual_seed(0)
    sizes = {"vocab_size": arguments.vocab, "n_positions": arguments.block, "n_embd": arguments.n_embd}
    layers = {"n_layer": arguments.n_layer, "n_head": max(1, arguments.n_embd // 64)}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **layers, bos_token_id=0, eos_token_id=0))
    tokens = torch.randint(arguments.vocab, (arguments.turn * arguments.batch * arguments.accumulate, arguments.block))
    meter = Meter(arguments.device)
    args = MarsTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        optim=arguments.optim,
        optim_args=optim_args,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=arguments.turn,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulate,
        bf16=arguments.bf16,
        use_cpu=arguments.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return MarsTrainer(model=model, args=args, train_dataset=data, callbacks=[meter]), meter


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", default="mars_adamw")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--turn", type=int, default=3, help="steps a form takes before the other's turn")
    parser.add_argument("--turns", type=int, default=11, help="turns of each form, the first of which is left out")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    print("| micro-batches | form | s/step | ratio | MiB: parameters | gradients | at x_{t−1} | state | sum |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for accumulate in arguments.accumulate:
        of_update = argparse.Namespace(**{**vars(arguments), "accumulate": accumulate})
        trainers = {form: make_trainer(f"exact={form == 'exact'}", of_update) for form in ("approx", "exact")}
        for turn in range(arguments.turns):
            for trainer, meter in trainers.values():
                trainer.train()
                if turn == 0:
                    meter.seconds.clear()
        baseline = statistics.median(trainers["approx"][1].seconds)
        for form, (_, meter) in trainers.items():
            seconds = statistics.median(meter.seconds)
            counted = [*meter.bytes.values(), sum(meter.bytes.values())]
            cells = [accumulate, form, f"{seconds:.3f}", f"{seconds / baseline:.2f}"]
            print("|", " | ".join(map(str, cells + [f"{n / MIB:.1f}" for n in counted])), "|", flush=True)


if __name__ == "__main__":
    main()
