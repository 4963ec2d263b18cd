"""The paper's metrics and benchmarks: retrieval, SugarCrepe(++), Winoground, ImageNet.

    python eval.py --task coco --folder DIR --model llava-1.5-7b --adapter runs/mine --json o.json
    torchrun --nproc-per-node 8 eval.py --task coco --folder DIR ...  # encoding is shared out
    python eval.py --task coco --folder DIR --embeddings clip.npz  # the metrics of any system
    python eval.py --task paper o.json ...  # the paper's tables, with results of earlier runs

Metrics take embeddings, not models. A benchmark is a reader in BENCHMARKS: docs/evaluation.md says
which files it wants; docs/extending.md adds one.

Not here: the scenes of the embedded default (extras/scenes.py), figures (extras/studies.py).
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

import data
from data import all_gather_rows, all_reduce_sum, format_table, rank_and_world_size, say
from model import read_json, write_json
from vladva import VladVA, load_model, next_token_loss, similarity

# ------------------------------------------------------------------------- metrics, in percent


# A tie is a miss: scores are compared strictly everywhere.
def percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def retrieval_ranks(
    image_emb: Tensor, text_emb: Tensor, image_of_text: Tensor, block: int = 2048
) -> tuple[Tensor, Tensor]:
    """Rank of each text's image (B,), and of the best text of each image (A,); 0 is the best.

    image_emb: (A, D); text_emb: (B, D); image_of_text: (B,) the image that each text belongs to.
    The rank of a text's image is the number of other images that score at least as high for the
    text: a tie counts against the model. That of an image's texts is the number of other images'
    texts that score at least as high as the best of its own. `block` texts are compared at once.
    """
    blocks = [slice(start, start + block) for start in range(0, len(text_emb), block)]
    # for each text: how many images score at least as high as its own, which is one of them
    image_ranks = []
    best_score = torch.full((len(image_emb),), -torch.inf, dtype=image_emb.dtype)  # (A,)
    for texts in blocks:
        sim = similarity(image_emb, text_emb[texts])  # (A, block)
        score = sim.gather(0, image_of_text[texts][None])[0]  # (block,), with its own image
        image_ranks.append((sim >= score).sum(0) - 1)
        best_score.scatter_reduce_(0, image_of_text[texts], score, "amax")
    # for each image: how many texts of others score at least as high as the best of its own
    text_ranks = torch.zeros(len(image_emb), dtype=torch.long)
    for texts in blocks:
        sim = similarity(image_emb, text_emb[texts])
        sim.scatter_(0, image_of_text[texts][None], -torch.inf)
        text_ranks += (sim >= best_score[:, None]).sum(1)
    return torch.cat(image_ranks), text_ranks


def recall(image_emb: Tensor, text_emb: Tensor, image_of_text: Tensor, ks=(1, 5, 10)) -> dict:
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


def class_accuracy(image_emb: Tensor, prompt_emb: Tensor, label: Tensor, ks=(1, 5)) -> dict:
    """Zero-shot classification, {"top-1": percent, ...}. label: (A,) class of each image.

    prompt_emb: (templates, classes, D): a class is the mean of its prompts, normalised again.
    """
    classes = F.normalize(prompt_emb.mean(0), dim=-1)
    ranks, _ = retrieval_ranks(classes, image_emb, label)
    return {f"top-{k}": percent(ranks < k) for k in ks}


# ---------------------------------------------------------------------------------- benchmarks


@dataclass(frozen=True)
class Benchmark:
    """Images and texts, each once, and what is asked of their embeddings."""

    images: Sequence  # what VladVA.encode_image takes
    texts: list[str]
    score: Callable  # (image_emb, text_emb) -> {name as in the paper's tables: percent}
    counts: dict  # what there is of what, for the reader


class IndexedList(list):
    """A list in which an item that is added again keeps its index, so that it is encoded once."""

    def __init__(self):
        super().__init__()
        self.indices = {}

    def add(self, item) -> int:
        index = self.indices.setdefault(item, len(self))
        if index == len(self):
            self.append(item)
        return index


def retrieval(images: Sequence, captions: list[list[str]]) -> Benchmark:
    """Images, each with the list of its captions."""
    texts, image_of_text = [], []
    for index, captions_of_image in enumerate(captions):
        texts += captions_of_image
        image_of_text += [index] * len(captions_of_image)
    score = functools.partial(recall, image_of_text=torch.tensor(image_of_text))
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
    # the categories
    parts = {}
    for category, rows in items.items():
        image, *texts = torch.tensor(rows).T
        embeddings = [image_emb[image], *(text_emb[text] for text in texts)]
        if len(texts) == 2:
            true, false = ((embeddings[0] * text).sum(-1) for text in embeddings[1:])
            parts[category] = {"": negative_accuracy(true, false)}
        else:
            accuracies = paraphrase_accuracy(*embeddings)
            parts[category] = {f" {name}": value for name, value in accuracies.items()}
    # their means by group
    for group, categories in groups.items():
        parts[group] = {}
        for suffix in parts[categories[0]]:
            values = [parts[category][suffix] for category in categories]
            parts[group][suffix] = sum(values) / len(values)
    scores = {}
    for name, values in parts.items():
        scores |= {f"{name}{suffix}": value for suffix, value in values.items()}
    return scores


class Folder:
    """A benchmark's files; what is missing is named together with the place of publication."""

    def __init__(self, root: str | Path, task: str, source: str):
        self.root = Path(root)
        self.task = task
        self.source = source
        if not self.root.is_dir():
            self.refuse("no such folder")

    def refuse(self, problem: str):
        raise ValueError(f"{self.root}: {problem}; {self.task} is published at {self.source}")

    def file(self, name: str) -> Path:
        """A file in the folder, or in data/ or annotations/ of it."""
        for path in (self.root / sub / name for sub in ("", "data", "annotations")):
            if path.is_file():
                return path
        return self.refuse(f"{name} not found")

    def json(self, name: str):
        return read_json(self.file(name), dict | list)

    def image(self, *names: str) -> Path:
        """The first of some file names that lies in the folder or where images are unpacked to."""
        for path in (self.root / sub / name for sub in ("", *IMAGE_FOLDERS) for name in names):
            if path.is_file():
                return path
        return self.refuse(f"image {names[0]} not found, not in {', '.join(IMAGE_FOLDERS)} either")


IMAGE_FOLDERS = ("images", "val2017", "val2014", "val", "flickr30k-images")


def clean_text(text: str, args) -> str:
    """One space between words, none at the ends: in SugarCrepe stray ones mark the true captions.

    With --strip-period the final full stop goes as well.
    """
    text = " ".join(text.split())
    return text[:-1].rstrip() if args.strip_period and text.endswith(".") else text


# Flickr30k or COCO in Karpathy's split, test part.
def read_karpathy(folder: Folder, args) -> Benchmark:
    images, captions = [], []
    for row in folder.json(f"dataset_{args.task}.json")["images"]:
        if row["split"] != "test":
            continue
        names = [row["filename"]]
        if "cocoid" in row:
            names = [f"{row['filepath']}/{names[0]}", *names, f"{row['cocoid']:012d}.jpg"]
        images.append(folder.image(*names))
        sentences = row["sentences"][: args.captions or None]
        captions.append([clean_text(sentence["raw"], args) for sentence in sentences])
    return retrieval(images, captions) if images else folder.refuse("no row of split 'test'")


# Inside each domain, their plain mean as the paper reports it, and in the whole.
def read_nocaps(folder: Folder, args) -> Benchmark:
    # captions name the id of their image, whose file name stands elsewhere in the file
    raw = folder.json("nocaps_val_4500_captions.json")
    captions_of = {row["id"]: [] for row in raw["images"]}
    for row in raw["annotations"]:
        captions_of[row["image_id"]].append(clean_text(row["caption"], args))
    images, captions, domains = [], [], {}
    for index, row in enumerate(raw["images"]):
        images.append(folder.image(row["file_name"]))
        captions.append(captions_of[row["id"]][: args.captions or None])
        domains.setdefault(row["domain"].split("-")[0], []).append(index)
    if sorted(domains) != ["in", "near", "out"]:
        folder.refuse(f"domains {sorted(domains)}, wanted in, near and out")
    whole = retrieval(images, captions)

    def score(image_emb, text_emb):
        texts = text_emb.split([len(captions_of_image) for captions_of_image in captions])
        scores, by_domain = {}, []
        for domain, indices in domains.items():
            part = retrieval(indices, [captions[i] for i in indices])
            by_domain.append(part.score(image_emb[indices], torch.cat([texts[i] for i in indices])))
            scores |= {f"{domain}-domain {name}": value for name, value in by_domain[-1].items()}
        for name, value in whole.score(image_emb, text_emb).items():
            scores[name] = sum(part_scores[name] for part_scores in by_domain) / len(by_domain)
            scores[f"whole gallery {name}"] = value
        return scores

    counts = {f"{domain}-domain": len(indices) for domain, indices in domains.items()}
    return Benchmark(images, whole.texts, score, whole.counts | counts)


# SugarCrepe and SugarCrepe++, a file a category. fields: the texts of a row, the false last.
def read_hard_negatives(folder: Folder, args, fields: tuple, groups: dict) -> Benchmark:
    images, texts, items = IndexedList(), IndexedList(), {}
    for category in itertools.chain(*groups.values()):
        rows = folder.json(f"{category}.json")
        items[category] = []
        for row in rows.values() if isinstance(rows, dict) else rows:  # SugarCrepe's keys have gaps
            captions = [texts.add(clean_text(row[field], args)) for field in fields]
            items[category].append((images.add(folder.image(row["filename"])), *captions))
    counts = {category: len(rows) for category, rows in items.items()}
    score = functools.partial(category_scores, items, groups)
    return Benchmark(images, texts, score, counts)


SUGARCREPE = {"fields": ("caption", "negative_caption"), "groups": GROUPS}
SUGARCREPE_PP = {"fields": ("caption", "caption2", "negative_caption")}
SUGARCREPE_PP |= {"groups": {group: GROUPS[group] for group in ("Replace", "Swap")}}


# Two images and two captions of the same words an item.
def read_winoground(folder: Folder, args) -> Benchmark:
    images, texts = [], []
    for line in folder.file("examples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for index in (0, 1):
            name = row[f"image_{index}"]
            images.append(folder.image(name, f"{name}.png", f"{name}.jpg"))
            texts.append(clean_text(row[f"caption_{index}"], args))

    def score(image_emb, text_emb):
        images, texts = image_emb.unflatten(0, (-1, 2)), text_emb.unflatten(0, (-1, 2))
        return winoground_scores(images @ texts.transpose(1, 2))  # (items, 2, 2)

    return Benchmark(images, texts, score, {"items": len(images) // 2})


# Class names stand in the order of the sorted WordNet ids.
def read_imagenet(folder: Folder, args) -> Benchmark:
    classes = read_json(args.classes)
    names, templates = classes["classnames"], classes["templates"]
    if args.templates == "one":
        templates = ["a photo of a {}."]
    root = folder.root / "val" if (folder.root / "val").is_dir() else folder.root
    class_folders = sorted(path for path in root.iterdir() if path.is_dir())
    if len(class_folders) != len(names):
        folder.refuse(f"{len(class_folders)} class folders, but {args.classes} names {len(names)}")
    images, labels = [], []
    for label, class_folder in enumerate(class_folders):
        for path in sorted(class_folder.iterdir()):
            images.append(path)
            labels.append(label)
    texts = [template.replace("{}", name) for template in templates for name in names]

    def score(image_emb, text_emb):
        prompt_emb = text_emb.unflatten(0, (len(templates), -1))
        return class_accuracy(image_emb, prompt_emb, torch.tensor(labels))

    counts = {"images": len(images), "classes": len(names), "templates": len(templates)}
    return Benchmark(images, texts, score, counts)


KARPATHY = "cs.stanford.edu/people/karpathy/deepimagesent"
HARD_NEGATIVES = functools.partial(read_hard_negatives, **SUGARCREPE)
HARD_NEGATIVES_PP = functools.partial(read_hard_negatives, **SUGARCREPE_PP)
BENCHMARKS = {  # task: its reader, and where its files are published
    "flickr30k": (read_karpathy, f"{KARPATHY}; images: shannon.cs.illinois.edu/DenotationGraph"),
    "coco": (read_karpathy, f"{KARPATHY}; images (val2014): cocodataset.org"),
    "nocaps": (read_nocaps, "nocaps.org"),
    "sugarcrepe": (HARD_NEGATIVES, "github.com/RAIVNLab/sugar-crepe; images: cocodataset.org"),
    "sugarcrepe_pp": (HARD_NEGATIVES_PP, "github.com/Sri-Harsha/scpp; images: cocodataset.org"),
    "winoground": (read_winoground, "huggingface.co/datasets/facebook/winoground"),
    "imagenet": (read_imagenet, "image-net.org"),
}


# One clear line where a file is not as it was published.
def read_benchmark(args) -> Benchmark:
    reader, source = BENCHMARKS[args.task]
    folder = Folder(args.folder, args.task, source)
    try:
        return reader(folder, args)
    except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
        return folder.refuse(f"a file is not in the published format ({reason})")


# ---------------------------------------------------------------------------------- embeddings


def encode_over_ranks(encode: Callable, items: Sequence) -> Tensor:
    """encode(items) on the host, (B, D), shared out over the processes; all get all rows."""
    rank, world_size = rank_and_world_size()
    rows, _ = all_gather_rows(encode(Subset(items, range(rank, len(items), world_size))))
    out = torch.empty_like(rows)
    order = [i for r in range(world_size) for i in range(r, len(items), world_size)]
    out[order] = rows
    return out.cpu()


# Work is shared out over the processes; all of them get all rows.
def embed_benchmark(model: VladVA, benchmark: Benchmark) -> tuple[Tensor, Tensor]:
    image_emb = encode_over_ranks(model.encode_image, benchmark.images)
    return image_emb, encode_over_ranks(
        lambda texts: model.encode_text(list(texts)), benchmark.texts
    )


def load_embeddings(path: str, benchmark: Benchmark) -> tuple[Tensor, Tensor]:
    """(image_emb, text_emb) from an .npz file of any system, in the benchmark's order; normalised.

    Where the file holds "images" (file names) or "texts" too, they must be the benchmark's.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as .npz ({error})") from None
    embeddings = []
    for kind, names in (("image", image_names(benchmark)), ("text", benchmark.texts)):
        emb = arrays.get(f"{kind}_emb", np.empty(0))
        if emb.ndim != 2 or len(emb) != len(names) or not np.isfinite(emb).all():
            wanted = f"({len(names)}, D) finite numbers, a row for each {kind} of the benchmark"
            raise ValueError(f"{path}: {kind}_emb has shape {emb.shape}, wanted {wanted}")
        if f"{kind}s" in arrays and arrays[f"{kind}s"].tolist() != names:
            raise ValueError(f"{path}: its {kind}s are not the benchmark's, or in another order")
        embeddings.append(F.normalize(torch.from_numpy(emb).float(), dim=-1))
    return embeddings[0], embeddings[1]


def image_names(benchmark: Benchmark) -> list[str]:
    return [Path(image).name for image in benchmark.images]


# What load_embeddings reads.
def save_embeddings(path: str, benchmark: Benchmark, image_emb: Tensor, text_emb: Tensor) -> None:
    embeddings = {"image_emb": image_emb.numpy(), "text_emb": text_emb.numpy()}
    with open(path, "wb") as file:
        np.savez(file, images=image_names(benchmark), texts=benchmark.texts, **embeddings)


# --------------------------------------------------------------- rows kept out of training


@dataclass(frozen=True)
class Measured:
    """What is known of a model before or after adaptation."""

    scores: dict  # {name: percent}
    sim: Tensor  # (images, captions) of the retrieval gallery
    caption_loss: float | None = None  # Eq. 2 on held-out long captions, nats per token


@torch.no_grad()
def mean_caption_loss(model: VladVA, images: Sequence, captions: list[str], batch_size: int = 32):
    """Eq. 2 on held-out long captions, in nats per token, shared out over the processes."""
    rank, world_size = rank_and_world_size()
    indices = range(rank, len(captions), world_size)
    total = torch.zeros(2, dtype=torch.float64)
    starts = range(0, len(indices), batch_size)
    for start in tqdm(starts, "reading long captions", leave=False, disable=None):
        part = indices[start : start + batch_size]
        opened = [data.open_image(images[i]) for i in part]
        pixels, batch = model.image_batch(opened, [captions[i] for i in part])
        pixels, batch = pixels.to(model.lvlm.device), batch.to(model.lvlm.device)
        _, caption_states = model.hidden_states(batch, "image", pixels)
        head_weight = model.lvlm.lm_head.weight
        loss = next_token_loss(caption_states, batch.caption_targets, head_weight, total=1)
        total += torch.tensor([loss.item(), len(batch.caption_targets)])
    loss, tokens = all_reduce_sum(total.to(model.lvlm.device)).tolist()
    return loss / tokens


class HeldOutPairs:
    """Rows of a pairs file as a retrieval benchmark: image i and its first short caption."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.chance = {}
        for direction in ("image_to_text", "text_to_image"):
            for k in (1, 5, 10):
                self.chance[f"{direction} R@{k}"] = min(100.0, 100 * k / max(1, len(rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def measure(self, model: VladVA) -> Measured:
        images = [row["image"] for row in self.rows]
        benchmark = retrieval(images, [row["short"][:1] for row in self.rows])
        image_emb, text_emb = embed_benchmark(model, benchmark)
        described = [row for row in self.rows if row["long"]][:300]
        images, captions = [row["image"] for row in described], [row["long"] for row in described]
        caption_loss = mean_caption_loss(model, images, captions) if described else None
        scores = benchmark.score(image_emb, text_emb)
        return Measured(scores, similarity(image_emb, text_emb), caption_loss)

    def image(self, index: int) -> Path:
        return self.rows[index]["image"]

    def caption(self, index: int) -> str:
        return self.rows[index]["short"][0]


def score_table(columns: dict[str, Measured], chance: dict[str, float]) -> str:
    """A table of the scores that `chance` names, with chance beside them."""
    rows = []
    for name, by_chance in chance.items():
        values = [f"{measured.scores[name]:.1f}" for measured in columns.values()]
        rows.append([name.replace("_", " "), f"{by_chance:.1f}", *values])
    losses = [measured.caption_loss for measured in columns.values()]
    if None not in losses:
        rows.append(["long captions, nats a token", "", *map("{:.3f}".format, losses)])
    return format_table(["percent", "chance", *columns], rows)


# --------------------------------------------------------------------------- the paper's tables

ASSETS = Path(__file__).resolve().parent / "assets"
PAPER_NAMES = {"llava-1.5-7b": "LLaVA-1.5-7B", "llava-1.5-13b": "LLaVA-1.5-13B"}
PAPER_NAMES |= {"qwen2-vl-2b": "Qwen2-VL-2B"}


# What the paper calls a model of this project, with VladVA's adapter or without.
def paper_name(model: str, adapter: str | None) -> str | None:
    short = model.split("/")[-1].lower().removesuffix("-hf").removesuffix("-instruct")
    name = PAPER_NAMES.get(short)
    return f"VladVA ({name})" if name and adapter else name


def paper_tables() -> dict[str, dict[str, dict]]:
    """{task: {row of the paper's table: {score: percent, or None where it could not be read}}}."""
    tables = {}
    for task, table in read_json(ASSETS / "paper.json")["tasks"].items():
        tables[task] = {row["model"]: row["scores"] for row in table["rows"]}
    return tables


def format_score(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f}"


def comparison_table(task: str, scores: dict, name: str | None) -> str:
    """Ours, the paper's row of that name, and the difference; what is missing on a side is "-"."""
    printed = paper_tables().get(task, {}).get(name, {})
    rows = []
    for key in scores | printed:
        ours, theirs = scores.get(key), printed.get(key)
        both = None if ours is None or theirs is None else ours - theirs
        values = [format_score(ours), format_score(theirs), format_score(both, "+")]
        rows.append([key.replace("_", " "), *values])
    column = f"paper: {name}" if printed else "paper: no such row"
    return format_table([task, "ours", column, "difference"], rows)


def print_paper(files: list[str]) -> None:
    """The paper's tables, each with the results of earlier runs (--json files) behind it."""
    results = [read_json(file) for file in files]
    for task, table in paper_tables().items():
        ours = {
            result["paper_row"]: result["scores"] for result in results if result["task"] == task
        }
        keys = list(next(iter(table.values())))
        rows = []
        for name, printed in table.items():
            state = "below" if name in ours else "not run"
            rows.append([name, *(format_score(printed.get(key)) for key in keys), state])
        say("\n" + format_table([task, *(key.replace("_", " ") for key in keys), "ours"], rows))
        for name, scores in ours.items():
            say("\n" + comparison_table(task, scores, name))


# -------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    about = "Benchmarks of a model, or of stored embeddings."
    parser = argparse.ArgumentParser(prog="eval.py", description=about)
    add = parser.add_argument
    add("files", nargs="*", metavar="RESULT.json", help="results of earlier runs, for --task paper")
    add("--task", required=True, choices=[*BENCHMARKS, "paper"], help="which benchmark")
    add("--folder", default=".", help="its files, as they are published (default: .)")
    data.add_model_flags(parser)
    add("--embeddings", metavar="FILE.npz", help="score these (default: those of the model)")
    add("--save-embeddings", metavar="FILE.npz", help="also write the embeddings (default: no)")
    add("--json", metavar="FILE", help="also write the scores (default: no)")
    add("--row", help="row of the paper's table to compare with (default: that of the model)")
    add("--captions", type=int, default=5, help="of an image, at most; 0: all (default: 5)")
    add("--strip-period", action="store_true", help="drop the full stops that captions end with")
    add("--templates", choices=("one", "all"), default="one", help="of ImageNet (default: one)")
    classes = ASSETS / "imagenet" / "openai_imagenet_prompts.json"
    add("--classes", default=str(classes), help="ImageNet's names and templates (default: CLIP's)")
    return parser


@data.command
def main(argv: list[str] | None = None) -> dict | None:
    args = build_parser().parse_args(argv)
    if args.task == "paper":
        return print_paper(args.files)
    name = args.row or (None if args.embeddings else paper_name(args.model, args.adapter))
    if args.row and args.row not in paper_tables().get(args.task, {}):
        raise ValueError(f"--row {args.row!r} is no row of the paper's table: see --task paper")
    # images and texts, their embeddings, the scores
    benchmark = read_benchmark(args)
    if args.embeddings:
        image_emb, text_emb = load_embeddings(args.embeddings, benchmark)
    else:
        image_emb, text_emb = embed_benchmark(load_model(args), benchmark)
    scores = benchmark.score(image_emb, text_emb)
    say(comparison_table(args.task, scores, name))
    say(", ".join(f"{count:,} {kind}" for kind, count in benchmark.counts.items()))
    # for a table of results, or another reader
    results = {"task": args.task, "model": args.model, "adapter": args.adapter, "paper_row": name}
    results |= {"scores": scores, "counts": benchmark.counts}
    if rank_and_world_size()[0] == 0:
        if args.save_embeddings:
            save_embeddings(args.save_embeddings, benchmark, image_emb, text_emb)
        if args.json:
            write_json(args.json, results)
    return results


if __name__ == "__main__":
    main()
