"""LLaVA-1.5, tiny-llava or Qwen2-VL at full size with random weights, trained. By hand.

    python tests/full_size.py --model 7b  # or 13b, tiny-llava, qwen2-vl-2b

7B takes 14 GB of disk and about 17 of memory, Qwen2-VL-2B 4.4 and about 6. Writes a bfloat16
folder in the hub's sharded form, loads it, then runs train.py on it for a step of 2 scenes in
micro-batches of 1; each in a process of its own, whose minutes and peak memory are printed.
tiny-llava is written in float32, as its publisher did, and trained for 3 steps of 8 image files;
the run is killed after the first and goes on, then 8 images and 8 texts are embedded.
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
    hub_config,
    is_norm_weight,
    write_llama_tokenizer,
    write_qwen_tokenizer,
)

import data
from data import write_json
from extras import scenes
from extras.export import hub_key, save_weights
from model import LVLM, parse_config, read_json

LOAD = """
import resource, sys, torch
from model import load_lvlm
lvlm = load_lvlm(sys.argv[1], dtype=torch.bfloat16)
weights = sum(p.nbytes for p in lvlm.parameters()) / 1e9
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(f"weights {weights:.3f} GB, peak {peak:.3f} GB, {peak / weights:.4f} times the weights")
"""
EMBED = """
import sys, torch
from vladva import VladVA
folder, pairs = sys.argv[1:]
model = VladVA.from_pretrained(folder, f"{folder}/run", dtype=torch.bfloat16)
images = model.encode_image([f"{pairs}/{i}.png" for i in range(8)])
texts = model.encode_text([f"{word} circle" for word in "a the one red blue big any no".split()])
lengths = torch.cat([images, texts]).norm(dim=1)
print("embeddings", *images.shape, "and", *texts.shape, "lengths", lengths.aminmax())
"""
TRAIN = "--dtype bfloat16 --device cpu --holdout 0 --save-every 1 --gradient-caching"
ONE_STEP = "--steps 1 --batch-size 2 --micro-batch-size 1 --gradient-checkpointing"
THREE_STEPS = "--steps 3 --batch-size 8 --micro-batch-size 2"
TINY_LLAVA = {  # the decoder of bczhou/tiny-llava-v1-hf; its tower is LLaVA-1.5's
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}


def llava_files(folder: Path, raw: dict) -> None:
    write_llama_tokenizer(folder)
    side = raw["vision_config"]["image_size"]
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    settings = read_json(data.TINY / "preprocessor_config.json") | sizes
    write_json(folder / "preprocessor_config.json", settings)


def qwen_files(folder: Path, raw: dict) -> None:
    write_qwen_tokenizer(folder, raw["bos_token_id"])
    write_json(folder / "preprocessor_config.json", QWEN_PROCESSOR)


MODELS = {  # name: (config.json, what writes tokenizer and preprocessor, dtype of the files)
    "7b": (HUB_CONFIGS["7b"], llava_files, torch.bfloat16),
    "13b": (HUB_CONFIGS["13b"], llava_files, torch.bfloat16),
    "tiny-llava": (hub_config(TINY_LLAVA), llava_files, torch.float32),
    "qwen2-vl-2b": (QWEN_2B, qwen_files, torch.bfloat16),
}


def make(folder: Path, raw: dict, write_files, dtype: torch.dtype) -> None:
    """Write a folder of random weights."""
    with torch.device("meta"):
        lvlm = LVLM(parse_config(raw))
    tensors = {}
    for name, p in lvlm.named_parameters():
        weight = torch.ones(p.shape, dtype=dtype)
        if not is_norm_weight(name):
            weight.normal_(std=0.02)
        tensors[hub_key(name, lvlm.config)] = weight
    save_weights(tensors, folder)
    write_json(folder / "config.json", raw)
    write_files(folder, raw)


def measure(name: str, command: list) -> None:
    """Run a command in a process of its own.

    Linux counts what this process holds as the other's peak too, so nothing large is made here.
    """
    start = time.time()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"{name}: {(time.time() - start) / 60:.1f} minutes, peak {peak:.2f} GB", flush=True)


def write_pairs(folder: Path, count: int) -> Path:
    """Rendered scenes as image files with their captions."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        row = scenes.scene_row(7, i)
        row["image"].save(folder / f"{i}.png")
        captions = {"short": row["short"], "long": row["long"]}
        lines.append(json.dumps({"image": f"{i}.png", **captions}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder / "pairs.jsonl"


def kill_after_a_step(run: Path, command: list) -> None:
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    start = time.time()
    while process.poll() is None and not list(run.glob("checkpoints/*.safetensors")):
        time.sleep(0.1)
    process.kill()
    process.wait()
    print(f"killed after {(time.time() - start) / 60:.1f} minutes", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="full_size.py", description="A model at full size.")
    parser.add_argument("--model", choices=MODELS, default="7b", help="which (default: 7b)")
    folder_help = "where the model is made (default: /tmp/full_size)"
    parser.add_argument("--folder", type=Path, default=Path("/tmp/full_size"), help=folder_help)
    parser.add_argument("--keep", action="store_true", help="leave the folder (default: remove it)")
    parser.add_argument("--only-make", action="store_true", help="only write the folder")
    args = parser.parse_args(argv)
    if args.only_make:
        make(args.folder, *MODELS[args.model])
        return
    run = args.folder / "run"
    flags = ["--model", args.model, "--folder", args.folder, "--only-make"]
    try:
        if not (args.folder / "config.json").exists():
            measure("make", [__file__, *flags])
        measure("load", ["-c", LOAD, args.folder])
        shutil.rmtree(run, ignore_errors=True)
        command = ["train.py", "--model", args.folder, "--out", run, *TRAIN.split()]
        if args.model == "tiny-llava":
            pairs = write_pairs(args.folder / "pairs", 24)
            kill_after_a_step(run, [*command, "--data", pairs, *THREE_STEPS.split()])
            measure("resumed", ["train.py", "--out", run, "--resume", "--device", "cpu"])
            measure("embed", ["-c", EMBED, args.folder, pairs.parent])
        else:
            measure("train", [*command, *ONE_STEP.split()])
        print((run / "metrics.jsonl").read_text())
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
