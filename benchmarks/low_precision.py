"""Evaluation losses in low precision: bfloat16 parameters at a fine-tuning learning rate, and a bfloat16 g_{t−1}.

    python benchmarks/low_precision.py [--model_name_or_path FOLDER] [--learning_rate 2e-5]

Without a model, the small GPT-2 of run_clm.py is first trained for 150 steps in float32; with one, that model is
fine-tuned. Every run starts from the same weights, sees the same batches of the novel in the package and ends with the
same evaluation.
"""

import argparse
import contextlib
import io
import tempfile

from hf_mars.clm.run import main as train_clm

RUNS = [
    ("float32", "float32", ""),
    ("float32", "float32", "last_grad_dtype=bfloat16"),
    ("float32", "float32", "state_dtype=bfloat16,last_grad_dtype=bfloat16"),
    ("bfloat16", "bfloat16", "state_dtype=float32"),
    ("bfloat16", "bfloat16", ""),
    ("bfloat16, plain rounding", "bfloat16", "kahan_sum=false"),
]
SMALL = "--config_overrides resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0 --per_device_train_batch_size 16"


def train(folder, *options):
    quiet = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--logging_strategy", "no"]
    argv = ["--output_dir", str(folder), "--eval_on_start", *quiet, *" ".join(options).split()]
    with contextlib.redirect_stdout(io.StringIO()):
        return train_clm(argv)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--learning_rate", default="2e-5")
    parser.add_argument("--optim", default="mars_adamw")
    parser.add_argument("--options", default="--max_steps 200 --per_device_train_batch_size 16", help="of run_clm.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model_name_or_path
        if model is None:
            model = f"{folder}/base"
            loss = train(model, SMALL, "--learning_rate 6e-3 --max_steps 150 --warmup_steps 20")["eval_loss"]
            print(f"start: evaluation loss {loss:.4f}")
        print(f"{arguments.optim}, learning rate {arguments.learning_rate}, {arguments.options}")
        print("\n| parameters | optim_args | evaluation loss |\n| --- | --- | --- |")
        for i, (title, dtype, optim_args) in enumerate(RUNS):
            results = train(
                f"{folder}/{i}",
                f"--model_name_or_path {model} --optim {arguments.optim} --learning_rate {arguments.learning_rate}",
                f"--dtype {dtype} {arguments.options}",
                f"--optim_args {optim_args}" if optim_args else "",
            )
            print(f"| {title} | {optim_args} | {results['eval_loss']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
