"""The rendered scenes that the embedded default is adapted to, and the benchmark made of them.

    python -m extras.scenes  # the untouched tiny LVLM as an embedder
    python -m extras.scenes --adapter runs/tiny --json scores.json
    python -m extras.scenes --task captions  # are the model's own captions of scenes right?

(seed, index) decides a scene: 2 to 4 objects on a 3 x 3 grid with colour, shape, size and texture,
rendered with Pillow, and captions true and false of it. The order of calls to the random generators
is part of the data: the tiny weights and every recorded table depend on it.

Not here: what the tiny LVLM was pre-trained on (assets/make_tiny.py), the metrics (eval.py).
"""

import argparse
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import eval as bench
from data import add_model_flags, command, format_table, rank_and_world_size, say
from model import write_json
from vladva import VladVA, load_model, similarity

# ---------------------------------------------------------------------------------- the scenes

COLOURS = {
    "red": (214, 39, 40), "green": (34, 150, 62), "blue": (38, 86, 222),
    "yellow": (247, 220, 50), "orange": (250, 138, 22), "purple": (132, 55, 176),
    "pink": (250, 152, 196), "cyan": (58, 206, 214),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.50, "large": 0.84}  # width of the object as a share of its cell
TEXTURES = ("plain", "striped", "dotted")
ATTRIBUTES = {"size": SIZES, "texture": TEXTURES}  # beside colour, shape and position
BACKGROUNDS = {
    "white": (244, 244, 240), "gray": (134, 138, 142),
    "tan": (205, 178, 138), "brown": (104, 70, 44),
}  # fmt: skip
GRID = 3  # cells a side; one object a cell at most
POSITIONS = ("top-left", "top-center", "top-right", "middle-left", "center", "middle-right")
POSITIONS += ("bottom-left", "bottom-center", "bottom-right")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    colour: str
    shape: str
    size: str
    texture: str
    cell: int  # index into POSITIONS: the grid's cells in reading order
    shift: tuple[float, float] = (0.0, 0.0)  # of its centre from the cell's, in cells

    @property
    def kind(self) -> tuple[str, str]:
        return self.colour, self.shape

    def phrase(self, attributes: Sequence[str] = ()) -> str:
        """Noun phrase: "a small striped red circle" for attributes ("size", "texture")."""
        words = [getattr(self, name) for name in ATTRIBUTES if name in attributes]
        words += self.kind
        article = "an" if words[0][0] in "aeiou" else "a"
        return f"{article} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """Objects, no two alike in colour and shape, in a cell of their own, on a plain background."""

    things: tuple[Thing, ...]
    background: str


def make_scene(seed: int, index: int | str, counts: Sequence[int] = (2, 3, 4)) -> Scene:
    """The scene that (seed, index) decides. counts: numbers of objects to draw from."""
    rng = Random(f"scene {seed} {index}")
    all_kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    kinds = rng.sample(all_kinds, rng.choice(counts))
    cells = rng.sample(range(GRID * GRID), len(kinds))
    things = []
    for (colour, shape), cell in zip(kinds, cells):
        size = rng.choice(list(SIZES))
        texture = rng.choice(TEXTURES)
        shift = (rng.uniform(-0.07, 0.07), rng.uniform(-0.07, 0.07))
        things.append(Thing(colour, shape, size, texture, cell, shift))
    return Scene(tuple(things), rng.choice(list(BACKGROUNDS)))


def relations(a: Thing, b: Thing) -> list[str]:
    """The relation words that are true of "a ... b"."""
    row_a, col_a = divmod(a.cell, GRID)
    row_b, col_b = divmod(b.cell, GRID)
    words = []
    if col_a != col_b:
        words.append("left of" if col_a < col_b else "right of")
    if row_a != row_b:
        words.append("above" if row_a < row_b else "below")
    return words


def exchange(a: Thing, b: Thing, field: str) -> tuple[Thing, Thing]:
    """Two objects that have exchanged their "colour" or their "cell"."""
    return replace(a, **{field: getattr(b, field)}), replace(b, **{field: getattr(a, field)})


def sibling(scene: Scene, rng: Random) -> Scene:
    """The scene with two objects that have exchanged their colours or their cells."""
    i, j = rng.sample(range(len(scene.things)), 2)
    by_colour = exchange(scene.things[i], scene.things[j], "colour")
    by_cell = exchange(scene.things[i], scene.things[j], "cell")
    kinds = {thing.kind for thing in scene.things}
    colours_differ = kinds.isdisjoint(thing.kind for thing in by_colour)
    things = list(scene.things)
    things[i], things[j] = by_colour if colours_differ and rng.random() < 0.5 else by_cell
    return replace(scene, things=tuple(things))


def shape_outline(shape: str, width: float, middle: float) -> list[tuple[float, float]]:
    """Corner points of a polygon shape, `width` wide around the point (middle, middle)."""
    r = width / 2
    t = r / 3  # half the width of a bar of the cross
    if shape == "square":
        corners = [(-r, -r), (r, -r), (r, r), (-r, r)]
    elif shape == "triangle":
        corners = [(0, -r), (r, r), (-r, r)]
    elif shape == "cross":
        corners = [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t)]
        corners += [(t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)]
    else:
        assert shape == "star", shape
        corners = []
        for k in range(10):
            length = r * (1.08 if k % 2 == 0 else 0.44)
            angle = math.pi * (k / 5 - 0.5)
            corners.append((length * math.cos(angle), length * math.sin(angle)))
    return [(middle + x, middle + y) for x, y in corners]


def draw_thing(canvas: Image.Image, thing: Thing, cell_px: float) -> None:
    """Paint one object on a canvas whose cells are cell_px wide."""
    # where there is paint: the shape
    side = round(cell_px)
    width = SIZES[thing.size] * cell_px
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if thing.shape in ("circle", "ring"):
        near, far = (side - width) / 2, (side + width) / 2
        pen.ellipse((near, near, far, far), fill=255)
        if thing.shape == "ring":
            near, far = side / 2 - width / 4, side / 2 + width / 4
            pen.ellipse((near, near, far, far), fill=0)
    else:
        pen.polygon(shape_outline(thing.shape, width, side / 2), fill=255)

    # the paint: the colour, with darker stripes or dots
    colour = COLOURS[thing.colour]
    dark = tuple(channel // 3 for channel in colour)
    paint = Image.new("RGB", (side, side), colour)
    pen = ImageDraw.Draw(paint)
    step = cell_px / 8
    for i in range(9):
        if thing.texture == "striped" and i % 2 == 0:
            pen.rectangle((0, (i - 0.35) * step, side, (i + 0.35) * step), fill=dark)
        for j in range(i % 2, 9, 2) if thing.texture == "dotted" else ():
            box = ((i - 0.42) * step, (j - 0.42) * step, (i + 0.42) * step, (j + 0.42) * step)
            pen.ellipse(box, fill=dark)
    row, col = divmod(thing.cell, GRID)
    left = round((col + thing.shift[0]) * cell_px)
    top = round((row + thing.shift[1]) * cell_px)
    canvas.paste(paint, (left, top), mask)


def render(scene: Scene, size: int = 96) -> Image.Image:
    """The scene as an RGB image of size x size pixels, drawn at twice that size."""
    canvas = Image.new("RGB", (2 * size, 2 * size), BACKGROUNDS[scene.background])
    for thing in scene.things:
        draw_thing(canvas, thing, 2 * size / GRID)
    return canvas.resize((size, size), Image.Resampling.BOX)


@dataclass(frozen=True)
class RenderedScenes:
    """Scenes as a sequence of images: each is rendered when it is indexed."""

    scenes: list[Scene]
    image_size: int

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Image.Image:
        return render(self.scenes[index], self.image_size)


# ------------------------------------------------------------------------------------ captions

OPENINGS = ("", "", "", "a picture of ", "an image of ", "there is ", "the image shows ")
NUMBERS = {1: "one object", 2: "two objects", 3: "three objects", 4: "four objects"}
SENTENCES = (  # of a long caption, which repeats one of them
    "{place}: {thing}.",
    "at the {place} there is {thing}.",
    "{thing} {place}.",
    "{thing} is at the {place}.",
    "there is {thing} at the {place}.",
)


@dataclass(frozen=True)
class Caption:
    """A short caption as structure, so that an edit of its content leaves its wording alone."""

    opening: str
    mentions: tuple[tuple[Thing, tuple[str, ...]], ...]  # objects, and attributes it says of them
    relation: str | None  # the word between the first two mentions
    positions: bool  # does the position follow every mention?
    background: str | None  # None: the caption does not speak of it

    def __str__(self) -> str:
        parts = []
        for thing, attributes in self.mentions:
            place = f" {POSITIONS[thing.cell]}" if self.positions else ""
            parts.append(thing.phrase(attributes) + place)
        if self.relation:
            parts[:2] = [f"{parts[0]} {self.relation} {parts[1]}"]
        text = " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
        ground = f" on a {self.background} background" if self.background else ""
        return self.opening + text + ground


def is_true(caption: Caption, scene: Scene) -> bool:
    """Does everything the caption says hold in the scene?"""
    present = {thing.kind: thing for thing in scene.things}
    for thing, attributes in caption.mentions:
        real = present.get(thing.kind)
        if real is None or (caption.positions and thing.cell != real.cell):
            return False
        if any(getattr(thing, name) != getattr(real, name) for name in attributes):
            return False
    if caption.relation:
        (first, _), (second, _) = caption.mentions[:2]
        if caption.relation not in relations(present[first.kind], present[second.kind]):
            return False
    return caption.background in (None, scene.background)


def short_caption(
    scene: Scene, rng: Random, style=None, num_mentions=None, attributes=ATTRIBUTES
) -> Caption:
    """A true caption of 2 or 3 objects. style: "relation", "position", "list"; None: drawn."""
    style = style or rng.choice(("relation", "relation", "position", "position", "list"))
    count = num_mentions or rng.randint(2, min(3, len(scene.things)))
    mentions = []
    for thing in rng.sample(scene.things, count):
        mentions.append((thing, tuple(name for name in attributes if rng.random() < 0.3)))
    opening = rng.choice(OPENINGS)
    relation = None
    if style == "relation":
        relation = rng.choice(relations(mentions[0][0], mentions[1][0]))
    background = scene.background if rng.random() < 0.3 else None
    return Caption(opening, tuple(mentions), relation, style == "position", background)


def long_caption(scene: Scene, rng: Random, attributes=ATTRIBUTES, related: bool = True) -> str:
    """A true caption with every object, its attributes and position, the background, relations."""
    if rng.random() < 0.5:
        things = sorted(scene.things, key=lambda thing: thing.cell)
    else:
        things = rng.sample(scene.things, len(scene.things))
    sentence = rng.choice(SENTENCES)
    count = NUMBERS[len(things)]
    ground = f"the image shows {count} on a {scene.background} background."
    ground = rng.choice((ground, f"there are {count}. the background is {scene.background}."))
    body = []
    for thing in things:
        body.append(sentence.format(thing=thing.phrase(attributes), place=POSITIONS[thing.cell]))
    for _ in range(rng.randint(1, len(things) - 1) if related else 0):
        a, b = rng.sample(things, 2)
        relation = rng.choice(relations(a, b))
        body.append(f"the {' '.join(a.kind)} is {relation} the {' '.join(b.kind)}.")
    return " ".join([ground, *body] if rng.random() < 0.5 else [*body, ground])


def paraphrase(caption: Caption, rng: Random) -> Caption:
    """The same content in another order: "A left of B" as "B right of A"; lists are shuffled."""
    mentions = list(caption.mentions)
    relation = None
    if caption.relation:
        mentions[:2] = mentions[1::-1]
        relation = OPPOSITE[caption.relation]
    else:
        rng.shuffle(mentions)
    opening = rng.choice(OPENINGS)
    return replace(caption, opening=opening, mentions=tuple(mentions), relation=relation)


# ---------------------------------------- hard negatives after SugarCrepe, pairs after Winoground

GROUPS = {  # "_pos" are this project's own: positions as further relations and roles
    "Replace": ("replace_obj", "replace_att", "replace_rel", "replace_pos"),
    "Swap": ("swap_obj", "swap_att", "swap_pos"),
    "Add": ("add_obj", "add_att"),
}
CATEGORIES = (*GROUPS["Replace"], *GROUPS["Swap"], *GROUPS["Add"])
STYLE_OF = {"replace_rel": "relation", "swap_obj": "relation"}  # the caption it takes
WINOGROUND_KINDS = ("colour", "relation", "position")
VALUES = {"colour": COLOURS, "shape": SHAPES, "cell": range(GRID * GRID)} | ATTRIBUTES


def with_other(thing: Thing, field: str, rng: Random) -> Thing:
    """The object with another value of a field, drawn."""
    others = [value for value in VALUES[field] if value != getattr(thing, field)]
    return replace(thing, **{field: rng.choice(others)})


def edit(caption: Caption, category: str, rng: Random) -> Caption | None:
    """The caption with one edit, which may leave it true; None where it has no place for one."""
    things, attributes = map(list, zip(*caption.mentions))
    spot = rng.randrange(len(things))
    if category == "replace_rel":
        return replace(caption, relation=OPPOSITE[caption.relation])
    if category == "swap_obj":
        things[:2] = things[1::-1]
        attributes[:2] = attributes[1::-1]
    elif category.startswith("swap"):
        things[:2] = exchange(*things[:2], "cell" if category == "swap_pos" else "colour")
    elif category.startswith("replace"):
        field = {"replace_obj": "shape", "replace_pos": "cell"}.get(category)
        field = field or rng.choice(["colour", *attributes[spot]])
        things[spot] = with_other(things[spot], field, rng)
    elif category == "add_obj":
        cell = with_other(things[spot], "cell", rng).cell
        values = [rng.choice(list(VALUES[name])) for name in ("colour", "shape", "size", "texture")]
        things.append(Thing(*values, cell))
        attributes.append(())
    elif category == "add_att":
        missing = [name for name in ATTRIBUTES if name not in attributes[spot]]
        if not missing:
            return None
        field = rng.choice(missing)
        things[spot] = with_other(things[spot], field, rng)
        attributes[spot] += (field,)
    return replace(caption, mentions=tuple(zip(things, attributes)))


def edited_caption(seed: int, index: int, category: str) -> tuple[Scene, Caption, Caption]:
    """(scene, true caption, false caption): the item that (seed, index, category) decides."""
    scene = make_scene(seed, index)
    rng = Random(f"negative {seed} {index} {category}")
    style = "position" if category.endswith("_pos") else STYLE_OF.get(category)
    num_mentions = 2 if category == "add_obj" else None
    while True:
        caption = short_caption(scene, rng, style, num_mentions)
        false = edit(caption, category, rng)
        if false and str(false) != str(caption) and not is_true(false, scene):
            if len({thing.kind for thing, _ in false.mentions}) == len(false.mentions):
                return scene, caption, false
        # a scene of one colour has none to swap
        if category == "swap_att" and len({thing.colour for thing in scene.things}) == 1:
            scene = make_scene(seed, f"{index} again {rng.random()}")


def caption_triple(seed: int, index: int, category: str) -> tuple[Scene, tuple[str, str, str]]:
    """(scene, (true caption, the same in other words, false caption)), after SugarCrepe++."""
    scene, true, false = edited_caption(seed, index, category)
    rng = Random(f"paraphrase {seed} {index} {category}")
    same = true
    while str(same) == str(true):
        same = paraphrase(true, rng)
    return scene, (str(true), str(same), str(false))


def scene_pair(seed: int, index: int, kind: str) -> tuple[tuple[Scene, Scene], tuple[str, str]]:
    """(two scenes, two captions) of the same words: caption i is true of scene i alone."""
    rng = Random(f"pair {seed} {index} {kind}")
    while True:
        scene = make_scene(seed, f"{index} {rng.random()}")
        a, b, *others = scene.things
        new_a, new_b = exchange(a, b, "colour" if kind == "colour" else "cell")
        mirrored = replace(scene, things=(new_a, new_b, *others))
        relation = rng.choice(relations(a, b)) if kind == "relation" else None
        first = Caption("", ((a, ()), (b, ())), relation, kind == "position", None)
        exchanged = (b, a) if kind == "relation" else (new_a, new_b)
        second = replace(first, mentions=tuple((thing, ()) for thing in exchanged))
        right = is_true(first, scene) and is_true(second, mirrored)
        if right and not is_true(first, mirrored) and not is_true(second, scene):
            return (scene, mirrored), (str(first), str(second))


# ------------------------------------------------- rows to train on, and the benchmark of scenes


def scene_row(seed: int, index: int, size: int = 96) -> dict:
    """The training pair {"image": ..., "short": ..., "long": ...} that (seed, index) decides.

    Rows 2k and 2k + 1 are siblings: the short caption of each is true of its own scene alone.
    """
    first = make_scene(seed, index // 2)
    second = sibling(first, Random(f"sibling {seed} {index // 2}"))
    scene, rival = (first, second) if index % 2 == 0 else (second, first)
    rng = Random(f"captions {seed} {index}")
    short = short_caption(scene, rng)
    while is_true(short, rival):
        short = short_caption(scene, rng)
    return {"image": render(scene, size), "short": str(short), "long": long_caption(scene, rng)}


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes with the interface of data.Pairs."""

    seed: int
    num_scenes: int
    image_size: int
    group_size = 2  # siblings share a batch, as hard negatives

    def __len__(self) -> int:
        return self.num_scenes

    def row(self, index: int, rng: Random) -> dict:
        return scene_row(self.seed, index, self.image_size) | {"where": f"scene {index}"}


def open_scenes(config, model: VladVA) -> tuple[Scenes, "HeldOutScenes"]:
    """(rows to train on, what is held out) of a run. config: train.TrainConfig."""
    size = model.lvlm.config.vision.image_size
    say(f"training on rendered scenes of {size} x {size} pixels, a demonstration")
    num_held_out = 1000 if config.holdout is None else config.holdout
    held_out = HeldOutScenes(config.eval_seed, num_held_out, size)
    return Scenes(config.seed, config.num_scenes, size), held_out


def described_scene(seed: int, index: int) -> tuple[Scene, Caption]:
    """A held-out scene and its short caption."""
    scene = make_scene(seed, index)
    return scene, short_caption(scene, Random(f"captions {seed} {index}"))


def scene_benchmark(seed: int, num_scenes: int, num_items: int, image_size: int) -> bench.Benchmark:
    """Held-out scenes: a gallery, and num_items hard negatives a category and pairs a kind."""
    scenes, texts = bench.IndexedList(), bench.IndexedList()
    # the gallery: text i describes scene i, so a caption that two scenes share stands there twice
    for i in range(num_scenes):
        scene, caption = described_scene(seed, i)
        scenes.add(scene)
        texts.append(str(caption))
    triples, pairs = {}, {}
    for category in CATEGORIES:
        triples[category] = []
        for i in range(num_items):
            scene, captions = caption_triple(seed, i, category)
            triples[category].append((scenes.add(scene), *map(texts.add, captions)))
    for kind in WINOGROUND_KINDS:
        pairs[kind] = []
        for i in range(num_items):
            two_scenes, captions = scene_pair(seed, i, kind)
            pairs[kind].append((list(map(scenes.add, two_scenes)), list(map(texts.add, captions))))
    score = functools.partial(scene_scores, num_scenes, triples, pairs)
    counts = {"scenes": num_scenes, "items a category": num_items}
    return bench.Benchmark(RenderedScenes(scenes, image_size), texts, score, counts)


def scene_scores(
    num_scenes: int, triples: dict, pairs: dict, image_emb: Tensor, text_emb: Tensor
) -> dict[str, float]:
    """Every score of the benchmark, in percent.

    triples: {category: [(scene, true text, the same in other words, false text), ...]}; pairs:
    {kind: [((scene, scene), (text, text)), ...]}; all are indices into image_emb and text_emb.
    """
    image_of_text = torch.arange(num_scenes)
    scores = bench.recall(image_emb[:num_scenes], text_emb[:num_scenes], image_of_text)
    negatives = {}
    for category, items in triples.items():
        negatives[category] = [(scene, true, false) for scene, true, _, false in items]
    scores |= bench.category_scores(negatives, GROUPS, image_emb, text_emb)
    scores |= bench.category_scores(triples, GROUPS, image_emb, text_emb)
    for kind, items in pairs.items():
        scene, text = torch.tensor(items).unbind(1)  # (items, 2) each
        sim = image_emb[scene] @ text_emb[text].transpose(1, 2)  # (items, 2, 2)
        for name, value in bench.winoground_scores(sim).items():
            scores[f"pairs {kind} {name}"] = value
    return scores


def chance_level(name: str, num_scenes: int) -> float:
    """What a score of the benchmark is by chance, in percent."""
    if "R@" in name:
        return min(100.0, 100 * int(name.split("R@")[1]) / max(1, num_scenes))
    return CHANCE.get(name.split()[-1], 50.0)


def ceilings(seed: int, num_scenes: int) -> dict[str, float]:
    """The best expected R@1, in percent: a caption may fit several scenes of the gallery."""
    scenes, captions = zip(*(described_scene(seed, i) for i in range(num_scenes)))
    fits = torch.zeros(num_scenes, num_scenes, dtype=torch.double)  # row i: scene i, all captions
    for i, scene in enumerate(scenes):
        fits[i] = torch.tensor([is_true(caption, scene) for caption in captions])
    best = {"image_to_text R@1": 1 / fits.sum(1), "text_to_image R@1": 1 / fits.sum(0)}
    return {name: 100 * values.mean().item() for name, values in best.items()}


TEST_SEED = 2000  # of the scenes that results are reported on, as in train.TrainConfig
CHANCE = {"ITT": 100 / 3, "TOT": 100 / 3, "text": 25.0, "image": 25.0, "group": 100 / 6}
REPORTED = (  # rows of a run's table
    *("image_to_text R@1", "image_to_text R@10", "text_to_image R@1", "text_to_image R@10"),
    *(*GROUPS, "pairs colour group", "pairs relation group", "pairs position group"),
)


class HeldOutScenes:
    """The benchmark of a run: `num_scenes` scenes in the gallery, half as many items a category."""

    num_long_captions = 300  # of which Eq. 2 is measured

    def __init__(self, seed: int, num_scenes: int, image_size: int):
        self.seed = seed
        self.num_scenes = num_scenes
        self.chance = {name: chance_level(name, num_scenes) for name in REPORTED}
        self.benchmark = scene_benchmark(seed, num_scenes, max(1, num_scenes // 2), image_size)

    def __len__(self) -> int:
        return self.num_scenes

    def measure(self, model: VladVA) -> bench.Measured:
        image_emb, text_emb = bench.embed_benchmark(model, self.benchmark)
        sim = similarity(image_emb[: len(self)], text_emb[: len(self)])
        scenes = self.benchmark.images.scenes[: min(self.num_long_captions, len(self))]
        captions = [long_caption(s, Random(f"long {self.seed} {i}")) for i, s in enumerate(scenes)]
        images = RenderedScenes(scenes, self.benchmark.images.image_size)
        caption_loss = bench.mean_caption_loss(model, images, captions)
        return bench.Measured(self.benchmark.score(image_emb, text_emb), sim, caption_loss)

    def image(self, index: int) -> Image.Image:
        return self.benchmark.images[index]

    def caption(self, index: int) -> str:
        return self.benchmark.texts[index]


def read_caption(text: str) -> dict[tuple[str, str], str]:
    """{(colour, shape): position} of every object that a long caption names with its position."""
    kind = rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
    place = rf"(?<![\w-])({'|'.join(POSITIONS)})(?![\w-])"
    position_of = {}
    for sentence in text.split("."):
        kinds = re.findall(kind, sentence)
        places = re.findall(place, sentence)
        if len(kinds) == 1 and len(places) == 1:
            position_of.setdefault(kinds[0], places[0])
    return position_of


def caption_accuracy(model: VladVA, seed: int, count: int = 300) -> dict:
    """How right are the model's own words about held-out scenes? In percent.

    named: objects whose colour and shape a greedy caption gives; placed: with the right position as
    well; invented: not there, per 100 that are; where: answers to "where is the ...?", one a scene.
    """
    named = placed = invented = objects = right = 0
    for start in tqdm(range(0, count, 100), "captioning scenes", leave=False, disable=None):
        indices = range(start, min(start + 100, count))
        scenes = [make_scene(seed, i) for i in indices]
        things = [Random(f"where {seed} {i}").choice(s.things) for i, s in zip(indices, scenes)]
        questions = [f"where is the {' '.join(thing.kind)}?" for thing in things]
        images = RenderedScenes(scenes, model.lvlm.config.vision.image_size)
        prompts = [model.config.detail_prompt] * len(scenes)
        captions = model.generate_batch(images, prompts, max_new_tokens=120)
        answers = model.generate_batch(images, questions, max_new_tokens=8)
        for thing, answer in zip(things, answers):
            right += answer == POSITIONS[thing.cell]
        for scene, caption in zip(scenes, captions):
            said = read_caption(caption)
            real = {thing.kind: POSITIONS[thing.cell] for thing in scene.things}
            objects += len(real)
            named += len(said.keys() & real.keys())
            placed += len(said.items() & real.items())
            invented += len(said.keys() - real.keys())
    percent = {"named": named, "placed": placed, "invented": invented}
    percent = {name: 100 * value / objects for name, value in percent.items()}
    return {"scenes": count, "objects": objects} | percent | {"where": 100 * right / count}


# -------------------------------------------------------------------------------- command line


def measure_scenes(model: VladVA, seed: int, num_scenes: int) -> dict:
    """Print every score of the benchmark; returns what --json writes."""
    held_out = HeldOutScenes(seed, num_scenes, model.lvlm.config.vision.image_size)
    measured = held_out.measure(model)
    ceiling = ceilings(seed, num_scenes)
    rows = []
    for name, value in measured.scores.items():
        best = f"{ceiling[name]:.1f}" if name in ceiling else ""
        chance = f"{chance_level(name, num_scenes):.1f}"
        rows.append([name.replace("_", " "), chance, best, f"{value:.1f}"])
    rows.append(["long captions, nats a token", "", "", f"{measured.caption_loss:.3f}"])
    say(format_table(["percent", "chance", "ceiling", "this model"], rows))
    results = {"counts": held_out.benchmark.counts, "scores": measured.scores, "ceiling": ceiling}
    return results | {"caption_loss": measured.caption_loss}


@command
def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser("python -m extras.scenes", description=__doc__.split("\n")[0])
    task_help = "the benchmark, or how right the model's own captions are (default: scenes)"
    parser.add_argument("--task", choices=("scenes", "captions"), default="scenes", help=task_help)
    add_model_flags(parser)
    seed_help = f"of the held-out scenes (default: {TEST_SEED})"
    parser.add_argument("--seed", type=int, default=TEST_SEED, help=seed_help)
    holdout_help = "scenes, and half as many items a category (default: 1000)"
    parser.add_argument("--holdout", type=int, default=1000, metavar="N", help=holdout_help)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers (default: no file)")
    args = parser.parse_args(argv)
    if args.holdout < 2:
        raise ValueError(f"--holdout {args.holdout}: at least 2 scenes are needed")
    model = load_model(args)
    if args.task == "scenes":
        results = measure_scenes(model, args.seed, args.holdout)
    else:
        results = caption_accuracy(model, args.seed, args.holdout)
        rows = [[name, f"{results[name]:.1f}"] for name in ("named", "placed", "invented", "where")]
        say(format_table(["percent", "this model"], rows))
    about = {"task": args.task, "model": args.model, "adapter": args.adapter, "seed": args.seed}
    if args.json and rank_and_world_size()[0] == 0:
        write_json(args.json, about | results)
    return about | results


if __name__ == "__main__":
    main()
