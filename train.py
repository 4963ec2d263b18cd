"""The training loop: an LVLM is measured as an embedder, adapted, and measured again.

    python train.py  # the tiny LVLM on rendered scenes: minutes on 2 CPU cores
    python train.py --model llava-1.5-7b --data pairs.jsonl --out runs/mine
    torchrun --nproc-per-node 8 train.py --model llava-1.5-7b ...  # the same gradient
    python train.py --out runs/mine --resume  # goes on after a stop

Writes OUT/adapter.safetensors, config.json, metrics.jsonl, scores.json, report.png, checkpoints.
Not here: losses (vladva.py), metrics (eval.py), the ablation (extras).
"""

import argparse
import contextlib
import fcntl
import functools
import json
import math
import os
import pickle
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import flag, rank_and_world_size, say, write_json
from eval import BadRows, HeldOutPairs, open_data, report
from model import DTYPES, check_shapes, from_json, read_json, read_tensors
from vladva import Embeddings, VladVA, VladVAConfig, next_token_loss

HEAD_CHUNK = 128  # rows of logits that exist at a time; more are slower on a CPU
RUN_FILES = ("config.json", "metrics.jsonl", "adapter.safetensors", "scores.json", "checkpoints")
MAY_CHANGE = ("out", "device", "num_workers", "save_every")  # when a run goes on


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on beside VladVAConfig. None: decided when the run starts."""

    model: str = flag("tiny", f"{', '.join(data.MODELS)}, a folder or a hub id")
    data: str = flag("scenes", "scenes (rendered ones), or a file of JSON lines")
    out: str | None = flag(None, "folder that the run writes (default: runs/<model>)")
    steps: int | None = flag(None, "optimizer steps (default: 140, or one epoch if longer)", low=1)
    epochs: float | None = flag(None, "passes over the data (default: as --steps says)", low=0)
    # second-hand notes on the paper: 1024
    batch_size: int = flag(64, "rows of a step, over all processes", low=2)
    micro_batch_size: int | None = flag(None, "rows of a forward (default: 4, 8 or 16)", low=1)
    gradient_caching: bool | None = flag(None, "two forwards, less memory (default: large models)")
    gradient_checkpointing: bool | None = flag(None, "recompute, less memory (default: small GPUs)")
    compile: bool = flag(False, "torch.compile the decoder's blocks and Eq. 2")
    shard: bool = flag(False, "split frozen weights over the processes, for models over one GPU")
    deterministic: bool = flag(False, "the same bytes each time on cuda as well, slower")
    # 2e-4 at width 4096 is LLaVA-1.5's LoRA recipe; the scaling and the factor 4 are ours
    lr: float | None = flag(None, "peak learning rate (default: 0.8192 / width)", low=0, high=1e30)
    soft_prompt_lr: float | None = None  # of soft prompts; None: 4 x lr
    warmup_ratio: float = flag(0.05, "share of the steps with a rising rate", low=0, high=1)
    max_grad_norm: float = 1.0  # a larger gradient is scaled down to this norm; ours
    seed: int = flag(0, "of adapter weights, data order and training scenes", low=0, high=2**32)
    device: str | None = flag(None, "cpu, cuda, ... (default: cuda if there is one)")
    dtype: str | None = flag(None, "weights (default: by device)", choices=("float32", "bfloat16"))
    num_workers: int | None = flag(None, "data workers (default: up to 8 on cuda)", low=0, high=256)
    save_every: int = flag(500, "steps between checkpoints; every 10 minutes as well", low=1)
    save_minutes: float = 10.0
    num_checkpoints: int = 2  # that are kept
    holdout: int | None = flag(None, "scenes or rows to measure on (default: up to 1000)", low=0)
    eval_every: int | None = flag(None, "steps between measurements (default: at the ends)", low=1)
    num_scenes: int = 20000  # training scenes to draw from
    eval_seed: int = 2000  # of the held-out scenes; settings were chosen on those of seed 1000

    def __post_init__(self):
        data.check_bounds(self)


def train(
    config: TrainConfig, method: VladVAConfig, resume: bool = False, open_rows: Callable = None
) -> dict:
    """Measure, adapt, measure again; returns what scores.json holds. open_rows: as open_data."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    torch.use_deterministic_algorithms(config.deterministic)
    device = data.init_distributed(config.device)
    dtype = DTYPES.get(config.dtype)
    model = VladVA.from_pretrained(config.model, None, device, dtype, method, config.shard)
    model.attach(config.seed)
    if config.shard:
        from extras.shard import shard_blocks

        shard_blocks(model)
    model.loss  # noqa: B018 - refuses a name that is none
    bad_rows = BadRows()
    rows, held_out = (open_rows or open_data)(config, model, bad_rows)
    # nothing is written before all that was asked for is known to be possible
    config = resolve(config, model, rows)
    trained = sum(p.numel() for p in model.trained_parameters().values())
    total = sum(p.numel() for p in model.parameters())
    with run_folder(config, method, resume) as out:
        say(f"{trained:,} parameters trained + {total - trained:,} frozen = {total:,}")
        say(f"{config.steps:,} steps of {config.batch_size} of the {len(rows):,} rows")
        bad_rows.write_to(out / "bad_rows.txt")
        # the untouched model, also where a run goes on
        with model.adapter_disabled():
            before = held_out.measure(model) if len(held_out) > 1 else None
        adapt(model, rows, held_out, bad_rows, config)
        say(f"written: {out}/adapter.safetensors")
        with torch.compiler.set_stance("force_eager"):
            return report(out, held_out, before, held_out.measure(model)) if before else {}


def adapt(
    model: VladVA, rows: data.Pairs, held_out: HeldOutPairs, bad_rows: BadRows, config: TrainConfig
) -> None:
    """The loop: one optimizer step of L = L_con + weight L_CE (paper Sec. 3.2.3) a batch."""
    out = Path(config.out)
    rank = rank_and_world_size()[0]
    prepare_blocks(model, config)
    optimizer = make_optimizer(model, config)
    done = load_checkpoint(out, model, optimizer)
    # a killed run may have written lines past its last checkpoint: those steps run again
    path = Path(os.devnull) if rank else out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:done] if done else []
    if path.is_file():  # cut in place: a kill between emptying and writing back would lose lines
        os.truncate(path, len("".join(lines).encode()))
    metrics = open(path, "a", encoding="utf-8", buffering=1)
    bar = tqdm(total=config.steps, initial=done, desc="adapting", disable=rank > 0 or None)
    began = saved = time.monotonic()
    with stoppable(out) as received, metrics, bar:
        loader = step_loader(model, rows, config, done + 1)
        for step, (micro_batches, where, bad) in enumerate(loader, start=done + 1):
            line = run_step(model, micro_batches, optimizer, step, config)
            # here, and not later: a broken model is never saved
            if not math.isfinite(line["loss"] + line["grad_norm"]):
                problem = f"loss {line['loss']} or gradient norm {line['grad_norm']} is not finite"
                names = ", ".join(where)[:800]
                raise ValueError(f"step {step}: {problem}; rows {names}; lower --lr")
            measured = len(held_out) > 1 and step % (config.eval_every or config.steps) == 0
            if measured and step < config.steps:
                with torch.compiler.set_stance("force_eager"):  # a cache is a graph for each block
                    line["held_out"] = held_out.measure(model).scores
            metrics.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=f"{line['loss']:.3f}")
            bar.update()
            if step == done + 5:
                minutes = (time.monotonic() - began) / 5 * (config.steps - step) / 60
                say(f"about {minutes:.0f} minutes to go ({minutes / 60:.1f} hours)")
            # all processes take the same decision to stop
            bad_rows.add(data.all_gather_strings(bad))
            num_signals = torch.tensor(len(received), device=model.lvlm.device)
            stopped = data.all_reduce_sum(num_signals).item()
            problem = bad_rows.problem(step * config.batch_size)
            # a checkpoint comes before anything that may end the run
            due = stopped or problem or time.monotonic() - saved > 60 * config.save_minutes
            due = due or step % config.save_every == 0 or step == config.steps
            if due and rank == 0:
                save_checkpoint(out, step, model, optimizer, config.num_checkpoints)
                saved = time.monotonic()
            if problem:
                raise ValueError(problem)
            if stopped and step < config.steps:
                say(f"stopped after step {step}; go on with: python train.py --out {out} --resume")
                raise SystemExit(130)
    if rank == 0:
        model.save_adapter(out)


# Returns the line of metrics.jsonl.
def run_step(model: VladVA, parts: list, optimizer: AdamW, step: int, config: TrainConfig) -> dict:
    start = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_scale(step, config)
    try:
        losses = train_step(model, parts, optimizer, config)
    except torch.OutOfMemoryError as error:
        remedy = f"--micro-batch-size is {config.micro_batch_size}: try half of it"
        raise ValueError(f"step {step}: {str(error).split(' GPU ')[0]} {remedy}") from None
    line = {"step": step} | {name: value.item() for name, value in losses.items()}
    line["lr"] = optimizer.param_groups[0]["lr"]
    line["step_s"] = time.perf_counter() - start
    line["tokens_per_s"] = sum(part.num_tokens for part in parts) / line["step_s"]
    line["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux: KiB
    if model.lvlm.device.type == "cuda":
        line["peak_bytes"] = torch.cuda.max_memory_allocated(model.lvlm.device)
    return line


def train_step(model: VladVA, micro_batches: list, optimizer: AdamW, config: TrainConfig) -> dict:
    """Gradients of one batch, clip, update. Returns 0-d tensors; nothing waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    contrastive, next_token = backward(model, micro_batches, config.gradient_caching)
    grad_norm = nn.utils.clip_grad_norm_(model.trained_parameters().values(), config.max_grad_norm)
    optimizer.step()
    loss = contrastive + model.config.next_token_weight * next_token
    return dict(loss=loss, contrastive=contrastive, next_token=next_token, grad_norm=grad_norm)


def backward(model: VladVA, micro_batches: list, gradient_caching: bool) -> tuple[Tensor, Tensor]:
    """The gradient of `model(batch).backward()` for the batch of all processes; (Eq. 1, Eq. 2)."""
    device = model.lvlm.device
    # Eq. 1 needs all embeddings at once, but its gradient reaches the model through them alone: the
    # chain rule may be cut there (gradient caching, Gao et al., 2021, arXiv 2101.06983). With
    # gradient_caching one micro-batch at a time holds activations, and runs twice

    # 1. the embeddings of all micro-batches: without a graph, if each is to run again
    outputs = []
    with torch.set_grad_enabled(not gradient_caching):
        for micro_batch in micro_batches:
            part = micro_batch.prefixes() if gradient_caching else micro_batch
            outputs.append(model.embed_batch(part.to(device)))

    # 2. Eq. 1 on the embeddings of all processes, and d loss / d embedding of this one's
    contrastive, gradients = embedding_gradients(model, [emb for emb, _ in outputs])
    num_tokens = sum(len(micro_batch.caption_targets) for micro_batch in micro_batches)
    if rank_and_world_size()[1] > 1:
        num_tokens = int(data.all_reduce_sum(torch.tensor(num_tokens, device=device)))
    if not contrastive.requires_grad and not num_tokens:
        raise ValueError("nothing to learn from in a batch: wanted 2 short captions, or a long one")

    # 3. each micro-batch with its graph: that gradient goes back together with Eq. 2's
    next_token = torch.zeros((), device=device)
    for micro_batch, (emb, caption_states), gradient in zip(micro_batches, outputs, gradients):
        if gradient_caching:
            emb, caption_states = model.embed_batch(micro_batch.to(device))
        targets = micro_batch.caption_targets.to(device)
        partial_loss, state_gradient = caption_gradient(model, caption_states, targets, num_tokens)
        next_token = next_token + partial_loss
        surrogate_loss = model.config.next_token_weight * (caption_states * state_gradient).sum()
        for part, part_gradient in zip(emb, gradient):
            surrogate_loss = surrogate_loss + (part * part_gradient).sum()
        if surrogate_loss.requires_grad:  # not of an empty micro-batch
            surrogate_loss.backward()

    # 4. the gradients of all processes add up; those of the loss's parameters are whole in each
    for name, p in model.trained_parameters().items():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if name.startswith("loss_parameters."):
            p.grad /= rank_and_world_size()[1]
        data.all_reduce_sum(p.grad)
    return contrastive.detach(), data.all_reduce_sum(next_token)


def embedding_gradients(model: VladVA, parts: list[Embeddings]) -> tuple[Tensor, list[Embeddings]]:
    """The embedding loss of all processes, and its gradient at each of this one's parts."""
    # image, text and further embeddings of the whole batch, the leaves of a small graph
    gathered = [data.all_gather_rows(torch.cat(column).detach()) for column in zip(*parts)]
    leaves = Embeddings(*(rows.requires_grad_() for rows, _ in gathered))
    loss = model.loss.function(model, leaves)
    if loss.requires_grad:
        loss.backward()
    # back into the micro-batches that this process's rows came from
    columns = []
    for (rows, first), column in zip(gathered, zip(*parts)):
        gradient = torch.zeros_like(rows) if rows.grad is None else rows.grad
        sizes = [len(part) for part in column]
        columns.append(gradient[first : first + sum(sizes)].split(sizes))
    return loss, [Embeddings(*gradients) for gradients in zip(*columns)]


def caption_gradient(
    model: VladVA, caption_states: Tensor, targets: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Eq. 2 of a micro-batch, a part of num_tokens, and its gradient at the states (M, D)."""
    # the graph is cut here as well: logits are (HEAD_CHUNK, V) at a time
    head_weight = model.lvlm.lm_head.weight
    states = caption_states.detach().requires_grad_()
    loss = torch.zeros((), device=states.device)
    for start in range(0, len(targets), HEAD_CHUNK):
        chunk = slice(start, start + HEAD_CHUNK)
        chunk_loss = model.next_token_loss(states[chunk], targets[chunk], head_weight, num_tokens)
        chunk_loss.backward()
        loss = loss + chunk_loss.detach()
    return loss, torch.zeros_like(states) if states.grad is None else states.grad


def make_optimizer(model: VladVA, config: TrainConfig) -> AdamW:
    """AdamW with a learning rate for each of the model's parameter groups."""
    groups = []
    for name, parameters in model.parameter_groups().items():
        rate = config.soft_prompt_lr if name == "soft_prompts" else config.lr
        groups.append({"params": list(parameters.values()), "lr": rate, "peak_lr": rate})
    return AdamW(groups, weight_decay=0.0, fused=model.lvlm.device.type != "meta")


def lr_scale(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step counted from 1: linear warm-up, cosine to 0."""
    warmup = max(1, round(config.warmup_ratio * config.steps))
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


# Gradient checkpointing block by block, and torch.compile of the blocks and Eq. 2.
def prepare_blocks(model: VladVA, config: TrainConfig) -> None:
    model.lvlm.decoder.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        # with or without gradients, first and last block, one row or several: over Dynamo's 8
        torch._dynamo.config.recompile_limit = 64
        for block in model.lvlm.decoder.layers:
            block.compile()
        model.next_token_loss = torch.compile(next_token_loss, dynamic=True)


class Steps:
    """Step number -> (micro-batches, names of their rows, what is wrong with rows left out)."""

    # What is random is a function of (seed, step): a run can go on.

    def __init__(self, model: VladVA, rows: data.Pairs, config: TrainConfig):
        self.model = model
        self.rows = rows
        self.config = config

    # A shuffle of all rows, in which neighbours of one group stay together.
    @functools.lru_cache(maxsize=1)  # noqa: B019 - one object a run
    def order(self, epoch: int) -> np.ndarray:
        size = self.rows.group_size
        rng = np.random.default_rng([self.config.seed, epoch])
        starts = rng.permutation(np.arange(0, len(self.rows), size))
        order = (starts[:, None] + np.arange(size)).reshape(-1)
        return order[order < len(self.rows)]

    # The caption depends on seed, epoch and row, not on which rows before it were replaced.
    def usable_row(self, index: int, epoch: int, bad: list[str]) -> dict:
        for number in (np.arange(index, index + 1000) % len(self.rows)).tolist():
            rng = random.Random(f"caption {self.config.seed} {epoch} {number}")
            try:
                return self.rows.row(number, rng)
            except data.BadRow as error:
                bad.append(str(error))
        raise ValueError(f"1000 rows in succession cannot be used; the last: {bad[-1]}")

    def __getitem__(self, step: int) -> tuple[list[data.TrainingBatch], list[str], list[str]]:
        rank, world_size = rank_and_world_size()
        size = self.config.batch_size
        # an epoch has no last incomplete batch; each process takes every n-th row of a batch
        epoch, place = divmod(step - 1, max(1, len(self.rows) // size))
        indices = self.order(epoch)[place * size :][:size].tolist()
        bad = []
        rows = [self.usable_row(index, epoch, bad) for index in indices[rank::world_size]]
        # longest first: what the shorter ones need then fits into memory that was used before
        rows.sort(key=lambda row: len(row["long"] or ""), reverse=True)
        micro_batches = []
        # all processes make equally many micro-batches; an empty one where a row is missing
        for start in range(0, -(-size // world_size), self.config.micro_batch_size):
            part = rows[start : start + self.config.micro_batch_size]
            micro_batches.append(self.model.training_batch(part))
        return micro_batches, [row["where"] for row in rows], bad


# torchrun signals all processes at once: those that make batches end with the one that trains.
def ignore_signals(worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def step_loader(model: VladVA, rows: data.Pairs, config: TrainConfig, first_step: int) -> Iterator:
    """What Steps has for `first_step` and on, made ahead if there are worker processes."""
    steps = Steps(model, rows, config)
    numbers = range(first_step, config.steps + 1)
    if not config.num_workers:
        return map(steps.__getitem__, numbers)
    # a step is one string of bytes in a pipe: a thousand tensors would be as many open files
    options = {"batch_size": None, "collate_fn": pickle.dumps, "worker_init_fn": ignore_signals}
    options |= {"num_workers": config.num_workers, "multiprocessing_context": "fork"}
    return map(pickle.loads, DataLoader(steps, sampler=numbers, prefetch_factor=1, **options))


def cuda_mode(memory: float) -> dict:
    """The settings by a card's bytes: with the least arithmetic of those that fit 7B."""
    if memory > 75e9:  # extras/plan.py counts both
        return {"micro_batch_size": 4, "gradient_checkpointing": False}
    return {"micro_batch_size": 8, "gradient_checkpointing": True}


def resolve(config: TrainConfig, model: VladVA, rows: data.Pairs) -> TrainConfig:
    """The config with everything decided that it leaves to the run."""
    world_size = rank_and_world_size()[1]
    batch_size = min(config.batch_size, len(rows))
    if batch_size < max(2, world_size):
        raise ValueError(f"a batch of {batch_size} rows: at least {max(2, world_size)} are needed")
    # how long: a number of steps or of epochs, or what shows an effect on the scenes
    steps_per_epoch = max(1, len(rows) // batch_size)
    steps = 140 if config.data == "scenes" else max(140, steps_per_epoch)
    if config.epochs is not None:
        if config.steps is not None:
            raise ValueError("--steps and --epochs: give one of them")
        steps = max(1, round(config.epochs * steps_per_epoch))
    lr = 2e-4 * 4096 / model.lvlm.config.decoder.hidden_size if config.lr is None else config.lr
    settings = {
        "out": f"runs/{Path(config.model).name}",
        "steps": steps,
        "micro_batch_size": 16,
        "gradient_caching": sum(p.numel() for p in model.parameters()) > 100e6,
        "gradient_checkpointing": False,
        "lr": lr,
        "soft_prompt_lr": 4 * lr,
        "num_workers": 0,
    }
    if model.lvlm.device.type == "cuda":
        settings |= cuda_mode(torch.cuda.get_device_properties(model.lvlm.device).total_memory)
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # a worker holds the float32 images of a step: 8 GB in all, of LLaVA's size
        step_bytes = 12 * model.lvlm.config.vision.image_size**2 * batch_size / world_size
        settings["num_workers"] = min(8, cores, max(1, int(8e9 / step_bytes)))
    # what was asked for comes first; a run that goes on finds steps here, and no epochs
    settings |= {name: value for name, value in vars(config).items() if value is not None}
    settings |= {"batch_size": batch_size, "epochs": None, "device": str(model.lvlm.device)}
    settings["dtype"] = str(model.lvlm.dtype).removeprefix("torch.")
    return replace(config, **settings)


# ----------------------------------------------------------------------------- a run's folder


# Its list notes SIGTERM and SIGINT, so that the step is finished and saved before the run stops.
# What ends the loop otherwise names the checkpoint to go on from.
@contextlib.contextmanager
def stoppable(out: Path) -> Iterator[list]:
    received = []
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT):
            handler = signal.signal(number, lambda number, frame: received.append(number))
            stack.callback(signal.signal, number, handler)
        try:
            yield received
        except (ValueError, OSError) as error:
            saved = checkpoints(out)
            last = f"the last checkpoint is {saved[-1]}" if saved else f"no checkpoint in {out}"
            raise ValueError(f"{error}; {last}") from error


# Of a run, oldest first; all are whole.
def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-??????.safetensors"))


def save_checkpoint(out: Path, step: int, model: VladVA, optimizer: AdamW, keep: int) -> None:
    """Write what is trained and AdamW's state of it. No random state is needed (see Steps)."""
    tensors = {}
    for name, p in model.trained_parameters().items():
        for kind, value in {"value": p, **optimizer.state[p]}.items():
            tensors[f"{name}.{kind}"] = value.detach().cpu().contiguous()
    folder = out / "checkpoints"
    folder.mkdir(exist_ok=True)
    data.write_tensors(folder / f"step-{step:06d}.safetensors", tensors)
    # the older ones go when this one is whole
    for old in checkpoints(out)[:-keep]:
        old.unlink()


def load_checkpoint(out: Path, model: VladVA, optimizer: AdamW) -> int:
    """Put the last checkpoint of OUT into model and optimizer; returns its step, or 0."""
    if not checkpoints(out):
        return 0
    path = checkpoints(out)[-1]
    tensors, _ = read_tensors(path)
    # all shapes first: a wrong one in AdamW's state would crash its kernel
    wanted = {}
    for name, p in model.trained_parameters().items():
        wanted |= {f"{name}.{kind}": p for kind in ("value", "exp_avg", "exp_avg_sq")}
        wanted[f"{name}.step"] = torch.zeros(())
    check_shapes(tensors, wanted, f"{path} does not fit this run")
    for name, p in model.trained_parameters().items():
        p.data.copy_(tensors[f"{name}.value"])
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            optimizer.state[p][kind] = tensors[f"{name}.{kind}"].to(p.device)
    return int(path.stem.removeprefix("step-"))


@contextlib.contextmanager
def run_folder(config: TrainConfig, method: VladVAConfig, resume: bool) -> Iterator[Path]:
    """OUT with its config.json, this run's alone inside the context; refuses that of another."""
    out = Path(config.out)
    run = vars(config) | vars(method)
    with contextlib.ExitStack() as stack:
        if rank_and_world_size()[0] == 0:
            out.mkdir(parents=True, exist_ok=True)
            # a lock of the system on the folder itself: a kill frees it too
            folder = os.open(out, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{out} is in use by another run: choose another --out") from None
            if not resume and any((out / name).exists() for name in RUN_FILES):
                raise ValueError(f"{out} holds another run: --resume it, or choose another --out")
            if not resume:
                write_json(out / "config.json", run | {"torch": torch.__version__})
        say("  ".join(f"{name}={value!r}" for name, value in run.items()))
        yield out


def configs_from_flags(flags: dict) -> tuple[TrainConfig, VladVAConfig]:
    """(TrainConfig, VladVAConfig) of {field: value}; other fields keep their defaults."""
    config = from_json(TrainConfig, flags, "train", extra=True)
    return config, from_json(VladVAConfig, flags, "method", extra=True)


def read_run(flags: dict) -> tuple[TrainConfig, VladVAConfig]:
    """The configs of the run in OUT that goes on; a flag that says otherwise is refused."""
    out = flags.get("out") or f"runs/{Path(flags.get('model', TrainConfig.model)).name}"
    run = read_json(Path(out) / "config.json")
    missing = {f.name for f in (*fields(TrainConfig), *fields(VladVAConfig))} - run.keys()
    if missing:
        raise ValueError(f"{out}/config.json is no run's: it lacks {', '.join(sorted(missing))}")
    for name, value in flags.items():
        if name not in MAY_CHANGE and run.get(name) != value:
            raise ValueError(f"{out} cannot go on: {name} was {run.get(name)!r}, not {value!r}")
    return configs_from_flags(run | {"device": None} | flags | {"out": out})


def build_parser() -> argparse.ArgumentParser:
    parser = data.Parser("train.py", description="Adapt an LVLM to embed (VladVA).")
    data.add_config_flags(parser, TrainConfig)
    data.add_config_flags(parser, VladVAConfig)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    return parser


@data.command
def main(argv: list[str] | None = None) -> dict:
    flags = vars(build_parser().parse_args(argv))
    resume = flags.pop("resume")
    config, method = read_run(flags) if resume else configs_from_flags(flags)
    return train(config, method, resume)


if __name__ == "__main__":
    main()
