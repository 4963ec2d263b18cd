"""Rendered scenes: what the tiny model is adapted to, and a benchmark made of them.

    python -m extras.scenes  # the untouched tiny model as an embedder
    python -m extras.scenes --task captions --adapter runs/tiny  # its own captions, after a run

(seed, index) decides a scene and what is said of it. The order of calls to the random generators is
part of the data: the tiny model's weights and every recorded table depend on it.
Not here: what the tiny model was pre-trained on (assets/make_tiny.py), the metrics (eval.py).
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import data
import eval as bench
from vladva import VladVA, load_model, similarity

# ---------------------------------------------------------------------------------- the scenes

COLOURS = {"red": (214, 39, 40), "green": (34, 150, 62), "blue": (38, 86, 222)}
COLOURS |= {"yellow": (247, 220, 50), "orange": (250, 138, 22), "purple": (132, 55, 176)}
COLOURS |= {"pink": (250, 152, 196), "cyan": (58, 206, 214)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.50, "large": 0.84}  # width of the object as a share of its cell
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = {"white": (244, 244, 240), "gray": (134, 138, 142)}
BACKGROUNDS |= {"tan": (205, 178, 138), "brown": (104, 70, 44)}
GRID = 3  # cells a side; one object a cell at most
POSITIONS = ("top-left", "top-center", "top-right", "middle-left", "center", "middle-right")
POSITIONS += ("bottom-left", "bottom-center", "bottom-right")
VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "texture": TEXTURES}
VALUES["cell"] = range(GRID * GRID)
ATTRIBUTES = ("size", "texture")  # what a short caption may leave out
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

BAR = 1 / 3  # half the width of the cross's bars
OUTLINES = {  # corners of the shapes that are polygons, in half widths from the middle
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "cross": [(-BAR, -1), (BAR, -1), (BAR, -BAR), (1, -BAR), (1, BAR), (BAR, BAR)],
    "star": [],
}
OUTLINES["cross"] += [(-x, -y) for x, y in OUTLINES["cross"]]
# the corners of a star lie on two circles in turn, from its top on
for spoke, length in enumerate(5 * (1.08, 0.44)):
    angle = math.pi * (spoke / 5 - 0.5)
    OUTLINES["star"].append((length * math.cos(angle), length * math.sin(angle)))


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
    """Objects on a plain background, no two of one kind or in one cell."""

    things: tuple[Thing, ...]
    background: str


def make_scene(seed: int, index: int | str, counts: Sequence[int] = (2, 3, 4)) -> Scene:
    """The scene that (seed, index) decides. counts: numbers of objects to choose from."""
    rng = Random(f"scene {seed} {index}")
    kinds = rng.sample(list(itertools.product(COLOURS, SHAPES)), rng.choice(counts))
    cells = rng.sample(VALUES["cell"], len(kinds))
    things = []
    for (colour, shape), cell in zip(kinds, cells):
        size = rng.choice(VALUES["size"])
        texture = rng.choice(TEXTURES)
        # a little off the middle, so that equal captions do not mean equal pixels
        shift = (rng.uniform(-0.07, 0.07), rng.uniform(-0.07, 0.07))
        things.append(Thing(colour, shape, size, texture, cell, shift))
    return Scene(tuple(things), rng.choice(tuple(BACKGROUNDS)))


# The words that are true of "a ... b", in this order.
def relations(a: Thing, b: Thing) -> list[str]:
    row_a, col_a = divmod(a.cell, GRID)
    row_b, col_b = divmod(b.cell, GRID)
    holds = {"left of": col_a < col_b, "right of": col_a > col_b}
    holds |= {"above": row_a < row_b, "below": row_a > row_b}
    return [word for word in holds if holds[word]]


# Two objects that have exchanged their "colour" or their "cell".
def exchange(a: Thing, b: Thing, field: str) -> tuple[Thing, Thing]:
    return replace(a, **{field: getattr(b, field)}), replace(b, **{field: getattr(a, field)})


# The scene with two objects that have exchanged their colours or their cells.
def sibling(scene: Scene, rng: Random) -> Scene:
    things = list(scene.things)
    i, j = rng.sample(range(len(things)), 2)
    pair = exchange(things[i], things[j], "colour")
    # not the colours where that would leave two objects of one kind, or change nothing
    kinds = {thing.kind for thing in things}
    if kinds & {pair[0].kind, pair[1].kind} or rng.random() >= 0.5:
        pair = exchange(things[i], things[j], "cell")
    things[i], things[j] = pair
    return replace(scene, things=tuple(things))


# One object, on a canvas whose cells are cell_px wide.
def paint_thing(canvas: Image.Image, thing: Thing, cell_px: float) -> None:
    # the mask says where there is paint: the shape
    side = round(cell_px)
    middle = side / 2
    radius = SIZES[thing.size] * cell_px / 2
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if thing.shape in OUTLINES:
        corners = [(middle + radius * x, middle + radius * y) for x, y in OUTLINES[thing.shape]]
        pen.polygon(corners, fill=255)
    else:
        pen.circle((middle, middle), radius, fill=255)
    if thing.shape == "ring":
        pen.circle((middle, middle), radius / 2, fill=0)
    # the paint is the colour, with darker stripes or dots
    colour = COLOURS[thing.colour]
    dark = tuple(channel // 3 for channel in colour)
    paint = Image.new("RGB", (side, side), colour)
    pen = ImageDraw.Draw(paint)
    step = cell_px / 8
    for i in range(9):
        if thing.texture == "striped" and i % 2 == 0:
            pen.rectangle((0, (i - 0.35) * step, side, (i + 0.35) * step), fill=dark)
        for j in range(i % 2, 9, 2) if thing.texture == "dotted" else ():
            pen.circle((i * step, j * step), 0.42 * step, fill=dark)
    row, col = divmod(thing.cell, GRID)
    left = round((col + thing.shift[0]) * cell_px)
    top = round((row + thing.shift[1]) * cell_px)
    canvas.paste(paint, (left, top), mask)


def render(scene: Scene, size: int = 96) -> Image.Image:
    """The scene as an RGB image of size x size pixels."""
    # at twice the size first: edges come out smooth
    canvas = Image.new("RGB", (2 * size, 2 * size), BACKGROUNDS[scene.background])
    for thing in scene.things:
        paint_thing(canvas, thing, 2 * size / GRID)
    return canvas.resize((size, size), Image.Resampling.BOX)


# ------------------------------------------------------------------------------------ captions

OPENINGS = ("", "", "", "a picture of ", "an image of ", "there is ", "the image shows ")
NUMBERS = {1: "one object", 2: "two objects", 3: "three objects", 4: "four objects"}
# a long caption repeats one of these
SENTENCES = ("{place}: {thing}.", "at the {place} there is {thing}.", "{thing} {place}.")
SENTENCES += ("{thing} is at the {place}.", "there is {thing} at the {place}.")


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
        # "a left of b, c and d": the relation joins the first two
        if self.relation:
            parts[:2] = [f"{parts[0]} {self.relation} {parts[1]}"]
        *others, last = parts
        text = f"{', '.join(others)} and {last}" if others else last
        ground = f" on a {self.background} background" if self.background else ""
        return self.opening + text + ground


def is_true(caption: Caption, scene: Scene) -> bool:
    """Does everything the caption says hold in the scene?"""
    present = {thing.kind: thing for thing in scene.things}
    for thing, attributes in caption.mentions:
        real = present.get(thing.kind)
        fields = (*attributes, "cell") if caption.positions else attributes
        if real is None or any(getattr(thing, name) != getattr(real, name) for name in fields):
            return False
    if caption.relation:
        (first, _), (second, _) = caption.mentions[:2]
        if caption.relation not in relations(present[first.kind], present[second.kind]):
            return False
    return caption.background in (None, scene.background)


def short_caption(
    scene: Scene,
    rng: Random,
    style: str | None = None,
    num_mentions: int | None = None,
    attributes: Sequence[str] = ATTRIBUTES,
) -> Caption:
    """A true caption of 2 or 3 objects; style: "relation", "position", "list" or None, random."""
    # relations and positions twice as often as a mere list
    style = style or rng.choice(("relation", "relation", "position", "position", "list"))
    things = rng.sample(scene.things, num_mentions or rng.randint(2, min(3, len(scene.things))))
    mentions = []
    for thing in things:
        mentions.append((thing, tuple(name for name in attributes if rng.random() < 0.3)))
    opening = rng.choice(OPENINGS)
    relation = rng.choice(relations(*things[:2])) if style == "relation" else None
    background = scene.background if rng.random() < 0.3 else None
    return Caption(opening, tuple(mentions), relation, style == "position", background)


def long_caption(
    scene: Scene, rng: Random, attributes: Sequence[str] = ATTRIBUTES, related: bool = True
) -> str:
    """A true caption with every object, its attributes and position, the background, relations."""
    if rng.random() < 0.5:
        things = sorted(scene.things, key=lambda thing: thing.cell)
    else:
        things = rng.sample(scene.things, len(scene.things))
    sentence = rng.choice(SENTENCES)
    # how many on which background: in one sentence or two, before the objects or after them
    count = NUMBERS[len(things)]
    ground = f"the image shows {count} on a {scene.background} background."
    ground = rng.choice((ground, f"there are {count}. the background is {scene.background}."))
    body = []
    for thing in things:
        body.append(sentence.format(thing=thing.phrase(attributes), place=POSITIONS[thing.cell]))
    # positions imply relations, but the pre-training never put them in words
    for _ in range(rng.randint(1, len(things) - 1) if related else 0):
        a, b = rng.sample(things, 2)
        relation = rng.choice(relations(a, b))
        body.append(f"the {' '.join(a.kind)} is {relation} the {' '.join(b.kind)}.")
    return " ".join([ground, *body] if rng.random() < 0.5 else [*body, ground])


def paraphrase(caption: Caption, rng: Random) -> Caption:
    """The same content in another order: "A left of B" as "B right of A"; lists are shuffled."""
    mentions = list(caption.mentions)
    if caption.relation:
        mentions[:2] = mentions[1::-1]
    else:
        rng.shuffle(mentions)
    changes = {"mentions": tuple(mentions), "relation": OPPOSITE.get(caption.relation)}
    return replace(caption, opening=rng.choice(OPENINGS), **changes)


# ---------------------------------------- hard negatives after SugarCrepe, pairs after Winoground

GROUPS = dict(bench.GROUPS)
# this project's own: positions as further relations and roles
GROUPS["Replace"] += ("replace_pos",)
GROUPS["Swap"] += ("swap_pos",)
CATEGORIES = tuple(itertools.chain(*GROUPS.values()))
STYLES = {"replace_rel": "relation", "swap_obj": "relation"}  # of the caption that is edited
STYLES |= {"replace_pos": "position", "swap_pos": "position"}
WINOGROUND_KINDS = ("colour", "relation", "position")


# The object with another value of a field, at random.
def with_other(thing: Thing, field: str, rng: Random) -> Thing:
    others = [value for value in VALUES[field] if value != getattr(thing, field)]
    return replace(thing, **{field: rng.choice(others)})


# One edit, which may leave the caption true or, where it has no place, as it is.
def edit(caption: Caption, category: str, rng: Random) -> Caption:
    mentions = list(caption.mentions)
    spot = rng.randrange(len(mentions))
    thing, attributes = mentions[spot]
    if category == "replace_rel":
        return replace(caption, relation=OPPOSITE[caption.relation])
    if category == "swap_obj":
        mentions[:2] = mentions[1::-1]
    elif category.startswith("swap"):
        (a, of_a), (b, of_b) = mentions[:2]
        a, b = exchange(a, b, "cell" if category == "swap_pos" else "colour")
        mentions[:2] = [(a, of_a), (b, of_b)]
    elif category.startswith("replace"):
        field = {"replace_obj": "shape", "replace_pos": "cell"}.get(category)
        field = field or rng.choice(["colour", *attributes])
        mentions[spot] = (with_other(thing, field, rng), attributes)
    elif category == "add_obj":
        cell = with_other(thing, "cell", rng).cell
        values = [rng.choice(VALUES[name]) for name in ("colour", "shape", "size", "texture")]
        mentions.append((Thing(*values, cell), ()))
    elif set(attributes) != set(ATTRIBUTES):  # add_att
        field = rng.choice([name for name in ATTRIBUTES if name not in attributes])
        mentions[spot] = (with_other(thing, field, rng), (*attributes, field))
    return replace(caption, mentions=tuple(mentions))


def caption_triple(seed: int, index: int, category: str) -> tuple[Scene, tuple[str, str, str]]:
    """(scene, (true caption, the same in other words, false caption)), after SugarCrepe++."""
    scene = make_scene(seed, index)
    rng = Random(f"negative {seed} {index} {category}")
    while True:
        true = short_caption(scene, rng, STYLES.get(category), 2 if category == "add_obj" else None)
        false = edit(true, category, rng)
        # an edit may make another true caption, or one that mentions two objects of one kind
        kinds = {thing.kind for thing, _ in false.mentions}
        if not is_true(false, scene) and len(kinds) == len(false.mentions):
            break
        # a scene of one colour has none to swap
        if category == "swap_att" and len({thing.colour for thing in scene.things}) == 1:
            scene = make_scene(seed, f"{index} again {rng.random()}")
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
        c, d = (b, a) if kind == "relation" else (new_a, new_b)
        second = replace(first, mentions=((c, ()), (d, ())))
        # two objects of one colour or of one shape may make no pair
        right = is_true(first, scene) and is_true(second, mirrored)
        if right and not is_true(first, mirrored) and not is_true(second, scene):
            return (scene, mirrored), (str(first), str(second))


# ------------------------------------------------- rows to train on, and the benchmark of scenes


def scene_row(seed: int, index: int, size: int = 96) -> dict:
    """The training pair {"image": ..., "short": ..., "long": ...} that (seed, index) decides."""
    # rows 2k and 2k + 1 are siblings: a short caption is true of one of the two scenes alone
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
    """Rows to train on, with the interface of data.Pairs."""

    seed: int
    num_scenes: int
    image_size: int
    group_size = 2  # siblings share a batch, as hard negatives

    def __len__(self) -> int:
        return self.num_scenes

    def row(self, index: int, rng: Random) -> dict:
        return scene_row(self.seed, index, self.image_size) | {"where": f"scene {index}"}


@dataclass(frozen=True)
class RenderedScenes:
    """Scenes as a sequence of images: each is rendered when it is indexed."""

    scenes: list[Scene]
    image_size: int

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Image.Image:
        return render(self.scenes[index], self.image_size)


def described_scene(seed: int, index: int) -> tuple[Scene, Caption]:
    """A held-out scene and its short caption."""
    scene = make_scene(seed, index)
    return scene, short_caption(scene, Random(f"captions {seed} {index}"))


# Of {item: index}; an item that is added again keeps its index, so that it is encoded once.
def add_items(indices: dict, items: Sequence) -> list[int]:
    return [indices.setdefault(item, len(indices)) for item in items]


def scene_benchmark(seed: int, num_scenes: int, num_items: int, image_size: int) -> bench.Benchmark:
    """Held-out scenes: a gallery, and num_items hard negatives a category and pairs a kind."""
    # the gallery: text i describes scene i, so a caption that two scenes share stands there twice
    described = [described_scene(seed, i) for i in range(num_scenes)]
    scenes = {scene: i for i, (scene, _) in enumerate(described)}
    gallery = [str(caption) for _, caption in described]
    # a caption triple is a list of indices: scene, true text, the same in other words, false text
    texts = {}  # behind the gallery's
    triples, negatives, pairs = {}, {}, {}
    for category, i in itertools.product(CATEGORIES, range(num_items)):
        scene, captions = caption_triple(seed, i, category)
        item = add_items(scenes, [scene]) + add_items(texts, captions)
        triples.setdefault(category, []).append(item)
        negatives.setdefault(category, []).append([*item[:2], item[3]])
    for kind, i in itertools.product(WINOGROUND_KINDS, range(num_items)):
        two_scenes, captions = scene_pair(seed, i, kind)
        item = [add_items(scenes, two_scenes), add_items(texts, captions)]
        pairs.setdefault(kind, []).append(item)

    def score(image_emb: Tensor, text_emb: Tensor) -> dict[str, float]:
        pairing = torch.arange(num_scenes)
        scores = bench.recall(image_emb[:num_scenes], text_emb[:num_scenes], pairing)
        text_emb = text_emb[num_scenes:]
        scores |= bench.category_scores(negatives, GROUPS, image_emb, text_emb)
        scores |= bench.category_scores(triples, GROUPS, image_emb, text_emb)
        for kind, items in pairs.items():
            scene, text = torch.tensor(items).unbind(1)  # (items, 2) each
            sim = image_emb[scene] @ text_emb[text].transpose(1, 2)  # (items, 2, 2)
            for name, value in bench.winoground_scores(sim).items():
                scores[f"pairs {kind} {name}"] = value
        return scores

    counts = {"scenes": num_scenes, "items a category": num_items}
    images = RenderedScenes(list(scenes), image_size)
    return bench.Benchmark(images, gallery + list(texts), score, counts)


class HeldOutScenes:
    """The benchmark of a run: `num_scenes` scenes in the gallery, half as many items a category."""

    def __init__(self, seed: int, num_scenes: int, image_size: int):
        self.seed = seed
        self.benchmark = scene_benchmark(seed, num_scenes, max(1, num_scenes // 2), image_size)
        # the rows of a run's table, and what chance would score
        self.chance = {}
        for direction, k in itertools.product(("image_to_text", "text_to_image"), (1, 10)):
            self.chance[f"{direction} R@{k}"] = min(100.0, 100 * k / max(1, num_scenes))
        self.chance |= dict.fromkeys(GROUPS, 50.0)
        self.chance |= {f"pairs {kind} group": 100 / 6 for kind in WINOGROUND_KINDS}

    def __len__(self) -> int:
        return self.benchmark.counts["scenes"]

    def measure(self, model: VladVA) -> bench.Measured:
        """All scores of the model as it is now."""
        image_emb, text_emb = bench.embed_benchmark(model, self.benchmark)
        sim = similarity(image_emb[: len(self)], text_emb[: len(self)])
        # Eq. 2 on the first of them only, to save time
        images = self.benchmark.images
        captions = []
        for i, scene in enumerate(images.scenes[: min(300, len(self))]):
            captions.append(long_caption(scene, Random(f"long {self.seed} {i}")))
        caption_loss = bench.mean_caption_loss(model, images, captions)
        return bench.Measured(self.benchmark.score(image_emb, text_emb), sim, caption_loss)


def open_scenes(config, model: VladVA) -> tuple[Scenes, HeldOutScenes]:
    """(rows to train on, what is held out) of a run. config: train.TrainConfig."""
    size = model.lvlm.config.vision.image_size
    holdout = 1000 if config.holdout is None else config.holdout
    held_out = HeldOutScenes(config.eval_seed, holdout, size)
    return Scenes(config.seed, config.num_scenes, size), held_out


# -------------------------------------------------------------------------------- command line

TEST_SEED = 2000  # of the scenes that results are reported on, as in train.TrainConfig
PLACE = re.compile("|".join(POSITIONS))


def caption_accuracy(model: VladVA, seed: int, count: int = 300) -> dict[str, float]:
    """How right are the model's own words about held-out scenes? In percent."""
    # named: objects, by colour and shape, with a position in a greedy long caption; placed: the
    # right one; where: right answers to "where is the red circle?"; said, true: sizes, textures
    objects = named = placed = right = 0
    said, true = Counter(), Counter()
    # in batches: all at once would fill the memory
    for indices in data.batches(range(count), 100, "captioning scenes"):
        scenes = [make_scene(seed, i) for i in indices]
        images = RenderedScenes(scenes, model.lvlm.config.vision.image_size)
        captions = model.generate_batch(images, [model.config.detail_prompt] * len(scenes), 120)
        targets = [Random(f"where {seed} {i}").choice(s.things) for i, s in zip(indices, scenes)]
        questions = [f"where is the {' '.join(target.kind)}?" for target in targets]
        answers = model.generate_batch(images, questions, 8)
        for scene, caption, target, answer in zip(scenes, captions, targets, answers):
            right += answer == POSITIONS[target.cell]
            objects += len(scene.things)
            # what is said of relations does not count: a sentence has to give a position
            sentences = [text for text in caption.split(".") if PLACE.search(text)]
            for thing in scene.things:
                name = " ".join(thing.kind)
                about = "".join([text for text in sentences if name in text][:1])
                named += len(about) > 0
                placed += POSITIONS[thing.cell] in PLACE.findall(about)
                words = about.partition(name)[0].split()[-len(ATTRIBUTES) :]
                for attribute in ATTRIBUTES:
                    said[attribute] += not set(words).isdisjoint(VALUES[attribute])
                    true[attribute] += getattr(thing, attribute) in words
    results = {"scenes": count, "objects": objects, "where": 100 * right / count}
    results |= {"named": 100 * named / objects, "placed": 100 * placed / objects}
    for name in ATTRIBUTES:
        results[f"{name} said"] = 100 * said[name] / max(1, named)
        if said[name]:
            results[f"{name} right"] = 100 * true[name] / said[name]
    return results


@data.command
def main(argv: list[str] | None = None) -> dict:
    parser = data.Parser("python -m extras.scenes", description=__doc__.split("\n")[0])
    add = parser.add_argument
    task_help = "score embeddings of scenes, or the model's own captions (default: scenes)"
    add("--task", choices=("scenes", "captions"), default="scenes", help=task_help)
    data.add_model_flags(parser)
    add("--seed", type=int, default=TEST_SEED, help=f"scenes of this seed (default: {TEST_SEED})")
    add("--holdout", type=int, default=1000, help="scenes to measure on (default: 1000)")
    add("--json", metavar="FILE", help="file for all scores, as JSON (default: none)")
    args = parser.parse_args(argv)
    if args.holdout < 2:
        raise ValueError(f"--holdout {args.holdout}: at least 2 scenes are needed")
    model = load_model(args)
    if args.json:  # what cannot be written is refused before the work
        open(args.json, "ab").close()
    results = {"task": args.task, "model": args.model, "adapter": args.adapter, "seed": args.seed}
    if args.task == "scenes":
        held_out = HeldOutScenes(args.seed, args.holdout, model.lvlm.config.vision.image_size)
        measured = held_out.measure(model)
        data.say(bench.score_table({"this model": measured}, held_out.chance))
        results |= {"scores": measured.scores, "caption_loss": measured.caption_loss}
        results |= {"counts": held_out.benchmark.counts}
    else:
        accuracy = caption_accuracy(model, args.seed, args.holdout)
        chance = {f"{name} right": f"{100 / len(VALUES[name]):.1f}" for name in ATTRIBUTES}
        rows = [[k, chance.get(k, ""), f"{value:.4g}"] for k, value in accuracy.items()]
        data.say(data.format_table(["captions", "chance", "this model"], rows))
        results |= accuracy
    if args.json and data.rank_and_world_size()[0] == 0:
        data.write_json(args.json, results)
    return results


if __name__ == "__main__":
    main()
