"""Fine-tune a model of the Hub, or of a folder, with LoRA, TRL and MARS.

    python examples/lora.py Qwen/Qwen2.5-0.5B                                    # needs: pip install trl peft
    python examples/lora.py ./model chats.jsonl --max_steps 100 --use_cpu

The texts are a jsonl file with "messages" or "text" per line; without one, the packaged novel. mars_adamw takes
AdamW's learning rates.
"""

import sys
from importlib.resources import files

from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

import hf_mars  # registers the names  # noqa: F401

if len(sys.argv) < 2:
    sys.exit("usage: python lora.py MODEL [TEXTS.jsonl] [options of TRL's SFTConfig]")
model, *rest = sys.argv[1:]
if rest and not rest[0].startswith("--"):
    data = load_dataset("json", data_files=rest.pop(0), split="train")
else:
    novel = files("hf_mars").joinpath("data/pride_and_prejudice.txt").read_text(encoding="utf-8")
    data = Dataset.from_dict({"text": [text for text in novel.split("\n\n") if len(text) > 200]})
data = data.train_test_split(test_size=0.05, seed=0)

parser = HfArgumentParser(SFTConfig)
parser.set_defaults(
    output_dir="lora", optim="mars_adamw", learning_rate=2e-4, max_length=512, max_steps=200, logging_steps=10
)
(args,) = parser.parse_args_into_dataclasses(rest)
trainer = SFTTrainer(
    model,
    args,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"evaluation loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
trainer.save_model()
