"""Runs that are killed with SIGKILL at a random moment and resumed, against one that is not. By hand: 20 runs take about 8 minutes.

    python tests/kill.py [--runs 20] [--seed 0]

Counts the runs whose adapter file is the same to the byte and whose metrics.jsonl has each step once with the same losses.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from conftest import make_folder, random_config
from test_train import finished, kill_and_resume, spawned, steps_written

STEPS = 12


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, same = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_folder(folder / "model", random_config())
        flags = [
            "--model",
            folder / "model",
            "--steps",
            STEPS,
            "--batch",
            8,
            "--rank",
            4,
            "--scenes",
            64,
            "--eval-gallery",
            0,
            "--save-every",
            2,
        ]
        finished(spawned(*flags, "--out", folder / "whole"))
        for run in range(args.runs):
            out, after, start = folder / f"killed-{run}", draw.randint(1, STEPS - 1), time.time()
            kill_and_resume(flags, out, after, delay=draw.uniform(0, 0.2))
            files = [
                (path / "adapter.safetensors").read_bytes() for path in (folder / "whole", out)
            ]
            equal = (
                files[0] == files[1]
                and steps_written(out) == list(range(1, STEPS + 1))
                and losses(out) == losses(folder / "whole")
            )
            same += equal
            print(
                f"run {run + 1}: killed after step {after}, {'the same' if equal else 'DIFFERENT'} ({time.time() - start:.0f} s)",
                flush=True,
            )
    print(f"{same} of {args.runs} the same")
    sys.exit(same != args.runs)


if __name__ == "__main__":
    main()
