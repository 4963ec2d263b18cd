"""The scenes, the world of the embedded default, and how well a model tells them apart.

    python -m extras.scenes                                   # the untouched tiny LVLM as an embedder
    python -m extras.scenes --adapter runs/tiny --json scores.json
    python -m extras.scenes --task captions                   # the generative side: are the captions of held-out scenes right?
    python -c "from extras import scenes; scenes.render(scenes.make_scene(seed=0, index=7)).save('scene.png')"

Scenes are pictures rendered with Pillow, decided by (seed, index) alone: 2 to 4 objects with colour, shape, size and texture on a 3 x 3
grid, with short and long captions, questions, hard negatives after SugarCrepe and pairs after Winoground.
"""

import argparse
import dataclasses
import functools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import eval as benchmarks
from data import TEXT_ROW, add_model_flags, command, format_table, say
from eval import (
    TEST_SEED,
    IndexedList,
    negative_accuracy,
    paraphrase_accuracy,
    recall_at,
    winoground_scores,
)
from model import encode_over_ranks, ranks, sum_over_ranks
from vladva import load_model, similarity

# ------------------------------------------------------------------------------------------------------ the scenes


COLOURS = {"red": (214, 39, 40), "green": (34, 150, 62), "blue": (38, 86, 222), "yellow": (247, 220, 50),
           "orange": (250, 138, 22), "purple": (132, 55, 176), "pink": (250, 152, 196), "cyan": (58, 206, 214)}  # fmt: skip


SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")


SIZES = {"small": 0.50, "large": 0.84}  # width of the object as a share of its cell


TEXTURES = ("plain", "striped", "dotted")


ATTRIBUTES = {
    "size": SIZES,
    "texture": TEXTURES,
}  # what a caption may say of an object beside colour, shape and place


BACKGROUNDS = {
    "white": (244, 244, 240),
    "gray": (134, 138, 142),
    "tan": (205, 178, 138),
    "brown": (104, 70, 44),
}


GRID = 3  # cells a side; one object a cell at most


POSITIONS = (
    "top-left",
    "top-center",
    "top-right",
    "middle-left",
    "center",
    "middle-right",
    "bottom-left",
    "bottom-center",
    "bottom-right",
)


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `cell` counts the grid's cells in reading order, so POSITIONS[cell] names its place."""

    colour: str
    shape: str
    size: str
    texture: str
    cell: int
    shift: tuple = (0.0, 0.0)  # of its centre from the cell's, in cells

    @property
    def kind(self):
        return self.colour, self.shape

    def phrase(self, attributes=()):
        """Noun phrase with an article: "a small striped red circle" for attributes ("size", "texture")."""
        words = [getattr(self, name) for name in ATTRIBUTES if name in attributes] + [
            self.colour,
            self.shape,
        ]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """2 to 4 objects, no two alike in colour and shape, each in a cell of its own, on a plain background."""

    things: tuple
    background: str


def make_scene(seed, index, counts=(2, 3, 4)):
    """The scene that (seed, index) decides."""
    rng = random.Random(f"scene {seed} {index}")
    kinds = rng.sample(
        [(colour, shape) for colour in COLOURS for shape in SHAPES], rng.choice(counts)
    )
    cells = rng.sample(range(GRID * GRID), len(kinds))
    things = tuple(
        Thing(
            colour,
            shape,
            rng.choice(list(SIZES)),
            rng.choice(TEXTURES),
            cell,
            (rng.uniform(-0.07, 0.07), rng.uniform(-0.07, 0.07)),
        )
        for (colour, shape), cell in zip(kinds, cells)
    )
    return Scene(things, rng.choice(list(BACKGROUNDS)))


def relations(a, b):
    """The relation words that are true of "a ... b"."""
    (row_a, col_a), (row_b, col_b) = divmod(a.cell, GRID), divmod(b.cell, GRID)
    checks = {
        "left of": col_a < col_b,
        "right of": col_a > col_b,
        "above": row_a < row_b,
        "below": row_a > row_b,
    }
    return [word for word, true in checks.items() if true]


def shape_outline(shape, centre, width):
    """Corner points of a polygon shape. centre: (x, y); width in the same unit."""
    (x, y), r = centre, width / 2
    if shape == "square":
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "cross":
        t = r / 3
        return [
            (x + dx, y + dy)
            for dx, dy in (
                (-t, -r),
                (t, -r),
                (t, -t),
                (r, -t),
                (r, t),
                (t, t),
                (t, r),
                (-t, r),
                (-t, t),
                (-r, t),
                (-r, -t),
                (-t, -t),
            )
        ]
    assert shape == "star", shape
    spokes = [(r * (1.08 if k % 2 == 0 else 0.44), math.pi * (k / 5 - 0.5)) for k in range(10)]
    return [
        (x + length * math.cos(angle), y + length * math.sin(angle)) for length, angle in spokes
    ]


def draw_thing(canvas, thing, cell_px):
    """Paint one object on a canvas whose cells are cell_px wide."""
    row, col = divmod(thing.cell, GRID)
    left, top = round((col + thing.shift[0]) * cell_px), round((row + thing.shift[1]) * cell_px)
    side, width = round(cell_px), SIZES[thing.size] * cell_px
    middle, near, far = side / 2, (side - width) / 2, (side + width) / 2
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if thing.shape in ("circle", "ring"):
        pen.ellipse((near, near, far, far), fill=255)
        if thing.shape == "ring":
            pen.ellipse(
                (middle - width / 4, middle - width / 4, middle + width / 4, middle + width / 4),
                fill=0,
            )
    else:
        pen.polygon(shape_outline(thing.shape, (middle, middle), width), fill=255)
    colour = COLOURS[thing.colour]
    paint = Image.new("RGB", (side, side), colour)
    pen, dark, step = ImageDraw.Draw(paint), tuple(channel // 3 for channel in colour), cell_px / 8
    marks = [k * step for k in range(9)]
    if thing.texture == "striped":
        for v in marks[::2]:
            pen.rectangle((0, v - step * 0.35, side, v + step * 0.35), fill=dark)
    elif thing.texture == "dotted":
        for i, u in enumerate(marks):
            for v in marks[i % 2 :: 2]:
                pen.ellipse(
                    (u - step * 0.42, v - step * 0.42, u + step * 0.42, v + step * 0.42), fill=dark
                )
    canvas.paste(paint, (left, top), mask)


def render(scene, size=96):
    """The scene as an RGB picture of size x size pixels."""
    oversampling = 2
    canvas = Image.new(
        "RGB", (size * oversampling, size * oversampling), BACKGROUNDS[scene.background]
    )
    for thing in scene.things:
        draw_thing(canvas, thing, size * oversampling / GRID)
    return canvas.resize((size, size), Image.Resampling.BOX)


@dataclass(frozen=True)
class Caption:
    """A short caption as structure, so that an edit of its content leaves its wording alone.

    mentions: (Thing, attributes shown) each. relation: the word between the first two, or None. positions: every mention is followed by
    its place. background: its name, or None when the caption is silent about it.
    """

    opening: str
    mentions: tuple
    relation: str | None
    positions: bool
    background: str | None

    def __str__(self):
        parts = [
            thing.phrase(shown) + (f" {POSITIONS[thing.cell]}" if self.positions else "")
            for thing, shown in self.mentions
        ]
        if self.relation:
            parts[:2] = [f"{parts[0]} {self.relation} {parts[1]}"]
        return (
            self.opening
            + join_words(parts)
            + (f" on a {self.background} background" if self.background else "")
        )


def join_words(parts):
    """["a", "b", "c"] -> "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def is_true(caption, scene):
    """Does everything the caption says hold in the scene?"""
    present = {thing.kind: thing for thing in scene.things}
    if any(thing.kind not in present for thing, _ in caption.mentions):
        return False
    for thing, shown in caption.mentions:
        real = present[thing.kind]
        if any(getattr(thing, name) != getattr(real, name) for name in shown) or (
            caption.positions and thing.cell != real.cell
        ):
            return False
    if caption.relation and caption.relation not in relations(
        *(present[thing.kind] for thing, _ in caption.mentions[:2])
    ):
        return False
    return caption.background in (None, scene.background)


OPENINGS = ("", "", "", "a picture of ", "an image of ", "there is ", "the image shows ")


def short_caption(scene, rng, style=None, mentions=None, attributes=ATTRIBUTES):
    """A true caption of 2 or 3 objects: style "relation", "position" or "list", drawn when None; attributes and background at times."""
    style = style or rng.choice(("relation", "relation", "position", "position", "list"))
    count = mentions or rng.randint(2, min(3, len(scene.things)))
    told = [
        (thing, tuple(name for name in attributes if rng.random() < 0.3))
        for thing in rng.sample(scene.things, count)
    ]
    return Caption(
        opening=rng.choice(OPENINGS),
        mentions=tuple(told),
        relation=rng.choice(relations(told[0][0], told[1][0])) if style == "relation" else None,
        positions=style == "position",
        background=scene.background if rng.random() < 0.3 else None,
    )


NUMBERS = {1: "one object", 2: "two objects", 3: "three objects", 4: "four objects"}


SENTENCES = (  # of a long caption, with {thing} and {place}; one is drawn a caption
    "{place}: {thing}.",
    "at the {place} there is {thing}.",
    "{thing} {place}.",
    "{thing} is at the {place}.",
    "there is {thing} at the {place}.",
)


def long_caption(scene, rng, attributes=ATTRIBUTES, related=True):
    """A true caption with every object, attribute and position, the background, and one or more relations if `related`; wording varies."""
    things = (
        sorted(scene.things, key=lambda thing: thing.cell)
        if rng.random() < 0.5
        else rng.sample(scene.things, len(scene.things))
    )
    sentence, count = rng.choice(SENTENCES), NUMBERS[len(things)]
    ground = rng.choice(
        (
            f"the image shows {count} on a {scene.background} background.",
            f"there are {count}. the background is {scene.background}.",
        )
    )
    body = [
        sentence.format(thing=thing.phrase(attributes), place=POSITIONS[thing.cell])
        for thing in things
    ]
    for _ in range(rng.randint(1, len(things) - 1) if related else 0):
        a, b = rng.sample(things, 2)
        body.append(
            f"the {' '.join(a.kind)} is {rng.choice(relations(a, b))} the {' '.join(b.kind)}."
        )
    return " ".join([ground, *body] if rng.random() < 0.5 else [*body, ground])


def one_word(scene, rng):
    """One content word that is true of the scene, at random: what "in one word" is answered with in the generative stage."""
    thing = rng.choice(scene.things)
    return rng.choice(
        (
            thing.colour,
            thing.colour,
            thing.shape,
            thing.shape,
            POSITIONS[thing.cell],
            scene.background,
        )
    )


def few_words(scene, rng):
    """Colour and shape of two objects."""
    return ", ".join(" ".join(thing.kind) for thing in rng.sample(scene.things, 2))


def question(scene, rng, attributes=ATTRIBUTES):
    """A (question, answer) about the scene: where an object is, or what is at a place."""
    thing = rng.choice(scene.things)
    name, place = " ".join(thing.kind), POSITIONS[thing.cell]
    return rng.choice(
        ((f"where is the {name}?", place), (f"what is at the {place}?", thing.phrase(attributes)))
    )


# Hard negatives after SugarCrepe: one edit makes the caption false of the scene and leaves its wording alone. "_pos" are this project's
# own: position words as further relations and roles.
CATEGORIES = {
    "replace_obj": "Replace", "replace_att": "Replace", "replace_rel": "Replace", "replace_pos": "Replace",
    "swap_obj": "Swap", "swap_att": "Swap", "swap_pos": "Swap", "add_obj": "Add", "add_att": "Add",
}  # fmt: skip


STYLE_OF = {
    "replace_rel": "relation",
    "swap_obj": "relation",
    "replace_pos": "position",
    "swap_pos": "position",
}


def other(rng, values, present):
    """A random value other than the present one."""
    return rng.choice([value for value in values if value != present])


def edit(caption, category, rng):
    """The caption with one edit of this category, or None when the caption offers no place for it; may still be true of the scene."""
    mentions, spot = list(caption.mentions), rng.randrange(len(caption.mentions))
    thing, shown = mentions[spot]
    (first, first_shown), (second, second_shown) = mentions[:2]
    if category == "replace_rel":
        return dataclasses.replace(caption, relation=OPPOSITE[caption.relation])
    if category == "replace_obj":
        mentions[spot] = dataclasses.replace(thing, shape=other(rng, SHAPES, thing.shape)), shown
    elif category == "replace_att":
        name, values = rng.choice(
            [("colour", COLOURS)] + [(name, ATTRIBUTES[name]) for name in shown]
        )
        mentions[spot] = (
            dataclasses.replace(thing, **{name: other(rng, values, getattr(thing, name))}),
            shown,
        )
    elif category == "replace_pos":
        mentions[spot] = (
            dataclasses.replace(thing, cell=other(rng, range(GRID * GRID), thing.cell)),
            shown,
        )
    elif category == "swap_obj":
        mentions[:2] = mentions[1::-1]
    elif category == "swap_pos":
        mentions[:2] = (
            (dataclasses.replace(first, cell=second.cell), first_shown),
            (dataclasses.replace(second, cell=first.cell), second_shown),
        )
    elif category == "swap_att":
        mentions[:2] = (
            (dataclasses.replace(first, colour=second.colour), first_shown),
            (dataclasses.replace(second, colour=first.colour), second_shown),
        )
    elif category == "add_obj":
        cell = other(rng, range(GRID * GRID), thing.cell)
        mentions.append(
            (
                Thing(
                    rng.choice(list(COLOURS)),
                    rng.choice(SHAPES),
                    rng.choice(list(SIZES)),
                    rng.choice(TEXTURES),
                    cell,
                ),
                (),
            )
        )
    elif category == "add_att":
        missing = [name for name in ATTRIBUTES if name not in shown]
        if not missing:
            return None
        name = rng.choice(missing)
        wrong = dataclasses.replace(
            thing, **{name: other(rng, ATTRIBUTES[name], getattr(thing, name))}
        )
        mentions[spot] = wrong, tuple(n for n in ATTRIBUTES if n in shown or n == name)
    return dataclasses.replace(caption, mentions=tuple(mentions))


def edited_caption(seed, index, category):
    """(scene, true Caption, false Caption): the item that (seed, index, category) decides."""
    scene, rng = make_scene(seed, index), random.Random(f"negative {seed} {index} {category}")
    while True:
        caption = short_caption(
            scene, rng, STYLE_OF.get(category), mentions=2 if category == "add_obj" else None
        )
        negative = edit(caption, category, rng)
        kinds = [thing.kind for thing, _ in negative.mentions] if negative else []
        if (
            negative
            and str(negative) != str(caption)
            and len(set(kinds)) == len(kinds)
            and not is_true(negative, scene)
        ):
            return scene, caption, negative
        if (
            category == "swap_att" and len({thing.colour for thing in scene.things}) == 1
        ):  # nothing to swap in a scene of one colour
            scene = make_scene(seed, f"{index} again {rng.random()}")


def hard_negative(seed, index, category):
    """(scene, true caption, false caption), after SugarCrepe."""
    scene, true, false = edited_caption(seed, index, category)
    return scene, str(true), str(false)


def paraphrase(caption, rng):
    """The same content in another order: "A left of B" becomes "B right of A"; lists are shuffled."""
    mentions = list(caption.mentions)
    if caption.relation:
        mentions[:2] = mentions[1::-1]
        return dataclasses.replace(
            caption,
            opening=rng.choice(OPENINGS),
            mentions=tuple(mentions),
            relation=OPPOSITE[caption.relation],
        )
    rng.shuffle(mentions)
    return dataclasses.replace(caption, opening=rng.choice(OPENINGS), mentions=tuple(mentions))


def caption_triple(seed, index, category):
    """(scene, (true caption, the same in other words, false caption)), after SugarCrepe++; the first and the last are hard_negative's."""
    scene, true, false = edited_caption(seed, index, category)
    rng = random.Random(f"paraphrase {seed} {index} {category}")
    same = paraphrase(true, rng)
    while str(same) == str(true):
        same = paraphrase(true, rng)
    return scene, (str(true), str(same), str(false))


WINOGROUND_KINDS = ("colour", "relation", "position")


def scene_pair(seed, index, kind):
    """((scene_0, scene_1), (caption_0, caption_1)) after Winoground: the captions use the same words, caption_i is true of scene_i alone."""
    rng = random.Random(f"pair {seed} {index} {kind}")
    while True:
        scene = make_scene(seed, f"{index} {rng.random()}")
        a, b, *rest = scene.things
        if kind == "colour":
            exchanged = (
                dataclasses.replace(a, colour=b.colour),
                dataclasses.replace(b, colour=a.colour),
            )
        else:
            exchanged = dataclasses.replace(a, cell=b.cell), dataclasses.replace(b, cell=a.cell)
        mirrored = dataclasses.replace(scene, things=(*exchanged, *rest))
        relation = rng.choice(relations(a, b)) if kind == "relation" else None
        captions = [
            Caption("", ((x, ()), (y, ())), relation, kind == "position", None)
            for x, y in ((a, b), exchanged)
        ]
        if kind == "relation":
            captions[1] = dataclasses.replace(captions[0], mentions=captions[0].mentions[::-1])
        true = [[is_true(caption, one) for one in (scene, mirrored)] for caption in captions]
        if true == [[True, False], [False, True]]:
            return (scene, mirrored), tuple(map(str, captions))


def exchanged(scene, rng):
    """A sibling of the scene: two of its objects have exchanged their places or, if that makes a difference, their colours."""
    i, j = rng.sample(range(len(scene.things)), 2)
    a, b = scene.things[i], scene.things[j]
    by_colour = dataclasses.replace(a, colour=b.colour), dataclasses.replace(b, colour=a.colour)
    by_place = dataclasses.replace(a, cell=b.cell), dataclasses.replace(b, cell=a.cell)
    kinds = {thing.kind for thing in scene.things}
    colours_differ = not kinds & {thing.kind for thing in by_colour}
    things = list(scene.things)
    things[i], things[j] = by_colour if colours_differ and rng.random() < 0.5 else by_place
    return dataclasses.replace(scene, things=tuple(things))


def scene_row(seed, index, size=96):
    """The training pair that (seed, index) decides: {"image": picture, "short": caption, "long": caption}.

    Rows 2k and 2k + 1 are siblings, alike but for one exchange; each short caption is true of its own scene and false of the other.
    """
    first = make_scene(seed, index // 2)
    second = exchanged(first, random.Random(f"sibling {seed} {index // 2}"))
    scene, sibling = (first, second) if index % 2 == 0 else (second, first)
    rng = random.Random(f"captions {seed} {index}")
    short = short_caption(scene, rng)
    while is_true(short, sibling):
        short = short_caption(scene, rng)
    return {"image": render(scene, size), "short": str(short), "long": long_caption(scene, rng)}


# ------------------------------------------------------------------------------------------------------ rows to train on


class Scenes:
    """`count` rendered scenes of one seed, with the same interface as Pairs. Siblings (see scene_row) share a batch: hard negatives."""

    together = 2

    def __init__(self, seed, count, size):
        self.seed, self.count, self.size = seed, count, size

    def __len__(self):
        return self.count

    def row(self, index, rng):
        return scene_row(self.seed, index, self.size) | {"where": f"scene {index}"}


class SceneTriples:
    """Rows for text-only training, from the grammar of the scenes: a caption, a paraphrase and a hard negative of a random category."""

    together = 1

    def __init__(self, seed, count):
        self.seed, self.count = seed, count

    def __len__(self):
        return self.count

    def row(self, index, rng):
        category = random.Random(f"category {self.seed} {index}").choice(sorted(CATEGORIES))
        return TEXT_ROW | {
            "triple": caption_triple(self.seed, index, category)[1],
            "where": f"triple {index}",
        }


# ------------------------------------------------------------------------------------------------------ the scenes as a benchmark


CHANCE = {
    "negatives": 50.0,
    "ITT": 100 / 3,
    "TOT": 100 / 3,
    "text": 25.0,
    "image": 25.0,
    "group": 100 / 6,
}  # percent


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


def described_scene(seed, index):
    """(scene, Caption) of a held-out scene of a seed."""
    scene = make_scene(seed, index)
    return scene, short_caption(scene, random.Random(f"captions {seed} {index}"))


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
    for category in CATEGORIES:
        drawn = (caption_triple(seed, i, category) for i in range(items))
        negatives[category] = [
            (scenes.index(scene), *map(texts.index, triple)) for scene, triple in drawn
        ]
    for kind in WINOGROUND_KINDS:
        drawn = (scene_pair(seed, i, kind) for i in range(items))
        pairs[kind] = [
            (tuple(map(scenes.index, two)), tuple(map(texts.index, words))) for two, words in drawn
        ]
    fits = torch.tensor(
        [[is_true(caption, scene) for caption in captions] for scene in scenes.items[:gallery]]
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
        encode_image or model.encode_image, read=lambda scene: render(scene, size)
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
        group: [c for c in benchmark.negatives if CATEGORIES[c] == group]
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


def captioned_scenes(seed, count, size):
    """[(picture, long caption), ...] of the first `count` held-out scenes of a seed."""
    scenes = [make_scene(seed, i) for i in range(count)]
    return [
        (render(scene, size), long_caption(scene, random.Random(f"long {seed} {i}")))
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
        members = [c for c in results["negatives"] if CATEGORIES[c] == group]
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


class HeldOutScenes:
    """Held-out scenes as a benchmark of retrieval and compositionality."""

    def __init__(self, config):
        self.config = config
        self.benchmark = config.eval_gallery and scene_benchmark(
            config.eval_seed, config.eval_gallery, config.eval_items
        )

    def measure(self, model):
        if not self.benchmark:
            return None
        image_emb, text_emb = embed(model, self.benchmark)
        gallery = self.benchmark.gallery
        captioned = captioned_scenes(
            self.config.eval_seed,
            min(benchmarks.LONG_CAPTIONS, gallery),
            model.lvlm.config.vision.image_size,
        )
        told = {
            "image_mode": model.image_processor.mode,
            "long_captions": benchmarks.caption_loss(model, captioned),
        }
        results = score(self.benchmark, image_emb, text_emb) | told
        return benchmarks.Measured(results, similarity(image_emb[:gallery], text_emb[:gallery]))

    def picture(self, index, size):
        return render(self.benchmark.scenes[index], size)

    def caption(self, index):
        return self.benchmark.texts[index]


# ------------------------------------------------------------------------------------------------------ captions of scenes


def read_caption(text):
    """{(colour, shape): position} of every object that a long caption names with a place."""
    colours, shapes, places = (
        "|".join(map(re.escape, words))
        for words in (COLOURS, SHAPES, sorted(POSITIONS, key=len, reverse=True))
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
        part = [make_scene(seed, i) for i in mine[start : start + 100]]
        pictures = [render(scene, size) for scene in part]
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
        right += sum(answer == POSITIONS[thing.cell] for answer, thing in zip(answers, asked))
        for scene, caption in zip(part, captions):
            told, real = (
                read_caption(caption),
                {thing.kind: POSITIONS[thing.cell] for thing in scene.things},
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
        prog="python -m extras.scenes", description="The benchmark of the rendered scenes."
    )
    parser.add_argument("--task", choices=sorted(OWN_TASKS), default="scenes")
    add_model_flags(parser)
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
    if args.gallery < 2 or args.items < 1:
        raise ValueError(f"--gallery {args.gallery} --items {args.items}: at least 2 and 1")
    model = load_model(args)
    results = dict(
        OWN_TASKS[args.task](model, args),
        model=args.model,
        adapter=args.adapter,
        image_mode=model.image_processor.mode,
    )
    if args.json and ranks()[0] == 0:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
