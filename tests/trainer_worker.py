"""One rank of tests/test_distributed.py: a few MarsTrainer runs on one or two processes, with the same data an update.

Usage: trainer_worker.py FOLDER PROCESSES. Rank 0 saves the weights of every run to FOLDER/weights-PROCESSES.pt.
"""

import os
import sys

import torch
from helpers import tiny_gpt2
from trainer_helpers import train, weights

RUNS = [
    {"optim": "mars_adamw"},
    {"optim": "mars_adamw", "optim_args": "exact=true,gamma=0.5"},
    {"optim": "mars_shampoo", "optim_args": "exact=true,gamma=0.5"},
]


def main(folder, processes):
    torch.set_num_threads(1)
    results = []
    for run in RUNS:
        # No dropout: ranks draw different masks.
        model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        trainer = train(
            folder,
            model=model,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4 // processes,
            learning_rate=1e-3,
            **run,
        )
        assert trainer.args.world_size == processes
        assert trainer.accelerator.distributed_type == ("NO" if processes == 1 else "MULTI_CPU"), trainer.accelerator
        results.append([w.clone() for w in weights(trainer)])
    if trainer.is_world_process_zero():
        torch.save(results, os.path.join(folder, f"weights-{processes}.pt"))
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # gloo can hang when a process group is torn down after DDP


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
