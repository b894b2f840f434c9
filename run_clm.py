#!/usr/bin/env python
"""Train a causal language model with MARS: from scratch or from a pretrained model, on the Hub's data or local files.

    python run_clm.py --output_dir out --max_steps 20                                  # a small GPT-2, a novel
    python run_clm.py --output_dir out --model_name_or_path gpt2 --train_file my.txt   # fine-tuning
    python run_clm.py recipe.yaml --output_dir out                                     # arguments from a file

docs/run_clm.md describes every argument. Without a checkout, `python -m hf_mars.clm` does the same.
"""

from hf_mars.clm.start import command

if __name__ == "__main__":
    command("run_clm.py")
