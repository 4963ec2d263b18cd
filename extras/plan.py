"""Memory and time of training at full size, from the shapes, and a check of the memory on small models. By hand; writes docs/scaling.md's tables.

    python -m extras.plan [--only-plan]

The plan comes from step_bytes and train.step_flops on a model on the meta device. The check runs one step of small random models
in processes of their own on the CPU and compares the peak with step_bytes. No GPU is involved anywhere.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch
from bench import peak, rows, write_folder
from conftest import HUB_CONFIGS
from torch import nn

import train
from model import LVLM, parse_config
from vladva import Batch, ChunkedCrossEntropy, Settings, TrainingBatch, VladVA

IMAGE_PROMPT, TURN, TEXT_PROMPT = (
    21,
    16,
    20,
)  # tokens of the templates with Llama's tokenizer, without the picture's and the caption's
SHORT, LONG, LONGEST = 12, 200, 500  # tokens of captions: assumed means, and the paper's limit
PAPER_PAIRS, PAPER_BATCH = 8.1e6, 1024
MACHINES = (
    ("one 24 GB GPU", 24e9, 1, 165e12),
    ("one 80 GB GPU", 80e9, 1, 312e12),
    ("8 x 80 GB GPUs", 80e9, 8, 312e12),
)  # memory, count, FLOPS
SHARE = 0.4  # of the data-sheet rate: an assumption


def step_bytes(model, parts, config):
    """Memory that one step of this process needs, from the shapes: {"weights", "adapter", "activations", "logits"} in bytes.

    adapter: values, gradients and AdamW's two moments of what is trained, in float32. activations: of all parts at once, or with
    config.grad_cache of the largest. logits: a chunk of them and its softmax. Not counted: the program itself, and what the allocator
    cannot use.
    """
    decoder, itemsize = model.lvlm.config.decoder, model.lvlm.compute_dtype.itemsize
    each = [
        train.activation_bytes(decoder, train.token_count([part]), config.checkpointing, itemsize)
        for part in parts
    ]
    return {
        "weights": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "adapter": 4 * sum(p.nbytes for _, p in model.trained()),
        "activations": max(each) if config.grad_cache else sum(each),
        "logits": 2
        * 4
        * decoder.vocab_size
        * min(ChunkedCrossEntropy.CHUNK, max(len(part.targets) for part in parts)),
    }


def meta_model(size):
    """LLaVA-1.5 of full size in bfloat16 with its adapters on the meta device; the soft prompts have the hand prompts' lengths."""
    with torch.device("meta"):
        lvlm = LVLM(parse_config(HUB_CONFIGS[size])).to(torch.bfloat16).requires_grad_(False)
        model = VladVA(lvlm, None, None, Settings(soft_prompts=False), size)
        model.attach()
        width = lvlm.config.decoder.hidden_size
        model.soft_prompts = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(10, width)) for name in ("image", "text")}
        )
    return model


def shaped_batch(model, count, short=SHORT, long=LONG):
    """A TrainingBatch of `count` pairs that has shapes only."""
    empty = lambda *shape: torch.empty(*shape, dtype=torch.long, device="meta")
    image = model.lvlm.config.num_image_tokens
    prompt, text = IMAGE_PROMPT + image, TEXT_PROMPT + short

    def batch(width, used, prompt_width, image):
        return Batch(
            empty(count, width),
            empty(count),
            empty(count),
            empty(2, count * image),
            *[empty(count * used)] * 2,
            prompt_width,
        )

    images = batch(prompt + TURN + long + 1, long + 1, prompt, image)
    return TrainingBatch(
        torch.empty(count, 3, 336, 336, device="meta"),
        images,
        batch(text, 0, text, 0),
        empty(count),
    )


def plan():
    """Lines of Markdown: arithmetic a pair, memory, and what fits where."""
    lines = ["| | 7B | 13B |", "|---|---|---|"]
    models = {size: meta_model(size) for size in HUB_CONFIGS}
    base = train.TrainConfig(checkpointing=False, grad_cache=False)
    recomputed = train.TrainConfig(checkpointing=True, grad_cache=True)
    one = {size: [shaped_batch(model, 1)] for size, model in models.items()}
    longest = {size: [shaped_batch(model, 1, long=LONGEST)] for size, model in models.items()}
    row = lambda label, value: lines.append(
        f"| {label} | " + " | ".join(value(size) for size in models) + " |"
    )
    in_bytes = lambda parts, config, key: (
        lambda size: f"{step_bytes(models[size], parts[size], config)[key] / 1e9:.2f} GB"
    )
    row("frozen weights, bfloat16", in_bytes(one, base, "weights"))
    row("trained parameters", lambda size: f"{sum(p.numel() for _, p in models[size].trained()):,}")
    row("they, their gradients and AdamW's moments, float32", in_bytes(one, base, "adapter"))
    row(f"activations of a pair, long caption of {LONG} tokens", in_bytes(one, base, "activations"))
    row(f"... of {LONGEST} tokens", in_bytes(longest, base, "activations"))
    row(f"... of {LONGEST} tokens, `--checkpointing`", in_bytes(longest, recomputed, "activations"))
    row("logits", in_bytes(longest, base, "logits"))
    flops = lambda config: (
        lambda size: f"{sum(train.step_flops(models[size], one[size], config)) / 1e12:.1f} TFLOP"
    )
    row("arithmetic of a pair", flops(base))
    row(
        "... with `--checkpointing`", flops(train.TrainConfig(checkpointing=True, grad_cache=False))
    )
    row("... with `--checkpointing --grad-cache`", flops(recomputed))
    lines += [
        "",
        "| | machine | pairs that fit in a micro-batch | a step of 1,024 pairs | 8.1 million pairs |",
        "|---|---|---|---|---|",
    ]
    for size, model in models.items():
        for machine, memory, count, rate in MACHINES:
            held = step_bytes(model, longest[size], recomputed)
            room = 0.95 * memory - held["weights"] - held["adapter"] - held["logits"]
            fitting = 0 if room < held["activations"] else next(
                n for n in range(256, 0, -1) if step_bytes(model, [shaped_batch(model, n, long=LONGEST)], recomputed)["activations"] < room
            )  # fmt: skip
            seconds = (
                PAPER_BATCH
                * sum(train.step_flops(model, one[size], recomputed))
                / (count * rate * SHARE)
            )
            days = seconds * PAPER_PAIRS / PAPER_BATCH / 86400
            times = f"{seconds:.0f} s | {days:.0f} days" if fitting else "- | -"
            fits = (
                f"{fitting}{' or more' * (fitting == 256)}"
                if fitting
                else f"none: {held['weights'] / 1e9:.1f} GB of weights"
            )
            lines.append(f"| {size.upper()} | {machine} | {fits} | {times} |")
    return lines


SMALL = {  # name: (vision, text) sizes of a random folder
    "8 x 512": {},
    "4 x 1024": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4},
    "16 x 256": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}


def one_step(folder, checkpointing, grad_cache):
    """One step on 8 pairs in micro-batches of 2 in this process: what the program takes, what step_bytes says, and the peak."""
    config = train.TrainConfig(
        lr=1e-4,
        soft_prompt_lr=1e-4,
        temperature_lr=1e-4,
        checkpointing=checkpointing,
        grad_cache=grad_cache,
    )
    train.return_freed_memory()
    torch.randn(512, 512) @ torch.randn(512, 512)  # so that the libraries are there
    program = peak()
    model = VladVA.from_pretrained(folder)
    model.attach()
    train.prepare_blocks(model.lvlm.decoder, config)
    drawn = sorted(rows(8), key=lambda row: len(row["long"]))
    parts = [model.training_batch(drawn[i : i + 2]) for i in range(0, 8, 2)]
    train.optimisation_step(model, parts, train.make_optimizer(model, config), config)
    print(json.dumps({"program": program, "peak": peak()} | step_bytes(model, parts, config)))


def check():
    """Lines of Markdown: predicted and measured peaks of small models."""
    lines = [
        "| decoder | | from the shapes | measured | measured / shapes |",
        "|---|---|---|---|---|",
    ]
    for name, text in SMALL.items():
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), text)
            for flags in ((0, 0), (1, 0), (0, 1), (1, 1)):
                command = [
                    sys.executable,
                    "-m",
                    "extras.plan",
                    "--folder",
                    folder,
                    "--checkpointing",
                    str(flags[0]),
                    "--grad-cache",
                    str(flags[1]),
                ]
                found = json.loads(
                    subprocess.run(
                        command, capture_output=True, text=True, check=True, cwd=ROOT
                    ).stdout.splitlines()[-1]
                )
                measured, program = found.pop("peak"), found.pop("program")
                predicted, above = sum(found.values()), measured - program
                label = (
                    " ".join(
                        f for f, on in zip(("`--checkpointing`", "`--grad-cache`"), flags) if on
                    )
                    or "neither"
                )
                lines.append(
                    f"| {name} | {label} | {predicted / 1e9:.2f} GB | {above / 1e9:.2f} GB | {above / predicted:.2f} |"
                )
                print(lines[-1], flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python -m extras.plan")
    parser.add_argument("--only-plan", action="store_true")
    parser.add_argument("--folder")
    parser.add_argument("--checkpointing", type=int)
    parser.add_argument("--grad-cache", type=int)
    args = parser.parse_args()
    if args.folder:
        return one_step(args.folder, bool(args.checkpointing), bool(args.grad_cache))
    page = ROOT / "docs" / "scaling.md"
    for name, lines in {"plan": plan(), **({} if args.only_plan else {"check": check()})}.items():
        print("\n".join(lines))
        before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        page.write_text(before + mark + "\n".join(lines) + "\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
