"""Disturbs runs until the time is over, and compares each with an undisturbed one: `make chaos MINUTES=30`.

A run is killed at random times and in the middle of a save, stopped by signals, put on a full disk, and its newest
checkpoint is damaged; each time it is started again as a scheduler would, until it is done. Weights and losses must
then be those of the undisturbed run, bit for bit. Counts are printed as JSON.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import conftest  # noqa: E402, F401  the tests' environment

from chaos.runs import LOST, SAVING, Moment, Setup, log_of, result_of, start, wait, warm_up  # noqa: E402
from hf_mars.trainer.checkpoints import MANIFEST, checkpoints_in, fault  # noqa: E402

ARGUMENTS = {"approx": "gamma=0.3", "exact": "gamma=0.3,exact=true", "no clip": "gamma=0.3,max_norm=none"}
SETUPS = [
    Setup(optim, arguments, processes)
    for processes in (1, 2)
    for optim in ("mars_adamw", "mars_lion", "mars_shampoo", "mars_m")
    for arguments in ARGUMENTS.values()
]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PAGE = 4096
DAMAGES = ("missing", "cut", "empty", "zeros", "flipped")


def damage(path, kind, chance):
    size = path.stat().st_size
    if kind == "missing":
        path.unlink()
    elif kind in ("cut", "empty"):
        os.truncate(path, size // 2 if kind == "cut" else 0)
    elif kind == "zeros":
        path.write_bytes(bytes(size))
    else:
        content = bytearray(path.read_bytes())
        place = chance.randrange(max(size - 16, 1))
        content[place : place + 16] = bytes(byte ^ 0xFF for byte in content[place : place + 16])
        path.write_bytes(bytes(content))


class Chaos:
    """Counts of what was done and seen, and the undisturbed runs."""

    def __init__(self, seed, work):
        self.chance = random.Random(seed)
        self.work = Path(work)
        self.counts = collections.Counter()
        self.undisturbed = {}
        self.seconds = {}
        self.sizes = {}  # of a checkpoint, in bytes on a tmpfs
        warm_up(self.work / "warm")

    def baseline(self, setup):
        if setup not in self.undisturbed:
            folder = self.work / "undisturbed"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            begin = time.monotonic()
            codes = wait(start(setup, folder))
            self.seconds[setup] = time.monotonic() - begin
            if any(codes):
                raise SystemExit(f"the undisturbed run of {setup} failed: {codes}\n{self.log(folder)}")
            self.undisturbed[setup] = result_of(folder)
            self.sizes[setup] = sum(
                -(-path.stat().st_size // PAGE) * PAGE for path in checkpoints_in(folder / "out")[-1].rglob("*")
            )
        return self.undisturbed[setup]

    def log(self, folder):
        logs = [log_of(folder, rank) for rank in range(2)]
        return "".join(path.read_text()[-3000:] for path in logs if path.exists())

    def run(self, setup, disturbances):
        """One run to its end, with up to that many disturbances."""
        expected = self.baseline(setup)
        folder = self.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for attempt in range(20):
            attack = self.chance.choice(self.attacks(folder)) if attempt < disturbances else None
            codes = attack(setup, folder) if attack else wait(start(setup, folder))
            self.check(setup, codes, folder, attack)
            started = folder / "started.json"
            if attempt and started.exists() and json.loads(started.read_text()) > 0:
                self.counts["resumes"] += 1
            if result_of(folder) is not None:
                break
        self.counts["runs"] += 1
        if result_of(folder) != expected:
            self.counts["differences"] += 1
            print(f"different: {setup}\n{self.log(folder)}", flush=True)

    def attacks(self, folder):
        attacks = [self.kill, self.kill_in_a_save, self.stop, self.stop]
        return attacks if not checkpoints_in(folder / "out") else [*attacks, self.tear, self.tear, self.tear]

    def check(self, setup, codes, folder, attack):
        """Each process ends well, by its signal, by a kill of the launcher's or ours; anything else is unexpected."""
        allowed = {0, -9, *(128 + signum for signum in SIGNALS), *(-signum for signum in SIGNALS)}
        if any(code < 0 for code in codes):  # what a launcher would end
            allowed.add(LOST)
        if not set(codes) <= allowed:
            self.counts["unexpected ends"] += 1
            print(f"unexpected: {setup} after {attack}: {codes}\n{self.log(folder)}", flush=True)

    def kill(self, setup, folder):
        pids = start(setup, folder)
        time.sleep(self.chance.uniform(0, self.seconds[setup]))
        os.kill(self.chance.choice(pids), signal.SIGKILL)
        self.counts["kills at random"] += 1
        return wait(pids)

    def kill_in_a_save(self, setup, folder):
        moment = Moment(self.chance.choice([*SAVING]), self.chance.randrange(1, 7))
        codes = wait(start(setup, folder, moment))
        self.counts["kills in a save"] += -9 in codes
        return codes

    def stop(self, setup, folder):
        signum = self.chance.choice(SIGNALS)
        started = folder / "started.json"  # written when the run begins
        started.unlink(missing_ok=True)
        pids = start(setup, folder)
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(self.chance.uniform(0.1, 0.7) * self.seconds[setup])
        for pid in pids if self.chance.random() < 0.5 else [self.chance.choice(pids)]:
            os.kill(pid, signum)
        self.counts["signals"] += 1
        codes = wait(pids)
        if 128 + signum in codes:
            self.counts["stops with a checkpoint"] += 1
            newest = checkpoints_in(folder / "out")[-1]
            if why := fault(newest):
                self.counts["stops without a whole checkpoint"] += 1
                print(f"{setup}: {newest} {why}", flush=True)
        return codes

    def tear(self, setup, folder):
        newest = checkpoints_in(folder / "out")[-1]
        # Without its manifest a checkpoint is looked at as any Trainer's, and this one is whole.
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.name != MANIFEST)
        if files and fault(newest) is None:
            path, kind = self.chance.choice(files), self.chance.choice(DAMAGES)
            damage(path, kind, self.chance)
            self.counts["torn files"] += 1
            if fault(newest) is None:
                self.counts["torn files unnoticed"] += 1
                print(f"unnoticed: {kind} {path}", flush=True)
        return wait(start(setup, folder, Moment("optimizer", self.chance.randrange(1, 4))))

    def fill_disk(self, setup, checkpoints=None):
        """A small tmpfs with a ballast that leaves space for that many checkpoints; needs root."""
        expected = self.baseline(setup)
        folder = self.work / "disk"
        folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            self.counts["full disks not tried (no root)"] += 1
            return
        try:
            ballast = folder / "ballast"
            fit = self.chance.uniform(0.2, 2.5) if checkpoints is None else checkpoints
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            ballast.write_bytes(bytes(free - int(fit * self.sizes[setup])))
            codes = wait(start(setup, folder))
            text = log_of(folder, 0).read_text()
            if codes[0] == 1 and "could not be saved" in text and "Traceback" not in text:
                self.counts["full disks"] += 1
            elif any(codes):
                self.counts["unexpected ends"] += 1
                print(f"unexpected on a full disk: {setup}: {codes}\n{text}", flush=True)
            ballast.unlink()
            self.check(setup, wait(start(setup, folder)), folder, "a full disk")
            self.counts["runs"] += 1
            self.counts["differences"] += result_of(folder) != expected
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def main(minutes, seed, setups=SETUPS):
    """Disturb for that long; the counts."""
    with tempfile.TemporaryDirectory() as work:
        chaos = Chaos(seed, work)
        end = time.monotonic() + 60 * minutes
        order = list(setups)
        chaos.chance.shuffle(order)
        number = 0
        while time.monotonic() < end:
            setup = order[number % len(order)]
            if number % 8 == 7:
                chaos.fill_disk(setup)
            else:
                chaos.run(setup, disturbances=chaos.chance.randrange(1, 6))
            number += 1
        counts = {"setups": len(chaos.undisturbed), "differences": 0, "unexpected ends": 0, **chaos.counts}
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = main(arguments.minutes, arguments.seed)
    print(json.dumps({"minutes": arguments.minutes, "seed": arguments.seed, **found}, indent=1))
    bad = ("differences", "unexpected ends", "stops without a whole checkpoint", "torn files unnoticed")
    sys.exit(any(found.get(name) for name in bad))
