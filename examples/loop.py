"""Train a small GPT-2 on the bytes of the packaged novel in a loop of one's own, and evaluate it: about a minute.

python examples/loop.py [STEPS]
"""

import sys
from importlib.resources import files

import torch
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
optimizer = MarsAdamW(param_groups(model, weight_decay=0.1), lr=6e-3, betas=(0.9, 0.95))
schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)

for _ in range(steps):
    batch = train[torch.randint(len(train), (16,))]
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
with torch.no_grad():
    print(f"{model(input_ids=held_out, labels=held_out).loss:.3f} nats per byte")
