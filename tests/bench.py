"""Our training step and encoders against transformers + peft doing the same. By hand.

    python tests/bench.py [--dtype float32] [--micro-batch-size 2] [--steps 3] [--rounds 3]
    python tests/bench.py --task score  # eval.py on stored embeddings of COCO's size, width 4096

Wants transformers and peft beside the project's own packages; pytest does not collect it. The model
is a LLaVA-shaped random folder (ViT 6 x 256 at 224/14, decoder 8 x 512, vocabulary 32064), long
captions have 40 to 300 words. The sides run in processes of their own, in turn, for some rounds;
printed are the median seconds of a step, the largest peak memory of a process, their ratios to
transformers + peft, and the first losses.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# peft has no prompt inside a template; LoRA and both losses are the same on either side
METHOD = {"soft_prompts": False, "lora_rank": 16}
WORDS = (
    "there are two objects the background is gray small dotted orange ring red circle large blue "
    "square above left of and striped"
).split()


def write_folder(folder: Path) -> None:
    """The LLaVA-shaped random folder."""
    from conftest import CLIP_L_336, VICUNA_7B, hub_config, make_folder, write_llama_tokenizer

    from data import TINY, write_json
    from model import read_json

    vision = CLIP_L_336 | {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": 224,
    }
    text = VICUNA_7B | {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    sizes = {"vision_config": vision, "image_seq_length": 256}
    make_folder(folder, hub_config(text) | sizes, std=0.03)
    write_llama_tokenizer(folder)
    settings = read_json(TINY / "preprocessor_config.json")
    settings["size"] = {"shortest_edge": 224}
    settings["crop_size"] = {"height": 224, "width": 224}
    write_json(folder / "preprocessor_config.json", settings)


def make_rows(count: int) -> list[dict]:
    """Images of noise, short captions of 4 to 20 words, long ones of 40 to 300; longest first."""
    rng = random.Random(0)
    noise = np.random.RandomState(0)
    rows = []
    for _ in range(count):
        image = Image.fromarray(noise.randint(0, 256, (224, 224, 3), dtype=np.uint8))
        short = " ".join(rng.choices(WORDS, k=rng.randint(4, 20)))
        long = " ".join(rng.choices(WORDS, k=rng.randint(40, 300)))
        rows.append({"image": image, "short": short, "long": long})
    return sorted(rows, key=lambda row: len(row["long"]), reverse=True)


def peak_bytes() -> int:
    """Most memory that this process has held (Linux).

    getrusage would count that of a larger parent before it started this program.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def timed(work: Callable, repeats: int) -> dict:
    """First result and median seconds of some calls after one that is not timed."""
    result = work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return {"loss": result, "seconds": sorted(seconds)[repeats // 2]}


# ----------------------------------------------------------------------------------- the sides


def ours(args, dtype) -> dict:
    """One task by this project."""
    import train
    from vladva import VladVA, VladVAConfig

    model = VladVA.from_pretrained(args.folder, dtype=dtype, config=VladVAConfig(**METHOD))
    if args.task == "encode_text":
        texts = [row["short"] for row in make_rows(args.count)]
        return timed(lambda: model.encode_text(texts).sum().item(), 1)
    if args.task == "encode_image":
        images = [row["image"] for row in make_rows(args.count)]
        return timed(lambda: model.encode_image(images).sum().item(), 1)
    model.attach()
    config = train.TrainConfig(
        lr=1e-4,
        soft_prompt_lr=1e-4,
        gradient_caching=bool(args.gradient_caching),
        gradient_checkpointing=False,
        compile=bool(args.compile),
    )
    train.prepare_blocks(model, config)
    optimizer = train.make_optimizer(model, config)
    # the same 8 rows again and again: 64 rows have no longer captions than 8
    rows = [row for row in make_rows(8) for _ in range(args.batch_size // 8)]
    micro_batches = []
    for start in range(0, len(rows), args.micro_batch_size):
        micro_batches.append(model.training_batch(rows[start : start + args.micro_batch_size]))

    def step():
        return train.train_step(model, micro_batches, optimizer, config)["loss"].item()

    return timed(step, args.steps)


def peer(args, dtype) -> dict:
    """The same task as one would write it with transformers and peft."""
    from transformers import LlavaForConditionalGeneration

    import data
    from model import parse_config, read_json
    from vladva import VladVA, VladVAConfig

    # our tokenisation and preprocessing only: both sides get the same ids and pixels
    config = parse_config(read_json(Path(args.folder) / "config.json"))
    process = data.ImageProcessor(args.folder, config, VladVAConfig())
    tokenizer = data.Tokenizer(args.folder, config)
    lvlm = argparse.Namespace(config=config)
    ours = VladVA(lvlm, tokenizer, process, VladVAConfig(**METHOD), "tokenisation")

    def padded(sequences, left=False):
        """input_ids and attention_mask of token sequences."""
        width = max(len(sequence.input_ids) for sequence in sequences)
        input_ids, mask = [], []
        for sequence in sequences:
            ids = sequence.input_ids
            space = [0] * (width - len(ids))
            input_ids.append(space + ids if left else ids + space)
            mask.append(space + [1] * len(ids) if left else [1] * len(ids) + space)
        return {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}

    def pixels_of(rows):
        return torch.stack([process(row["image"]) for row in rows]).to(dtype)

    model = LlavaForConditionalGeneration.from_pretrained(args.folder, dtype=dtype)
    if args.task.startswith("encode"):
        return timed(lambda: peer_encode(model, ours, args, padded, pixels_of), 1)
    return peer_step(model, ours, args, padded, pixels_of)


@torch.no_grad()
def peer_encode(model, ours, args, padded: Callable, pixels_of: Callable) -> float:
    """Sum of the embeddings of images or texts, 64 at a time, padded on the left."""
    rows = make_rows(args.count)
    total = 0.0
    for start in range(0, args.count, 64):
        part = rows[start : start + 64]
        if args.task == "encode_text":
            inputs = padded([ours.text_sequence(row["short"]) for row in part], left=True)
        else:
            inputs = padded([ours.image_sequence()] * len(part), left=True)
            inputs["pixel_values"] = pixels_of(part)
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
        total += F.normalize(states[:, -1].float(), dim=-1).sum().item()
    return total


def peer_step(model, ours, args, padded: Callable, pixels_of: Callable) -> dict:
    """A training step of 8 pairs in one piece."""
    import peft

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    lora = peft.LoraConfig(r=METHOD["lora_rank"], lora_alpha=16, target_modules=targets)
    model = peft.get_peft_model(model, lora)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    rows = make_rows(8)
    pairs = torch.arange(len(rows))
    images = [ours.image_sequence(row["long"]) for row in rows]
    texts = [ours.text_sequence(row["short"]) for row in rows]
    image_inputs = padded(images) | {"pixel_values": pixels_of(rows)}
    text_inputs = padded(texts)
    image_summary = torch.tensor([sequence.summary_index for sequence in images])
    text_summary = torch.tensor([sequence.summary_index for sequence in texts])
    labels = torch.full_like(image_inputs["input_ids"], -100)
    for row, sequence in enumerate(images):
        caption = slice(sequence.caption_start, len(sequence.input_ids))
        labels[row, caption] = image_inputs["input_ids"][row, caption]

    def step():
        optimizer.zero_grad()
        image_out = model(**image_inputs, labels=labels, output_hidden_states=True)
        text_out = model(**text_inputs, output_hidden_states=True)
        image_states = image_out.hidden_states[-1][pairs, image_summary]
        text_states = text_out.hidden_states[-1][pairs, text_summary]
        image_emb = F.normalize(image_states.float(), dim=-1)
        text_emb = F.normalize(text_states.float(), dim=-1)
        sim = image_emb @ text_emb.T / 0.05
        loss = F.cross_entropy(sim, pairs) + F.cross_entropy(sim.T, pairs) + image_out.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return timed(step, args.steps)


# ------------------------------------------------------------------------------- the comparison


def measure(side: str, folder: Path, **flags) -> dict:
    """One side in a process of its own -> {"loss", "seconds", "peak"}."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    for name, value in flags.items():
        command.append(f"--{name.replace('_', '-')}={value}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def compare(sides: dict[str, dict], rounds: int, peer: str, count: int | None = None) -> None:
    """Measure the sides in turn; print medians, peaks and their ratios to those of the peer.

    count: of what is encoded, for a rate instead of seconds.
    """
    results = {name: [] for name in sides}
    for _ in range(rounds):
        for name, flags in sides.items():
            results[name].append(measure(**flags))
    values, peaks = {}, {}
    for name, runs in results.items():
        values[name] = [count / run["seconds"] if count else run["seconds"] for run in runs]
        peaks[name] = max(run["peak"] for run in runs)
    reference = sorted(values[peer])[rounds // 2]
    for name, runs in results.items():
        median = sorted(values[name])[rounds // 2]
        all_values = ", ".join(f"{value:.2f}" for value in values[name])
        print(
            f"  {name}: {median:.2f} {'a second' if count else 's'} (of {all_values}), "
            f"ratio {median / reference:.3f}; peak {peaks[name] / 1e9:.2f} GB, "
            f"ratio {peaks[name] / peaks[peer]:.3f}; first result {runs[0]['loss']:.5f}",
            flush=True,
        )


def compare_all(folder: Path, args) -> None:
    """Steps, memory by batch size, encoders."""
    common = {"folder": folder, "dtype": args.dtype}
    step = common | {"side": "ours", "steps": args.steps, "batch_size": 8}
    step["micro_batch_size"] = args.micro_batch_size
    print(f"a step of 8 pairs in {args.dtype}", flush=True)
    sides = {
        f"ours, micro-batches of {args.micro_batch_size}": step,
        "... with --compile": step | {"compile": 1},
        "... with --gradient-caching": step | {"gradient_caching": 1},
        "transformers + peft": step | {"side": "peer"},
    }
    compare(sides, args.rounds, "transformers + peft")
    cached = step | {"steps": 1, "micro_batch_size": 4, "gradient_caching": 1}
    small = measure(**cached)["peak"]
    large = measure(**cached | {"batch_size": 64})["peak"]
    print(
        f"micro-batches of 4 with --gradient-caching: batch 8 peaks at {small / 1e9:.2f} GB, "
        f"batch 64 at {large / 1e9:.2f} GB, ratio {large / small:.3f}",
        flush=True,
    )
    for task, count in (("encode_text", args.texts), ("encode_image", args.images)):
        print(f"{task} of {count}", flush=True)
        sides = {}
        for name, side in (("ours", "ours"), ("transformers", "peer")):
            sides[name] = common | {"side": side, "task": task, "count": count}
        compare(sides, args.rounds, "transformers", count)


def score_large_gallery(folder: Path, width: int = 4096) -> None:
    """COCO's test split in size, random embeddings: seconds and peak of the whole command."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(5000):
        (folder / f"{i}.jpg").touch()  # stored embeddings need no pixels
        sentences = [{"raw": f"caption {j} of {i}"} for j in range(5)]
        images.append({"split": "test", "filename": f"{i}.jpg", "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    np.savez(
        folder / "emb.npz",
        image_emb=rng.standard_normal((5000, width), dtype=np.float32),
        text_emb=rng.standard_normal((25000, width), dtype=np.float32),
    )
    code = "import sys, eval, bench; eval.main(sys.argv[1:]); print('peak', bench.peak_bytes())"
    flags = ["--task", "coco", "--folder", str(folder), "--embeddings", f"{folder}/emb.npz"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    print(done.stdout, f"{time.perf_counter() - start:.1f} s in all", sep="")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description="This project and its peers.")
    add = parser.add_argument
    add("--task", default="step", help="step (and encoders), or score (default: step)")
    add("--dtype", default="float32", help="of the weights (default: float32)")
    add("--rounds", type=int, default=3, help="in which each side runs once (default: 3)")
    add("--steps", type=int, default=3, help="timed in a run (default: 3)")
    add("--micro-batch-size", type=int, default=2, help="of our side (default: 2)")
    add("--texts", type=int, default=2000, help="to encode (default: 2000)")
    add("--images", type=int, default=96, help="to encode (default: 96)")
    # what `measure` passes to a process of one side
    for name in ("--side", "--folder"):
        add(name, help=argparse.SUPPRESS)
    for name in ("--batch-size", "--count", "--compile", "--gradient-caching"):
        add(name, type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        result = {"ours": ours, "peer": peer}[args.side](args, getattr(torch, args.dtype))
        print(json.dumps(result | {"peak": peak_bytes()}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        if args.task == "score":
            score_large_gallery(Path(temporary))
            return
        folder = Path(temporary) / "model"
        write_folder(folder)
        compare_all(folder, args)


if __name__ == "__main__":
    main()
