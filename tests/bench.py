"""Our training step and our encoders against transformers + peft doing the same. By hand, where these are installed; pytest does not collect it.

    python tests/bench.py [--dtype float32] [--micro-batch 2] [--steps 3] [--rounds 3]
    python tests/bench.py --task score      # eval.py on stored embeddings: 5,000 pictures, 25,000 captions, of width 4096

A LLaVA-shaped random folder (ViT 6 x 256 at 224/14, decoder 8 x 512, vocabulary 32064), long captions of 40 to 300 words. The sides run in
processes of their own, in turn, for some rounds; printed are the median seconds a step, the largest peak memory of a process, their
ratios to transformers + peft, and the first losses.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from PIL import Image

SETTINGS = {
    "soft_prompts": False,
    "rank": 16,
}  # peft has no prompt inside a template; LoRA and both losses are the same on either side
WORDS = "there are two objects the background is gray small dotted orange ring red circle large blue square above left of and striped".split()


def write_folder(folder, text_sizes=None):
    """The LLaVA-shaped random folder; text_sizes: other sizes of its decoder."""
    from conftest import CLIP_L_336, VICUNA_7B, make_folder, write_llama_tokenizer

    from data import TINY
    from model import write_json

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
    text |= text_sizes or {}
    top = {
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "image_seq_length": 256,
    }
    make_folder(
        folder,
        top
        | {
            "vision_feature_select_strategy": "default",
            "vision_config": vision,
            "text_config": text,
        },
        std=0.03,
    )
    write_llama_tokenizer(folder)
    steps = json.loads((TINY / "preprocessor_config.json").read_text())
    write_json(
        folder / "preprocessor_config.json",
        steps | {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
    )


def rows(count):
    """Pictures of noise with short captions of 4 to 20 words and long ones of 40 to 300."""
    draw = random.Random(0)
    words = lambda low, high: " ".join(draw.choices(WORDS, k=draw.randint(low, high)))
    noise = np.random.RandomState(0)
    return [
        {
            "image": Image.fromarray(noise.randint(0, 256, (224, 224, 3), dtype=np.uint8)),
            "short": words(4, 20),
            "long": words(40, 300),
        }
        for _ in range(count)
    ]


def peak():
    """Most memory this process has held, in bytes (Linux; getrusage would count a larger parent's before it started this program)."""
    return 1024 * int(
        next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ).split()[1]
    )


def timed(work, steps):
    """(first result, median seconds) of a few calls after one that is not timed."""
    first, seconds = work(), []
    for _ in range(steps):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return first, sorted(seconds)[len(seconds) // 2]


def ours(args, dtype):
    import train
    from vladva import Settings, VladVA

    model = VladVA.from_pretrained(args.folder, dtype=dtype, settings=Settings(**SETTINGS))
    if args.task.startswith("encode"):
        inputs = rows(args.count)
        encode = (
            (lambda: model.encode_text([row["short"] for row in inputs]))
            if args.task == "encode_text"
            else (lambda: model.encode_image([row["image"] for row in inputs]))
        )
        return dict(zip(("loss", "seconds"), (0.0, timed(encode, 1)[1])))
    model.attach()
    rates = {"lr": 1e-4, "soft_prompt_lr": 1e-4, "temperature_lr": 1e-4}
    config = train.TrainConfig(
        **rates, grad_cache=bool(args.grad_cache), compile=bool(args.compile), checkpointing=False
    )
    train.prepare_blocks(model.lvlm.decoder, config)
    optimizer = train.make_optimizer(model, config)
    drawn = sorted(
        rows(8) * (args.batch // 8), key=lambda row: len(row["long"])
    )  # so that 64 rows have no longer captions than 8
    parts = [
        model.training_batch(drawn[i : i + args.micro_batch])
        for i in range(0, args.batch, args.micro_batch)
    ]
    first, seconds = timed(
        lambda: train.optimisation_step(model, parts, optimizer, config)["loss"].item(), args.steps
    )
    return {"loss": first, "seconds": seconds}


def peer(args, dtype):
    """What one would write with transformers and peft."""
    import peft
    import torch.nn.functional as F
    from transformers import LlavaForConditionalGeneration

    import data
    from model import read_config
    from vladva import Settings, VladVA, collate

    model = LlavaForConditionalGeneration.from_pretrained(args.folder, dtype=dtype)
    helper = VladVA.__new__(VladVA)  # our tokenisation only: both sides get the same ids and pixels
    torch.nn.Module.__init__(helper)
    config = read_config(args.folder)
    helper.tokenizer, helper.settings = data.Tokenizer(args.folder, config), Settings(**SETTINGS)
    helper.lvlm = argparse.Namespace(config=config)
    process = data.ImageProcessor(args.folder, config, "crop")

    def left_padded(sequences):
        width = max(len(s.ids) for s in sequences)
        ids = torch.tensor([[0] * (width - len(s.ids)) + s.ids for s in sequences])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor(
                [[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in sequences]
            ),
        }

    @torch.no_grad()
    def encode():
        out, inputs = [], rows(args.count)
        for start in range(0, args.count, 64):
            part = inputs[start : start + 64]
            if args.task == "encode_text":
                kind = left_padded([helper.text_sequence(row["short"]) for row in part])
            else:
                kind = left_padded([helper.image_sequence()] * len(part)) | {
                    "pixel_values": torch.stack([process(row["image"]) for row in part]).to(dtype)
                }
            out.append(
                F.normalize(
                    model(**kind, output_hidden_states=True).hidden_states[-1][:, -1].float(),
                    dim=-1,
                )
            )
        return torch.cat(out)

    if args.task.startswith("encode"):
        return {"loss": 0.0, "seconds": timed(encode, 1)[1]}
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    drawn = rows(8)
    images, texts = (
        [helper.image_sequence(row["long"]) for row in drawn],
        [helper.text_sequence(row["short"]) for row in drawn],
    )
    batch, words = collate(images, 0), collate(texts, 0)
    real = torch.tensor([[t < len(s.ids) for t in range(batch.ids.shape[1])] for s in images])
    labels = torch.tensor(
        [
            [
                s.ids[t] if s.loss_start <= t < len(s.ids) else -100
                for t in range(batch.ids.shape[1])
            ]
            for s in images
        ]
    )
    mask = torch.tensor([[t < len(s.ids) for t in range(words.ids.shape[1])] for s in texts])
    pixels, pairs = (
        torch.stack([process(row["image"]) for row in drawn]).to(dtype),
        torch.arange(len(drawn)),
    )

    def step():
        optimizer.zero_grad()
        out = model(
            input_ids=batch.ids,
            attention_mask=real.long(),
            pixel_values=pixels,
            labels=labels,
            output_hidden_states=True,
        )
        image_emb = F.normalize(out.hidden_states[-1][pairs, batch.summary].float(), dim=-1)
        told = model(input_ids=words.ids, attention_mask=mask.long(), output_hidden_states=True)
        text_emb = F.normalize(told.hidden_states[-1][pairs, words.summary].float(), dim=-1)
        sim = image_emb @ text_emb.T / 0.05
        loss = F.cross_entropy(sim, pairs) + F.cross_entropy(sim.T, pairs) + out.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        return loss.item()

    return dict(zip(("loss", "seconds"), timed(step, args.steps)))


def measure(side, folder, **flags):
    """One side in a process of its own -> {"loss", "seconds", "peak"}."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--folder", str(folder), *words],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def score_large_gallery(folder, width=4096):
    """COCO's test split in size, random embeddings: seconds and peak memory of the whole command."""
    draw, images = np.random.default_rng(0), []
    for i in range(5000):
        (folder / f"{i}.jpg").touch()  # stored embeddings need no pixels
        images.append(
            {
                "split": "test",
                "filename": f"{i}.jpg",
                "sentences": [{"raw": f"caption {j} of {i}"} for j in range(5)],
            }
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    emb = {
        name: draw.standard_normal((count, width), dtype=np.float32)
        for name, count in (("image_emb", 5000), ("text_emb", 25000))
    }
    np.savez(folder / "emb.npz", **emb)
    del emb
    start = time.perf_counter()
    command = [
        sys.executable,
        "-c",
        "import sys, eval, bench; eval.main(sys.argv[1:]); print('peak', bench.peak())",
    ]
    flags = ["--task", "coco", "--folder", str(folder), "--embeddings", str(folder / "emb.npz")]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=True, env=env)
    print(done.stdout, f"{time.perf_counter() - start:.1f} s in all", sep="")


def compare(sides, rounds, peer, scale, unit):
    """Measure the sides in turn for some rounds; print each one's median seconds and largest peak, and their ratios to the peer's."""
    found = {name: [] for name in sides}
    for _ in range(rounds):
        for name, flags in sides.items():
            found[name].append(measure(**flags))
    median = {
        name: sorted(r["seconds"] for r in results)[len(results) // 2]
        for name, results in found.items()
    }
    peaks = {name: max(r["peak"] for r in results) for name, results in found.items()}
    for name, results in found.items():
        every = ", ".join(f"{scale(r['seconds']):.2f}" for r in results)
        print(
            f"  {name}: {scale(median[name]):.2f} {unit} (of {every}), ratio {scale(median[name]) / scale(median[peer]):.3f}; "
            f"peak {peaks[name] / 1e9:.2f} GB, ratio {peaks[name] / peaks[peer]:.3f}; loss {results[0]['loss']:.5f}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("dtype", "float32"), ("task", "step"), ("side", ""), ("folder", "")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("micro-batch", 2), ("steps", 3), ("rounds", 3), ("texts", 2000), ("images", 96), ("count", 0), ("batch", 8),
                          ("compile", 0), ("grad-cache", 0)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.side:
        result = {"ours": ours, "peer": peer}[args.side](args, getattr(torch, args.dtype))
        return print(json.dumps(result | {"peak": peak()}))
    with tempfile.TemporaryDirectory() as temporary:
        if args.task == "score":
            return score_large_gallery(Path(temporary))
        folder = Path(temporary) / "model"
        write_folder(folder)
        theirs = "transformers + peft"
        same = {"folder": folder, "dtype": args.dtype}
        step = same | {
            "side": "ours",
            "batch": 8,
            "micro_batch": args.micro_batch,
            "steps": args.steps,
        }
        print(f"a step of 8 pairs in {args.dtype}", flush=True)
        sides = {
            f"ours, micro-batches of {args.micro_batch}": step,
            "... with --compile": step | {"compile": 1},
        }
        sides |= {
            "... with --grad-cache": step | {"grad_cache": 1},
            theirs: step | {"side": "peer"},
        }
        compare(sides, args.rounds, theirs, lambda seconds: seconds, "s")
        few = same | {"side": "ours", "steps": 1, "micro_batch": 4, "grad_cache": 1}
        small, large = (measure(**few, batch=n)["peak"] / 1e9 for n in (8, 64))
        print(
            f"micro-batches of 4 with --grad-cache: batch 8 peaks at {small:.2f} GB, batch 64 at {large:.2f} GB, ratio {large / small:.3f}",
            flush=True,
        )
        for task, count in (("encode_text", args.texts), ("encode_image", args.images)):
            print(f"{task} of {count}", flush=True)
            sides = {
                name: same | {"side": side, "task": task, "count": count}
                for name, side in (("ours", "ours"), ("transformers", "peer"))
            }
            compare(
                sides,
                args.rounds,
                "transformers",
                lambda seconds, count=count: count / seconds,
                "a second",
            )


if __name__ == "__main__":
    main()
