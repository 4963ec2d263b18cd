"""Runs that are killed at a random moment and resumed, against one that is not. By hand.

    python tests/kill.py [--runs 20] [--seed 0]  # half a minute
    python tests/kill.py --runs 4 --ranks 2  # two processes, all killed at once

Counts the runs whose adapter file is the same to the byte and whose metrics.jsonl has each step
once with the same losses. The signal is SIGKILL, which no process can answer.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from conftest import make_folder, random_config
from test_train import kill_and_resume, read_lines, start_training, write_pairs

STEPS = 12


def steps_and_losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(out)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kill.py", description="Kill and resume runs.")
    parser.add_argument("--runs", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run (default: 1)")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    num_same = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_folder(folder / "model", random_config())
        (folder / "data").mkdir()
        flags = ["--model", model, "--data", write_pairs(folder / "data"), "--steps", STEPS]
        flags += ["--batch-size", 8, "--lora-rank", 4, "--holdout", 0, "--save-every", 2]
        whole = folder / "whole"
        start_training(*flags, "--out", whole, ranks=args.ranks).finish()
        for number in range(1, args.runs + 1):
            out = folder / f"killed-{number}"
            after = rng.randint(1, STEPS - 1)
            start = time.monotonic()
            kill_and_resume(flags, out, after, delay=rng.uniform(0, 0.2), ranks=args.ranks)
            adapters = [path / "adapter.safetensors" for path in (whole, out)]
            same = adapters[0].read_bytes() == adapters[1].read_bytes()
            same = same and steps_and_losses(whole) == steps_and_losses(out)
            num_same += same
            verdict = "the same" if same else "DIFFERENT"
            seconds = time.monotonic() - start
            print(f"run {number}: after step {after}, {verdict} ({seconds:.0f} s)", flush=True)
    print(f"{num_same} of {args.runs} the same")
    sys.exit(num_same != args.runs)


if __name__ == "__main__":
    main()
