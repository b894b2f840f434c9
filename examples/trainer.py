"""Train a small GPT-2 on the bytes of the packaged novel with the stock Trainer, and evaluate it: about a minute.

python examples/trainer.py --output_dir out [--optim mars_adamw --learning_rate 3e-3 and all other TrainingArguments]
"""

from importlib.resources import files

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments

import hf_mars  # noqa: F401 (registers mars_adamw, mars_lion, mars_shampoo and mars_m)

parser = HfArgumentParser(TrainingArguments)
parser.set_defaults(optim="mars_m", learning_rate=1e-2, weight_decay=0.1, max_steps=300, warmup_steps=30)
parser.set_defaults(lr_scheduler_type="cosine", per_device_train_batch_size=16, report_to="none")
(args,) = parser.parse_args_into_dataclasses()

novel = torch.tensor(list(files("hf_mars").joinpath("data/pride_and_prejudice.txt").read_bytes()))
blocks = [{"input_ids": block, "labels": block} for block in novel.split(128)[:-1]]
train, held_out = blocks[:-100], blocks[-100:]

torch.manual_seed(args.seed)
config = GPT2Config(
    vocab_size=256, n_positions=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None
)
model = GPT2LMHeadModel(config)
trainer = Trainer(model, args, train_dataset=train, eval_dataset=held_out)
trainer.train()
print(f"{trainer.evaluate()['eval_loss']:.3f} nats per byte")
