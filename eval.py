"""Benchmarks: how well the embeddings of a model tell pictures and captions apart, and how right its captions are.

    python eval.py --task scenes                              # the untouched tiny LVLM as an embedder
    python eval.py --task scenes --adapter runs/tiny --json scores.json
    python eval.py --task captions                            # the generative side: are the captions of held-out scenes right?
    python eval.py --task coco --folder DIR --model llava-1.5-7b --adapter runs/mine     # a published benchmark; torchrun splits the work
    python eval.py --task coco --folder DIR --embeddings clip.npz                        # the same metrics for any other system
    python eval.py --task paper coco.json ...                 # the paper's tables, with results of earlier runs beside them
    python eval.py --task prompts                             # what the paper looks into, each with a picture in runs/analysis:
    python eval.py --task attention --adapter runs/tiny       # prompts, tokens, attention, soft-prompts, layers, generation

Metrics take embeddings, not models. The published benchmarks, where their files come from and what is measured: docs/evaluation.md.

Not here: training (train.py), the formulas of the paper (vladva.py).
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import random
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import add_model_flags, command, format_table, say
from model import encode_over_ranks, ranks, read_json, sum_over_ranks, write_json
from vladva import (
    attention_density,
    components_for,
    cumulative_variance,
    load_model,
    nearest_tokens,
    next_token_loss,
    output_entropy,
    rank_correlation,
    similarity,
    summary_embedding,
)

DEV_SEED, TEST_SEED = (
    1000,
    2000,
)  # settings are chosen on the scenes of DEV_SEED, results are reported on those of TEST_SEED
CHANCE = {
    "negatives": 50.0,
    "ITT": 100 / 3,
    "TOT": 100 / 3,
    "text": 25.0,
    "image": 25.0,
    "group": 100 / 6,
}  # percent

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


# ------------------------------------------------------------------------------------------------------ the scenes as a benchmark


@dataclass(frozen=True)
class SceneBenchmark:
    """Pictures and texts, each once, and the tasks on them as indices."""

    about: dict  # what it is, for the results
    scenes: list  # rendered when they are encoded
    texts: list
    gallery: int  # the first so many scenes and texts are one retrieval gallery, text i describing scene i
    negatives: dict  # {category: [(scene, true text, the same in other words, false text), ...]}
    pairs: dict  # {kind: [((scene, scene), (text, text)), ...]}
    ceiling: dict  # best R@1 that captions which fit several scenes allow


class IndexedList:
    """A list in which a thing that is asked for again keeps its place, so that it is encoded once."""

    def __init__(self):
        self.items, self.places = [], {}

    def index(self, thing):
        if thing not in self.places:
            self.places[thing] = len(self.items)
            self.items.append(thing)
        return self.places[thing]


def described_scene(seed, index):
    """(scene, Caption) of a held-out scene of a seed."""
    scene = data.make_scene(seed, index)
    return scene, data.short_caption(scene, random.Random(f"captions {seed} {index}"))


def scene_benchmark(seed, gallery=1000, items=500):
    """Held-out scenes of one seed: a retrieval gallery, `items` hard negatives a category and `items` Winoground-like pairs a kind."""
    scenes, texts = IndexedList(), IndexedList()
    captions = []
    for i in range(gallery):
        scene, caption = described_scene(seed, i)
        captions.append(caption)
        scenes.places.setdefault(scene, i)
        scenes.items.append(scene)
        texts.items.append(str(captions[-1]))
    negatives, pairs = {}, {}
    for category in data.CATEGORIES:
        drawn = (data.caption_triple(seed, i, category) for i in range(items))
        negatives[category] = [
            (scenes.index(scene), *map(texts.index, triple)) for scene, triple in drawn
        ]
    for kind in data.WINOGROUND_KINDS:
        drawn = (data.scene_pair(seed, i, kind) for i in range(items))
        pairs[kind] = [
            (tuple(map(scenes.index, two)), tuple(map(texts.index, words))) for two, words in drawn
        ]
    fits = torch.tensor(
        [[data.is_true(caption, scene) for caption in captions] for scene in scenes.items[:gallery]]
    ).double()  # (gallery, gallery)
    ceiling = {
        "image_to_text": 100 * (1 / fits.sum(1)).mean().item(),
        "text_to_image": 100 * (1 / fits.sum(0)).mean().item(),
    }
    about = {"task": "scenes", "scene_seed": seed, "gallery": gallery, "items": items}
    return SceneBenchmark(about, scenes.items, texts.items, gallery, negatives, pairs, ceiling)


def embed(model, benchmark, encode_image=None, encode_text=None):
    """(image_emb, text_emb) of all its scenes and texts, on the host; under torchrun every process encodes its share.

    encode_image, encode_text: what embeds them, the model's own when None.
    """
    size = model.lvlm.config.vision.image_size
    encode_scenes = functools.partial(
        encode_image or model.encode_image, read=lambda scene: data.render(scene, size)
    )
    return encode_over_ranks(encode_scenes, benchmark.scenes).cpu(), encode_over_ranks(
        encode_text or model.encode_text, benchmark.texts
    ).cpu()


def score(benchmark, image_emb, text_emb):
    """Every metric of the benchmark, in percent, as a dictionary that --json writes."""
    sim = similarity(image_emb, text_emb)
    results = dict(
        benchmark.about,
        retrieval=recall_at(
            *(emb[: benchmark.gallery] for emb in (image_emb, text_emb)),
            torch.arange(benchmark.gallery),
        ),
    )
    results["negatives"], results["paraphrases"] = {}, {}
    for category, items in benchmark.negatives.items():
        scene, true, same, false = torch.tensor(items).T
        results["negatives"][category] = negative_accuracy(sim[scene, true], sim[scene, false])
        triple = torch.stack([true, same, false])
        results["paraphrases"][category] = paraphrase_accuracy(
            sim[scene, triple].T, *text_emb[triple]
        )
    by_group = {
        group: [c for c in benchmark.negatives if data.CATEGORIES[c] == group]
        for group in ("Replace", "Swap", "Add")
    }
    mean = lambda values: sum(values) / len(values)
    results["groups"] = {
        group: mean([results["negatives"][c] for c in members])
        for group, members in by_group.items()
    }
    results["paraphrase_groups"] = {
        group: {
            name: mean([results["paraphrases"][c][name] for c in members])
            for name in ("ITT", "TOT")
        }
        for group, members in by_group.items()
    }
    results["winoground"] = {}
    for kind, items in benchmark.pairs.items():
        scenes, texts = (torch.tensor(part) for part in zip(*items))  # (items, 2) each
        results["winoground"][kind] = winoground_scores(sim[scenes[:, :, None], texts[:, None, :]])
    return dict(results, ceiling=benchmark.ceiling)


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


def captioned_scenes(seed, count, size):
    """[(picture, long caption), ...] of the first `count` held-out scenes of a seed."""
    scenes = [data.make_scene(seed, i) for i in range(count)]
    return [
        (data.render(scene, size), data.long_caption(scene, random.Random(f"long {seed} {i}")))
        for i, scene in enumerate(scenes)
    ]


def score_rows(results):
    """[(label, chance, ceiling, value)] of a result, in the order of the table."""
    gallery, rows = results["gallery"], []
    for direction, label in (
        ("image_to_text", "image to text"),
        ("text_to_image", "text to image"),
    ):
        for name, value in results["retrieval"][direction].items():
            k = int(name[2:])
            rows.append(
                (
                    f"{label} {name}",
                    100 * k / gallery,
                    results.get("ceiling", {}).get(direction) if k == 1 else None,
                    value,
                )
            )
    for group in results.get("groups", {}):
        members = [c for c in results["negatives"] if data.CATEGORIES[c] == group]
        rows += [
            (c.replace("_", " "), CHANCE["negatives"], None, results["negatives"][c])
            for c in members
        ]
        rows.append((f"{group}, mean", CHANCE["negatives"], None, results["groups"][group]))
    for group, scores in results.get("paraphrase_groups", {}).items():
        rows += [
            (f"{group}, with a paraphrase: {name}", CHANCE[name], None, scores[name])
            for name in ("ITT", "TOT")
        ]
    for kind, scores in results.get("winoground", {}).items():
        rows += [
            (f"pairs, {kind} exchanged: {name}", CHANCE[name], None, value)
            for name, value in scores.items()
        ]
    return rows


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


# ------------------------------------------------------------------------------------------------------ captions of scenes


def read_caption(text):
    """{(colour, shape): position} of every object that a long caption names with a place."""
    colours, shapes, places = (
        "|".join(map(re.escape, words))
        for words in (data.COLOURS, data.SHAPES, sorted(data.POSITIONS, key=len, reverse=True))
    )
    found = {}
    for sentence in text.split("."):
        kinds, where = (
            re.findall(rf"\b({colours}) ({shapes})\b", sentence),
            re.findall(rf"(?<![\w-])({places})(?![\w-])", sentence),
        )
        if len(kinds) == 1 and len(where) == 1:
            found.setdefault(kinds[0], where[0])
    return found


def caption_accuracy(model, seed, count=300):
    """How right are the model's own words? Greedy captions of held-out scenes, and "where is ...?" for one object each; percent.

    named: objects whose colour and shape the caption gives; placed: those it also puts in the right place; invented: objects of the
    captions that are not there, per 100 real ones; where: questions answered right.
    """
    (rank, processes), size = ranks(), model.lvlm.config.vision.image_size
    mine = range(rank, count, processes)
    named = placed = invented = right = total = 0
    for start in tqdm(
        range(0, len(mine), 100), desc="captioning scenes", leave=False, disable=None
    ):
        part = [data.make_scene(seed, i) for i in mine[start : start + 100]]
        pictures = [data.render(scene, size) for scene in part]
        captions = model.generate_batch(
            pictures, [model.settings.detail_prompt] * len(part), max_new_tokens=120
        )
        asked = [
            random.Random(f"where {seed} {i}").choice(scene.things)
            for i, scene in zip(mine[start:], part)
        ]
        answers = model.generate_batch(
            pictures, [f"where is the {' '.join(thing.kind)}?" for thing in asked], max_new_tokens=8
        )
        right += sum(answer == data.POSITIONS[thing.cell] for answer, thing in zip(answers, asked))
        for scene, caption in zip(part, captions):
            told, real = (
                read_caption(caption),
                {thing.kind: data.POSITIONS[thing.cell] for thing in scene.things},
            )
            named += len(told.keys() & real.keys())
            placed += len(told.items() & real.items())
            invented += len(told.keys() - real.keys())
            total += len(scene.things)
    named, placed, invented, right, total = sum_over_ranks(
        torch.tensor([named, placed, invented, right, total], device=model.lvlm.device)
    ).tolist()
    scores = {
        "named": 100 * named / total,
        "placed": 100 * placed / total,
        "invented": 100 * invented / total,
        "where": 100 * right / count,
    }
    return {"task": "captions", "scene_seed": seed, "scenes": count, "objects": total, **scores}


# ------------------------------------------------------------------------------------------------------ what the paper looks into

PROMPTS = (
    PAPER.parent / "prompts.json"
)  # 50 pairs of an image and a text prompt, in words that the tiny model can read


def testbed(model, args):
    """(pictures, captions): --items held-out scenes with a short caption each, or as many rows of a pairs file."""
    if args.data == "scenes":
        drawn, size = (
            [described_scene(args.seed, i) for i in range(args.items)],
            model.lvlm.config.vision.image_size,
        )
        return [data.render(scene, size) for scene, _ in drawn], [
            str(caption) for _, caption in drawn
        ]
    rows = data.Pairs(args.data, model.tokenizer).held_out(args.items)
    if len(rows) < 2:
        raise ValueError(
            f"{args.data} and --items {args.items} give {len(rows)} rows with a short caption: at least 2 are needed"
        )
    return [row["image"] for row in rows], [row["short"][0] for row in rows]


def before_and_after(model):
    """Yields "before", while the adapter is switched off, and then "after" when there is one."""
    with model.adapter_disabled():
        yield "before"
    if model.adapted:
        yield "after"


def recall_both(image_emb, text_emb):
    """R@1 of pictures and captions that belong together row by row: {"image to text R@1": percent, "text to image R@1": percent}."""
    found = recall_at(image_emb.cpu(), text_emb.cpu(), torch.arange(len(image_emb)), ks=(1,))
    return {
        f"{direction.replace('_', ' ')} R@1": values["R@1"] for direction, values in found.items()
    }


def summary_measures(model, pictures, captions):
    """The paper's measures of a prompt pair (Sec. 3.1), on the summary tokens of pictures and captions that belong together.

    Entropies in nats (means), the cumulative variance and how many principal components hold 90 % of it, and R@1 in percent.
    """
    states, measures = (
        {"image": model.image_states(pictures), "text": model.text_states(captions)},
        {},
    )
    for modality, state in states.items():
        entropy = torch.cat(
            [
                output_entropy(model.lvlm.head(part.to(model.lvlm.compute_dtype)))
                for part in state.split(256)
            ]
        )
        variance = cumulative_variance(summary_embedding(state))
        measures |= {
            f"{modality} entropy": entropy.mean().item(),
            f"{modality} components": components_for(variance),
        }
        measures[f"{modality} variance"] = [round(share, 4) for share in variance.tolist()]
    return measures | recall_both(*map(summary_embedding, states.values()))


def run_prompts(model, args):
    """Figs. 2, 3 and 5: what a good prompt is."""
    pictures, captions = testbed(model, args)
    pairs, rows = read_json(args.prompts), []
    if (
        not isinstance(pairs, list)
        or any(not isinstance(pair, dict) or set(pair) != {"image", "text"} for pair in pairs)
        or len(pairs) < 2
    ):
        raise ValueError(
            f'{args.prompts}: wanted a list of two or more {{"image": prompt, "text": prompt}}, as assets/prompts.json'
        )
    for pair in tqdm(pairs, desc="prompts", disable=None):
        measures = summary_measures(
            model.with_prompts(pair["image"], pair["text"]), pictures, captions
        )
        both = {
            name: (measures[f"image {name}"] + measures[f"text {name}"]) / 2
            for name in ("entropy", "components")
        }
        both["R@1"] = (measures["image to text R@1"] + measures["text to image R@1"]) / 2
        rows.append(
            {"image prompt": pair["image"], "text prompt": pair["text"], **both, **measures}
        )
    rows.sort(key=lambda row: row["entropy"])
    columns = {
        name: torch.tensor([float(row[name]) for row in rows])
        for name in ("entropy", "components", "R@1")
    }
    varied = [
        name for name, values in columns.items() if len(values.unique()) > 1
    ]  # a constant one has no order
    correlations = {
        f"{a} and {b}": rank_correlation(columns[a], columns[b])
        for a, b in itertools.combinations(varied, 2)
    }
    say(
        format_table(
            ["image prompt, by entropy", *columns],
            [[row["image prompt"], *(f"{row[name]:.2f}" for name in columns)] for row in rows],
        )
    )
    for names, (rho, p) in correlations.items():
        say(f"Spearman's rho of {names}: {rho:.2f} (p = {p:.4f}, {len(rows)} prompt pairs)")
    about = {
        "pictures": len(pictures),
        "correlations": {names: {"rho": rho, "p": p} for names, (rho, p) in correlations.items()},
    }
    return about | {"prompts": rows}, draw_prompts


def draw_prompts(plt, results):
    """Entropy a prompt pair, cumulative variance coloured by entropy, retrieval against entropy."""
    rows, colour = results["prompts"], plt.get_cmap("viridis")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
    top, places = max(row["entropy"] for row in rows), range(1, len(rows) + 1)
    for modality, marker in (("image", "o"), ("text", "^")):
        left.plot(
            places,
            [row[f"{modality} entropy"] for row in rows],
            marker,
            markersize=3,
            label=modality,
        )
        right.scatter([row["entropy"] for row in rows], [row[f"{modality} to {'text' if modality == 'image' else 'image'} R@1"] for row in rows],
                      marker=marker, s=12, label=f"{modality} query")  # fmt: skip
    left.set(
        title="entropy of the next token (Fig. 2)",
        xlabel="prompt pairs, by mean entropy",
        ylabel="nats",
    )
    for row in rows:
        middle.plot(
            *zip(*enumerate(row["image variance"][:40], start=1)),
            color=colour(row["entropy"] / top),
            linewidth=0.8,
        )
    middle.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    middle.set(
        title="cumulative variance, images (Fig. 3)",
        xlabel="principal components",
        ylabel="share of the variance",
    )
    figure.colorbar(
        plt.cm.ScalarMappable(plt.Normalize(0, top), colour), ax=middle, label="entropy (nats)"
    )
    rho = results["correlations"].get("entropy and R@1", {}).get("rho", math.nan)
    right.set(
        title=f"zero-shot retrieval (Fig. 5), rho = {rho:.2f}",
        xlabel="entropy (nats)",
        ylabel="R@1 (percent)",
    )
    left.legend()
    right.legend()
    return figure


def run_tokens(model, args, shown=3, top=6):
    """Fig. 4 and Sec. 3.4: the likeliest next tokens at the summary token, entropy, and spread of the embeddings, before and after."""
    pictures, captions = testbed(model, args)
    results = {
        "pictures": len(pictures),
        "captions": captions[:shown],
        "measures": {},
        "tokens": {},
    }
    for when in before_and_after(model):
        results["measures"][when] = summary_measures(model, pictures, captions)
        states = {
            "image": model.image_states(pictures[:shown]),
            "text": model.text_states(captions[:shown]),
        }
        likely = {
            name: model.lvlm.head(state.to(model.lvlm.compute_dtype)).float().softmax(-1).topk(top)
            for name, state in states.items()
        }
        results["tokens"][when] = {
            modality: [
                [[model.tokenizer.decode([t]), q] for t, q in zip(*row)]
                for row in zip(best.indices.tolist(), best.values.tolist())
            ]
            for modality, best in likely.items()
        }
    numbers = [
        name for name, value in results["measures"]["before"].items() if not isinstance(value, list)
    ]
    say(
        format_table(
            ["", *results["measures"]],
            [[n, *(f"{m[n]:.2f}" for m in results["measures"].values())] for n in numbers],
        )
    )
    for when, tokens in results["tokens"].items():
        for modality, rows in tokens.items():
            for number, row in enumerate(rows):
                say(
                    f"{when}, {modality} {number}: "
                    + "  ".join(f"{token} {100 * q:.1f}%" for token, q in row)
                )
    return results, functools.partial(draw_tokens, pictures=pictures[:shown])


def draw_tokens(plt, results, pictures):
    """A row a picture: the picture, and the likeliest tokens of it and of its caption, before and after."""
    columns = [(when, modality) for when in results["tokens"] for modality in ("image", "text")]
    figure, axes = plt.subplots(
        len(pictures), 1 + len(columns), figsize=(9.5, 1.8 * len(pictures)), layout="constrained"
    )
    for number, (line, picture, caption) in enumerate(
        zip(axes.reshape(len(pictures), -1), pictures, results["captions"])
    ):
        line[0].imshow(data.open_image(picture))
        line[0].set_title(textwrap.fill(caption, 22, break_on_hyphens=False), fontsize=7)
        line[0].axis("off")
        for axis, (when, modality) in zip(line[1:], columns):
            words, shares = zip(*results["tokens"][when][modality][number])
            axis.barh(
                range(len(words)),
                [100 * share for share in shares],
                color="C0" if when == "before" else "C1",
            )
            axis.set_yticks(range(len(words)), [word.strip() or repr(word) for word in words])
            axis.invert_yaxis()
            axis.set_title(f"{when}, {modality} (percent)")
    return figure


def run_attention(model, args):
    """Fig. 6: attention of the summary token to the image tokens, its density over all heads, before and after; drawn for the first picture."""
    pictures, _ = testbed(model, args)
    results, maps = {"pictures": len(pictures), "density": {}}, {}
    for when in before_and_after(model):
        every = [
            model.summary_attention(picture).cpu()
            for picture in tqdm(pictures, desc=f"attention {when}", leave=False, disable=None)
        ]
        given, (entropy, share) = (
            torch.stack([each.sum(-1).mean() for each in every]),
            zip(*map(attention_density, every)),
        )
        results["density"][when] = {
            "entropy": torch.stack([each.mean() for each in entropy]).mean().item(),
            "share of patches with 90 % of the mass": torch.stack([each.mean() for each in share])
            .mean()
            .item(),
            "mass on the picture": given.mean().item(),
        }
        maps[when] = every[0]
    results["entropy when uniform"] = math.log(maps["before"].shape[-1])
    names = list(results["density"]["before"])
    say(
        format_table(
            ["mean over heads and pictures", *maps],
            [[n, *(f"{d[n]:.3f}" for d in results["density"].values())] for n in names],
        )
    )
    say(f"entropy of a uniform map: {results['entropy when uniform']:.3f}")
    mass = maps["before"].sum(
        -1
    )  # (layers, H): the head of a layer that looks at the picture most before adaptation is drawn
    layers = torch.linspace(0, len(mass) - 1, min(4, len(mass))).round().long().tolist()
    chosen = [(layer, mass[layer].argmax().item()) for layer in layers]
    first = data.open_image(pictures[0])
    seen, grid = (
        np.asarray(model.image_processor.fitted(first)) / 255,
        model.prepared([first])[1][0],
    )
    return results, functools.partial(
        draw_attention, maps=maps, chosen=chosen, pixels=seen, grid=grid
    )


def draw_attention(plt, results, maps, chosen, pixels, grid):
    """A row before and one after, a column a head: its map over the greyed picture, with the share of patches that holds 90 % of the mass."""
    figure, axes = plt.subplots(
        len(maps),
        1 + len(chosen),
        figsize=(1.9 * (1 + len(chosen)), 2.3 * len(maps)),
        layout="constrained",
        squeeze=False,
    )
    gray = pixels.mean(-1)
    extent = (0, gray.shape[1], gray.shape[0], 0)
    for line, (when, weights) in zip(axes, maps.items()):
        line[0].imshow(pixels)
        line[0].set_title(when)
        for axis, (layer, head) in zip(line[1:], chosen):
            one = weights[layer, head]
            axis.imshow(gray, cmap="gray", vmin=0, vmax=1)
            axis.imshow(
                (one.view(grid) / one.max()).numpy(),
                cmap="inferno",
                alpha=0.65,
                extent=extent,
                vmin=0,
                vmax=1,
            )
            _, share = attention_density(one)
            axis.set_title(
                f"layer {layer + 1}, head {head + 1}\n90 % in {100 * share:.0f} % of patches"
            )
        for axis in line:
            axis.axis("off")
    return figure


def run_soft_prompts(model, args):
    """Sec. 5.1: each learned vector as the nearest token, with its cosine."""
    if not model.soft_prompts:
        raise ValueError(
            "no soft prompts to decode: --adapter names the folder of a run that trained them"
        )
    results = {}
    for modality, vectors in model.soft_prompts.items():
        sequence = model.image_sequence() if modality == "image" else model.text_sequence("a")
        hand = sequence.ids[sequence.prompt_slot : sequence.prompt_slot + sequence.prompt_length]
        ids, cosine = nearest_tokens(vectors.detach(), model.lvlm.decoder.embed_tokens.weight)
        word = model.tokenizer.inner.decode
        results[modality] = [
            [word([h]), word([i], skip_special_tokens=False), c]
            for h, i, c in zip(hand, ids.tolist(), cosine.tolist())
        ]
        say(
            format_table(
                [f"{modality} prompt", "nearest token", "cosine"],
                [[repr(a), repr(b), f"{c:.3f}"] for a, b, c in results[modality]],
            )
        )
    return results, draw_soft_prompts


def draw_soft_prompts(plt, results):
    """Cosine of each learned vector with its nearest token, which stands below; in orange where it is not the hand prompt's."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.7 * len(results), 2.6), layout="constrained", squeeze=False
    )
    for axis, (modality, rows) in zip(axes[0], results.items()):
        axis.bar(
            range(len(rows)),
            [c for _, _, c in rows],
            color=["C0" if hand == near else "C1" for hand, near, _ in rows],
        )
        axis.set_xticks(
            range(len(rows)),
            [near.strip() or repr(near) for _, near, _ in rows],
            rotation=45,
            ha="right",
        )
        axis.set(title=f"{modality} soft prompt", ylabel="cosine with its nearest token")
    return figure


def run_layers(model, args):
    """Supplement, Table 6: embeddings from every layer, before and after. States between layers have not met the final norm."""
    pictures, captions = testbed(model, args)
    benchmark = (
        scene_benchmark(args.seed, gallery=2, items=min(args.items, 200))
        if args.data == "scenes"
        else None
    )
    results = {"pictures": len(pictures), "layers": {}}
    for when in before_and_after(model):
        for depth in range(1, len(model.lvlm.decoder.layers) + 1):
            encode_image = lambda items, depth=depth, **more: summary_embedding(
                model.image_states(items, depth=depth, **more)
            )
            encode_text = lambda items, depth=depth: summary_embedding(
                model.text_states(items, depth=depth)
            )
            scores = recall_both(encode_image(pictures), encode_text(captions))
            if benchmark:
                scores |= score(benchmark, *embed(model, benchmark, encode_image, encode_text))[
                    "groups"
                ]
            results["layers"].setdefault(when, []).append(scores)
    for when, rows in results["layers"].items():
        say(
            format_table(
                [f"layer, {when}", *rows[0]],
                [
                    [str(n), *(f"{v:.1f}" for v in row.values())]
                    for n, row in enumerate(rows, start=1)
                ],
            )
        )
    return results, draw_layers


def draw_layers(plt, results):
    """A line a score over the layers, dashed before, solid after."""
    figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for when, rows in results["layers"].items():
        for n, name in enumerate(rows[0]):
            line = "--" if when == "before" else "-"
            axis.plot(
                range(1, len(rows) + 1),
                [row[name] for row in rows],
                line,
                color=f"C{n}",
                marker="o",
                markersize=3,
                label=f"{name}, {when}",
            )
    axis.set(
        xlabel="decoder layer that the embedding is taken from",
        ylabel="percent",
        xticks=range(1, len(rows) + 1),
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


ASKED = ("Describe the image in detail.", "Describe the image briefly.", "What is in the image?")


def run_generation(args):
    """Fig. 7: answers of the base, of --adapter on and off, and of --rival (an E5-V-style adapter), to the same prompts."""
    answers = {}
    for name, adapter in (("base", None), ("adapter", args.adapter), ("rival", args.rival)):
        if adapter or name == "base":
            model = load_model(argparse.Namespace(**vars(args) | {"adapter": adapter}))
            pictures = testbed(model, args)[0][: len(ASKED)]
            tell = lambda model=model, pictures=pictures: [
                model.generate_batch([p] * len(ASKED), ASKED, max_new_tokens=200) for p in pictures
            ]
            answers[name] = tell()
            if name == "adapter":
                with model.adapter_disabled():
                    answers["adapter off"] = tell()
    for picture in range(len(pictures)):
        for number, prompt in enumerate(ASKED):
            say(
                f"\npicture {picture}: {prompt}\n"
                + "\n".join(f"  {name}: {told[picture][number]}" for name, told in answers.items())
            )
    words = lambda told: (
        sum(len(answer.split()) for each in told for answer in each) / (len(ASKED) * len(told))
    )
    results = {
        "prompts": ASKED,
        "answers": answers,
        "words an answer": {name: words(told) for name, told in answers.items()},
    }
    if "adapter off" in answers:
        results["adapter off equals base"] = answers["adapter off"] == answers["base"]
        say(f"\nadapter off = base, to the letter: {results['adapter off equals base']}")
    return results, functools.partial(draw_generation, pictures=pictures)


def draw_generation(plt, results, pictures):
    """A row a picture with the answers to the first prompt."""
    figure, axes = plt.subplots(
        len(pictures),
        2,
        figsize=(9.5, 1.7 * len(pictures)),
        width_ratios=(1, 6),
        layout="constrained",
        squeeze=False,
    )
    for number, ((shown, told), picture) in enumerate(zip(axes, pictures)):
        shown.imshow(data.open_image(picture))
        text = "\n".join(
            textwrap.fill(
                f"{name}: {answers[number][0]}",
                122,
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
            for name, answers in results["answers"].items()
        )
        told.text(0, 1, f"{results['prompts'][0]}\n\n{text}", va="top")
        for axis in (shown, told):
            axis.axis("off")
    return figure


STUDIES = {
    "prompts": run_prompts,
    "tokens": run_tokens,
    "attention": run_attention,
    "soft-prompts": run_soft_prompts,
    "layers": run_layers,
}


def run_study(args):
    """One look into the model: a table, OUT/<task>.json and OUT/<task>.png."""
    if args.task == "generation":
        results, draw = run_generation(args)
    else:
        results, draw = STUDIES[args.task](load_model(args), args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "task": args.task,
        "model": args.model,
        "adapter": args.adapter,
        "data": args.data,
        "seed": args.seed,
    }
    write_json(out / f"{args.task}.json", about | results)
    say(f"written: {out / args.task}.json")
    save_picture(out / f"{args.task}.png", lambda plt: draw(plt, results))


def save_picture(path, draw):
    """Save the matplotlib figure that draw(pyplot) makes; without matplotlib, one line that says how to get it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return say(
            f"{path} not drawn: matplotlib is not installed (pip install matplotlib); the numbers are in {Path(path).with_suffix('.json')}"
        )
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure = draw(pyplot)
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    say(f"written: {path}")


# ------------------------------------------------------------------------------------------------------ command line


def score_table(columns):
    """A table of results side by side. columns: {heading: results}; chance and ceiling stand beside them."""
    rows = [score_rows(results) for results in columns.values()]
    show = lambda value: "" if value is None else f"{value:.1f}"
    body = [
        [first[0], show(first[1]), show(first[2]), *(show(row[3]) for row in same)]
        for same in zip(*rows)
        for first in same[:1]
    ]
    return format_table(["percent", "chance", "ceiling", *columns], body)


def run_scenes(model, args):
    benchmark = scene_benchmark(args.seed, args.gallery, args.items)
    results = score(benchmark, *embed(model, benchmark))
    say(score_table({"this model": results}))
    return results


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


def run_captions(model, args):
    results = caption_accuracy(model, args.seed, args.items)
    labels = {
        "named": "objects with the right colour and shape",
        "placed": "... and in the right place",
        "invented": "invented objects per 100 real ones",
        "where": '"where is the ...?" answered right',
    }
    say(
        format_table(
            ["percent", "this model"],
            [[label, f"{results[name]:.1f}"] for name, label in labels.items()],
        )
    )
    return results


OWN_TASKS = {"scenes": run_scenes, "captions": run_captions}


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
        choices=sorted([*OWN_TASKS, *LOADERS, *STUDIES, "generation", "paper"]),
        default="scenes",
    )
    add_model_flags(parser)
    parser.add_argument(
        "--rival",
        metavar="DIR",
        help="a second adapter beside --adapter (generation), such as one trained with --loss text-text",
    )
    parser.add_argument(
        "--data",
        default="scenes",
        help="what the studies look at: scenes, or a pairs file (default: scenes)",
    )
    parser.add_argument(
        "--prompts",
        default=str(PROMPTS),
        metavar="FILE.json",
        help='list of {"image": ..., "text": ...} (prompts)',
    )
    parser.add_argument(
        "--out",
        default="runs/analysis",
        metavar="DIR",
        help="where a study writes its numbers and its picture",
    )
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
    parser.add_argument(
        "--seed", type=int, default=TEST_SEED, help=f"of the held-out scenes (default: {TEST_SEED})"
    )
    parser.add_argument(
        "--gallery", type=int, default=1000, help="scenes in the retrieval gallery (default: 1000)"
    )
    parser.add_argument(
        "--items",
        type=int,
        default=500,
        help="items per category, or captioned scenes (default: 500)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    return parser


@command
def main(argv=None):
    args = command_line().parse_args(argv)
    if args.gallery < 2 or args.items < 1 or args.captions < 0 or args.workers < 0:
        raise ValueError(
            f"--gallery {args.gallery} --items {args.items} --captions {args.captions} --workers {args.workers}: at least 2, 1, 0 and 0"
        )
    if args.task == "paper":
        return run_paper(args)
    if args.task in (*STUDIES, "generation"):
        return run_study(args)
    if args.task in OWN_TASKS:
        model = load_model(args)
        results = dict(
            OWN_TASKS[args.task](model, args),
            model=args.model,
            adapter=args.adapter,
            image_mode=model.image_processor.mode,
        )
    else:
        results = run_published(args)
    if args.json and ranks()[0] == 0:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
