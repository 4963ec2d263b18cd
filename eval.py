"""Benchmarks: how well the embeddings of a model tell pictures and captions apart.

    python eval.py --task coco --folder DIR --model llava-1.5-7b --adapter runs/mine     # a published benchmark; torchrun splits the work
    python eval.py --task coco --folder DIR --embeddings clip.npz                        # the same metrics for any other system
    python eval.py --task paper coco.json ...                 # the paper's tables, with results of earlier runs beside them

Metrics take embeddings, not models. The published benchmarks, where their files come from and what is measured: docs/evaluation.md.

Not here: training (train.py), the formulas of the paper (vladva.py), the scenes (extras/scenes.py), what the paper looks into
(extras/studies.py).
"""

import argparse
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import add_model_flags, command, format_table, say
from model import encode_over_ranks, ranks, read_json, sum_over_ranks
from vladva import (
    load_model,
    next_token_loss,
    similarity,
)

DEV_SEED, TEST_SEED = (
    1000,
    2000,
)  # settings are chosen on the scenes of DEV_SEED, results are reported on those of TEST_SEED

# ------------------------------------------------------------------------------------------------------ metrics, in percent


def ranks_of_own(image_emb, text_emb, owner, block=2048):
    """(text_ranks (B,), image_ranks (A,)): how many others score at least as high as what belongs together; a tie counts against the model.

    image_emb: (A, D); text_emb: (B, D); owner: (B,) image of each text. text_ranks: other images, for each text. image_ranks: texts of
    others, for each image against the best of its own. Only `block` texts' similarities exist at a time, twice: A x block x 4 bytes each.
    """
    text_rank, best_own = [], torch.full((len(image_emb),), -torch.inf)
    blocks = [slice(start, start + block) for start in range(0, len(text_emb), block)]
    for rows in blocks:
        sim, own_image = similarity(image_emb, text_emb[rows]), owner[rows]
        own = sim.gather(0, own_image[None])[0]
        text_rank.append((sim >= own).sum(0) - 1)
        best_own.scatter_reduce_(0, own_image, own, "amax")
    image_rank = torch.zeros(len(image_emb), dtype=torch.long)
    for rows in blocks:
        sim = similarity(image_emb, text_emb[rows]).scatter_(0, owner[rows][None], -torch.inf)
        image_rank += (sim >= best_own[:, None]).sum(1)
    return torch.cat(text_rank), image_rank


def recall_at(image_emb, text_emb, owner, ks=(1, 5, 10), block=2048):
    """Retrieval both ways, in percent: {"image_to_text": {"R@1": ...}, "text_to_image": ...}. Arguments as ranks_of_own's.

    A text is found when fewer than k other images score as high as its own; an image when any of its texts is among its k best.
    """
    text_rank, image_rank = ranks_of_own(image_emb, text_emb, owner, block)
    has_text = torch.zeros(len(image_emb), dtype=torch.bool).scatter(0, owner, True)
    percent = lambda rank, k: 100 * (rank < k).double().mean().item()
    return {
        "image_to_text": {f"R@{k}": percent(image_rank[has_text], k) for k in ks},
        "text_to_image": {f"R@{k}": percent(text_rank, k) for k in ks},
    }


def negative_accuracy(positive, negative):
    """Share of items whose true caption scores strictly higher than the false one (SugarCrepe). Two (items,) tensors."""
    return 100 * (positive > negative).double().mean().item()


def paraphrase_accuracy(seen, first, second, false):
    """SugarCrepe++, of two true captions P1, P2 and a false one N, strictly.

    seen: (items, 3), s(I, P1), s(I, P2), s(I, N); first, second, false: (items, D), the embeddings of P1, P2 and N.
    ITT: the picture is nearer to both true captions than to N. TOT: the true captions are nearer to each other than either is to N.
    """
    between = torch.stack(
        [(a * b).sum(-1) for a, b in ((first, second), (first, false), (second, false))], 1
    )
    hits = {
        "ITT": (seen[:, :2] > seen[:, 2:]).all(1),
        "TOT": (between[:, :1] > between[:, 1:]).all(1),
    }
    return {name: 100 * hit.double().mean().item() for name, hit in hits.items()}


def winoground_scores(sims):
    """Text, image and group score (Winoground). sims: (items, 2, 2), [n, i, c] = similarity of image i and caption c of item n."""
    text = (sims[:, 0, 0] > sims[:, 0, 1]) & (sims[:, 1, 1] > sims[:, 1, 0])
    image = (sims[:, 0, 0] > sims[:, 1, 0]) & (sims[:, 1, 1] > sims[:, 0, 1])
    return {
        name: 100 * hits.double().mean().item()
        for name, hits in (("text", text), ("image", image), ("group", text & image))
    }


def class_accuracy(image_emb, prompt_emb, label, ks=(1, 5)):
    """Zero-shot classification, {"top-1": percent, ...}. prompt_emb: (templates, classes, D); label: (A,) class of each image.

    A class is the mean of its normalised prompt embeddings, normalised again.
    """
    classes = F.normalize(prompt_emb.mean(0), dim=-1)
    rank, _ = ranks_of_own(classes, image_emb, label)
    return {f"top-{k}": 100 * (rank < k).double().mean().item() for k in ks}


class IndexedList:
    """A list in which a thing that is asked for again keeps its place, so that it is encoded once."""

    def __init__(self):
        self.items, self.places = [], {}

    def index(self, thing):
        if thing not in self.places:
            self.places[thing] = len(self.items)
            self.items.append(thing)
        return self.places[thing]


@torch.no_grad()
def caption_loss(model, captioned, batch=32):
    """Eq. 2 on held-out long captions: {"loss": nats a token, "tokens": how many}; under torchrun every process takes its share.

    captioned: [(picture, long caption), ...].
    """
    (rank, processes), total = ranks(), torch.zeros(2, dtype=torch.float64)
    mine = captioned[rank::processes]
    for start in tqdm(
        range(0, len(mine), batch), desc="reading long captions", leave=False, disable=None
    ):
        rows = [
            {"image": data.open_image(image), "short": None, "long": long}
            for image, long in mine[start : start + batch]
        ]
        part = model.training_batch(rows).to(model.lvlm.device)
        loss = next_token_loss(
            model.outputs(part).caption_states, part.targets, model.lvlm.head.weight, total=1
        )
        total += torch.tensor([loss.item(), len(part.targets)])
    loss, tokens = sum_over_ranks(total.to(model.lvlm.device)).tolist()
    return {"loss": loss / tokens, "tokens": int(tokens)}


# ------------------------------------------------------------------------------------------------------ held-out rows of a run

LONG_CAPTIONS = 300  # held-out long captions whose next-token loss is measured


@dataclass(frozen=True)
class Measured:
    """Scores and the gallery's similarity table, (pictures, captions)."""

    results: dict
    sim: torch.Tensor


# ------------------------------------------------------------------------------------------------------ published benchmarks

PUBLISHED = {  # task: where its files come from
    "flickr30k": "dataset_flickr30k.json: cs.stanford.edu/people/karpathy/deepimagesent; pictures: shannon.cs.illinois.edu/DenotationGraph",
    "coco": "dataset_coco.json: cs.stanford.edu/people/karpathy/deepimagesent; pictures (val2014): cocodataset.org",
    "nocaps": "nocaps_val_4500_captions.json and pictures: nocaps.org",
    "sugarcrepe": "github.com/RAIVNLab/sugar-crepe, data/; pictures (val2017): cocodataset.org",
    "sugarcrepe_pp": "github.com/Sri-Harsha/scpp, data/; pictures (val2017): cocodataset.org",
    "winoground": "huggingface.co/datasets/facebook/winoground, data/examples.jsonl and data/images.zip",
    "imagenet": "image-net.org: val/, sorted into 1000 folders named after the WordNet ids",
}
SUGARCREPE = {
    "Replace": ("replace_obj", "replace_att", "replace_rel"),
    "Swap": ("swap_obj", "swap_att"),
    "Add": ("add_obj", "add_att"),
}
DOMAINS = {
    "in": "in-domain",
    "near": "near-domain",
    "out": "out-domain",
}  # by the first word of what nocaps files say
SEVEN = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.", "art of the {}.",
         "a photo of the small {}.")  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """Pictures (paths) and texts, each once, and what is asked of their embeddings."""

    images: list
    texts: list
    score: callable  # (image_emb, text_emb) -> {"scores": {name as in the paper's tables: percent}, ...}


class Folder:
    """A benchmark's files; what is missing is named together with the place where it is published."""

    def __init__(self, root, task, clean):
        self.root, self.task, self.clean = Path(root), task, clean

    def refuse(self, problem):
        raise ValueError(
            f"{self.root}: {problem}; {self.task} is published at {PUBLISHED[self.task]}"
        )

    def file(self, name):
        """A file in the folder, or in data/ or annotations/ of it."""
        found = [
            path
            for path in (self.root / sub / name for sub in ("", "data", "annotations"))
            if path.is_file()
        ]
        return found[0] if found else self.refuse(f"{name} not found")

    def json(self, name):
        return read_json(self.file(name))

    def lines(self, name):
        """The objects of a file of JSON lines."""
        for number, line in enumerate(
            self.file(name).read_text(encoding="utf-8").split("\n"), start=1
        ):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    self.refuse(f"{name}:{number} is not JSON ({error})")

    def picture(self, *names):
        """The first of some file names that lies in the folder, or in one of the folders that pictures are unpacked to."""
        for path in (self.root / sub / name for sub in ("", *PICTURE_FOLDERS) for name in names):
            if path.is_file():
                return path
        return self.refuse(
            f"picture {names[0]} not found, neither there nor in {', '.join(PICTURE_FOLDERS)}"
        )

    def field(self, row, key, where):
        return (
            row[key]
            if key in row
            else self.refuse(f"{where} has no {key!r}, only {', '.join(map(repr, row))}")
        )


PICTURE_FOLDERS = ("images", "val2017", "val2014", "val", "flickr30k-images")


def clean_text(text, strip_period=False):
    """One blank between words and none at the ends: in SugarCrepe stray ones stand in the true captions alone. On request no final full stop."""
    words = " ".join(text.split())
    return words[:-1].rstrip() if strip_period and words.endswith(".") else words


def retrieval(images, captions):
    """Benchmark of pictures with their captions, one list a picture."""
    owner = torch.tensor([i for i, mine in enumerate(captions) for _ in mine])
    texts = [caption for mine in captions for caption in mine]

    def score(image_emb, text_emb):
        return {
            "scores": flat(recall_at(image_emb, text_emb, owner)),
            "counts": {"pictures": len(images), "captions": len(texts)},
        }

    return Benchmark(images, texts, score)


def flat(recall):
    """{"text_to_image R@1": ...} of what recall_at returns."""
    return {
        f"{direction} {name}": value
        for direction, values in recall.items()
        for name, value in values.items()
    }


def karpathy(folder, args):
    """Flickr30k or COCO in Karpathy's split, test part, up to --captions captions a picture."""
    name = f"dataset_{folder.task}.json"
    images, captions = [], []
    for row in folder.field(folder.json(name), "images", name):
        if folder.field(row, "split", name) == "test":
            names = [row["filename"], *([f"{row['cocoid']:012d}.jpg"] if "cocoid" in row else [])]
            images.append(
                folder.picture(
                    *([f"{row['filepath']}/{row['filename']}"] if "filepath" in row else []), *names
                )
            )
            captions.append(
                [folder.clean(s["raw"]) for s in row["sentences"][: args.captions or None]]
            )
    return (
        retrieval(images, captions)
        if images
        else folder.refuse(f"{name} has no row of split 'test'")
    )


def nocaps(folder, args):
    """Retrieval inside each domain and the plain mean of the three, as the paper reports it, and among all pictures."""
    name = "nocaps_val_4500_captions.json"
    raw, by_image = folder.json(name), {}
    for note in folder.field(raw, "annotations", name):
        by_image.setdefault(note["image_id"], []).append(folder.clean(note["caption"]))
    rows = folder.field(raw, "images", name)
    domain = [DOMAINS.get(folder.field(row, "domain", name).split("-")[0]) for row in rows]
    if set(domain) != set(DOMAINS.values()):
        folder.refuse(
            f"{name} has the domains {sorted({row['domain'] for row in rows})}, wanted {', '.join(DOMAINS.values())}"
        )
    captions = [by_image.get(row["id"], [])[: args.captions or None] for row in rows]
    whole = retrieval([folder.picture(row["file_name"]) for row in rows], captions)
    owner = [i for i, mine in enumerate(captions) for _ in mine]

    def score(image_emb, text_emb):
        parts, counts = {}, {}
        for kind in DOMAINS.values():
            inside = [i for i, d in enumerate(domain) if d == kind]
            part = retrieval(inside, [captions[i] for i in inside])
            parts[kind] = part.score(
                image_emb[inside], text_emb[[t for t, i in enumerate(owner) if domain[i] == kind]]
            )["scores"]
            counts[kind] = len(inside)
        scores = {
            key: sum(part[key] for part in parts.values()) / len(parts)
            for key in parts["in-domain"]
        }
        parts["whole gallery"] = whole.score(image_emb, text_emb)["scores"]
        return {
            "scores": scores
            | {
                f"{kind} {key}": value
                for kind, part in parts.items()
                for key, value in part.items()
            },
            "counts": counts,
        }

    return Benchmark(whole.images, whole.texts, score)


def hard_negatives(folder, categories, fields, score_items):
    """SugarCrepe and SugarCrepe++: a file a category. score_items: (seen, *texts) -> {suffix: percent}.

    seen: (items, texts an item), similarities with the picture; texts: (items, D) each.
    """
    images, texts, items = IndexedList(), IndexedList(), {}
    for category in categories:
        rows = folder.json(f"{category}.json")
        rows = (
            list(rows.values()) if isinstance(rows, dict) else rows
        )  # SugarCrepe's keys have gaps
        field = lambda row, key, category=category: folder.clean(
            folder.field(row, key, f"{category}.json")
        )
        items[category] = [
            (
                images.index(folder.picture(row["filename"])),
                *(texts.index(field(row, key)) for key in fields),
            )
            for row in rows
        ]

    def score(image_emb, text_emb):
        found = {}
        for category, rows in items.items():
            picture, *words = torch.tensor(rows).T
            told = [text_emb[each] for each in words]
            found[category] = score_items(
                torch.stack([(image_emb[picture] * each).sum(1) for each in told], 1), *told
            )
        scores = {
            f"{category}{suffix}": value
            for category, values in found.items()
            for suffix, value in values.items()
        }
        suffixes = next(iter(found.values()))
        groups = {
            group: [c for c in members if c in items] for group, members in SUGARCREPE.items()
        }
        means = {
            f"{group}{suffix}": sum(scores[c + suffix] for c in members) / len(members)
            for group, members in groups.items() if members for suffix in suffixes
        }  # fmt: skip
        return {
            "scores": scores | means,
            "counts": {category: len(rows) for category, rows in items.items()},
        }

    return Benchmark(images.items, texts.items, score)


def sugarcrepe(folder, args):
    """One true and one false caption a picture, 7 categories."""
    categories = [c for members in SUGARCREPE.values() for c in members]
    return hard_negatives(
        folder,
        categories,
        ("caption", "negative_caption"),
        lambda seen, *_: {"": negative_accuracy(*seen.T)},
    )


def sugarcrepe_pp(folder, args):
    """Two true captions and a false one a picture, 5 categories."""
    score_items = lambda seen, *texts: {
        f" {name}": value for name, value in paraphrase_accuracy(seen, *texts).items()
    }
    categories = SUGARCREPE["Replace"] + SUGARCREPE["Swap"]
    return hard_negatives(
        folder, categories, ("caption", "caption2", "negative_caption"), score_items
    )


def winoground(folder, args):
    """Two pictures and two captions of the same words an item."""
    rows = list(folder.lines("examples.jsonl"))
    name = lambda row, key: folder.field(row, key, "examples.jsonl")
    images = [
        folder.picture(name(row, key), f"{row[key]}.png", f"{row[key]}.jpg")
        for row in rows
        for key in ("image_0", "image_1")
    ]
    texts = [folder.clean(name(row, key)) for row in rows for key in ("caption_0", "caption_1")]

    def score(image_emb, text_emb):
        sims = image_emb.unflatten(0, (-1, 2)) @ text_emb.unflatten(0, (-1, 2)).transpose(
            1, 2
        )  # (items, 2, 2)
        return {"scores": winoground_scores(sims), "counts": {"items": len(rows)}}

    return Benchmark(images, texts, score)


def imagenet(folder, args):
    """Zero-shot classification of val/; class names in the order of the sorted WordNet ids."""
    named = read_json(args.classes)
    templates = {"one": ["a photo of a {}."], "seven": SEVEN, "all": named["templates"]}[
        args.templates
    ]
    root = next(
        (path for path in (folder.root / "val", folder.root) if any(path.glob("n*/*"))), None
    ) or folder.refuse("no folder like n01440764 found")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    if len(folders) != len(named["classnames"]):
        folder.refuse(
            f"{root} has {len(folders)} class folders, {args.classes} names {len(named['classnames'])}"
        )
    images = [
        (path, label) for label, each in enumerate(folders) for path in sorted(each.iterdir())
    ]
    label = torch.tensor([label for _, label in images])
    texts = [
        template.format(name) for template in templates for name in named["classnames"]
    ]  # by place, not by name: two names occur twice

    def score(image_emb, text_emb):
        counts = {"pictures": len(images), "classes": len(folders), "templates": len(templates)}
        return {
            "scores": class_accuracy(image_emb, text_emb.unflatten(0, (len(templates), -1)), label),
            "counts": counts,
        }

    return Benchmark([path for path, _ in images], texts, score)


LOADERS = {"flickr30k": karpathy, "coco": karpathy, "nocaps": nocaps, "sugarcrepe": sugarcrepe, "sugarcrepe_pp": sugarcrepe_pp,
           "winoground": winoground, "imagenet": imagenet}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ embeddings of a benchmark


class Cache:
    """Embeddings on disk, by the content of what was embedded and of the model: a second task on the same pictures costs nothing.

    CACHE/<model>/<n>.npz, each with some keys (64 hexadecimal digits) and their rows; a file is there whole or not at all.
    """

    CHUNK = 1024  # items between two files: what a stop can lose

    def __init__(self, folder, model, args):
        self.folder = Path(folder) / fingerprint(model, args) if folder else None
        self.known = {}
        for path in sorted(self.folder.glob("*.npz")) if folder else ():
            with np.load(path) as stored:
                self.known |= dict(zip(stored["keys"].tolist(), torch.from_numpy(stored["emb"])))

    def encode(self, encode, items, keys):
        """encode(items), (B, D) on the host, computing only what is not known."""
        missing = list(
            {key: i for i, key in enumerate(keys) if key not in self.known}.values()
        )  # each content once
        step = self.CHUNK if self.folder else max(1, len(missing))
        for start in tqdm(
            range(0, len(missing), step),
            desc="embedding",
            leave=False,
            disable=None if len(missing) > step else True,
        ):
            chunk = missing[start : start + step]
            emb = encode_over_ranks(encode, [items[i] for i in chunk]).float().cpu()
            self.known |= {keys[i]: row for i, row in zip(chunk, emb)}
            if self.folder and ranks()[0] == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self.folder / "partial"
                with open(partial, "wb") as file:
                    np.savez(file, keys=np.array([keys[i] for i in chunk]), emb=emb.numpy())
                partial.replace(
                    self.folder / f"{sum(1 for _ in self.folder.glob('*.npz')):06d}.npz"
                )
        return torch.stack([self.known[key] for key in keys])


def digest(*parts):
    """SHA-256 of some bytes and strings, in hexadecimal."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else str(part).encode())
        total.update(b"\0")
    return total.hexdigest()


def fingerprint(model, args):
    """What embeddings depend on beside their input: weight files (by size and time), adapter, settings, dtype."""
    folder = data.model_folder(args.model)
    files = [
        f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}"
        for path in sorted(folder.glob("*.safetensors"))
    ]
    adapter = (Path(args.adapter) / "adapter.safetensors").read_bytes() if args.adapter else b""
    return digest(
        folder.resolve(),
        *files,
        (folder / "config.json").read_bytes(),
        adapter,
        model.settings,
        model.lvlm.dtype,
    )[:16]


def embed_files(model, benchmark, args):
    """(image_emb, text_emb) of a Benchmark by a model of this repository."""
    cache = Cache(args.cache, model, args)
    encode = functools.partial(model.encode_image, workers=args.workers)
    keys = [
        digest("image", path.read_bytes()) if args.cache else str(path) for path in benchmark.images
    ]
    image_emb = cache.encode(encode, benchmark.images, keys)
    return image_emb, cache.encode(
        model.encode_text, benchmark.texts, [digest("text", text) for text in benchmark.texts]
    )


def stored_embeddings(path, benchmark):
    """(image_emb, text_emb) of a Benchmark from a .npz file of any system: image_emb (A, D) and text_emb (B, D) in the benchmark's order.

    The rows are normalised here. When the file has "images" (names) or "texts" too, they must be the benchmark's.
    """
    try:
        with np.load(path) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as .npz ({error}): wanted the arrays image_emb and text_emb"
        ) from None
    wanted = {"images": [path.name for path in benchmark.images], "texts": benchmark.texts}
    for name, own in wanted.items():
        emb = stored.get(f"{name[:-1]}_emb")
        if emb is None or emb.ndim != 2 or len(emb) != len(own) or not np.isfinite(emb).all():
            shape = "missing" if emb is None else f"of shape {emb.shape}"
            raise ValueError(
                f"{path}: {name[:-1]}_emb is {shape}, wanted ({len(own)}, D) finite numbers, a row for each of the benchmark's {name}"
            )
        if name in stored and stored[name].tolist() != own:
            first = next(i for i, (a, b) in enumerate(zip(stored[name].tolist(), own)) if a != b)
            raise ValueError(
                f"{path}: row {first} of {name} is {stored[name][first]!r}, the benchmark's is {own[first]!r}: another order or version"
            )
    return tuple(
        F.normalize(torch.from_numpy(stored[f"{name[:-1]}_emb"]).float(), dim=-1) for name in wanted
    )


def save_embeddings(path, benchmark, image_emb, text_emb):
    """Write what stored_embeddings reads."""
    with open(path, "wb") as file:
        np.savez(
            file,
            image_emb=image_emb.numpy(),
            text_emb=text_emb.numpy(),
            images=[p.name for p in benchmark.images],
            texts=benchmark.texts,
        )


# ------------------------------------------------------------------------------------------------------ the paper's tables

PAPER = Path(__file__).resolve().parent / "assets" / "paper.json"
CLASSES = PAPER.parent / "imagenet" / "openai_imagenet_prompts.json"  # with its licence beside it
PAPER_NAMES = {
    "llava-1.5-7b": "LLaVA-1.5-7B",
    "llava-1.5-13b": "LLaVA-1.5-13B",
    "qwen2-vl-2b": "Qwen2-VL-2B",
}


def paper_row(task, name):
    """(name, scores) of a row of the paper's table for a task; (None, {}) when the table has none of that name."""
    rows = {row["model"]: row["scores"] for row in read_json(PAPER)["tasks"][task]["rows"]}
    return (name, rows[name]) if name in rows else (None, {})


def paper_name(model, adapter):
    """What the paper calls a model of this repository, with VladVA's adapter or without; None for others."""
    base = PAPER_NAMES.get(
        str(model).split("/")[-1].lower().removesuffix("-hf").removesuffix("-instruct")
    )
    return f"VladVA ({base})" if base and adapter else base


def paper_table(task, scores, name, printed):
    """Ours, the paper's, and their difference; a cell that was not run, or not printed, says so."""
    show = lambda value, sign="": "" if value is None else f"{value:{sign}.1f}"
    rows = []
    for key in [*scores, *(key for key in printed if key not in scores)]:
        ours, theirs = scores.get(key), printed.get(key)
        both = ours is not None and theirs is not None
        rows.append(
            [
                key.replace("_", " "),
                show(ours) or "not run",
                show(theirs) or "-",
                show(ours - theirs, "+") if both else "-",
            ]
        )
    return format_table([task, "ours", f"paper: {name or 'no such row'}", "difference"], rows)


def run_paper(args):
    """The paper's tables, a row a model, with the results of earlier runs (--json files) below theirs; "not run" where there are none."""
    found = {
        (r["task"], r["paper_row"]): r["scores"]
        for r in map(read_json, args.results)
        if r.get("paper_row")
    }
    show = lambda values, sign="": [
        "-" if value is None else f"{value:{sign}.1f}" for value in values
    ]
    for task, table in read_json(PAPER)["tasks"].items():
        keys, body = list(table["rows"][0]["scores"]), []
        for row in table["rows"]:
            printed, ours = (
                [row["scores"].get(key) for key in keys],
                found.get((task, row["model"])),
            )
            body.append([row["model"], *show(printed), "below" if ours else "not run"])
            if ours:
                own = [ours.get(key) for key in keys]
                apart = [None if None in pair else pair[0] - pair[1] for pair in zip(own, printed)]
                body += [["  ours", *show(own), ""], ["  difference", *show(apart, "+"), ""]]
        say(
            f"\n{table['table']}: {task}\n"
            + format_table(["", *(key.replace("_", " ") for key in keys), "ours"], body)
        )


# ------------------------------------------------------------------------------------------------------ command line


def run_published(args):
    """One benchmark from its authors' files: the embeddings of a model of this repository, or stored ones of any system."""
    name, printed = paper_row(
        args.task, args.row or (None if args.embeddings else paper_name(args.model, args.adapter))
    )
    if args.row and not name:
        raise ValueError(
            f"--row {args.row!r} is no row of the paper's table for {args.task}: python eval.py --task paper prints them"
        )
    folder = Folder(
        args.folder, args.task, functools.partial(clean_text, strip_period=args.strip_period)
    )
    if not folder.root.is_dir():
        folder.refuse("no such folder")
    try:
        benchmark = LOADERS[args.task](folder, args)
    except (KeyError, TypeError, AttributeError) as error:
        folder.refuse(f"a file is not in the published format ({type(error).__name__}: {error})")
    if args.embeddings:
        (image_emb, text_emb), about = (
            stored_embeddings(args.embeddings, benchmark),
            {"embeddings": args.embeddings},
        )
    else:
        model = load_model(args)
        image_emb, text_emb = embed_files(model, benchmark, args)
        about = {
            "model": args.model,
            "adapter": args.adapter,
            "image_mode": model.image_processor.mode,
        }
    if args.save_embeddings and ranks()[0] == 0:
        save_embeddings(args.save_embeddings, benchmark, image_emb, text_emb)
    results = {
        "task": args.task,
        **benchmark.score(image_emb, text_emb),
        **about,
        "paper_row": name,
    }
    say(paper_table(args.task, results["scores"], name, printed))
    say(", ".join(f"{count} {what}" for what, count in results.get("counts", {}).items()))
    return results


def command_line():
    """The parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description="Benchmarks of a model with or without an adapter, or of stored embeddings.",
    )
    parser.add_argument(
        "results",
        nargs="*",
        metavar="RESULT.json",
        help="with --task paper: results of earlier runs",
    )
    parser.add_argument(
        "--task",
        choices=sorted([*LOADERS, "paper"]),
        required=True,
    )
    add_model_flags(parser)
    parser.add_argument(
        "--folder",
        default=".",
        help="of a published benchmark: its files as their authors publish them, and the pictures",
    )
    parser.add_argument(
        "--embeddings",
        metavar="FILE.npz",
        help="score these (image_emb, text_emb) instead of a model's",
    )
    parser.add_argument(
        "--row",
        metavar="NAME",
        help="row of the paper's table to compare with, e.g. 'CLIP (ViT-L)' (default: that of the model)",
    )
    parser.add_argument("--save-embeddings", metavar="FILE.npz", help="also write the embeddings")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="keep embeddings there, by content, for other tasks on the same pictures and texts",
    )
    parser.add_argument(
        "--captions",
        type=int,
        default=5,
        help="of a picture, at most; 0: all (retrieval; default: 5)",
    )
    parser.add_argument(
        "--strip-period",
        action="store_true",
        help="drop the final full stop of captions, which betrays some true ones in SugarCrepe",
    )
    parser.add_argument(
        "--templates",
        choices=("one", "seven", "all"),
        default="one",
        help="prompts a class (imagenet; default: one)",
    )
    parser.add_argument(
        "--classes",
        default=str(CLASSES),
        metavar="FILE.json",
        help="class names and templates (imagenet)",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that read pictures ahead (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    return parser


@command
def main(argv=None):
    args = command_line().parse_args(argv)
    if args.captions < 0 or args.workers < 0:
        raise ValueError(f"--captions {args.captions} --workers {args.workers}: at least 0 and 0")
    if args.task == "paper":
        return run_paper(args)
    results = run_published(args)
    if args.json and ranks()[0] == 0:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
