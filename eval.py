"""Benchmarks: how well the embeddings of a model tell pictures and captions apart, and how right its captions are.

    python eval.py --task scenes                              # the untouched tiny LVLM as an embedder
    python eval.py --task scenes --adapter runs/tiny --json scores.json
    python eval.py --task captions                            # the generative side: are the captions of held-out scenes right?

Metrics take embeddings, not models: `embed` makes them, `score` reads them.

Not here: training (train.py), the formulas of the paper (vladva.py).
"""

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
from vladva import add_model_flags, command, encode_over_ranks, format_table, load_model, ranks, say, similarity

DEV_SEED, TEST_SEED = 1000, 2000  # settings are chosen on the scenes of DEV_SEED, results are reported on those of TEST_SEED
CHANCE = {"negatives": 50.0, "ITT": 100 / 3, "TOT": 100 / 3, "text": 25.0, "image": 25.0, "group": 100 / 6}  # percent

# ------------------------------------------------------------------------------------------------------ metrics, in percent


def recall_at(sim, owner, ks=(1, 5, 10)):
    """Retrieval both ways. sim: (A images, B texts); owner: (B,) image of each text.

    Returns {"image_to_text": {"R@1": ...}, "text_to_image": ...}. A text is found when fewer than k other images score as high as its
    own; an image when any of its texts is among its k best. A tie counts against the model.
    """
    own = sim[owner, torch.arange(len(owner))]  # (B,)
    text_rank = (sim >= own).sum(0) - 1  # (B,) other images at least as similar
    foreign = sim.clone()
    foreign[owner, torch.arange(len(owner))] = -torch.inf
    best_own = torch.full((len(sim),), -torch.inf).scatter_reduce(0, owner, own, "amax")  # (A,)
    image_rank = (foreign >= best_own[:, None]).sum(1)
    has_text = torch.zeros(len(sim), dtype=torch.bool).scatter(0, owner, True)
    percent = lambda rank, k: 100 * (rank < k).double().mean().item()
    return {
        "image_to_text": {f"R@{k}": percent(image_rank[has_text], k) for k in ks},
        "text_to_image": {f"R@{k}": percent(text_rank, k) for k in ks},
    }


def negative_accuracy(positive, negative):
    """Share of items whose true caption scores strictly higher than the false one (SugarCrepe). Two (items,) tensors."""
    return 100 * (positive > negative).double().mean().item()


def paraphrase_accuracy(image, texts):
    """SugarCrepe++: of two true captions P1, P2 and a false one N, strictly. image: (items, 3), s(I, .); texts: (items, 3), s(P1, P2), s(P1, N), s(P2, N).

    ITT: the picture is nearer to both true captions than to N. TOT: the true captions are nearer to each other than either is to N.
    """
    hits = {"ITT": (image[:, :2] > image[:, 2:]).all(1), "TOT": (texts[:, :1] > texts[:, 1:]).all(1)}
    return {name: 100 * hit.double().mean().item() for name, hit in hits.items()}


def winoground_scores(sims):
    """Text, image and group score (Winoground). sims: (items, 2, 2), [n, i, c] = similarity of image i and caption c of item n."""
    text = (sims[:, 0, 0] > sims[:, 0, 1]) & (sims[:, 1, 1] > sims[:, 1, 0])
    image = (sims[:, 0, 0] > sims[:, 1, 0]) & (sims[:, 1, 1] > sims[:, 0, 1])
    return {name: 100 * hits.double().mean().item() for name, hits in (("text", text), ("image", image), ("group", text & image))}


# ------------------------------------------------------------------------------------------------------ the scenes as a benchmark


@dataclass(frozen=True)
class Benchmark:
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


def scene_benchmark(seed, gallery=1000, items=500):
    """Held-out scenes of one seed: a retrieval gallery, `items` hard negatives a category and `items` Winoground-like pairs a kind."""
    scenes, texts = IndexedList(), IndexedList()
    captions = []
    for i in range(gallery):
        scene = data.make_scene(seed, i)
        captions.append(data.short_caption(scene, random.Random(f"captions {seed} {i}")))
        scenes.places.setdefault(scene, i)
        scenes.items.append(scene)
        texts.items.append(str(captions[-1]))
    negatives, pairs = {}, {}
    for category in data.CATEGORIES:
        drawn = (data.caption_triple(seed, i, category) for i in range(items))
        negatives[category] = [(scenes.index(scene), *map(texts.index, triple)) for scene, triple in drawn]
    for kind in data.WINOGROUND_KINDS:
        drawn = (data.scene_pair(seed, i, kind) for i in range(items))
        pairs[kind] = [(tuple(map(scenes.index, two)), tuple(map(texts.index, words))) for two, words in drawn]
    fits = torch.tensor([[data.is_true(caption, scene) for caption in captions] for scene in scenes.items[:gallery]]).double()  # (gallery, gallery)
    ceiling = {"image_to_text": 100 * (1 / fits.sum(1)).mean().item(), "text_to_image": 100 * (1 / fits.sum(0)).mean().item()}
    about = {"task": "scenes", "scene_seed": seed, "gallery": gallery, "items": items}
    return Benchmark(about, scenes.items, texts.items, gallery, negatives, pairs, ceiling)


def embed(model, benchmark, chunk=128):
    """(image_emb, text_emb) of all its scenes and texts, on the host; under torchrun every process encodes its share."""
    size = model.lvlm.config.vision.image_size

    def encode_scenes(scenes):
        starts = tqdm(range(0, len(scenes), chunk), desc="encoding scenes", leave=False, disable=None)
        parts = [model.encode_image([data.render(scene, size) for scene in scenes[start : start + chunk]]) for start in starts]
        return torch.cat([model.encode_image([]), *parts])

    return encode_over_ranks(encode_scenes, benchmark.scenes).cpu(), encode_over_ranks(model.encode_text, benchmark.texts).cpu()


def score(benchmark, image_emb, text_emb):
    """Every metric of the benchmark, in percent, as a dictionary that --json writes."""
    sim = similarity(image_emb, text_emb)
    results = dict(benchmark.about, retrieval=recall_at(sim[: benchmark.gallery, : benchmark.gallery], torch.arange(benchmark.gallery)))
    results["negatives"], results["paraphrases"] = {}, {}
    for category, items in benchmark.negatives.items():
        scene, true, same, false = torch.tensor(items).T
        results["negatives"][category] = negative_accuracy(sim[scene, true], sim[scene, false])
        between = [(text_emb[a] * text_emb[b]).sum(1) for a, b in ((true, same), (true, false), (same, false))]
        results["paraphrases"][category] = paraphrase_accuracy(sim[scene[:, None], torch.stack([true, same, false], 1)], torch.stack(between, 1))
    by_group = {group: [c for c in benchmark.negatives if data.CATEGORIES[c] == group] for group in ("Replace", "Swap", "Add")}
    mean = lambda values: sum(values) / len(values)
    results["groups"] = {group: mean([results["negatives"][c] for c in members]) for group, members in by_group.items()}
    results["paraphrase_groups"] = {
        group: {name: mean([results["paraphrases"][c][name] for c in members]) for name in ("ITT", "TOT")} for group, members in by_group.items()
    }
    results["winoground"] = {}
    for kind, items in benchmark.pairs.items():
        scenes, texts = (torch.tensor(part) for part in zip(*items))  # (items, 2) each
        results["winoground"][kind] = winoground_scores(sim[scenes[:, :, None], texts[:, None, :]])
    return dict(results, ceiling=benchmark.ceiling)


def score_rows(results):
    """[(label, chance, ceiling, value)] of a result, in the order of the table."""
    gallery, rows = results["gallery"], []
    for direction, label in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
        for name, value in results["retrieval"][direction].items():
            k = int(name[2:])
            rows.append((f"{label} {name}", 100 * k / gallery, results.get("ceiling", {}).get(direction) if k == 1 else None, value))
    for group in results.get("groups", {}):
        members = [c for c in results["negatives"] if data.CATEGORIES[c] == group]
        rows += [(c.replace("_", " "), CHANCE["negatives"], None, results["negatives"][c]) for c in members]
        rows.append((f"{group}, mean", CHANCE["negatives"], None, results["groups"][group]))
    for group, scores in results.get("paraphrase_groups", {}).items():
        rows += [(f"{group}, with a paraphrase: {name}", CHANCE[name], None, scores[name]) for name in ("ITT", "TOT")]
    for kind, scores in results.get("winoground", {}).items():
        rows += [(f"pairs, {kind} exchanged: {name}", CHANCE[name], None, value) for name, value in scores.items()]
    return rows


# ------------------------------------------------------------------------------------------------------ captions of scenes


def read_caption(text):
    """{(colour, shape): position} of every object that a long caption names with a place."""
    colours, shapes, places = (
        "|".join(map(re.escape, words)) for words in (data.COLOURS, data.SHAPES, sorted(data.POSITIONS, key=len, reverse=True))
    )
    found = {}
    for sentence in text.split("."):
        kinds, where = re.findall(rf"\b({colours}) ({shapes})\b", sentence), re.findall(rf"(?<![\w-])({places})(?![\w-])", sentence)
        if len(kinds) == 1 and len(where) == 1:
            found.setdefault(kinds[0], where[0])
    return found


def caption_accuracy(model, seed, count=300):
    """How right are the model's own words? Greedy captions of held-out scenes, and "where is ...?" for one object each; percent.

    named: objects whose colour and shape the caption gives; placed: those it also puts in the right place; invented: objects of the
    captions that are not there, per 100 real ones; where: questions answered right.
    """
    scenes, size = [data.make_scene(seed, i) for i in range(count)], model.lvlm.config.vision.image_size
    named = placed = invented = right = 0
    for start in tqdm(range(0, count, 100), desc="captioning scenes", leave=False, disable=None):
        part = scenes[start : start + 100]
        pictures = [data.render(scene, size) for scene in part]
        captions = model.generate_batch(pictures, [model.settings.detail_prompt] * len(part), max_new_tokens=120)
        asked = [random.Random(f"where {seed} {start + i}").choice(scene.things) for i, scene in enumerate(part)]
        answers = model.generate_batch(pictures, [f"where is the {' '.join(thing.kind)}?" for thing in asked], max_new_tokens=8)
        right += sum(answer == data.POSITIONS[thing.cell] for answer, thing in zip(answers, asked))
        for scene, caption in zip(part, captions):
            told, real = read_caption(caption), {thing.kind: data.POSITIONS[thing.cell] for thing in scene.things}
            named += len(told.keys() & real.keys())
            placed += len(told.items() & real.items())
            invented += len(told.keys() - real.keys())
    total = sum(len(scene.things) for scene in scenes)
    scores = {"named": 100 * named / total, "placed": 100 * placed / total, "invented": 100 * invented / total, "where": 100 * right / count}
    return {"task": "captions", "scene_seed": seed, "scenes": count, "objects": total, **scores}


# ------------------------------------------------------------------------------------------------------ command line


def score_table(columns):
    """A table of results side by side. columns: {heading: results}; chance and ceiling stand beside them."""
    rows = [score_rows(results) for results in columns.values()]
    show = lambda value: "" if value is None else f"{value:.1f}"
    body = [[first[0], show(first[1]), show(first[2]), *(show(row[3]) for row in same)] for same in zip(*rows) for first in same[:1]]
    return format_table(["percent", "chance", "ceiling", *columns], body)


def run_scenes(model, args):
    benchmark = scene_benchmark(args.seed, args.gallery, args.items)
    results = score(benchmark, *embed(model, benchmark))
    say(score_table({"this model": results}))
    return results


def run_captions(model, args):
    results = caption_accuracy(model, args.seed, args.items)
    labels = {
        "named": "objects with the right colour and shape",
        "placed": "... and in the right place",
        "invented": "invented objects per 100 real ones",
        "where": '"where is the ...?" answered right',
    }
    say(format_table(["percent", "this model"], [[label, f"{results[name]:.1f}"] for name, label in labels.items()]))
    return results


TASKS = {"scenes": run_scenes, "captions": run_captions}


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="eval.py", description="Benchmarks of a model with or without an adapter.")
    parser.add_argument("--task", choices=sorted(TASKS), default="scenes")
    add_model_flags(parser)
    parser.add_argument("--seed", type=int, default=TEST_SEED, help=f"of the held-out scenes (default: {TEST_SEED})")
    parser.add_argument("--gallery", type=int, default=1000, help="scenes in the retrieval gallery (default: 1000)")
    parser.add_argument("--items", type=int, default=500, help="items per category, or captioned scenes (default: 500)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    args = parser.parse_args(argv)
    if args.gallery < 2 or args.items < 1:
        raise ValueError(f"--gallery {args.gallery} --items {args.items}: at least 2 and 1 are needed")
    model = load_model(args)
    results = dict(TASKS[args.task](model, args), model=args.model, adapter=args.adapter, image_mode=model.settings.image_mode)
    if args.json and ranks()[0] == 0:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
