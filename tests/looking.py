"""By hand: do long captions choose sizes and textures by looking, and if not, what is in the way?

    python tests/looking.py curve --model DIR --steps 2000 --eval-every 100  # and flags of train.py
    python tests/looking.py readouts --model DIR --adapter runs/curve

curve trains and measures on the way, on scenes that no table is reported on: how many sizes and
textures of true long captions the model puts first among the words of their kind, and Eq. 2 on
those words. readouts trains linear read-outs of both: in the tower, behind the projector, and in
the decoder, layer by layer, at the token before the word. The tables are in docs/results.md.
"""

import contextlib
import sys
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import train
from eval import Measured
from extras import scenes
from extras.studies import before_and_after
from model import read_json
from vladva import load_model

DEVELOPMENT_SEED = 1000  # of the scenes that settings are chosen on
BATCH_SIZE = 50
RIDGE = 30.0  # of the read-outs


def word_ids(model, attribute):
    """Of each word of an attribute, the first token."""
    encode = model.tokenizer.encode
    words = scenes.VALUES[attribute]
    return torch.tensor([encode(f" {word}", add_special_tokens=False).ids[0] for word in words])


def described_batches(model, seed, count):
    """(scenes, their long captions, pixels, Batch) of held-out scenes, BATCH_SIZE at a time."""
    for indices in data.batches(range(count), BATCH_SIZE, "reading long captions"):
        scene_list = [scenes.make_scene(seed, i) for i in indices]
        captions = []
        for i, scene in zip(indices, scene_list):
            captions.append(scenes.long_caption(scene, Random(f"long {seed} {i}")))
        images = scenes.RenderedScenes(scene_list, model.lvlm.config.vision.image_size)
        yield scene_list, captions, *model.image_batch(list(images), captions)


@torch.no_grad()
def word_scores(model, seed, count=300):
    """{"size right": percent, "size nats": Eq. 2 on sizes, ...} on true long captions."""
    hits = {name: [] for name in scenes.ATTRIBUTES}
    losses = {name: [] for name in scenes.ATTRIBUTES}
    for _, _, pixels, batch in described_batches(model, seed, count):
        states = model.hidden_states(batch, "image", pixels)[1]
        for name in scenes.ATTRIBUTES:
            ids = word_ids(model, name)
            here = torch.isin(batch.caption_targets, ids)
            logits = model.lvlm.lm_head(states[here])
            targets = batch.caption_targets[here]
            hits[name].append(ids[logits[:, ids].argmax(-1)] == targets)
            losses[name].append(F.cross_entropy(logits, targets, reduction="none"))
    scores = {}
    for name in scenes.ATTRIBUTES:
        scores[f"{name} right"] = 100 * torch.cat(hits[name]).double().mean().item()
        scores[f"{name} nats"] = torch.cat(losses[name]).mean().item()
    return scores


# ----------------------------------------------------------------------------------- the curve


class HeldOutWords(scenes.HeldOutScenes):
    """In the place of a benchmark: word_scores."""

    def __init__(self, seed, image_size):
        super().__init__(seed, 2, image_size)
        self.chance = {}
        for name in scenes.ATTRIBUTES:
            self.chance[f"{name} right"] = 100 / len(scenes.VALUES[name])

    def measure(self, model):
        return Measured(word_scores(model, self.seed), torch.zeros(len(self), len(self)))


def open_rows(config, model, bad_rows):
    size = model.lvlm.config.vision.image_size
    rows = scenes.Scenes(config.seed, config.num_scenes, size)
    return rows, HeldOutWords(config.eval_seed, size)


def curve(argv):
    """Train with the flags of train.py; print the words' scores on the way."""
    flags = {"out": "runs/curve", "eval_every": 100} | vars(train.build_parser().parse_args(argv))
    resume = flags.pop("resume")
    flags |= {"eval_seed": DEVELOPMENT_SEED, "device": "cpu"}
    config, method = train.read_run(flags) if resume else train.configs_from_flags(flags)
    train.train(config, method, resume, open_rows)
    out = Path(config.out)
    scores = read_json(out / "scores.json")
    lines = [{"step": 0, "held_out": scores["before"]["scores"]}]
    for line in (out / "metrics.jsonl").read_text().splitlines():
        lines.append(data.parse_json(line, "metrics.jsonl"))
    lines[-1]["held_out"] = scores["after"]["scores"]
    names = [f"{name} {what}" for name in scenes.ATTRIBUTES for what in ("right", "nats")]
    rows = []
    for line in lines:
        if "held_out" in line:
            rows.append([str(line["step"]), *(f"{line['held_out'][name]:.2f}" for name in names)])
    print(data.format_table(["step", *names], rows))


# ---------------------------------------------------------------------------------- read-outs


def accuracy(features, labels, num_classes):
    """Percent right of a ridge regression on classes; features (n, D), a quarter to test on."""
    count = len(features) * 3 // 4
    x = (features - features[:count].mean(0)) / (features[:count].std(0) + 1e-5)
    x = F.pad(x, (0, 1), value=1.0).double()
    wanted = F.one_hot(labels, num_classes).double()
    penalty = RIDGE * torch.eye(x.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(x[:count].T @ x[:count] + penalty, x[:count].T @ wanted[:count])
    return 100 * ((x[count:] @ weights).argmax(-1) == labels[count:]).double().mean().item()


def object_features(features, scene_list):
    """Features (B, N, D) of square images -> (n, D) of all objects, averaged over their cells."""
    side = round(features.shape[1] ** 0.5)
    grid = features.unflatten(1, (side, side))
    per_cell = side // scenes.GRID
    rows = []
    for image, scene in zip(grid, scene_list):
        for thing in scene.things:
            top, left = (per_cell * place for place in divmod(thing.cell, scenes.GRID))
            rows.append(image[top : top + per_cell, left : left + per_cell].mean((0, 1)))
    return torch.stack(rows)


@torch.no_grad()
def layer_states(model, batch, pixels):
    """States (M, D) that predict caption tokens: the decoder's inputs, then behind each block."""
    states = [model.inputs_embeds(batch, "image", pixels)]
    with contextlib.ExitStack() as stack:
        for block in model.lvlm.decoder.layers:
            hook = block.register_forward_hook(lambda block, inputs, x: states.append(x))
            stack.callback(hook.remove)
        model.lvlm.decoder(states[0], batch.position_ids)
    return [x.flatten(0, 1)[batch.caption_index] for x in states]


@torch.no_grad()
def collect(model, seed, count):
    """{where: {attribute: [features, ...]}}, {where: {attribute: [labels, ...]}} of all objects."""
    features, labels = {}, {}

    def add(where, attribute, x, y):
        features.setdefault(where, {}).setdefault(attribute, []).append(x)
        labels.setdefault(where, {}).setdefault(attribute, []).append(y)

    for scene_list, _, pixels, batch in described_batches(model, seed, count):
        tower = model.lvlm.vision(pixels)
        places = {"tower": tower, "behind the projector": model.lvlm.projector(tower)}
        states = layer_states(model, batch, pixels)
        for name in scenes.ATTRIBUTES:
            words = scenes.VALUES[name]
            things = [thing for scene in scene_list for thing in scene.things]
            kinds = torch.tensor([words.index(getattr(thing, name)) for thing in things])
            for where, x in places.items():
                add(where, name, object_features(x, scene_list), kinds)
            # in the captions, in the order of their words
            is_word = batch.caption_targets[:, None] == word_ids(model, name)
            here = is_word.any(1)
            for layer, x in enumerate(states):
                add(f"before the word, layer {layer}", name, x[here], is_word[here].int().argmax(1))
    return features, labels


def readouts(argv):
    """Percent right of linear read-outs, before adaptation and after it."""
    parser = data.Parser("looking.py readouts")
    data.add_model_flags(parser)
    parser.add_argument("--scenes", type=int, default=700, help="to train and test on")
    args = parser.parse_args(argv)
    args.device = "cpu"
    model = load_model(args)
    columns = {}
    for when in before_and_after(model):
        features, labels = collect(model, DEVELOPMENT_SEED, args.scenes)
        for name in scenes.ATTRIBUTES:
            column = columns.setdefault(f"{name}, {when}", {})
            for where, parts in features.items():
                x, y = torch.cat(parts[name]), torch.cat(labels[where][name])
                column[where] = accuracy(x, y, len(scenes.VALUES[name]))
    rows = []
    for where in features:
        rows.append([where, *(f"{column[where]:.0f}" for column in columns.values())])
    print(data.format_table(["percent right", *columns], rows))


if __name__ == "__main__":
    task, *rest = sys.argv[1:] or [""]
    if task not in ("curve", "readouts"):
        sys.exit("wanted: looking.py curve, or looking.py readouts, and flags")
    {"curve": curve, "readouts": readouts}[task](rest)
