"""The training loop: a generative LVLM is measured as an embedder, adapted with the paper's two losses, and measured again.

    python train.py                                                    # the tiny LVLM on rendered scenes, a few minutes on 2 CPU cores
    python train.py --data pairs.jsonl --out runs/mine                 # your own pictures (data.py says how a line looks)
    python train.py --model llava-1.5-7b --data pairs.jsonl            # the real one: from the hub, its cache, or a folder
    torchrun --nproc-per-node 8 train.py --model llava-1.5-7b ...      # the same gradient from 8 devices
    python train.py --out runs/mine --resume                           # go on after a stop

Writes OUT/adapter.safetensors, config.json, metrics.jsonl, scores.json, report.png, and OUT/checkpoints while it runs.

Not here: the losses (vladva.py), the benchmarks (eval.py).
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
import random
import resource
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval as benchmarks
from data import command, say, write_lines
from model import (
    encode_over_ranks,
    free_bytes,
    gather_rows,
    join_ranks,
    open_shard,
    pick_device,
    ranks,
    read_json,
    sum_over_ranks,
    wait_for_ranks,
    write_json,
    write_tensors,
)
from vladva import (
    E5V,
    Outputs,
    Settings,
    VladVA,
    pick_dtype,
    read_adapter,
    similarity,
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on, beside the method's Settings. None: decided when the run starts, and written to OUT/config.json."""

    model: str = "tiny"  # or llava-1.5-7b, llava-1.5-13b, a folder, a hub id
    data: str = "scenes"  # rendered; or a file of JSON lines
    text_data: str = "scenes"  # triples for the text-text loss, from the scenes' grammar; or a CSV file: sent0, sent1, hard_neg
    out: str | None = None  # folder; None: runs/<name of the model>
    steps: int = 140  # ours: what fits 3 minutes on 2 cores
    contrast: str = "short"  # captions that Eq. 1 takes; "long" is what Sec. 3.2.2 warns of
    batch: int | None = (
        None  # pairs a step, over all devices; None: 64, or all rows if there are fewer. Second-hand notes on the paper: 1024
    )
    micro_batch: int | None = (
        None  # pairs that run together, padded to one length, the gradient being the same; None: 16, or fewer if those fit
    )
    grad_cache: bool | None = (
        None  # run each micro-batch twice, so that only one holds activations; None: with --micro-batch, or if not all fit
    )
    lr: float | None = (
        None  # peak, of LoRA; None: 2e-4 at a decoder width of 4096 (LLaVA-1.5's LoRA recipe), inversely with the width
    )
    soft_prompt_lr: float | None = None  # peak; None: 4 x lr (ours)
    temperature_lr: float | None = None  # peak, of log tau when it is learned; None: lr (ours)
    warmup: float = 0.05  # share of the steps, linear; then cosine to 0 (cosine: second-hand)
    weight_decay: float = 0.0  # of LoRA; ours
    clip: float = 1.0  # largest gradient norm; ours
    seed: int = 0  # of adapter weights, data order and training scenes
    dtype: str | None = (
        None  # of frozen weights, what is trained stays float32; None: bfloat16 on cuda, on the cpu float32 if it fits well
    )
    device: str | None = None  # None: cuda when there is one
    checkpointing: bool | None = (
        None  # recompute each decoder block in the backward pass: less memory, about a third more time; None: on cuda
    )
    compile: bool = False  # torch.compile every decoder block
    workers: int | None = (
        None  # processes that read and preprocess batches ahead; None: 0 on the cpu, up to 8 on cuda
    )
    on_bad_data: str = "error"  # or "skip": leave bad rows out and list them in OUT/bad_rows.txt
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints that are kept
    scenes: int = 20000  # training scenes to draw from
    eval_seed: int = benchmarks.TEST_SEED  # of the held-out scenes
    eval_gallery: int = (
        1000  # held-out scenes in the retrieval gallery; 0: nothing is measured before and after
    )
    eval_items: int = 500  # held-out items a category
    holdout: int | None = (
        None  # rows of a pairs file kept out of training, for retrieval; None: a tenth, at most 1000
    )


BUCKET = 16  # pairs of similar length in a micro-batch: enough to keep a device busy (on 2 cores, 20 % faster than 64 padded to one length)
FREE_ON_RESUME = ("device", "workers", "save_every", "keep")  # what may differ when a run goes on

# ------------------------------------------------------------------------------------------------------ the run


def train(config, settings, resume=False):
    """Measure, adapt, measure again. Returns {"before": results, "after": results}, empty when nothing was held out."""
    torch.manual_seed(config.seed)
    device = join_ranks(pick_device(config.device))
    dtype = pick_dtype(config.dtype, device, config.model)
    model = VladVA.from_pretrained(config.model, None, device, dtype, settings)
    if 4 * sum(p.nbytes for p in model.parameters()) > free_bytes(device):
        return_freed_memory()
    rows, held_out = open_data(config, model)
    rows = with_triples(rows, config, model)
    config = resolve(config, model, rows)
    out = start_run(config, settings, rows, resume)
    before = held_out.measure(model)
    model.attach()
    prepare_blocks(model.lvlm.decoder, config)
    announce(config, settings, model, rows)
    adapt(model, rows, config, out)
    if ranks()[0] == 0:
        model.save_adapter(out)
    after = held_out.measure(model)
    return report(out, held_out, before, after) if ranks()[0] == 0 else None


def adapt(model, rows, config, out):
    """The loop: one optimisation step of L = L_con + w L_CE (paper Sec. 3.2.3) a batch."""
    optimizer = make_optimizer(model, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    done = load_checkpoint(out, model, optimizer)
    rate = matmul_rate(model.lvlm.device, model.lvlm.compute_dtype)
    stop, bad, cut = StopSignals(), BadRows(out, config, len(rows)), 0
    with (
        stop,
        Metrics(out / "metrics.jsonl", done) as metrics,
        tqdm(total=config.steps, initial=done, desc="adapting", disable=hidden_bar()) as bar,
    ):
        start = time.perf_counter()
        for step, drawn in enumerate(loader(model, rows, config, done + 1), start=done + 1):
            bad.count(drawn.bad)
            cut += drawn.cut
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * schedule(step, config)
            measured = {
                name: value.item()
                for name, value in optimisation_step(model, drawn.parts, optimizer, config).items()
            }
            now = time.perf_counter()
            if not math.isfinite(measured["loss"] + measured["grad_norm"]):
                raise not_finite(step, measured, drawn.where, out)
            flops = sum(step_flops(model, drawn.parts, config))
            metrics.write(
                step,
                measured,
                optimizer.param_groups[0]["lr"],
                now - start,
                drawn.parts,
                flops / rate,
                peak_bytes(model.lvlm.device),
            )
            start = now
            bar.set_postfix(loss=f"{measured['loss']:.3f}")
            bar.update()
            stopped = stop.asked(model.lvlm.device)
            if (step % config.save_every == 0 or stopped) and step < config.steps:
                save_checkpoint(out, step, model, optimizer, config.keep)
            if stopped and step < config.steps:
                say(
                    f"stopped by a signal after step {step} of {config.steps}; go on with: python train.py --out {out} --resume"
                )
                raise SystemExit(130)
    cut = int(sum_over_ranks(torch.tensor(cut, device=model.lvlm.device)))
    if cut:
        say(
            f"{cut} of the captions drawn had over {' or '.join(f'{r[-1]} tokens ({s})' for s, r in data.LIMITS.items())} and were cut"
        )


def optimisation_step(model, parts, optimizer, config):
    """Gradients of the batch, clip, update. Returns losses and gradient norm as 0-d tensors: nothing here waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    contrastive, next_token = backward(model, parts, config.grad_cache)
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in model.trained()], config.clip)
    optimizer.step()
    return {
        "loss": model.overall_loss(contrastive, next_token),
        "contrastive": contrastive,
        "next_token": next_token,
        "grad_norm": norm,
    }


def backward(model, parts, grad_cache):
    """Add the gradient of the overall loss of one batch to every trained parameter; returns (contrastive, next-token).

    parts: this process's share of the batch as TrainingBatches on the host. The gradient is that of model(batch) for the batch in one
    piece: Eq. 1 sees every pair of every process, Eq. 2 is a mean over all their caption tokens. grad_cache: run each part twice, so that
    only one of them has its graph in memory at a time (gradient caching, Gao et al., 2021, arXiv 2101.06983).
    """
    device = model.lvlm.device
    with torch.set_grad_enabled(
        not grad_cache
    ):  # 1. embed all parts, without a graph if they are to be run again
        first = [
            model.outputs((part.prompts() if grad_cache else part).to(device)) for part in parts
        ]
    contrastive, grads = contrastive_gradients(model, first)  # 2. Eq. 1
    tokens = total_tokens(parts, device)
    if not (contrastive.requires_grad or (tokens and model.settings.next_token_weight)):
        raise ValueError(
            "a batch has nothing to learn from: it needs 2 short captions, a triple, or a long one with --next-token-weight above 0"
        )
    next_token = torch.zeros_like(contrastive.detach())
    for part, out in zip(
        parts, first
    ):  # 3. each part with its graph: that gradient goes back together with Eq. 2's
        out = model.outputs(part.to(device)) if grad_cache else out
        _, share = model.losses(
            dataclasses.replace(out, image_emb=out.image_emb[:0], triple_emb=out.triple_emb[:0]),
            part.targets.to(device),
            tokens,
        )
        pull = 0.0
        for name in EMBEDDINGS:
            own = getattr(out, name)
            pull, grads[name] = (
                pull + (own * grads[name][: len(own)]).sum(),
                grads[name][len(own) :],
            )
        model.overall_loss(pull, share).backward()
        next_token = next_token + share.detach()
    sum_gradients(model)
    return contrastive.detach(), sum_over_ranks(next_token)


EMBEDDINGS = ("image_emb", "text_emb", "triple_emb")  # of Outputs, in its order


def contrastive_gradients(model, outputs):
    """(loss, {embedding: its gradient}): the contrastive term on all embeddings of all processes, and what it asks of those of this one."""
    emb = {
        name: torch.cat([getattr(out, name).detach() for out in outputs]).requires_grad_()
        for name in EMBEDDINGS
    }
    loss, _ = model.losses(Outputs(*map(with_other_ranks, emb.values()), None), ())
    if loss.requires_grad:
        loss.backward()
    return loss, {
        name: torch.zeros_like(every) if every.grad is None else every.grad
        for name, every in emb.items()
    }


def with_other_ranks(emb):
    """The embeddings of all processes, those of this one with their graph."""
    every, begin = gather_rows(emb.detach())
    return torch.cat([every[:begin], emb, every[begin + len(emb) :]])


def total_tokens(parts, device):
    """Caption tokens of the batch over all processes."""
    own = sum(len(part.targets) for part in parts)
    return own if ranks()[1] == 1 else int(sum_over_ranks(torch.tensor(own, device=device)))


def sum_gradients(model):
    """Add up the gradients of all processes. That of the temperature is whole in each of them already, so one counts."""
    rank, count = ranks()
    if count == 1:
        return
    for name, p in model.trained():
        p.grad = (
            torch.zeros_like(p)
            if p.grad is None or (name == "log_temperature" and rank)
            else p.grad
        )
    flat = sum_over_ranks(torch.cat([p.grad.flatten() for _, p in model.trained()]))
    for (_, p), piece in zip(model.trained(), flat.split([p.numel() for _, p in model.trained()])):
        p.grad.copy_(piece.view_as(p))


def make_optimizer(model, config):
    """AdamW, fused where the device has it, with a learning rate each for LoRA, soft prompts and the temperature."""
    trained = dict(model.trained())
    soft = [p for name, p in trained.items() if name.startswith("soft_prompts.")]
    adapters = [p for name, p in trained.items() if "lora_" in name]
    rest = [p for name, p in trained.items() if name == "log_temperature"]
    groups = [
        (adapters, config.lr, config.weight_decay),
        (soft, config.soft_prompt_lr, 0.0),
        (rest, config.temperature_lr, 0.0),
    ]
    fused = model.lvlm.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        [
            {"params": params, "lr": lr, "weight_decay": decay}
            for params, lr, decay in groups
            if params
        ],
        fused=fused,
    )


def schedule(step, config):
    """Share of the peak learning rate at a step counted from 1: linear warm-up, then cosine to 0."""
    warm = max(1, round(config.warmup * config.steps))
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))


def return_freed_memory():
    """On Linux, have tensors over 4 MB allocated apart, so that their memory goes back to the system when they are freed.

    Left alone, glibc keeps them in one heap, whose holes can come to hold several times what is in use. It costs time (each allocation is
    a new mapping), so it is for models that are large for the machine.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(ctypes.c_int(-3), ctypes.c_int(4 << 20))  # M_MMAP_THRESHOLD


def prepare_blocks(decoder, config):
    """Checkpointing and torch.compile, block by block."""
    decoder.checkpointing = config.checkpointing
    if config.compile:
        for block in decoder.layers:
            block.compile()


# ------------------------------------------------------------------------------------------------------ data order


@dataclass(frozen=True)
class Drawn:
    """What one process works on in one step: its micro-batches on the host, the names of their rows, and what was wrong with others."""

    parts: list
    where: list
    bad: list
    cut: int = 0  # captions over the paper's length, of which the beginning is used


class Steps:
    """Step number -> Drawn. All that is random is a function of (seed, step, number of processes), so a run can go on anywhere.

    An epoch is a shuffle of all rows, a last incomplete batch left out; rows that belong together (rows.together of them) stay neighbours.
    Each process takes every n-th row of the batch; inside it, rows of similar length share a micro-batch.
    """

    def __init__(self, model, rows, config):
        self.model, self.rows, self.config = model, rows, config

    def indices(self, step):
        """Row numbers of the whole batch of a step counted from 1, and its epoch."""
        epoch, place = divmod(step - 1, max(1, len(self.rows) // self.config.batch))
        return self.order(epoch)[
            place * self.config.batch : (place + 1) * self.config.batch
        ].tolist(), epoch

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one object a run
    def order(self, epoch):
        groups = -(-len(self.rows) // self.rows.together)
        firsts = (
            np.random.default_rng([self.config.seed, epoch]).permutation(groups)
            * self.rows.together
        )
        every = (firsts[:, None] + np.arange(self.rows.together)).reshape(-1)
        return every[every < len(self.rows)]

    def __getitem__(self, step):
        (rank, count), (indices, epoch), usable, bad = ranks(), self.indices(step), [], []
        for index in indices[rank::count]:
            try:
                usable.append(
                    self.told(
                        self.rows.row(
                            index, random.Random(f"caption {self.config.seed} {epoch} {index}")
                        )
                    )
                )
            except data.BadRow as error:
                bad.append(str(error))
        usable.sort(key=lambda row: len(row["long"] or ""))
        size = self.config.micro_batch or len(usable) or 1
        parts = [
            self.model.training_batch(usable[start : start + size])
            for start in range(0, len(usable), size)
        ]
        return Drawn(
            parts, [row["where"] for row in usable], bad, sum(row.get("cut", 0) for row in usable)
        )

    def told(self, row):
        """The row with the captions that the losses take: no long one for a next-token loss of weight 0."""
        contrasted = row["long"] if self.config.contrast == "long" else row["short"]
        return row | {
            "short": contrasted,
            "long": row["long"] if self.model.settings.next_token_weight else None,
        }


def loader(model, rows, config, first):
    """Drawn of every step from `first` on, made ahead by worker processes if there are any."""
    ahead = {"multiprocessing_context": "fork", "prefetch_factor": 2} if config.workers else {}
    steps = Steps(model, rows, config)
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, config.steps + 1),
        num_workers=config.workers or 0,
        collate_fn=lambda x: x,
        **ahead,
    )


def allowed_bad(rows):
    """How many bad rows a run with --on-bad-data skip accepts: 1 % of them, or 3 in a small file."""
    return max(3, rows // 100)


class BadRows:
    """Rows that turn out bad while training: an error at the first, or left out and listed in OUT/bad_rows.txt, up to 1 % of all."""

    def __init__(self, out, config, rows):
        self.path, self.policy, self.allowed, self.found = (
            out / "bad_rows.txt",
            config.on_bad_data,
            allowed_bad(rows),
            0,
        )

    def count(self, messages):
        if messages and self.policy == "error":
            raise data.BadRow(messages[0])
        self.found += len(messages)
        if messages:
            write_lines(self.path, messages, "a")
        if self.found > self.allowed:
            raise ValueError(
                f"{self.found} bad rows, more than 1 % of the data: look at {self.path}"
            )


# ------------------------------------------------------------------------------------------------------ nothing lost


class StopSignals:
    """Inside the context SIGTERM and SIGINT are noted instead of ending the process, so that the step in hand is finished and saved."""

    def __enter__(self):
        self.noted, self.before = (
            False,
            {
                number: signal.signal(number, self.note)
                for number in (signal.SIGTERM, signal.SIGINT)
            },
        )

    def note(self, number, frame):
        self.noted = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self, device):
        """Was any process asked to stop?"""
        return (
            self.noted
            if ranks()[1] == 1
            else bool(sum_over_ranks(torch.tensor(int(self.noted), device=device)))
        )


class Metrics:
    """OUT/metrics.jsonl, one line a step; lines of steps after the `done` ones of an interrupted run are dropped first."""

    def __init__(self, path, done):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines()[:done] if path.exists() else []
        self.kept = "".join(f"{line}\n" for line in lines)

    def __enter__(self):
        if ranks()[0] == 0:
            self.file = open(self.path, "w", encoding="utf-8", buffering=1)
            self.file.write(self.kept)
        return self

    def write(self, step, measured, lr, seconds, parts, flops, peak):
        images, tokens = pictures(parts), token_count(parts)
        speed = {
            "step_s": seconds,
            "images_per_s": images / seconds,
            "tokens_per_s": tokens / seconds,
            "matmul_share": flops / seconds,
            "peak_bytes": peak,
        }
        if ranks()[0] == 0:
            self.file.write(json.dumps({"step": step, **measured, "lr": lr, **speed}) + "\n")

    def __exit__(self, *_):
        if ranks()[0] == 0:
            self.file.close()


def checkpoints(out):
    """The whole checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-??????"))


def save_checkpoint(out, step, model, optimizer, keep):
    """Write OUT/checkpoints/step-...: whole or not at all, the last `keep` of them; nothing random needs saving (see Steps)."""
    if ranks()[0]:
        return
    folder = out / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_adapter(partial)
        write_tensors(partial / "optimizer.safetensors", optimizer_state(model, optimizer))
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = (
            f"the last whole one is {checkpoints(out)[-1]}"
            if checkpoints(out)
            else "there is no earlier one"
        )
        raise ValueError(
            f"the checkpoint of step {step} could not be saved, {last}: {error}"
        ) from None
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def optimizer_state(model, optimizer):
    """AdamW's moments and step counts by parameter name, as tensors on the host."""
    return {
        f"{name}.{kind}": value.detach().to("cpu").contiguous()
        for name, p in model.trained()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def load_checkpoint(out, model, optimizer):
    """Put the last whole checkpoint of OUT into model and optimizer; returns its step, 0 when there is none."""
    found = checkpoints(out)
    if not found:
        return 0
    model.load_adapter_state(read_adapter(found[-1])[0], found[-1])
    shard, trained = open_shard(found[-1] / "optimizer.safetensors"), dict(model.trained())
    for key in shard.keys():
        name, kind = key.rsplit(".", 1)
        value = shard.get_tensor(key)
        optimizer.state[trained[name]][kind] = (
            value
            if kind == "step" and not optimizer.defaults["fused"]
            else value.to(trained[name].device)
        )
    return int(found[-1].name.removeprefix("step-"))


def not_finite(step, measured, where, out):
    """The error of a run whose loss or gradient is not finite any more."""
    write_lines(out / "not_finite.txt", where)
    last = (
        f"the last checkpoint is {checkpoints(out)[-1]}"
        if checkpoints(out)
        else "there is no checkpoint"
    )
    rows = f"{', '.join(where[:8])}{' ...' if len(where) > 8 else ''} (all {len(where)} in {out / 'not_finite.txt'})"
    return ValueError(
        f"step {step}: loss {measured['loss']} or gradient norm {measured['grad_norm']} is not finite; rows {rows}; {last}: "
        "lower --lr, or use --dtype float32"
    )


# ------------------------------------------------------------------------------------------------------ start


class HeldOutRows:
    """Rows of a pairs file kept out of training, as a retrieval benchmark: picture i and its first short caption belong together."""

    def __init__(self, rows):
        self.rows = rows

    def measure(self, model):
        if len(self.rows) < 2:
            return None
        shown, said = [row["image"] for row in self.rows], [row["short"][0] for row in self.rows]
        emb = (
            encode_over_ranks(model.encode_image, shown),
            encode_over_ranks(model.encode_text, said),
        )
        image_emb, text_emb = (each.cpu() for each in emb)
        captioned = [(row["image"], row["long"]) for row in self.rows if row["long"]][
            : benchmarks.LONG_CAPTIONS
        ]
        told = {"long_captions": benchmarks.caption_loss(model, captioned)} if captioned else {}
        results = {
            "task": "held-out rows",
            "gallery": len(self.rows),
            "image_mode": model.image_processor.mode,
        } | told
        return benchmarks.Measured(
            results
            | {
                "retrieval": benchmarks.recall_at(image_emb, text_emb, torch.arange(len(self.rows)))
            },
            similarity(image_emb, text_emb),
        )

    def picture(self, index, size):
        return data.pad_to_square(
            data.open_image(self.rows[index]["image"]), (255, 255, 255)
        ).resize((size, size))

    def caption(self, index):
        return self.rows[index]["short"][0]


def open_data(config, model):
    """(rows to train on, what is held out) for rendered scenes or a pairs file."""
    if config.data == "scenes":
        from extras.scenes import HeldOutScenes, Scenes

        size = model.lvlm.config.vision.image_size
        say(
            f"training on rendered scenes of {size} x {size} pixels, a demonstration (--data pairs.jsonl takes your own pictures)"
        )
        return Scenes(config.seed, config.scenes, size), HeldOutScenes(config)
    pairs = data.Pairs(config.data, model.tokenizer, config.on_bad_data)
    if len(pairs.bad) > allowed_bad(len(pairs) + len(pairs.bad)):
        raise ValueError(
            f"{config.data}: {len(pairs.bad)} bad rows beside {len(pairs)} good ones, more than 1 %; first: {pairs.bad[0]}"
        )
    if pairs.bad:
        say(
            f"{len(pairs.bad)} bad rows of {config.data} left out:\n  "
            + "\n  ".join(pairs.bad[:20])
            + ("\n  ..." if len(pairs.bad) > 20 else "")
        )
    count = min(1000, len(pairs) // 10) if config.holdout is None else config.holdout
    if count > len(pairs) - 2:
        raise ValueError(
            f"--holdout {count} leaves fewer than 2 of the {len(pairs)} rows to train on"
        )
    chosen = pairs.held_out(count)
    if len(chosen) < 2:
        say(
            f"nothing held out of {len(pairs)} rows: no table before and after (--holdout N keeps N rows out)"
        )
    return pairs, HeldOutRows(chosen)


def with_triples(rows, config, model):
    """The rows that the loss needs: pairs, triples of texts, or pairs with triples."""
    if model.settings.loss == "vladva":
        return rows
    if config.text_data == "scenes" and config.data != "scenes":
        raise ValueError(
            f"--loss {model.settings.loss} beside --data {config.data}: name your texts too, --text-data FILE.csv (sent0, sent1, hard_neg)"
        )
    if config.text_data == "scenes":
        from extras.scenes import SceneTriples

        triples = SceneTriples(config.seed, config.scenes)
    else:
        triples = data.Triples(config.text_data, model.tokenizer)
    return triples if model.settings.loss == "text-text" else data.Joined(rows, triples)


def resolve(config, model, rows):
    """Fill in what the config leaves to the run, and refuse what cannot be honoured."""
    batch = config.batch if config.batch is not None else min(64, len(rows))
    lr = config.lr if config.lr is not None else 2e-4 * 4096 / model.lvlm.config.decoder.hidden_size
    if not max(2, ranks()[1]) <= batch <= len(rows):
        raise ValueError(
            f"--batch {batch}: wanted {max(2, ranks()[1])} to {len(rows)}, the rows there are to train on"
        )
    for name, low in (("steps", 1), ("scenes", 2), ("eval_gallery", 2 * (config.eval_gallery != 0)), ("eval_items", 1),
                      ("micro_batch", 1), ("workers", 0), ("save_every", 1), ("keep", 1)):  # fmt: skip
        if getattr(config, name) is not None and getattr(config, name) < low:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(config, name)}: at least {low} is needed"
            )
    if config.contrast not in ("short", "long"):
        raise ValueError(f"--contrast is {config.contrast!r}: short or long")
    cuda = model.lvlm.device.type == "cuda"
    checkpointing = cuda if config.checkpointing is None else config.checkpointing
    share, fitting = (
        -(-batch // ranks()[1]),
        config.micro_batch or fitting_micro_batch(model, checkpointing),
    )
    return dataclasses.replace(
        config,
        dtype=str(model.lvlm.dtype).removeprefix("torch."),
        checkpointing=checkpointing,
        micro_batch=min(share, config.micro_batch or min(fitting, BUCKET)),
        grad_cache=fitting < share if config.grad_cache is None else config.grad_cache,
        out=config.out or str(Path("runs") / Path(config.model).name),
        batch=batch,
        lr=lr,
        soft_prompt_lr=config.soft_prompt_lr if config.soft_prompt_lr is not None else 4 * lr,
        temperature_lr=config.temperature_lr if config.temperature_lr is not None else lr,
        device=str(model.lvlm.device),
        workers=config.workers if config.workers is not None else min(8, os.cpu_count() - 1) * cuda,
    )


def fitting_micro_batch(model, checkpointing):
    """The most rows whose activations fit into 0.6 of the memory that is free now, with captions as long as they may be and the largest
    picture that the image processor makes."""
    texts = {"vladva": 1, "text-text": 3, "vladva+text-text": 4}[model.settings.loss]
    longest = {side: limits[-1] for side, limits in data.LIMITS.items()}
    tokens = len(model.image_sequence(grid=model.image_processor.largest).ids) + longest["long"]
    tokens += texts * (len(model.text_sequence("a").ids) + longest["short"])
    row = activation_bytes(
        model.lvlm.config.decoder, tokens, checkpointing, model.lvlm.compute_dtype.itemsize
    )
    return max(1, int(0.6 * free_bytes(model.lvlm.device) / row))


def activation_bytes(decoder, tokens, checkpointing, itemsize):
    """Memory that `tokens` tokens hold between the forward and the backward pass of the decoder, estimated from its shapes.

    A block keeps about 13 D + 4 I numbers a token in bfloat16 and 9 D + 4 I in float32 (I: width of its MLP; counted from the tensors that
    autograd saves); the rest is room for the backward pass itself. Checkpointing keeps D a block and one block's numbers at a time.
    """
    width, blocks = decoder.hidden_size, decoder.num_hidden_layers
    block = 14 * width + 5 * decoder.intermediate_size
    return itemsize * tokens * (blocks * width + block if checkpointing else blocks * block)


def start_run(config, settings, rows, resume):
    """Make OUT and write its config.json, and the bad rows found so far; refuse a folder that holds another run, unless it goes on."""
    out = Path(config.out)
    if not resume and any(
        (out / name).exists() for name in ("config.json", "adapter.safetensors", "metrics.jsonl")
    ):
        raise ValueError(
            f"{out} holds another run: go on with --resume, choose another --out, or delete it first"
        )
    wait_for_ranks()  # all have looked before the first one writes
    try:
        if ranks()[0] == 0 and not resume:
            out.mkdir(parents=True, exist_ok=True)
            write_json(
                out / "config.json",
                dataclasses.asdict(config)
                | {"settings": dataclasses.asdict(settings), "torch": torch.__version__},
            )
            if getattr(rows, "bad", []):
                write_lines(out / "bad_rows.txt", rows.bad)
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error}") from None
    return out


def stored_run(given):
    """(TrainConfig, Settings) of the run in OUT that goes on. given: the flags of the command line; one that differs is refused."""
    out = Path(given.get("out") or Path("runs") / Path(given.get("model", TrainConfig.model)).name)
    stored = read_json(out / "config.json")
    settings = stored.pop("settings")
    known = {**stored, **settings, "out": str(out)}
    other = [
        f"{name} was {known[name]!r}, not {value!r}"
        for name, value in given.items()
        if name not in FREE_ON_RESUME and known[name] != value
    ]
    if other:
        raise ValueError(f"{out} cannot go on with other settings: {'; '.join(other)}")
    fields = {f.name: known[f.name] for f in dataclasses.fields(TrainConfig)} | {
        "device": None,
        "workers": None,
    }
    free = {name: given[name] for name in FREE_ON_RESUME if name in given}
    return TrainConfig(**fields | free), Settings(**settings)


def announce(config, settings, model, rows):
    """Say what is about to run: the counts, and the resolved config."""
    trained = sum(p.numel() for _, p in model.trained())
    every = sum(p.numel() for p in model.parameters())
    say(
        f"{config.model}: {trained:,} parameters trained + {every - trained:,} frozen = {every:,}; {len(rows):,} rows to train on"
    )
    say(
        "  ".join(
            f"{name}={value!r}"
            for name, value in (dataclasses.asdict(config) | dataclasses.asdict(settings)).items()
        )
    )


def token_count(parts):
    """Tokens of this process's share of a batch, padding included."""
    return sum(batch.ids.numel() for part in parts for batch in part.batches)


def pictures(parts):
    """Pictures of this process's share of a batch."""
    return sum(len(part.pixels) for part in parts if part.pixels is not None)


def hidden_bar():
    """Progress bars are for the first process, in a terminal."""
    return True if ranks()[0] else None


def step_flops(model, parts, config):
    """(matrix products, attention) of one step of this process in operations, from the shapes; attention counted causally.

    A frozen weight costs 2 operations a number and token in each direction, a LoRA factor twice that backwards; gradients for frozen
    weights cost nothing, because there are none. Behind its attention the last block runs for the states that are used only.
    """
    lvlm, decoder, products, attention = model.lvlm, model.lvlm.config.decoder, 0, 0
    frozen, factors = (
        [0, 0],
        [0, 0],
    )  # numbers that every token meets, and only the states that are used
    late = tuple(f"{decoder.num_hidden_layers - 1}.{name}" for name in ("self_attn.o_proj", "mlp"))
    for name, p in lvlm.decoder.layers.named_parameters():
        if "proj." in name and p.ndim == 2:
            (factors if "lora_" in name else frozen)[name.startswith(late)] += p.numel()
    seen = lvlm.vision.patches_per_token * sum(p.numel() for p in lvlm.vision.run_weights()) + sum(
        p.numel() for p in lvlm.projector.parameters()
    )
    for part in parts:
        whole, first = part.batches, part.prompts().batches
        forwards = whole * (1 + config.checkpointing) + first * config.grad_cache
        for batch, low_rank, causal in [(b, 2, 2) for b in forwards] + [(b, 4, 4) for b in whole]:
            for tokens, w, ab in zip((batch.ids.numel(), len(batch.states)), frozen, factors):
                products += tokens * (2 * w + low_rank * ab)
            attention += (
                causal
                * batch.ids.numel()
                * batch.ids.shape[1]
                * decoder.num_hidden_layers
                * decoder.num_attention_heads
                * decoder.head_width
            )
        products += 4 * len(part.targets) * decoder.vocab_size * decoder.hidden_size
        products += (
            (1 + config.grad_cache)
            * 2
            * seen
            * (part.images.image_places.shape[1] if part.images else 0)
        )
    return products, attention


def matmul_rate(device, dtype):
    """Operations a second that the device reaches on a product of two square matrices, the best of a few."""
    size = 4096 if device.type == "cuda" else 1024
    a, best = torch.randn(size, size, device=device, dtype=dtype), math.inf
    for _ in range(4):
        start = time.perf_counter()
        (a @ a).sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_bytes(device):
    """Most memory held so far: allocated on a CUDA device, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


# ------------------------------------------------------------------------------------------------------ end


def report(out, held_out, before, after):
    """Print the table before / after, write scores.json and report.png."""
    from extras.plots import draw_report, read_metrics
    from extras.scenes import score_table

    metrics = read_metrics(out)
    scores = {"before": before.results, "after": after.results} if before else {}
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    if scores:
        print(score_table(scores))
        if "long_captions" in before.results:
            first, last = (each.results["long_captions"] for each in (before, after))
            print(
                f"held-out long captions: {first['loss']:.3f} nats a token before, {last['loss']:.3f} after ({first['tokens']:,} tokens)"
            )
    draw_report(held_out, before, after, metrics).save(out / "report.png")
    print(
        f"written: {out}/adapter.safetensors, config.json, metrics.jsonl, scores.json, report.png"
    )
    return scores


# ------------------------------------------------------------------------------------------------------ command line


def add_fields(parser, cls):
    """One flag a field of a config dataclass, defaults and all."""
    for f in dataclasses.fields(cls):
        flag, kind = (
            f"--{f.name.replace('_', '-')}",
            str(f.type).removeprefix("<class '").removesuffix("'>").removesuffix(" | None"),
        )
        if kind == "bool":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS
            )
        else:
            parser.add_argument(
                flag,
                type={"int": int, "float": float, "str": str}[kind],
                help=f"(default: {f.default})",
            )


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Adapt an LVLM into an embedding model (VladVA).",
        argument_default=argparse.SUPPRESS,
    )
    add_fields(parser, TrainConfig)
    add_fields(parser, Settings)
    parser.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on with the run in OUT, from its last checkpoint",
    )
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if given.get("loss") == "text-text" and not resume:
        given = E5V | given
    config, settings = stored_run(given) if resume else picked(given)
    return train(config, settings, resume)


def picked(given):
    """(TrainConfig, Settings) with the flags that were given."""
    return tuple(
        cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given})
        for cls in (TrainConfig, Settings)
    )


if __name__ == "__main__":
    main()
