"""The paper's metrics and benchmarks: retrieval, SugarCrepe(++), Winoground, ImageNet.

    python eval.py --task coco --folder DIR --model llava-1.5-7b --adapter runs/mine --json o.json
    torchrun --nproc-per-node 8 eval.py --task coco --folder DIR ...  # encoding is shared out
    python eval.py --task coco --folder DIR --embeddings clip.npz  # the metrics of any system
    python eval.py --task paper o.json ...  # the paper's tables, with results of earlier runs

Metrics take embeddings, not models. A benchmark is a reader in BENCHMARKS; docs/extending.md adds
one. Not here: rendered scenes (extras/scenes.py), figures (extras/studies.py).
"""

import argparse
import functools
import itertools
import os
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

import data
from data import format_table, rank_and_world_size, say
from model import check_supported, parse_json, read_json
from vladva import VladVA, load_model, next_token_loss, similarity

# ------------------------------------------------------------------------- metrics, in percent


# A tie is a miss: scores are compared strictly everywhere.
def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def retrieval_ranks(image_emb: Tensor, text_emb: Tensor, image_of_text: Tensor) -> tuple:
    """Rank of each text's image (B,), and of the best text of each image (A,); 0 is the best.

    image_emb: (A, D); text_emb: (B, D); image_of_text: (B,) the image that each text belongs to.
    The rank of a text's image is the number of other images that score at least as high for the
    text: a tie counts against the model. That of an image's texts is the number of other images'
    texts that score at least as high as the best of its own.
    """
    sim = similarity(image_emb, text_emb)  # (A, B)
    texts = torch.arange(len(text_emb))
    score = sim[image_of_text, texts]  # (B,), of a text with its own image, which is no rival
    image_ranks = (sim >= score).sum(0) - 1
    # the best of an image's own texts, and then how many of others are not below it
    best_score = torch.full_like(sim[:, 0], -torch.inf)
    best_score.scatter_reduce_(0, image_of_text, score, "amax")  # (A,)
    sim[image_of_text, texts] = -torch.inf
    return image_ranks, (sim >= best_score[:, None]).sum(1)


def recall(
    image_emb: Tensor, text_emb: Tensor, image_of_text: Tensor, ks: tuple = (1, 5, 10)
) -> dict:
    """{"image_to_text R@1": percent, ..., "text_to_image R@1": ...}; arguments: retrieval_ranks."""
    image_ranks, text_ranks = retrieval_ranks(image_emb, text_emb, image_of_text)
    text_ranks = text_ranks[image_of_text.unique()]  # of the images that have a text
    scores = {f"image_to_text R@{k}": percent(text_ranks < k) for k in ks}
    return scores | {f"text_to_image R@{k}": percent(image_ranks < k) for k in ks}


def negative_accuracy(positive: Tensor, negative: Tensor) -> float:
    """SugarCrepe: items (n,) whose true caption scores strictly higher than the false one."""
    return percent(positive > negative)


def paraphrase_accuracy(image: Tensor, first: Tensor, second: Tensor, false: Tensor) -> dict:
    """SugarCrepe++: embeddings (n, D) of images, two true captions and a false one.

    ITT: the image is nearer to both true captions than to the false one. TOT: the true captions are
    nearer to each other than either is to the false one. Strictly.
    """
    true_pair = (first * second).sum(-1)  # cosines, (n,)
    to_false = (image * false).sum(-1)
    itt = ((image * first).sum(-1) > to_false) & ((image * second).sum(-1) > to_false)
    tot = (true_pair > (first * false).sum(-1)) & (true_pair > (second * false).sum(-1))
    return {"ITT": percent(itt), "TOT": percent(tot)}


def winoground_scores(sim: Tensor) -> dict:
    """Winoground's text, image and group score. sim: (n, 2, 2), [item, image, caption]."""
    text = (sim[:, 0, 0] > sim[:, 0, 1]) & (sim[:, 1, 1] > sim[:, 1, 0])
    image = (sim[:, 0, 0] > sim[:, 1, 0]) & (sim[:, 1, 1] > sim[:, 0, 1])
    return {"text": percent(text), "image": percent(image), "group": percent(text & image)}


def class_accuracy(
    image_emb: Tensor, prompt_emb: Tensor, label: Tensor, ks: tuple = (1, 5)
) -> dict:
    """Zero-shot classification, {"top-1": percent, ...}. label: (A,) class of each image.

    prompt_emb: (templates, classes, D): a class is the mean of its prompts, normalised again.
    """
    classes = F.normalize(prompt_emb.mean(0), dim=-1)
    # as in CLIP's code: of classes that tie, such as two of one name, the first is taken
    order = similarity(image_emb, classes).argsort(dim=1, descending=True, stable=True)
    hits = order == label[:, None]  # (A, classes), best first
    return {f"top-{k}": percent(hits[:, :k].any(1)) for k in ks}


# ---------------------------------------------------------------------------------- benchmarks


@dataclass(frozen=True)
class Benchmark:
    """Images and texts, each once, and what is asked of their embeddings."""

    images: Sequence  # what VladVA.encode_image takes
    texts: list[str]
    score: Callable  # (image_emb, text_emb) -> {name as in the paper's tables: percent}
    counts: dict[str, int]  # what there is of what, for the reader


def retrieval(images: Sequence, captions: list[list[str]]) -> Benchmark:
    """Images, each with the list of its captions."""
    texts = list(itertools.chain(*captions))
    image_of_text = torch.tensor([index for index, group in enumerate(captions) for _ in group])
    score = functools.partial(recall, image_of_text=image_of_text)
    return Benchmark(images, texts, score, {"images": len(images), "captions": len(texts)})


GROUPS = {  # categories of SugarCrepe, whose plain means the paper's Table 4 reports
    "Replace": ("replace_obj", "replace_att", "replace_rel"),
    "Swap": ("swap_obj", "swap_att"),
    "Add": ("add_obj", "add_att"),
}


def category_scores(items: dict, groups: dict, image_emb: Tensor, text_emb: Tensor) -> dict:
    """Scores of hard negatives: of each category, and the mean of each group.

    items: {category: [(image index, true text, false text) or (image index, true text, the same in
    other words, false text), ...]}; groups: {group: its categories}.
    """
    scores = {}
    for category, rows in items.items():
        index = torch.tensor(rows).T
        image = image_emb[index[0]]  # (n, D)
        texts = text_emb[index[1:]]  # (2 or 3, n, D)
        if len(texts) == 3:
            for name, value in paraphrase_accuracy(image, *texts).items():
                scores[f"{category} {name}"] = value
        else:
            true, false = (image * texts).sum(-1)
            scores[category] = negative_accuracy(true, false)
    # the plain means, however many items a category has
    for group, categories in groups.items():
        for suffix in ("", " ITT", " TOT"):
            values = [scores[name + suffix] for name in categories if name + suffix in scores]
            if values:
                scores[group + suffix] = sum(values) / len(values)
    return scores


FOLDERS = ("", "data", "annotations", "images", "val2017", "val2014", "val", "flickr30k-images")


@dataclass(frozen=True)
class Folder:
    """A benchmark's files; what is missing is named together with the place of publication."""

    root: Path
    task: str
    source: str  # the place of publication
    images: str | None = None  # the folder that images may lie in; None: root

    def refuse(self, problem: str) -> typing.NoReturn:
        raise ValueError(f"{self.root}: {problem}; {self.task} is published at {self.source}")

    # the first of some names that is there
    def file(self, *names: str, kind: str = "file") -> Path:
        for folder, name in itertools.product(FOLDERS, names):
            path = os.path.join(folder, name)
            if os.path.isfile(self.root / path):
                return data.inside(self.root, path, self.images)
        self.refuse(f"{kind} {names[0]} not found, nor in {', '.join(FOLDERS[1:])}")

    def image(self, *names: str) -> Path:
        return self.file(*names, kind="image")

    def json(self, name: str) -> dict | list:
        return read_json(self.file(name), dict | list)


# One space between words, none at the ends: in SugarCrepe stray ones mark the true captions.
def clean_text(text: str) -> str:
    return " ".join(text.split())


# Flickr30k or COCO in Karpathy's split, test part; of COCO's captions the first five by custom.
def read_karpathy(folder: Folder, args: argparse.Namespace) -> Benchmark:
    limit = 5 if args.captions is None else args.captions or None
    images = []
    captions = []
    rows = folder.json(f"dataset_{args.task}.json")["images"]
    for row in [row for row in rows if row["split"] == "test"]:
        names = [row["filename"]]
        if "cocoid" in row:
            names = [f"{row['filepath']}/{names[0]}", *names, f"{row['cocoid']:012d}.jpg"]
        images.append(folder.image(*names))
        captions.append([clean_text(line["raw"]) for line in row["sentences"][:limit]])
    return retrieval(images, captions)


# Inside each domain, their plain mean as the paper reports it, and in the whole.
def read_nocaps(folder: Folder, args: argparse.Namespace) -> Benchmark:
    # captions name the id of their image, whose file name stands elsewhere in the file
    raw = folder.json("nocaps_val_4500_captions.json")
    captions_of = {row["id"]: [] for row in raw["images"]}
    for row in raw["annotations"]:
        captions_of[row["image_id"]].append(clean_text(row["caption"]))
    images = [folder.image(row["file_name"]) for row in raw["images"]]
    captions = [captions_of[row["id"]][: args.captions or None] for row in raw["images"]]
    domain_of = [row["domain"].split("-")[0] for row in raw["images"]]
    domains = sorted(set(domain_of))
    if domains != ["in", "near", "out"]:
        folder.refuse(f"domains {domains}, wanted in, near and out")
    whole = retrieval(images, captions)

    def score(image_emb: Tensor, text_emb: Tensor) -> dict:
        texts = text_emb.split(list(map(len, captions)))  # by image
        scores = {}
        for domain in domains:
            part = [index for index, name in enumerate(domain_of) if name == domain]
            domain_emb = image_emb[part], torch.cat([texts[i] for i in part])
            domain_scores = retrieval(part, [captions[i] for i in part]).score(*domain_emb)
            scores |= {f"{domain}-domain {name}": score for name, score in domain_scores.items()}
        for name, value in whole.score(image_emb, text_emb).items():
            scores[name] = sum(scores[f"{domain}-domain {name}"] for domain in domains) / 3
            scores[f"whole gallery {name}"] = value
        return scores

    counts = {f"{domain}-domain": domain_of.count(domain) for domain in domains}
    return Benchmark(images, whole.texts, score, whole.counts | counts)


# SugarCrepe and SugarCrepe++, a file a category; the second has no Add, and two true captions.
def read_hard_negatives(folder: Folder, args: argparse.Namespace) -> Benchmark:
    fields = ("caption", "negative_caption")
    groups = GROUPS
    if args.task == "sugarcrepe_pp":
        fields = ("caption", "caption2", "negative_caption")
        groups = {group: GROUPS[group] for group in ("Replace", "Swap")}
    images = {}  # {path: index}: what stands in several items is encoded once
    texts = {}
    items = {}
    for category in itertools.chain(*groups.values()):
        rows = folder.json(f"{category}.json")
        items[category] = []
        for row in rows.values() if isinstance(rows, dict) else rows:  # SugarCrepe's keys have gaps
            captions = [clean_text(row[field]) for field in fields]
            item = [images.setdefault(folder.image(row["filename"]), len(images))]
            item += [texts.setdefault(text, len(texts)) for text in captions]
            items[category].append(item)
    counts = {category: len(rows) for category, rows in items.items()}
    score = functools.partial(category_scores, items, groups)
    return Benchmark(list(images), list(texts), score, counts)


# Two images and two captions of the same words an item.
def read_winoground(folder: Folder, args: argparse.Namespace) -> Benchmark:
    images = []
    texts = []
    for line in folder.file("examples.jsonl").read_bytes().splitlines():
        row = parse_json(line, f"{folder.root}/examples.jsonl")
        for index in (0, 1):
            name = row[f"image_{index}"]
            images.append(folder.image(name, f"{name}.png", f"{name}.jpg"))
            texts.append(clean_text(row[f"caption_{index}"]))

    def score(image_emb: Tensor, text_emb: Tensor) -> dict:
        sim = image_emb.unflatten(0, (-1, 2)) @ text_emb.unflatten(0, (-1, 2)).transpose(1, 2)
        return winoground_scores(sim)  # (items, 2, 2)

    return Benchmark(images, texts, score, {"items": len(images) // 2})


# Class names stand in the order of the sorted WordNet ids.
def read_imagenet(folder: Folder, args: argparse.Namespace) -> Benchmark:
    names, templates = map(read_json(args.classes).get, ("classnames", "templates"))
    for texts in (names, templates):
        if not isinstance(texts, list) or {*map(type, texts)} != {str}:
            raise ValueError(f"{args.classes}: wanted lists of texts, classnames and templates")
    templates = ["a photo of a {}."] if args.templates == "one" else templates
    root = folder.root / "val" if (folder.root / "val").is_dir() else folder.root
    class_folders = sorted(path for path in root.iterdir() if path.is_dir())
    if len(class_folders) != len(names):
        folder.refuse(f"{len(class_folders)} class folders, but {args.classes} names {len(names)}")
    images = []
    labels = []
    for label, class_folder in enumerate(class_folders):
        images += sorted(class_folder.iterdir())
        labels += [label] * (len(images) - len(labels))
    texts = [template.replace("{}", name) for template in templates for name in names]

    def score(image_emb: Tensor, text_emb: Tensor) -> dict:
        prompt_emb = text_emb.unflatten(0, (len(templates), -1))
        return class_accuracy(image_emb, prompt_emb, torch.tensor(labels))

    counts = {"images": len(images), "classes": len(names), "templates": len(templates)}
    return Benchmark(images, texts, score, counts)


KARPATHY = "cs.stanford.edu/people/karpathy/deepimagesent"
BENCHMARKS = {  # task: its reader, and where its files are published
    "flickr30k": (read_karpathy, f"{KARPATHY}; images: shannon.cs.illinois.edu/DenotationGraph"),
    "coco": (read_karpathy, f"{KARPATHY}; images (val2014): cocodataset.org"),
    "nocaps": (read_nocaps, "nocaps.org"),
    "sugarcrepe": (read_hard_negatives, "github.com/RAIVNLab/sugar-crepe; images: cocodataset.org"),
    "sugarcrepe_pp": (read_hard_negatives, "github.com/Sri-Harsha/scpp; images: cocodataset.org"),
    "winoground": (read_winoground, "huggingface.co/datasets/facebook/winoground"),
    "imagenet": (read_imagenet, "image-net.org; class names: --classes"),
}


# One clear line where a file is not as it was published.
def read_benchmark(args: argparse.Namespace) -> Benchmark:
    reader, source = BENCHMARKS[args.task]
    folder = Folder(Path(args.folder), args.task, source, args.images)
    if not folder.root.is_dir():
        folder.refuse("no such folder")
    try:
        benchmark = reader(folder, args)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        folder.refuse(f"a file is not in the published format ({type(error).__name__}: {error})")
    if 0 in benchmark.counts.values():
        folder.refuse(f"it holds no images, or no captions, of the test split: {benchmark.counts}")
    return benchmark


def embed_benchmark(model: VladVA, benchmark: Benchmark) -> tuple[Tensor, Tensor]:
    """(image_emb, text_emb) of a benchmark, on the host; each process encodes its share."""
    rank, world_size = rank_and_world_size()
    embeddings = []
    # the texts first: one that cannot be used is refused before hours of work on the images
    jobs = [(model.encode_text, benchmark.texts), (model.encode_image, benchmark.images)]
    for encode, items in jobs:
        # equally many, as --shard wants equally many forwards: the last item fills up
        size = -(-len(items) // world_size)
        share = np.arange(rank * size, (rank + 1) * size).clip(max=len(items) - 1)
        rows, _ = data.all_gather_rows(encode(Subset(items, share.tolist())))
        embeddings.append(rows[: len(items)].cpu())
    return embeddings[1], embeddings[0]


# ------------------------------------------------- rows left out of training, for good or bad


@dataclass(frozen=True)
class Measured:
    """What is known of a model before or after adaptation."""

    scores: dict  # {name: percent}
    sim: Tensor  # (images, captions) of the retrieval gallery
    caption_loss: float | None = None  # Eq. 2 on held-out long captions, nats per token


@torch.no_grad()
def mean_caption_loss(model: VladVA, images: list, captions: list, batch_size: int = 32) -> float:
    """Eq. 2 on held-out long captions, in nats per token, shared out over the processes."""
    rank, world_size = rank_and_world_size()
    device = model.lvlm.device
    total = torch.zeros(2, dtype=torch.float64)  # loss, tokens: captions differ in length
    # equally many here too: images without a caption fill up
    captions = captions + [None] * (-len(captions) % world_size)
    share = range(rank, len(captions), world_size)
    for part in data.batches(share, batch_size, "reading long captions"):
        opened = [data.open_image(images[i % len(images)]) for i in part]
        for few in model.image_processor.split(opened):
            pixels, batch = model.image_batch(opened[few], [captions[i] for i in part[few]])
            _, states = model.hidden_states(batch.to(device), "image", pixels.to(device))
            targets = batch.caption_targets.to(device)
            loss = next_token_loss(states, targets, model.lvlm.lm_head.weight, total=1)
            total += torch.tensor([loss.item(), len(targets)])
    loss, tokens = data.all_reduce_sum(total.to(device)).tolist()
    return loss / tokens if tokens else None


class BadRows:
    """Rows that cannot be used, named once; all processes hold the list, the first one prints."""

    def __init__(self):
        self.path = os.devnull
        self.messages = []
        self.rows_tried = 0  # by hold_out, before training

    # List them in a file from now on, behind those of a run that was interrupted
    def write_to(self, path: Path) -> None:
        before = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        self.messages = list(dict.fromkeys(before + self.messages))
        if self.messages and rank_and_world_size()[0] == 0:
            data.write_text(path, "\n".join([*self.messages, ""]))
        self.path = path if rank_and_world_size()[0] == 0 else os.devnull

    def add(self, messages: list[str]) -> None:
        """Name and list those that are new."""
        for message in messages:
            # one line of text: names of files may hold bytes that are none
            line = " ".join(message.split())[:500].encode(errors="backslashreplace").decode()
            if line not in self.messages:
                self.messages.append(line)
                say(f"left out: {line}", file=sys.stderr)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(f"{line}\n")

    # What ends a run, or None; rows_seen: beside those that hold_out tried.
    def problem(self, rows_seen: int) -> str | None:
        count = len(self.messages)
        rows_seen += self.rows_tried
        if count <= max(3, rows_seen / 100):
            return None
        return f"{count} of {rows_seen} rows cannot be used; the last: {self.messages[-1]}"


def hold_out(pairs: data.Pairs, count: int, bad_rows: BadRows) -> list[dict]:
    """Take up to `count` random rows with short captions out of the file's; images as paths."""
    rows = {}
    # a file may have 8 million rows and no short caption: not all of them are tried
    order = np.random.default_rng(list(b"holdout")).permutation(len(pairs))[: 20 * count]
    for index in order.tolist():
        if len(rows) == count:
            break
        bad_rows.rows_tried += 1
        # the image is opened too: what cannot be decoded cannot be measured
        try:
            if pairs.row(index, Random(0))["short"]:
                rows[index] = pairs.parse(index)
        except data.BadRow as error:
            bad_rows.add([str(error)])
            if problem := bad_rows.problem(0):
                raise ValueError(problem) from None
    # training does not see them
    pairs.numbers = np.delete(pairs.numbers, list(rows))
    return list(rows.values())


class HeldOutPairs:
    """Rows of a pairs file as a retrieval benchmark: image i and its first short caption."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        captions = [row["short"][:1] for row in rows]
        self.benchmark = retrieval([row["image"] for row in rows], captions)
        self.chance = {}
        for direction, k in itertools.product(("image_to_text", "text_to_image"), (1, 5, 10)):
            self.chance[f"{direction} R@{k}"] = min(100.0, 100 * k / max(1, len(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def measure(self, model: VladVA) -> Measured:
        image_emb, text_emb = embed_benchmark(model, self.benchmark)
        scores = self.benchmark.score(image_emb, text_emb)
        # Eq. 2 takes longer than all embeddings: on the first 300 long captions
        described = [row for row in self.rows if row["long"]][:300]
        captions = [row["long"] for row in described]
        caption_loss = mean_caption_loss(model, [row["image"] for row in described], captions)
        return Measured(scores, similarity(image_emb, text_emb), caption_loss)


def open_data(config: typing.Any, model: VladVA, bad_rows: BadRows) -> tuple:
    """(rows to train on, what is held out), of scenes or a pairs file. config: TrainConfig."""
    if config.data == "scenes":
        from extras import scenes

        return scenes.open_scenes(config, model)
    pairs = data.Pairs(config.data, model.tokenizer)
    count = min(1000, len(pairs) // 10) if config.holdout is None else config.holdout
    if count > len(pairs) - 2:
        raise ValueError(f"--holdout {count} leaves fewer than 2 of {len(pairs)} rows to train on")
    return pairs, HeldOutPairs(hold_out(pairs, count, bad_rows))


# Of the scores that `chance` names, with chance beside them.
def score_table(columns: dict[str, Measured], chance: dict[str, float]) -> str:
    rows = []
    for name, by_chance in chance.items():
        values = [f"{measured.scores[name]:.1f}" for measured in columns.values()]
        rows.append([name.replace("_", " "), f"{by_chance:.1f}", *values])
    losses = [measured.caption_loss for measured in columns.values()]
    if None not in losses:
        rows.append(["long captions, nats a token", "", *map("{:.3f}".format, losses)])
    return format_table(["percent", "chance", *columns], rows)


def report(out: Path, held_out: HeldOutPairs, before: Measured, after: Measured) -> dict:
    """Print the table before / after; write OUT/scores.json, which is returned, and report.png."""
    columns = {"before": before, "after": after}
    say(score_table(columns, held_out.chance))
    scores = {k: {"scores": m.scores, "caption_loss": m.caption_loss} for k, m in columns.items()}
    if rank_and_world_size()[0] == 0:
        from extras.plots import draw_report

        data.write_json(out / "scores.json", scores)
        draw_report(out, held_out, before, after)
    return scores


# --------------------------------------------------------------------------- the paper's tables

ASSETS = Path(__file__).resolve().parent / "assets"


# {task: {row of the paper's table: {score: percent, or None where it could not be read}}}
def paper_tables() -> dict[str, dict[str, dict]]:
    tables = {}
    for task, table in read_json(ASSETS / "paper.json")["tasks"].items():
        tables[task] = {row["model"]: row["scores"] for row in table["rows"]}
    return tables


def format_score(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f}"


# Ours, the paper's row of that name, and the difference; what is missing on a side is "-".
def comparison_table(task: str, scores: dict, name: str | None) -> str:
    printed = paper_tables().get(task, {}).get(name, {})
    rows = []
    for key in scores | printed:
        ours = scores.get(key)
        theirs = printed.get(key)
        both = None if ours is None or theirs is None else ours - theirs
        values = [format_score(ours), format_score(theirs), format_score(both, "+")]
        rows.append([key.replace("_", " "), *values])
    column = f"paper: {name}" if printed else "paper: no such row"
    return format_table([task, "ours", column, "difference"], rows)


# The paper's tables, and behind each the results of earlier runs (--json files).
def print_paper(files: list[str]) -> None:
    results = [{"task": None, "paper_row": None, "scores": 0} | read_json(file) for file in files]
    for file, run in zip(files, results):
        check_supported(run, {"task": tuple(paper_tables())}, file)
        check_supported(run["scores"], {}, f"{file}: scores")
        kinds = {name: type(value) for name, value in run["scores"].items()}
        check_supported(kinds, dict.fromkeys(kinds, (int, float)), f"{file}: scores")
    for task, table in paper_tables().items():
        ours = {str(run["paper_row"]): run["scores"] for run in results if run["task"] == task}
        keys = list(next(iter(table.values())))
        rows = []
        for name, printed in table.items():
            state = "below" if name in ours else "not run"
            rows.append([name, *(format_score(printed.get(key)) for key in keys), state])
        say("\n" + format_table([task, *(key.replace("_", " ") for key in keys), "ours"], rows))
        for name, scores in ours.items():
            say("\n" + comparison_table(task, scores, name))


def build_parser() -> argparse.ArgumentParser:
    parser = data.Parser("eval.py", description="Benchmarks of a model or embeddings.")
    add = parser.add_argument
    add("files", nargs="*", metavar="RESULT.json", help="results of earlier runs, for --task paper")
    add("--task", required=True, choices=[*BENCHMARKS, "paper"], help="which benchmark")
    add("--folder", default=".", help="its files, as they are published (default: .)")
    add("--images", metavar="DIR", help="images may lie in this folder (default: as --folder)")
    data.add_model_flags(parser)
    add("--embeddings", metavar="FILE.npz", help="score these (default: those of the model)")
    add("--save-embeddings", metavar="FILE.npz", help="also write the embeddings (default: no)")
    add("--json", metavar="FILE", help="also write the scores (default: no)")
    add("--row", help="row of the paper's table to compare with, see --task paper (default: none)")
    add("--captions", type=int, help="of an image, at most; 0: all (default: 5; nocaps: all)")
    add("--templates", choices=("one", "all"), default="one", help="of ImageNet (default: one)")
    classes = ASSETS / "imagenet" / "openai_imagenet_prompts.json"
    add("--classes", default=str(classes), help="ImageNet's names and templates (default: CLIP's)")
    return parser


@data.command
def main(argv: list[str] | None = None) -> dict | None:
    from extras import embeddings

    args = build_parser().parse_args(argv)
    if args.task == "paper":
        return print_paper(args.files)
    if args.row is not None and args.row not in paper_tables().get(args.task, {}):
        raise ValueError(f"--row {args.row!r} is no row of the paper's table: see --task paper")
    if args.captions is not None and args.captions < 0:
        raise ValueError(f"--captions is {args.captions}: wanted 0 (all) or more")
    # images and texts, their embeddings, the scores
    benchmark = read_benchmark(args)
    if args.embeddings:
        image_emb, text_emb = embeddings.load(args.embeddings, benchmark)
    else:
        model = load_model(args)
        # what cannot be written is refused before the work, not after it
        for path in filter(None, (args.json, args.save_embeddings)):
            open(path, "ab").close()
        try:
            image_emb, text_emb = embed_benchmark(model, benchmark)
        except ValueError as error:
            raise ValueError(f"{args.folder}: {error}") from None
    scores = benchmark.score(image_emb, text_emb)
    say(comparison_table(args.task, scores, args.row))
    counts = ", ".join(f"{count:,} {kind}" for kind, count in benchmark.counts.items())
    say(f"{counts}; a tie is a miss (of classes that tie, the first is taken, as in CLIP's code)")
    # for a table of results, or another reader
    results = {"task": args.task, "model": args.model, "adapter": args.adapter}
    results |= {"paper_row": args.row, "scores": scores, "counts": benchmark.counts}
    if rank_and_world_size()[0] == 0:
        if args.save_embeddings:
            embeddings.save(args.save_embeddings, benchmark, image_emb, text_emb)
        if args.json:
            data.write_json(args.json, results)
    return results


if __name__ == "__main__":
    main()
