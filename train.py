"""The training loop: an LVLM is measured as an embedder, adapted, and measured again.

    python train.py  # the tiny LVLM on rendered scenes: minutes on 2 CPU cores
    python train.py --model llava-1.5-7b --data pairs.jsonl --out runs/mine
    torchrun --nproc-per-node 8 train.py --model llava-1.5-7b ...  # the same gradient from 8 devices
    python train.py --out runs/mine --resume  # goes on after a stop

Writes OUT/adapter.safetensors, config.json, metrics.jsonl, scores.json, report.png, and while it
runs OUT/checkpoints.

Not here: the losses (vladva.py), metrics (eval.py), curves (extras/plots.py), the paper's ablation
(extras/ablation.py), memory and time at full size (extras/plan.py).
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import (
    TrainingBatch,
    all_gather_rows,
    all_reduce_sum,
    barrier,
    rank_and_world_size,
    say,
)
from eval import HeldOutPairs, Measured, score_table
from model import DTYPES, from_json, open_safetensors, read_json, write_json
from vladva import Embeddings, VladVA, VladVAConfig, read_adapter


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on beside VladVAConfig. None: decided when the run starts."""

    model: str = "tiny"
    data: str = "scenes"  # rendered; or a pairs file
    out: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 64  # second-hand notes on the paper: 1024
    micro_batch_size: int | None = None
    gradient_caching: bool | None = None
    gradient_checkpointing: bool | None = None
    compile: bool = False
    lr: float | None = None  # 2e-4 at width 4096 is LLaVA-1.5's LoRA recipe; the scaling is ours
    soft_prompt_lr: float | None = None  # ours
    loss_lr: float | None = None  # of what the loss itself trains, such as log tau; ours
    warmup_ratio: float = 0.05  # linear, then cosine to 0 (cosine: second-hand notes)
    weight_decay: float = 0.0  # of LoRA; ours
    max_grad_norm: float = 1.0  # ours
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    num_workers: int | None = None
    save_every: int = 500
    save_minutes: float = 10.0
    keep_checkpoints: int = 2
    holdout: int | None = None
    eval_every: int | None = None
    num_scenes: int = 20000  # training scenes to draw from
    eval_seed: int = 2000  # of the held-out scenes; settings were chosen on those of seed 1000


HELP = {
    "model": "tiny, tiny-llava, llava-1.5-7b, llava-1.5-13b, qwen2-vl-2b, a folder or a hub id",
    "data": "scenes, or a file of JSON lines",
    "out": "folder that the run writes (default: runs/<model>)",
    "steps": "optimizer steps (default: 140 on scenes, else one epoch or 140 if that is more)",
    "epochs": "passes over the data, instead of --steps",
    "batch_size": "pairs a step, over all processes",
    "micro_batch_size": "pairs that run together; the gradient does not depend on it (default: 16 on the cpu, 8 on cuda)",
    "gradient_caching": "hold one micro-batch's activations at a time (default: for models over 100 million parameters)",
    "gradient_checkpointing": "recompute decoder blocks in the backward pass (default: on cuda)",
    "compile": "torch.compile every decoder block",
    "lr": "peak learning rate of LoRA (default: 2e-4 x 4096 / decoder width)",
    "soft_prompt_lr": "peak learning rate of the soft prompts (default: 4 x --lr)",
    "warmup_ratio": "share of the steps with a rising learning rate",
    "max_grad_norm": "gradients are scaled down to this norm",
    "seed": "of adapter weights, data order and training scenes",
    "device": "cpu, cuda, ... (default: cuda if there is one)",
    "dtype": "of the frozen weights (default: bfloat16 on cuda, float32 on the cpu if it fits)",
    "num_workers": "processes that prepare batches ahead (default: 0 on the cpu, 8 on cuda)",
    "save_every": "steps between checkpoints; one is due every 10 minutes as well",
    "holdout": "scenes, or rows of --data, that are kept for measuring (default: 1000 scenes, or a tenth of the rows, at most 1000); 0: none",
    "eval_every": "steps between measurements on what is held out (default: before and after only)",
}
METHOD_HELP = {
    "loss": "an entry of vladva.LOSSES",
    "soft_prompts": "train soft prompts in place of the hand prompts",
    "lora": "train LoRA on the decoder's linear layers",
    "lora_rank": "rank of LoRA",
    "temperature": "tau of Eq. 1",
    "learn_temperature": "train tau as well",
    "next_token_weight": "weight of Eq. 2",
    "image_mode": "crop or pad images that are not square",
}

# ------------------------------------------------------------------------------------- the run


def train(
    config: TrainConfig,
    method: VladVAConfig,
    resume: bool = False,
    open_rows: Callable | None = None,
) -> dict:
    """Measure, adapt, measure again; returns what scores.json holds.

    open_rows: (TrainConfig, VladVA, BadRows) -> (rows, held-out rows); None: what config.data names.
    """
    device = data.init_distributed(data.pick_device(config.device))
    model = VladVA.from_pretrained(config.model, None, device, DTYPES.get(config.dtype), method)
    bad_rows = data.BadRows()
    rows, held_out = (open_rows or open_data)(config, model, bad_rows)
    config = resolve(config, model, rows)
    out = start_run(config, method, resume)
    bad_rows.write_to(out / "bad_rows.txt")
    before = measure(model, held_out)
    model.attach(config.seed)
    announce(config, model, rows)
    adapt(model, rows, held_out, bad_rows, config)
    after = measure(model, held_out)
    return report(out, held_out, before, after)


def adapt(model: VladVA, rows, held_out, bad_rows: data.BadRows, config: TrainConfig) -> None:
    """The loop: one optimizer step of L = L_con + weight L_CE (paper Sec. 3.2.3) a batch."""
    out = Path(config.out)
    prepare_blocks(model, config)
    optimizer = make_optimizer(model, config)
    peak_lrs = [group["lr"] for group in optimizer.param_groups]
    done = load_checkpoint(out, model, optimizer)
    metrics = open_metrics(out / "metrics.jsonl", done)
    saved = began = time.monotonic()
    bar = tqdm(total=config.steps, initial=done, desc="adapting", disable=hide_bar())
    with StopSignal() as stop, metrics, bar:
        for step, batch in enumerate(step_loader(model, rows, config, done + 1), start=done + 1):
            start = time.perf_counter()
            for group, peak in zip(optimizer.param_groups, peak_lrs):
                group["lr"] = peak * lr_scale(step, config)
            losses = train_step(model, batch.micro_batches, optimizer, config)
            values = {name: value.item() for name, value in losses.items()}
            check_finite(values, step, batch.where, out)

            # what is known of the step
            seconds = time.perf_counter() - start
            line = {"step": step, **values, "lr": optimizer.param_groups[0]["lr"]}
            line |= speed(batch.micro_batches, seconds, model.lvlm.device)
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                line["held_out"] = measure(model, held_out).scores
            metrics.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{values['loss']:.3f}")
            bar.update()
            if step == done + 5:
                hours = (time.monotonic() - began) / 5 * (config.steps - step) / 3600
                say(f"about {hours:.1f} hours to go")

            # what must not be lost
            bad_rows.add(batch.bad)
            counts = torch.tensor(
                [stop.requested, len(bad_rows.messages)], device=model.lvlm.device
            )
            stopped, num_bad = all_reduce_sum(counts.long()).tolist()
            too_many = bad_rows.too_many(num_bad, step * config.batch_size)
            due = (
                step % config.save_every == 0 or time.monotonic() - saved > 60 * config.save_minutes
            )
            if due or stopped or too_many or step == config.steps:
                save_checkpoint(out, step, model, optimizer, config.keep_checkpoints)
                saved = time.monotonic()
            if too_many:
                raise ValueError(too_many)
            if stopped and step < config.steps:
                say(f"stopped after step {step}; go on with: python train.py --out {out} --resume")
                raise SystemExit(130)
    if rank_and_world_size()[0] == 0:
        model.save_adapter(out)


def train_step(model: VladVA, micro_batches, optimizer, config: TrainConfig) -> dict[str, Tensor]:
    """Gradients of one batch, clip, update. Returns 0-d tensors: nothing here waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    contrastive, next_token = backward(model, micro_batches, config.gradient_caching)
    parameters = list(model.trained_parameters().values())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    loss = contrastive + model.config.next_token_weight * next_token
    losses = {"loss": loss, "contrastive": contrastive, "next_token": next_token}
    return losses | {"grad_norm": grad_norm}


def backward(model: VladVA, micro_batches: list[TrainingBatch], gradient_caching: bool):
    """Add the gradient of one batch's loss to every trained parameter; returns (Eq. 1, Eq. 2).

    What anyone would write is

        loss = model(batch)
        loss.backward()

    and this gives that gradient, for the whole batch of all processes, from micro-batches. Eq. 1
    needs all embeddings at once, but its gradient reaches the model through them alone, so the
    chain rule may be cut there (gradient caching, Gao et al., 2021, arXiv 2101.06983). With
    gradient_caching only one micro-batch holds activations at a time, and runs twice.
    """
    device = model.lvlm.device
    weight = model.config.next_token_weight

    # 1. the embeddings of all micro-batches: without a graph, if each is to run again
    outputs = []
    with torch.set_grad_enabled(not gradient_caching):
        for micro_batch in micro_batches:
            part = micro_batch.prefixes() if gradient_caching else micro_batch
            outputs.append(model.embed_batch(part.to(device)))

    # 2. Eq. 1 on the embeddings of all processes, and d loss / d embedding of this one's
    contrastive, gradients = embedding_gradients(model, [emb for emb, _ in outputs])
    own_tokens = sum(len(micro_batch.caption_targets) for micro_batch in micro_batches)
    num_tokens = total_tokens(own_tokens, device)
    if not contrastive.requires_grad and not num_tokens:
        raise ValueError(
            "a batch has nothing to learn from: 2 short captions, or a long one, needed"
        )

    # 3. each micro-batch with its graph: that gradient goes back together with Eq. 2's
    next_token = torch.zeros((), device=device)
    for micro_batch, (emb, caption_states), gradient in zip(micro_batches, outputs, gradients):
        if gradient_caching:
            emb, caption_states = model.embed_batch(micro_batch.to(device))
        targets = micro_batch.caption_targets.to(device)
        partial_loss, state_gradient = caption_gradient(model, caption_states, targets, num_tokens)
        surrogate_loss = weight * (caption_states * state_gradient).sum()
        for name in EMBEDDINGS:
            surrogate_loss = surrogate_loss + (getattr(emb, name) * getattr(gradient, name)).sum()
        surrogate_loss.backward()
        next_token = next_token + partial_loss
    sum_gradients(model)
    return contrastive.detach(), all_reduce_sum(next_token)


EMBEDDINGS = ("image", "text", "texts")  # fields of vladva.Embeddings


def embedding_gradients(model: VladVA, parts: list[Embeddings]) -> tuple[Tensor, list[Embeddings]]:
    """The embedding loss on those of all processes, and its gradient for each of this one's parts."""
    leaves, everyone = {}, {}
    for name in EMBEDDINGS:
        own = torch.cat([getattr(part, name).detach() for part in parts]).requires_grad_()
        rows, first = all_gather_rows(own.detach())
        leaves[name] = own
        everyone[name] = torch.cat([rows[:first], own, rows[first + len(own) :]])
    loss = model.embedding_loss(Embeddings(**everyone))
    if loss.requires_grad:
        loss.backward()
    columns = []
    for name, own in leaves.items():
        gradient = torch.zeros_like(own) if own.grad is None else own.grad
        columns.append(gradient.split([len(getattr(part, name)) for part in parts]))
    return loss, [Embeddings(*gradients) for gradients in zip(*columns)]


def caption_gradient(model: VladVA, caption_states: Tensor, targets: Tensor, num_tokens: int):
    """(Eq. 2 of a micro-batch, its gradient at the states (M, D)).

    The graph is cut at the states as well, so that only HEAD_CHUNK rows of logits exist at a time.
    """
    states = caption_states.detach().requires_grad_()
    loss = torch.zeros((), device=states.device)
    for start in range(0, len(targets), HEAD_CHUNK):
        chunk = slice(start, start + HEAD_CHUNK)
        chunk_loss = model.caption_loss(states[chunk], targets[chunk], num_tokens)
        chunk_loss.backward()
        loss = loss + chunk_loss.detach()
    return loss, torch.zeros_like(states) if states.grad is None else states.grad


HEAD_CHUNK = 1024


def total_tokens(own: int, device) -> int:
    """Caption tokens of the batch over all processes; with one process the device is not asked."""
    if rank_and_world_size()[1] == 1:
        return own
    return int(all_reduce_sum(torch.tensor(own, device=device)))


def sum_gradients(model: VladVA) -> None:
    """Add up the gradients of all processes; those of the loss's own are whole in each already."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return
    parameters = model.trained_parameters()
    for name, p in parameters.items():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if name.startswith("loss."):
            p.grad /= world_size
    flat = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters.values()]))
    parts = flat.split([p.numel() for p in parameters.values()])
    for p, part in zip(parameters.values(), parts):
        p.grad.copy_(part.view_as(p))


def make_optimizer(model: VladVA, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate for each of the model's parameter groups."""
    rates = {
        "lora": (config.lr, config.weight_decay),
        "soft_prompts": (config.soft_prompt_lr, 0.0),
        "loss": (config.loss_lr, 0.0),
    }
    groups = []
    for name, parameters in model.parameter_groups().items():
        lr, weight_decay = rates[name]
        params = list(parameters.values())
        if params:
            groups.append({"params": params, "lr": lr, "weight_decay": weight_decay})
    return torch.optim.AdamW(groups, fused=model.lvlm.device.type != "meta")


def lr_scale(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step counted from 1: linear warm-up, then cosine to 0."""
    warmup = max(1, round(config.warmup_ratio * config.steps))
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def prepare_blocks(model: VladVA, config: TrainConfig) -> None:
    """Gradient checkpointing and torch.compile, block by block; on a CPU, freed memory goes back."""
    decoder = model.lvlm.decoder
    decoder.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        for block in decoder.layers:
            block.compile()
    if platform.libc_ver()[0] == "glibc" and is_large(model):
        # left alone, glibc keeps tensors in one heap whose holes come to hold more than is in use:
        # 24 GB instead of 16 for a step of 7B. M_MMAP_THRESHOLD (-3): over 4 MB, map them apart
        ctypes.CDLL(None).mallopt(ctypes.c_int(-3), ctypes.c_int(4 << 20))


def is_large(model: VladVA) -> bool:
    """Over 100 million parameters: where memory is worth more than time."""
    return sum(p.numel() for p in model.parameters()) > 100e6


def step_loader(model: VladVA, rows, config: TrainConfig, first_step: int) -> DataLoader:
    """StepBatch of every step from `first_step` on, made ahead by worker processes if there are any."""
    steps = Steps(model, rows, config.batch_size, config.micro_batch_size, config.seed)
    numbers = range(first_step, config.steps + 1)
    options = {"multiprocessing_context": "fork"} if config.num_workers else {}
    workers = config.num_workers
    return DataLoader(steps, None, sampler=numbers, num_workers=workers, collate_fn=list, **options)


# --------------------------------------------------------------------------------- data order


@dataclass(frozen=True)
class StepBatch:
    """What one process works on in one step."""

    micro_batches: list[TrainingBatch]  # on the host
    where: list[str]  # names of the rows
    bad: list[str]  # what was wrong with rows that were replaced
    num_truncated: int  # rows with a caption over the paper's length


class Steps:
    """Step number -> StepBatch. All that is random is a function of (seed, step), so a run can go on
    at any step.

    An epoch is a shuffle of all rows, without a last incomplete batch; `group_size` neighbours stay
    together. Each process takes every n-th row; rows of similar length share a micro-batch.
    """

    def __init__(self, model, rows, batch_size: int, micro_batch_size: int, seed: int):
        self.model = model
        self.rows = rows
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one object a run
    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch."""
        size = self.rows.group_size
        num_groups = -(-len(self.rows) // size)
        first = np.random.default_rng([self.seed, epoch]).permutation(num_groups) * size
        order = (first[:, None] + np.arange(size)).reshape(-1)
        return order[order < len(self.rows)]

    def usable_row(self, index: int, epoch: int, bad: list[str]) -> dict:
        """Row `index`, or the next one that can be used."""
        for offset in range(min(len(self.rows), 1000)):
            number = (index + offset) % len(self.rows)
            try:
                return self.rows.row(number, random.Random(f"caption {self.seed} {epoch} {number}"))
            except data.BadRow as error:
                bad.append(str(error))
        raise ValueError(f"{len(bad)} rows in a row cannot be used; the last: {bad[-1]}")

    def __getitem__(self, step: int) -> StepBatch:
        rank, world_size = rank_and_world_size()
        steps_per_epoch = max(1, len(self.rows) // self.batch_size)
        epoch, step_of_epoch = divmod(step - 1, steps_per_epoch)
        start = step_of_epoch * self.batch_size
        indices = self.order(epoch)[start : start + self.batch_size].tolist()
        bad = []
        rows = [self.usable_row(index, epoch, bad) for index in indices[rank::world_size]]
        # longest first: what the shorter ones need then fits into memory that was used before
        rows.sort(key=lambda row: len(row["long"] or ""), reverse=True)
        micro_batches = []
        for start in range(0, len(rows), self.micro_batch_size):
            part = rows[start : start + self.micro_batch_size]
            micro_batches.append(self.model.training_batch(part))
        num_truncated = sum(row.get("truncated", False) for row in rows)
        return StepBatch(micro_batches, [row["where"] for row in rows], bad, num_truncated)


# -------------------------------------------------------------------------------- nothing lost


class StopSignal:
    """Inside the context SIGTERM and SIGINT are noted, so that the step is finished and saved."""

    def __enter__(self):
        self.requested = False
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        self.requested = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def open_metrics(path: Path, done: int):
    """metrics.jsonl, to write on after the lines of `done` steps; only the first process keeps it."""
    if rank_and_world_size()[0]:
        return open(os.devnull, "w")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    file = open(path, "w", encoding="utf-8", buffering=1)
    file.writelines(lines[:done])
    return file


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((out / "checkpoints").glob("step-" + "[0-9]" * 6))


def save_checkpoint(out: Path, step: int, model: VladVA, optimizer, keep: int) -> None:
    """Write OUT/checkpoints/step-...: whole or not at all. Nothing random needs saving (see Steps)."""
    if rank_and_world_size()[0]:
        return
    folder = out / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_adapter(partial)
        data.write_tensors(partial / "optimizer.safetensors", optimizer_state(model, optimizer))
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"step {step} could not be saved ({error}); {last_checkpoint(out)}"
        ) from None
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def last_checkpoint(out: Path) -> str:
    """Where a run would go on, in words."""
    saved = checkpoints(out)
    return f"the last whole checkpoint is {saved[-1]}" if saved else "there is no checkpoint"


def optimizer_state(model: VladVA, optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts by parameter name, on the host."""
    tensors = {}
    for name, p in model.trained_parameters().items():
        for kind, value in optimizer.state[p].items():
            tensors[f"{name}.{kind}"] = value.detach().cpu().contiguous()
    return tensors


def load_checkpoint(out: Path, model: VladVA, optimizer) -> int:
    """Put the last whole checkpoint of OUT into model and optimizer; returns its step, or 0."""
    saved = checkpoints(out)
    if not saved:
        return 0
    model.load_adapter_state(read_adapter(saved[-1])[0], saved[-1])
    parameters = model.trained_parameters()
    with open_safetensors(saved[-1] / "optimizer.safetensors") as file:
        for key in file.keys():
            name, kind = key.rsplit(".", 1)
            value = file.get_tensor(key)
            p = parameters[name]
            optimizer.state[p][kind] = value.to(p.device)
    return int(saved[-1].name.removeprefix("step-"))


def check_finite(values: dict[str, float], step: int, where: list[str], out: Path) -> None:
    """ValueError when a loss or the gradient norm is not finite; names the rows."""
    if all(map(math.isfinite, values.values())):
        return
    loss, norm = values["loss"], values["grad_norm"]
    rows = f"{', '.join(where[:8])}{' ...' if len(where) > 8 else ''}"
    raise ValueError(
        f"step {step}: loss {loss} or gradient norm {norm} is not finite; rows {rows}; "
        f"{last_checkpoint(out)}: lower --lr, or use --dtype float32"
    )


# ------------------------------------------------------------------------------ start and end


def open_data(config: TrainConfig, model: VladVA, bad_rows: data.BadRows):
    """(rows to train on, what is held out) of the rendered scenes or of a pairs file."""
    if config.data == "scenes":
        from extras import scenes

        return scenes.open_scenes(config, model)
    pairs = data.Pairs(config.data, model.tokenizer)
    count = min(1000, len(pairs) // 10) if config.holdout is None else config.holdout
    if count > len(pairs) - 2:
        raise ValueError(f"--holdout {count} leaves fewer than 2 of {len(pairs)} rows to train on")
    return pairs, HeldOutPairs(pairs.hold_out(count, bad_rows))


def measure(model: VladVA, held_out) -> Measured | None:
    """Scores of what is held out, adapters as they are; None when fewer than 2 rows are."""
    return held_out.measure(model) if len(held_out) >= 2 else None


def resolve(config: TrainConfig, model: VladVA, rows) -> TrainConfig:
    """The config with everything decided that it leaves to the run."""
    world_size = rank_and_world_size()[1]
    batch_size = min(config.batch_size, len(rows))
    if batch_size < max(2, world_size):
        raise ValueError(f"a batch of {batch_size} rows: at least {max(2, world_size)} are needed")
    cuda = model.lvlm.device.type == "cuda"
    steps_per_epoch = max(1, len(rows) // batch_size)
    steps = 140 if config.data == "scenes" else max(140, steps_per_epoch)
    if config.epochs is not None:
        steps = max(1, round(config.epochs * steps_per_epoch))
    defaults = {
        "out": f"runs/{Path(config.model).name}",
        "steps": steps,
        "micro_batch_size": min(-(-batch_size // world_size), 8 if cuda else 16),
        "gradient_caching": is_large(model),
        "gradient_checkpointing": cuda,
        "lr": 2e-4 * 4096 / model.lvlm.config.decoder.hidden_size,
        "num_workers": 8 if cuda else 0,
    }
    lr = config.lr if config.lr is not None else defaults["lr"]
    defaults |= {"soft_prompt_lr": 4 * lr, "loss_lr": lr}
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    dtype = str(model.lvlm.dtype).removeprefix("torch.")
    device = str(model.lvlm.device)
    return replace(config, batch_size=batch_size, device=device, dtype=dtype, **unset)


RUN_FILES = ("config.json", "metrics.jsonl", "adapter.safetensors", "scores.json", "checkpoints")


def start_run(config: TrainConfig, method: VladVAConfig, resume: bool) -> Path:
    """Make OUT and write its config.json; refuse a folder that holds another run."""
    out = Path(config.out)
    if not resume and any((out / name).exists() for name in RUN_FILES):
        raise ValueError(
            f"{out} holds another run: --resume it, choose another --out, or delete it"
        )
    barrier()  # all have looked before the first one writes
    if rank_and_world_size()[0] == 0 and not resume:
        out.mkdir(parents=True, exist_ok=True)
        run = {"train": dataclasses.asdict(config), "method": dataclasses.asdict(method)}
        write_json(out / "config.json", run | {"torch": torch.__version__})
    barrier()
    return out


MAY_CHANGE = ("out", "device", "num_workers", "save_every")  # when a run goes on


def read_run(flags: dict) -> tuple[TrainConfig, VladVAConfig]:
    """The configs of the run in OUT that goes on; a flag that says otherwise is refused."""
    out = Path(flags.get("out") or f"runs/{Path(flags.get('model', TrainConfig.model)).name}")
    run = read_json(out / "config.json")
    config = from_json(TrainConfig, run.get("train"), f"{out}/config.json train")
    method = from_json(VladVAConfig, run.get("method"), f"{out}/config.json method")
    known = dataclasses.asdict(config) | dataclasses.asdict(method)
    for name, value in flags.items():
        if name not in MAY_CHANGE and known[name] != value:
            raise ValueError(f"{out} cannot go on: {name} was {known[name]!r}, not {value!r}")
    changes = {name: flags[name] for name in MAY_CHANGE if name in flags}
    return replace(config, **{"out": str(out), "device": None} | changes), method


def announce(config: TrainConfig, model: VladVA, rows) -> None:
    """Say what is about to run: the counts and the resolved config."""
    trained = sum(p.numel() for p in model.trained_parameters().values())
    total = sum(p.numel() for p in model.parameters())
    frozen = total - trained
    say(f"{config.model}: {trained:,} parameters trained + {frozen:,} frozen = {total:,}")
    epochs = config.steps * config.batch_size / len(rows)
    say(
        f"{config.steps:,} steps of {config.batch_size} pairs: {epochs:.2f} passes over {len(rows):,} rows"
    )
    settings = dataclasses.asdict(config) | dataclasses.asdict(model.config)
    say("  ".join(f"{name}={value!r}" for name, value in settings.items()))


def speed(micro_batches: list[TrainingBatch], seconds: float, device) -> dict:
    """Seconds, images and tokens per second of this process, and its peak memory in bytes."""
    images = sum(len(part.pixels) for part in micro_batches if part.pixels is not None)
    tokens = sum(part.num_tokens for part in micro_batches)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    rates = {"images_per_s": images / seconds, "tokens_per_s": tokens / seconds}
    return {"step_s": seconds} | rates | {"peak_bytes": peak}


def hide_bar() -> bool | None:
    """Progress bars are for the first process, in a terminal."""
    return True if rank_and_world_size()[0] else None


def report(out: Path, held_out, before: Measured | None, after: Measured | None) -> dict:
    """Print the table before / after; write scores.json and report.png."""
    if before is None:
        say(f"written: {out}/adapter.safetensors; nothing was held out, so nothing was measured")
        return {}
    columns = {"before": before, "after": after}
    scores = {}
    for name, measured in columns.items():
        scores[name] = {"scores": measured.scores, "caption_loss": measured.caption_loss}
    if rank_and_world_size()[0] == 0:
        say(score_table(columns, held_out.chance))
        write_json(out / "scores.json", scores)
        from extras.plots import draw_report

        draw_report(out, held_out, before, after)
        say(
            f"written: {out}/adapter.safetensors, config.json, metrics.jsonl, scores.json, report.png"
        )
    return scores


# -------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train.py", description="Adapt an LVLM (VladVA).")
    data.add_config_flags(parser, TrainConfig, HELP)
    data.add_config_flags(parser, VladVAConfig, METHOD_HELP)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser


def configs_from_flags(flags: dict) -> tuple[TrainConfig, VladVAConfig]:
    """(TrainConfig, VladVAConfig) with the flags that were used."""
    configs = []
    for cls in (TrainConfig, VladVAConfig):
        names = [f.name for f in dataclasses.fields(cls)]
        configs.append(cls(**{name: flags[name] for name in names if name in flags}))
    return configs[0], configs[1]


@data.command
def main(argv: list[str] | None = None) -> dict:
    flags = vars(build_parser().parse_args(argv))
    resume = flags.pop("resume")
    config, method = read_run(flags) if resume else configs_from_flags(flags)
    return train(config, method, resume)


if __name__ == "__main__":
    main()
