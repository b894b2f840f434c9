"""A script that trains nothing: it writes the log that a Trainer's RunLog would, so that a run takes no time.

The final loss is 1 + (log10(learning_rate) + 3)² + seed / 100, half of the first term's weight for optimizer "b".
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("optim", "learning_rate", "seed", "output_dir"):
    parser.add_argument(f"--{name}", required=True)
parser.add_argument("--gamma")
parser.add_argument("--max_steps", type=int, default=10)
parser.add_argument("--sleep", type=float, default=0, help="seconds in the middle of training")
parser.add_argument("--begun", help="a file that gets a line when a run begins")
parser.add_argument("--fail", help="the optimizer whose runs fail")
parser.add_argument("--kill", help="a file; the run that makes it is killed")
parser.add_argument("--nan", help="the optimizer whose runs diverge")
args = parser.parse_args()

Path(args.output_dir).mkdir()
if args.begun:
    with open(args.begun, "a") as begun:
        begun.write(f"{args.optim} {args.learning_rate} {args.seed} {os.environ.get('OMP_NUM_THREADS')}\n")
if args.fail == args.optim:
    print("something went wrong", file=sys.stderr)
    sys.exit(1)
if args.kill and not Path(args.kill).exists():
    Path(args.kill).touch()
    os.kill(os.getpid(), signal.SIGKILL)
with open(os.environ["HF_MARS_SWEEP_LOG"], "a") as log:
    final = 1 + (0.5 if args.optim == "b" else 1) * (math.log10(float(args.learning_rate)) + 3) ** 2
    final += int(args.seed) / 100
    rows = [{"begin": {"max_steps": args.max_steps, "parameters": 10}}, {"state_bytes": 80}]
    for step in range(1, args.max_steps + 1):
        loss = math.nan if args.nan == args.optim else final + 5 * (1 - step / args.max_steps)
        rows.append({"step": step, "loss": loss, "seconds": step / 100})
    for i, row in enumerate([*rows, {"end": args.max_steps}]):
        if i == args.max_steps // 2:
            time.sleep(args.sleep)
        log.write(json.dumps(row) + "\n")
        log.flush()
