"""The loop of loop.py with accelerate, in exact mode: about two minutes, on one process or several.

accelerate launch examples/accelerate_loop.py [STEPS]
"""

import sys
from importlib.resources import files

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from hf_mars import MarsAdamW, param_groups

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
novel = torch.tensor(list(files("hf_mars").joinpath("data/pride_and_prejudice.txt").read_bytes()))
blocks = torch.stack(novel.split(128)[:-1])
train, held_out = blocks[:-100], blocks[-100:]

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=256, n_positions=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None
)
model = GPT2LMHeadModel(config)
accelerator = Accelerator()
# accelerate's wrapper has step() and zero_grad(), but neither needs_previous_point nor previous_point(): keep `mars`.
mars = MarsAdamW(param_groups(model, weight_decay=0.1), lr=6e-3, gamma=0.1, exact=True)
schedule = get_cosine_schedule_with_warmup(
    mars, steps // 10 * accelerator.num_processes, steps * accelerator.num_processes
)
loader = torch.utils.data.DataLoader(train, batch_size=16, shuffle=True, drop_last=True)
model, optimizer, loader, schedule = accelerator.prepare(model, mars, loader, schedule)


def backward(batch):
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)


for _, batch in zip(range(steps), loader, strict=False):
    if mars.needs_previous_point:
        with mars.previous_point():  # the parameters are those of the last step
            backward(batch)
    backward(batch)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    held_out = held_out.to(accelerator.device)
    accelerator.print(f"{model(input_ids=held_out, labels=held_out).loss:.3f} nats per byte")
accelerator.end_training()
