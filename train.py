"""The training loop: a generative LVLM is measured as an embedder, adapted with the paper's two losses, and measured again.

    python train.py                                                    # the tiny LVLM on rendered scenes, a few minutes on 2 CPU cores
    python train.py --data pairs.jsonl --out runs/mine                 # your own pictures (data.py says how a line looks)
    python train.py --model llava-1.5-7b --data pairs.jsonl            # the real one: from the hub, its cache, or a folder

Writes OUT/adapter.safetensors, OUT/config.json, OUT/metrics.jsonl, OUT/scores.json and OUT/report.png.

Not here: the losses (vladva.py), the benchmarks (eval.py). Several devices and resuming are not written yet.
"""

import argparse
import dataclasses
import json
import math
import random
import resource
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import eval as benchmarks
from vladva import Outputs, Settings, VladVA, command, free_bytes, pick_device, pick_dtype, similarity


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on, beside the method's Settings. None: decided when the run starts, and written to OUT/config.json."""

    model: str = "tiny"  # or llava-1.5-7b, llava-1.5-13b, a folder, a hub id
    data: str = "scenes"  # rendered; or a file of JSON lines
    out: str | None = None  # folder; None: runs/<name of the model>
    steps: int = 140  # ours: what fits 3 minutes on 2 cores
    batch: int | None = None  # pairs a step; None: 64, or all rows if there are fewer. Second-hand notes on the paper: 1024
    micro_batch: int | None = None  # pairs that are in memory at a time, the gradient being the same; None: what free memory allows
    lr: float | None = None  # peak, of LoRA; None: 2e-4 at a decoder width of 4096 (LLaVA-1.5's LoRA recipe), inversely with the width
    soft_prompt_lr: float | None = None  # peak; None: 4 x lr (ours)
    warmup: float = 0.05  # share of the steps, linear; then cosine to 0 (cosine: second-hand)
    weight_decay: float = 0.0  # ours
    clip: float = 1.0  # largest gradient norm; ours
    seed: int = 0  # of adapter weights, data order and training scenes
    dtype: str | None = (
        None  # of frozen weights and compute (what is trained stays float32); None: bfloat16 on cuda, on the cpu float32 if it fits well
    )
    device: str | None = None  # None: cuda when there is one
    checkpointing: bool | None = None  # recompute each decoder block in the backward pass: less memory, about a third more time; None: on cuda
    on_bad_data: str = "error"  # or "skip": leave bad rows out, count and list them
    scenes: int = 20000  # training scenes to draw from
    eval_seed: int = benchmarks.TEST_SEED  # of the held-out scenes
    eval_gallery: int = 1000  # held-out scenes in the retrieval gallery; 0: nothing is measured before and after
    eval_items: int = 500  # held-out items a category
    holdout: int | None = None  # rows of a pairs file kept out of training, for retrieval; None: a tenth, at most 1000


# ------------------------------------------------------------------------------------------------------ the run


def train(config, settings):
    """Measure, adapt, measure again. Returns {"before": results, "after": results}, empty when nothing was held out."""
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device, config.model)
    model = VladVA.from_pretrained(config.model, None, device, dtype, settings)
    rows, held_out = open_data(config, model)
    config = resolve(config, model, rows)
    out = start_run(config, settings)
    before = held_out.measure(model)
    model.attach()
    model.lvlm.decoder.checkpointing = config.checkpointing
    announce(config, settings, model, rows)
    adapt(model, rows, config, out / "metrics.jsonl")
    model.save_adapter(out)
    after = held_out.measure(model)
    return report(out, held_out, before, after)


def adapt(model, rows, config, metrics_path):
    """The loop: one optimisation step of L = L_con + w L_CE (paper Sec. 3.2.3) a batch."""
    optimizer = make_optimizer(model, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    with open(metrics_path, "w", encoding="utf-8", buffering=1) as metrics, tqdm(total=config.steps, desc="adapting", disable=None) as bar:
        for step, parts in enumerate(batches(model, rows, config), start=1):
            start, factor = time.perf_counter(), schedule(step, config)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            measured = optimisation_step(model, parts, optimizer, config.clip)
            seconds, images = time.perf_counter() - start, sum(len(part.pixels) for part in parts)
            measured |= {"step": step, "lr": optimizer.param_groups[0]["lr"], "step_s": seconds, "images_per_s": images / seconds}
            measured |= {"tokens_per_s": token_count(parts) / seconds, "peak_bytes": peak_bytes(model.lvlm.device)}
            metrics.write(json.dumps({"step": step, **measured}) + "\n")
            bar.set_postfix(loss=f"{measured['loss']:.3f}", images_per_s=f"{measured['images_per_s']:.2f}")
            bar.update()


def optimisation_step(model, parts, optimizer, clip):
    """Gradients of the batch, clip, update. Returns the step's losses and gradient norm; ValueError when they are not finite."""
    optimizer.zero_grad(set_to_none=True)
    contrastive, next_token = backward(model, [part.to(model.lvlm.device) for part in parts])
    loss = model.overall_loss(contrastive, next_token)
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in model.trained()], clip)
    if not torch.isfinite(loss + norm):
        raise ValueError(f"loss {loss.item()} and gradient norm {norm.item()} are not finite: lower --lr, or use --dtype float32")
    optimizer.step()
    return {"loss": loss.item(), "contrastive": contrastive.item(), "next_token": next_token.item(), "grad_norm": norm.item()}


def backward(model, parts):
    """Add the gradient of the overall loss of one batch to every trained parameter; returns (contrastive, next-token).

    parts: the batch as TrainingBatches, of which one at a time is in memory with its graph (gradient caching, Gao et al., 2021, arXiv
    2101.06983). The gradient is that of model(batch) in one piece; Eq. 1 sees every pair of the batch.
    """
    whole = len(parts) == 1
    with torch.set_grad_enabled(whole):  # 1. embed all parts, without a graph if they are to be run again
        first = [model.outputs(part if whole else part.prompts()) for part in parts]
    image_emb, text_emb = (torch.cat([getattr(o, name).detach() for o in first]).requires_grad_() for name in ("image_emb", "text_emb"))
    contrastive, _ = model.losses(Outputs(image_emb, text_emb, None), ())  # 2. Eq. 1 over the whole batch, and its gradient
    tokens = sum(len(part.images.targets) for part in parts)
    if contrastive.requires_grad:
        contrastive.backward()
    elif not (tokens and model.settings.next_token_weight):
        raise ValueError("a batch has nothing to learn from: it needs 2 short captions, or a long one with --next-token-weight above 0")
    image_grads, text_grads = (torch.zeros_like(emb) if emb.grad is None else emb.grad for emb in (image_emb, text_emb))
    row, next_token = 0, torch.zeros_like(contrastive.detach())
    for part in parts:  # 3. each part with its graph: that gradient goes back together with Eq. 2's
        out, rows = first[0] if whole else model.outputs(part), slice(row, row + len(part.with_short))
        _, share = model.losses(dataclasses.replace(out, image_emb=out.image_emb[:0]), part.images.targets, tokens)
        pull = (out.image_emb * image_grads[rows]).sum() + (out.text_emb * text_grads[rows]).sum()
        model.overall_loss(pull, share).backward()
        row, next_token = rows.stop, next_token + share.detach()
    return contrastive.detach(), next_token


def make_optimizer(model, config):
    """AdamW with a learning rate each for LoRA and for soft prompts; the temperature, when learned, goes with LoRA undecayed."""
    trained = dict(model.trained())
    soft = [p for name, p in trained.items() if name.startswith("soft_prompts.")]
    adapters = [p for name, p in trained.items() if "lora_" in name]
    rest = [p for name, p in trained.items() if name == "log_temperature"]
    groups = [(adapters, config.lr, config.weight_decay), (soft, config.soft_prompt_lr, 0.0), (rest, config.lr, 0.0)]
    return torch.optim.AdamW([{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in groups if params])


def schedule(step, config):
    """Share of the peak learning rate at a step counted from 1: linear warm-up, then cosine to 0."""
    warm = max(1, round(config.warmup * config.steps))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def batches(model, rows, config):
    """config.steps TrainingBatches. The order is a function of the seed: a shuffle an epoch, a last incomplete batch left out.

    Rows that belong together stay neighbours (rows.together of them).
    """
    rng, order = random.Random(f"order {config.seed}"), []
    for _ in range(config.steps):
        if len(order) < config.batch:
            firsts = range(0, len(rows), rows.together)
            order = [row for first in rng.sample(firsts, len(firsts)) for row in range(first, min(first + rows.together, len(rows)))]
        drawn, order = order[: config.batch], order[config.batch :]
        usable = []
        for index in drawn:
            try:
                usable.append(rows.row(index, rng))
            except data.BadRow as error:
                if config.on_bad_data == "error":
                    raise
                tqdm.write(f"row left out: {error}")
        usable.sort(key=lambda row: len(row["long"] or ""))  # rows of similar length share a micro-batch
        size = config.micro_batch or len(usable)
        yield [model.training_batch(usable[start : start + size]) for start in range(0, len(usable), size)]


# ------------------------------------------------------------------------------------------------------ start


class HeldOutScenes:
    """Held-out scenes as a benchmark of retrieval and compositionality."""

    def __init__(self, config):
        self.benchmark = config.eval_gallery and benchmarks.scene_benchmark(config.eval_seed, config.eval_gallery, config.eval_items)

    def measure(self, model):
        if not self.benchmark:
            return None
        image_emb, text_emb = benchmarks.embed(model, self.benchmark)
        gallery = self.benchmark.gallery
        return Measured(benchmarks.score(self.benchmark, image_emb, text_emb), similarity(image_emb[:gallery], text_emb[:gallery]))

    def picture(self, index, size):
        return data.render(self.benchmark.scenes[index], size)

    def caption(self, index):
        return self.benchmark.texts[index]


class HeldOutRows:
    """Rows of a pairs file kept out of training, as a retrieval benchmark: picture i and its first short caption belong together."""

    def __init__(self, rows):
        self.rows = rows

    def measure(self, model):
        if len(self.rows) < 2:
            return None
        emb = model.encode_image([row["image"] for row in self.rows]), model.encode_text([row["short"][0] for row in self.rows])
        sim = similarity(*emb).cpu()
        results = {"task": "held-out rows", "gallery": len(self.rows), "retrieval": benchmarks.recall_at(sim, torch.arange(len(self.rows)))}
        return Measured(results, sim)

    def picture(self, index, size):
        return data.pad_to_square(data.open_image(self.rows[index]["image"]), (255, 255, 255)).resize((size, size))

    def caption(self, index):
        return self.rows[index]["short"][0]


@dataclass(frozen=True)
class Measured:
    """Scores and the gallery's similarity table, (pictures, captions)."""

    results: dict
    sim: torch.Tensor


def open_data(config, model):
    """(rows to train on, what is held out) for rendered scenes or a pairs file."""
    if config.data == "scenes":
        size = model.lvlm.config.vision.image_size
        print(f"training on rendered scenes of {size} x {size} pixels, a demonstration (--data pairs.jsonl takes your own pictures)")
        return data.Scenes(config.seed, config.scenes, size), HeldOutScenes(config)
    pairs = data.Pairs(config.data, model.tokenizer, config.on_bad_data)
    if pairs.bad:
        print(f"{len(pairs.bad)} bad rows of {config.data} left out:\n  " + "\n  ".join(pairs.bad[:20]) + ("\n  ..." if len(pairs.bad) > 20 else ""))
    count = min(1000, len(pairs) // 10) if config.holdout is None else config.holdout
    if count > len(pairs) - 2:
        raise ValueError(f"--holdout {count} leaves fewer than 2 of the {len(pairs)} rows to train on")
    shuffled = random.Random("holdout").sample(pairs.rows, len(pairs))
    chosen = [row for row in shuffled if row["short"]][:count]
    kept_out = {row["where"] for row in chosen}
    pairs.rows = [row for row in pairs.rows if row["where"] not in kept_out]
    if len(chosen) < 2:
        print(f"nothing held out of {len(pairs)} rows: no table before and after (--holdout N keeps N rows out)")
    return pairs, HeldOutRows(chosen)


def resolve(config, model, rows):
    """Fill in what the config leaves to the run, and refuse what cannot be honoured."""
    batch = config.batch if config.batch is not None else min(64, len(rows))
    lr = config.lr if config.lr is not None else 2e-4 * 4096 / model.lvlm.config.decoder.hidden_size
    if not 2 <= batch <= len(rows):
        raise ValueError(f"--batch {batch}: wanted 2 to {len(rows)}, the rows there are to train on")
    for name, low in (("steps", 1), ("scenes", 2), ("eval_gallery", 2 * (config.eval_gallery != 0)), ("eval_items", 1), ("micro_batch", 1)):
        if getattr(config, name) is not None and getattr(config, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: at least {low} is needed")
    checkpointing = config.checkpointing if config.checkpointing is not None else model.lvlm.device.type == "cuda"
    return dataclasses.replace(
        config,
        dtype=str(model.lvlm.dtype).removeprefix("torch."),
        checkpointing=checkpointing,
        micro_batch=min(batch, config.micro_batch or fitting_micro_batch(model, checkpointing)),
        out=config.out or str(Path("runs") / Path(config.model).name),
        batch=batch,
        lr=lr,
        soft_prompt_lr=config.soft_prompt_lr if config.soft_prompt_lr is not None else 4 * lr,
        device=str(model.lvlm.device),
    )


def fitting_micro_batch(model, checkpointing):
    """The most pairs whose activations fit into 0.6 of the memory that is free now, with captions of 500 tokens (the paper's longest)."""
    tokens = len(model.image_sequence().ids) + len(model.text_sequence("a").ids) + 500
    row = activation_bytes(model.lvlm.config.decoder, tokens, checkpointing, model.lvlm.compute_dtype.itemsize)
    return max(1, int(0.6 * free_bytes(model.lvlm.device) / row))


def activation_bytes(decoder, tokens, checkpointing, itemsize):
    """Memory that `tokens` tokens hold between the forward and the backward pass of the decoder, estimated from its shapes.

    A block keeps about 13 D + 4 I numbers a token in bfloat16 and 9 D + 4 I in float32 (I: width of its MLP; counted from the tensors that
    autograd saves); the rest is room for the backward pass itself. Checkpointing keeps D a block and one block's numbers at a time.
    """
    width, blocks = decoder.hidden_size, decoder.num_hidden_layers
    block = 14 * width + 5 * decoder.intermediate_size
    return itemsize * tokens * (blocks * width + block if checkpointing else blocks * block)


def start_run(config, settings):
    """Make OUT and write its config.json; refuse a folder that holds another run."""
    out = Path(config.out)
    if any((out / name).exists() for name in ("config.json", "adapter.safetensors", "metrics.jsonl")):
        raise ValueError(f"{out} holds another run: choose another --out, or delete it first")
    try:
        out.mkdir(parents=True, exist_ok=True)
        resolved = dataclasses.asdict(config) | {"settings": dataclasses.asdict(settings), "torch": torch.__version__}
        (out / "config.json").write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error}") from None
    return out


def announce(config, settings, model, rows):
    """Say what is about to run: the counts, and the resolved config."""
    trained = sum(p.numel() for _, p in model.trained())
    every = sum(p.numel() for p in model.parameters())
    print(f"{config.model}: {trained:,} parameters trained + {every - trained:,} frozen = {every:,}; {len(rows):,} rows to train on")
    print("  ".join(f"{name}={value}" for name, value in (dataclasses.asdict(config) | dataclasses.asdict(settings)).items()))


def token_count(parts):
    """Tokens of a batch, padding included."""
    return sum(part.images.ids.numel() + (part.texts.ids.numel() if part.texts else 0) for part in parts)


def peak_bytes(device):
    """Most memory held so far: allocated on a CUDA device, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


# ------------------------------------------------------------------------------------------------------ end


def report(out, held_out, before, after):
    """Print the table before / after, write scores.json and report.png."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {"before": before.results, "after": after.results} if before else {}
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if scores:
        print(benchmarks.score_table(scores))
    draw_report(held_out, before, after, metrics).save(out / "report.png")
    print(f"written: {out}/adapter.safetensors, config.json, metrics.jsonl, scores.json, report.png")
    return scores


QUERIES, SHOWN, THUMB, INK = 6, 5, 72, (40, 40, 40)  # of the picture: captions, pictures a caption, pixels a picture, colour of text


def draw_report(held_out, before, after, metrics):
    """A picture: the first held-out captions with the pictures nearest to them before and after (the right one framed), and the losses."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    queries = min(QUERIES, len(before.sim)) if before else 0
    row, half = THUMB + 34, SHOWN * (THUMB + 8) + 24
    page = Image.new("RGB", (2 * half + 16, 48 + queries * row + 190), "white")
    pen = ImageDraw.Draw(page)
    for x, title, measured in ((16, "before: the untouched LVLM", before), (16 + half, "after: VladVA", after)) if before else ():
        pen.text((x, 10), title, INK, font)
        for q in range(queries):
            y = 40 + q * row
            pen.text((x, y), textwrap.shorten(held_out.caption(q), 66, placeholder=" ..."), INK, small)
            best = measured.sim[:, q].topk(min(SHOWN, len(measured.sim))).indices.tolist()
            for n, index in enumerate(best):
                left, top = x + n * (THUMB + 8), y + 18
                if index == q:
                    pen.rectangle((left - 4, top - 4, left + THUMB + 3, top + THUMB + 3), fill=(30, 160, 60))
                page.paste(held_out.picture(index, THUMB), (left, top))
    y = 56 + queries * row
    for x, name, title in ((56, "contrastive", "contrastive loss (nats, Eq. 1)"), (56 + half, "next_token", "next-token loss (nats a token, Eq. 2)")):
        draw_curve(pen, (x, y + 24, x + half - 90, y + 150), [m[name] for m in metrics], title, (font, small))
    return page


def draw_curve(pen, box, values, title, fonts):
    """One curve over the steps, with the axes' ends labelled. box: (left, top, right, bottom) in pixels."""
    left, top, right, bottom = box
    high = max(values) * 1.05 or 1.0
    pen.text((left, top - 24), title, INK, fonts[0])
    pen.line((left, top, left, bottom, right, bottom), fill=INK)
    for level in (0.0, high / 2, high):
        y = bottom - (bottom - top) * level / high
        pen.text((left - 6, y), f"{level:.2f}", INK, fonts[1], anchor="rm")
        pen.line((left - 3, y, left, y), fill=INK)
    points = [(left + (right - left) * i / max(1, len(values) - 1), bottom - (bottom - top) * value / high) for i, value in enumerate(values)]
    pen.line(points if len(points) > 1 else points * 2, fill=(200, 60, 40), width=2)
    pen.text((left, bottom + 6), "step 1", INK, fonts[1])
    pen.text((right, bottom + 6), f"step {len(values)}", INK, fonts[1], anchor="ra")


# ------------------------------------------------------------------------------------------------------ command line


def add_fields(parser, cls, skip=()):
    """One flag a field of a config dataclass, defaults and all."""
    for f in dataclasses.fields(cls):
        flag, kind = f"--{f.name.replace('_', '-')}", str(f.type).removeprefix("<class '").removesuffix("'>").removesuffix(" | None")
        if f.name in skip:
            continue
        if kind == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default)
        else:
            parser.add_argument(flag, type={"int": int, "float": float, "str": str}[kind], default=f.default, help=f"(default: {f.default})")


def from_args(cls, args):
    return cls(**{f.name: getattr(args, f.name) for f in dataclasses.fields(cls)})


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="train.py", description="Adapt an LVLM into an embedding model (VladVA).")
    add_fields(parser, TrainConfig)
    add_fields(parser, Settings)
    args = parser.parse_args(argv)
    return train(from_args(TrainConfig, args), from_args(Settings, args))


if __name__ == "__main__":
    main()
