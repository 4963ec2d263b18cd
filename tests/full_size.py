"""LLaVA-1.5 or Qwen2-VL at full size with random weights: made, loaded and trained one step, measured. By hand: 7B takes 14 GB of disk and about
17 GB of memory, Qwen2-VL-2B 4.4 GB and about 6.

    python tests/full_size.py --model 7b [--folder /tmp/full_size] [--keep]        # or 13b, qwen2-vl-2b

Writes a bfloat16 folder in the hub's sharded form, loads it in a process of its own, then runs `python train.py --model FOLDER --steps 1`
with 2 scenes in micro-batches of 1. Prints minutes and peak memory of each, and removes the folder.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from conftest import (
    HUB_CONFIGS,
    QWEN_2B,
    QWEN_PROCESSOR,
    write_llama_tokenizer,
    write_qwen_tokenizer,
)

import data
from model import LVLM, parse_config, save_weights, write_json

LOAD = """
import resource, sys, torch
from model import load_lvlm
lvlm = load_lvlm(sys.argv[1], dtype=torch.bfloat16)
weights, peak = sum(p.nbytes for p in lvlm.parameters()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"weights {weights / 1e9:.3f} GB, peak of the whole process {peak / 1e9:.3f} GB, {peak / weights:.4f} times the weights")
"""


def random_weights(lvlm):
    """(name, random tensor) of every parameter, one at a time."""
    for name, p in lvlm.named_parameters():
        norm = ("norm" in name or "ln_q" in name) and name.endswith("weight")
        yield (
            name,
            torch.ones(p.shape) if norm else torch.randn(p.shape, dtype=torch.bfloat16) * 0.02,
        )


def llava_files(folder, raw):
    write_llama_tokenizer(folder)
    processor = json.loads((data.TINY / "preprocessor_config.json").read_text())
    side = raw["vision_config"]["image_size"]
    write_json(
        Path(folder) / "preprocessor_config.json",
        processor | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}},
    )


def qwen_files(folder, raw):
    write_qwen_tokenizer(folder, raw["bos_token_id"])
    write_json(Path(folder) / "preprocessor_config.json", QWEN_PROCESSOR)


MODELS = {size: (raw, llava_files) for size, raw in HUB_CONFIGS.items()} | {
    "qwen2-vl-2b": (QWEN_2B, qwen_files)
}


def make(folder, raw, write_files):
    with torch.device("meta"):
        lvlm = LVLM(parse_config(raw))
    save_weights(random_weights(lvlm), raw, folder, torch.bfloat16)
    write_files(folder, raw)


def timed(name, command):
    """Run a command in a process of its own. Linux counts what this process holds as the other's peak, too, so nothing large is made here."""
    start, process = time.time(), subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    print(
        f"{name}: {(time.time() - start) / 60:.1f} minutes, peak memory {usage.ru_maxrss * 1024 / 1e9:.2f} GB",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=sorted(MODELS), default="7b")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/full_size"))
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    parser.add_argument("--only-make", action="store_true", help="only write the folder")
    args = parser.parse_args()
    if args.only_make:
        return make(args.folder, *MODELS[args.model])
    try:
        if not (args.folder / "config.json").exists():
            timed(
                "make",
                [
                    sys.executable,
                    __file__,
                    "--model",
                    args.model,
                    "--folder",
                    str(args.folder),
                    "--only-make",
                ],
            )
        timed("load", [sys.executable, "-c", LOAD, str(args.folder)])
        shutil.rmtree(args.folder / "run", ignore_errors=True)
        flags = "--steps 1 --batch 2 --micro-batch 1 --dtype bfloat16 --checkpointing --eval-gallery 0".split()
        timed(
            "train",
            [
                sys.executable,
                "train.py",
                "--model",
                str(args.folder),
                "--out",
                str(args.folder / "run"),
                *flags,
            ],
        )
        print((args.folder / "run" / "metrics.jsonl").read_text())
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
