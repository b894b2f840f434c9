"""A training script that knows nothing of hf_mars: a tiny model, random tokens, arguments of transformers alone."""

import os

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments, set_seed


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    tokens = torch.randint(0, 8, (64, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row, "number": i} for i, row in enumerate(tokens)]

    def collate(batch):
        if "ORDER" in os.environ:
            with open(os.environ["ORDER"], "a") as order:
                order.write(f"{args.optim.value} {args.seed} {[row['number'] for row in batch]}\n")
        return {key: torch.stack([row[key] for row in batch]) for key in ("input_ids", "labels")}

    args.remove_unused_columns = False
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:8], data_collator=collate)
    trainer.train()
    print("final", [row["loss"] for row in trainer.state.log_history if "loss" in row][-1])


if __name__ == "__main__":
    main()
