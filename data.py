"""Everything that comes from files or is rendered: tokenizer, pictures, training pairs, and the scenes of the embedded default.

    python -c "import data; data.render(data.make_scene(seed=0, index=7)).save('scene.png')"

Pairs are JSON lines, one picture a line, paths relative to the file:
    {"image": "a.jpg", "short": "a red bus" | ["a red bus", "..."] | null, "long": "..." | null}

Scenes are pictures rendered with Pillow, decided by (seed, index) alone: 2 to 4 objects with colour, shape, size and texture on a 3 x 3
grid, with short and long captions, questions, hard negatives after SugarCrepe and pairs after Winoground.

Not here: prompts and templates (vladva.py), reading of public datasets.
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from model import read_json, shard_files, write_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TINY = Path(__file__).resolve().parent / "assets" / "tiny"
NAMES = {"tiny": TINY, "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
         "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct"}  # fmt: skip  # a folder or a hub id
WANTED_FILES = ["*.safetensors", "*.json"]  # of a hub model: no pickles

# ------------------------------------------------------------------------------------------------------ model folders


def model_folder(name):
    """The folder that a model name stands for: one of NAMES, a folder, or a hub id, whose files are fetched when the cache lacks them."""
    known = NAMES.get(str(name), name)
    if Path(known).is_dir():
        return Path(known)
    if str(name) not in NAMES and (str(known).count("/") != 1 or str(known)[0] in "./~"):
        raise ValueError(
            f"no model folder {str(name)!r}: give tiny, llava-1.5-7b, llava-1.5-13b, a hub id such as {NAMES['qwen2-vl-2b']} (in short qwen2-vl-2b), "
            "or a folder in its layout"
        )
    return cached(known) or fetch(known)


def cached(repo):
    """The folder of a hub model in the local cache (HF_HOME), or None unless all its files are there."""
    try:
        folder = Path(snapshot_download(repo, allow_patterns=WANTED_FILES, local_files_only=True))
        shard_files(folder)
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        return None
    return folder if (folder / "config.json").exists() else None


def fetch(repo):
    """Download the safetensors and json files of a hub model into the cache, say how much and where to first; returns the folder."""
    try:
        files = [f for f in HfApi().model_info(repo, files_metadata=True, timeout=10).siblings if f.rfilename.endswith((".safetensors", ".json"))]
        size = sum(f.size or 0 for f in files)
        print(f"fetching {repo}: {len(files)} files, {size / 1e9:.1f} GB, into {constants.HF_HUB_CACHE}", flush=True)
        return Path(snapshot_download(repo, allow_patterns=WANTED_FILES))
    except (OSError, HFValidationError, *HfHubHTTPError.__bases__) as error:
        reason = str(error).strip().split("\n")[0][:150]
        raise ValueError(
            f"{repo}: no such folder here, not whole in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} gave {type(error).__name__} "
            f"({reason}); with the files on this disk: --model FOLDER"
        ) from None


def tower_folder(folder):
    """The CLIP folder that the original LLaVA's config.json names ("mm_vision_tower"): inside the model folder, beside it, or in the cache.

    None when there is none, or none is named: the hub's layout has its vision tower inside.
    """
    named = read_json(Path(folder) / "config.json").get("mm_vision_tower")
    if named is None:
        return None
    places = (Path(folder) / Path(named).name, Path(folder).parent / Path(named).name, Path(named))
    return next((place for place in places if (place / "config.json").is_file()), None) or cached(named)


def copy_companions(source, target):
    """Copy the small json files of a model folder, all but those that describe weights and tokens.

    transformers 5 rebuilds a Llama tokenizer from its vocabulary, with other ids beside special tokens; the class written here takes
    tokenizer.json as it is, as this project does.
    """
    for path in Path(source).glob("*.json"):
        if path.name not in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
            shutil.copy(path, target)
    described = Path(target) / "tokenizer_config.json"
    raw = read_json(described) if described.exists() else {}
    kept = {key: value for key, value in raw.items() if key not in ("added_tokens_decoder", "auto_map", "add_bos_token", "add_eos_token", "legacy")}
    write_json(described, kept | {"tokenizer_class": "PreTrainedTokenizerFast"})


# ------------------------------------------------------------------------------------------------------ tokenizer


@dataclass(frozen=True)
class Chat:
    """How an architecture spells a conversation that vladva.py writes in the paper's words: USER:, ASSISTANT:, <image>."""

    image: str  # the token that stands for a picture
    eos_id: int  # when config.json says none: the default of transformers' config class
    bos_id: int | None  # the same, of the token that every text begins with; None: texts begin with none
    spelling: tuple = ()  # (pattern, what it becomes), one after another, in templates only, never in prompts and captions


CHATS = {  # by model_type
    "llava": Chat("<image>", 2, 1),
    "qwen2_vl": Chat("<|image_pad|>", 151645, None, (  # Qwen2-VL's own chat template, with its default system turn
        (r"\s*ASSISTANT: ?", "<|im_end|>\n<|im_start|>assistant\n"),
        (r"^USER: ", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"),
        (r" USER: ", "<|im_end|>\n<|im_start|>user\n"),
        (r"<image>\n?", "<|vision_start|><|image_pad|><|vision_end|>"),
    )),
}  # fmt: skip


class Tokenizer:
    """tokenizer.json of a model folder as it is, with the ids that the method needs.

    image_id: of the image token. placeholder_id stands in a sequence where image tokens will be placed: image_id when the model embeds it.
    """

    def __init__(self, folder, config):
        path = Path(folder) / "tokenizer.json"
        read_json(path)  # one clear line when it is missing or broken
        self.inner, self.chat = tokenizers.Tokenizer.from_file(str(path)), CHATS[config.model_type]
        text, rows = config.raw["text_config"], config.decoder.vocab_size
        self.image_id = config.image_token_id
        if self.image_id >= rows:  # the original LLaVA, which cuts the text at <image> instead of having a token for it
            self.inner.add_special_tokens([tokenizers.AddedToken("<image>", special=True, normalized=False)])
            self.image_id = self.inner.token_to_id("<image>")
        self.bos_id = self.chat.bos_id and text.get("bos_token_id", self.chat.bos_id)
        self.eos_id = text.get("eos_token_id", self.chat.eos_id)
        self.pad_id = self.eos_id  # never seen by a real token, so any id serves
        self.placeholder_id = self.image_id if self.image_id < rows else self.pad_id
        eos, image = self.inner.id_to_token(self.eos_id), self.inner.id_to_token(self.image_id)
        self.special = sorted(token.content for token in self.inner.get_added_tokens_decoder().values() if token.special)
        needed = re.findall(r"<\|\w+\|>", "".join(becomes for _, becomes in self.chat.spelling))
        if eos is None or image != self.chat.image or any(self.inner.token_to_id(token) is None for token in needed):
            raise ValueError(
                f"{path} has {image!r} at id {self.image_id} and {eos!r} at id {self.eos_id}: config.json says {self.chat.image} and an "
                f"end-of-sequence token{', the chat template ' * bool(needed)}{' '.join(needed)}, so the two files do not belong together"
            )
        begin = self.inner.encode("a").ids
        if self.bos_id is not None and (begin[0] != self.bos_id or begin.count(self.bos_id) != 1):
            raise ValueError(f"{path} does not put one beginning-of-sequence token (id {self.bos_id}) first: it is not LLaVA-1.5's tokenizer")
        highest = max(token for token in self.inner.get_vocab().values() if token != self.image_id)
        if highest >= rows:
            raise ValueError(f"{path} has {self.inner.id_to_token(highest)!r} at id {highest}, but the model embeds {rows} tokens")

    def spelled(self, template):
        """A template in the paper's words as this architecture spells it; LLaVA-1.5 takes it as it is."""
        for pattern, becomes in self.chat.spelling:
            template = re.sub(pattern, becomes, template)
        return template

    def encode(self, text):
        """tokenizers.Encoding of a text: .ids with one BOS first (LLaVA-1.5), .offsets in characters."""
        return self.inner.encode(text)

    def decode(self, ids):
        """Text of token ids, special tokens left out."""
        return self.inner.decode(ids)

    def with_tokens(self, names):
        """A copy of the tokenizers.Tokenizer with special tokens added at its end."""
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        copy.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
        return copy

    def checked(self, text):
        """The text without blanks at its ends, or ValueError: empty, or holding what would become a special token."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"empty text {text!r}: a caption or prompt needs words")
        found = [token for token in self.special if token in text]
        if found:
            raise ValueError(f"text holds {found[0]!r}, which this model reads as a special token: remove it from {text[:60]!r}")
        return text.strip()


# ------------------------------------------------------------------------------------------------------ pictures

BROKEN_IMAGE = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # what Pillow raises


def open_image(source):
    """A path or a PIL picture of any mode -> RGB picture, upright (EXIF). ValueError names a file that is missing or cannot be decoded."""
    if not isinstance(source, Image.Image):
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such picture file")
        try:
            with Image.open(source) as opened:
                opened.load()
                source = opened
        except BROKEN_IMAGE as error:
            raise ValueError(f"{source}: cannot be decoded as a picture ({type(error).__name__}: {error})") from None
    return to_rgb(ImageOps.exif_transpose(source))


def to_rgb(image):
    """Any PIL mode -> RGB; 16-bit greys keep their upper 8 bits, which Pillow's own conversion would clip to white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values / (256 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def pad_to_square(image, colour):
    """The picture centred on a square of one colour, as the original LLaVA-1.5 does."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class ImageProcessor:
    """The steps that preprocessor_config.json names (transformers' CLIPImageProcessor): resize, centre crop, rescale, normalise.

    mode "crop" does these as they are; "pad" first pads to a square with the mean colour, so that nothing is cut off. budget: (fewest,
    most) pixels of a picture, for Qwen2-VL only.
    """

    def __init__(self, folder, config, mode, tower=None, budget=(None, None)):
        path = Path(folder) / "preprocessor_config.json"
        if tower and not path.exists():
            path = Path(tower) / path.name
        self.read_steps(path)
        side = config.vision.image_size
        if mode not in ("crop", "pad"):
            raise ValueError(f"image mode is {mode!r}: 'crop' or 'pad'")
        if budget != (None, None):
            raise ValueError(f"--min-pixels and --max-pixels are {budget}, but LLaVA-1.5 takes every picture at {side} x {side}: leave them out")
        self.mode, self.side, self.largest = mode, side, config.grid()
        size, crop = self.raw.get("size", side), self.raw.get("crop_size", side)
        self.resize = size.get("shortest_edge", size) if isinstance(size, dict) else size  # an int, or {"height", "width"}
        self.crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        if self.steps["center_crop"] and self.crop != (side, side):
            raise ValueError(f"{path}: crop_size is {self.crop}, but the vision tower takes {side} x {side}")

    def read_steps(self, path):
        """What preprocessor_config.json says in any architecture."""
        self.raw = raw = read_json(path)
        self.steps = {step: raw.get(f"do_{step}", True) for step in ("resize", "center_crop", "rescale", "normalize")}
        self.resample = Image.Resampling(raw.get("resample", 3))
        self.factor = raw.get("rescale_factor", 1 / 255)
        self.mean, self.std = np.array(raw.get("image_mean", CLIP_MEAN)), np.array(raw.get("image_std", CLIP_STD))

    def target(self, image):
        """(width, height) after the resize step."""
        if isinstance(self.resize, dict):
            return self.resize["width"], self.resize["height"]
        short, long = sorted(image.size)
        edges = self.resize, int(self.resize * long / short)
        return edges if image.width <= image.height else edges[::-1]

    def __call__(self, image):
        """RGB picture -> (3, side, side) float32, normalised."""
        return self.normalised(self.fitted(image))

    def fitted(self, image):
        """The RGB picture that the vision tower sees."""
        if self.mode == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in self.mean))
        if self.steps["resize"]:
            image = image.resize(self.target(image), self.resample)
        if self.steps["center_crop"]:
            left, top = (image.width - self.crop[1]) // 2, (image.height - self.crop[0]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        if image.size != (self.side, self.side):
            raise ValueError(f"preprocessed picture is {image.width} x {image.height}, but the vision tower takes {self.side} x {self.side}")
        return image

    def normalised(self, image):
        """RGB picture -> (3, height, width) float32, rescaled and normalised."""
        pixels = np.asarray(image).astype(np.float64)  # (height, width, 3)
        pixels = pixels * self.factor if self.steps["rescale"] else pixels
        pixels = (pixels - self.mean) / self.std if self.steps["normalize"] else pixels
        return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy())


class PatchProcessor(ImageProcessor):
    """Qwen2-VL's preprocessing: a picture keeps its shape, its sides become multiples of an image token's (28 pixels). After transformers'
    image_processing_qwen2_vl; changed: still pictures only.

    budget: (fewest, most) pixels after the resize; None: what preprocessor_config.json says (min_pixels and max_pixels, or the size of
    newer files). The paper states no pixel budget.
    """

    def __init__(self, folder, config, mode, tower=None, budget=(None, None)):
        path, self.vision = Path(folder) / "preprocessor_config.json", config.vision
        self.read_steps(path)
        if mode != "crop":
            raise ValueError(f"image mode is {mode!r}, but Qwen2-VL takes pictures whole, in their own shape: leave it out")
        vision, size = config.vision, self.raw.get("size") or {}
        known = (self.raw.get("min_pixels", size.get("shortest_edge")), self.raw.get("max_pixels", size.get("longest_edge")))
        self.fewest, self.most = (own if given is None else given for own, given in zip(known, budget))
        if not (self.fewest and self.most) or not vision.token_side**2 <= self.most >= self.fewest > 0:
            raise ValueError(
                f"pictures of {self.fewest} to {self.most} pixels ({path}, --min-pixels, --max-pixels): wanted two rising numbers, the second at "
                f"least {vision.token_side**2}"
            )
        fixed = {"do_resize": True, "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
                 "merge_size": vision.spatial_merge_size}  # fmt: skip
        strange = {name: self.raw[name] for name, wanted in fixed.items() if self.raw.get(name, wanted) != wanted}
        if strange:
            raise ValueError(f"{path} says {strange}, but the vision tower needs {fixed}")
        self.raw = self.raw | {"min_pixels": self.fewest, "max_pixels": self.most}
        self.mode, self.largest = f"{self.fewest} to {self.most} pixels", (math.isqrt(self.most) // vision.token_side,) * 2  # a square's

    def target(self, image):
        """(width, height) nearest to the picture's own, multiples of an image token's side, their product within the budget."""
        side, area = self.vision.token_side, image.width * image.height
        if max(image.size) > 200 * min(image.size):
            raise ValueError(f"picture of {image.width} x {image.height}: Qwen2-VL takes no side over 200 times the other")
        size = [round(edge / side) * side for edge in image.size]
        if math.prod(size) > self.most:
            size = [max(1, math.floor(edge / math.sqrt(area / self.most) / side)) * side for edge in image.size]
        elif math.prod(size) < self.fewest:
            size = [math.ceil(edge * math.sqrt(self.fewest / area) / side) * side for edge in image.size]
        return tuple(size)

    def fitted(self, image):
        return image.resize(self.target(image), self.resample)

    def __call__(self, image):
        """RGB picture -> (rows, columns, 4, numbers of a patch) float32: of every image token its 2 x 2 patches, each in two equal frames."""
        pixels, vision = self.normalised(self.fitted(image)), self.vision
        inside = (vision.spatial_merge_size, vision.patch_size)
        tokens = pixels.unflatten(2, (-1, *inside)).unflatten(1, (-1, *inside))  # (3, rows, m, side, columns, m, side)
        patches = tokens.permute(1, 4, 2, 5, 0, 3, 6).flatten(2, 3)  # (rows, columns, 4, 3, side, side)
        return patches.unsqueeze(4).expand(-1, -1, -1, -1, vision.temporal_patch_size, -1, -1).flatten(3)


def image_processor(folder, config, *how):
    """The image processor that config.json's model_type asks for; its arguments are both classes'."""
    return {"llava": ImageProcessor, "qwen2_vl": PatchProcessor}[config.model_type](folder, config, *how)


# ------------------------------------------------------------------------------------------------------ training pairs


class BadRow(ValueError):
    """A row of a pairs file that cannot be used; the message names file and line."""


def parse_pair(line, where, folder):
    """One JSON line -> {"image": path, "short": [captions], "long": caption or None, "where": "file:line"}. BadRow says what is wrong."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"{where}: not a JSON object ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise BadRow(f'{where}: wanted {{"image": "path", "short": ..., "long": ...}}, got {line.strip()[:80]}')
    unknown = sorted(row.keys() - {"image", "short", "long"})
    if unknown:
        raise BadRow(f"{where}: unknown key {', '.join(map(repr, unknown))}; known are image, short, long")
    short, long = row.get("short"), row.get("long")
    short = [] if short is None else [short] if isinstance(short, str) else short
    if not isinstance(short, list):
        raise BadRow(f"{where}: short is {short!r}; wanted a caption, a list of captions or null")
    for caption in [*short, *([] if long is None else [long])]:
        if not isinstance(caption, str) or not caption.strip():
            raise BadRow(f"{where}: empty caption {caption!r}; leave the key out instead")
    if not short and long is None:
        raise BadRow(f"{where}: neither a short nor a long caption")
    path = folder / row["image"]
    if not path.is_file():
        raise BadRow(f"{where}: picture {path} not found")
    return {"image": path, "short": short, "long": long, "where": where}


def line_starts(path, chunk=1 << 24):
    """Where each line of a file begins, and where the last one ends: (lines + 1,) integers, without holding the file in memory."""
    parts, size = [np.zeros(1, dtype=np.int64)], Path(path).stat().st_size
    with open(path, "rb") as file:
        for start in range(0, size, chunk):
            parts.append(np.flatnonzero(np.frombuffer(file.read(chunk), dtype=np.uint8) == ord("\n")) + (start + 1))
    starts = np.concatenate(parts)
    return starts if starts[-1] == size else np.append(starts, size)


class Pairs:
    """The rows of a pairs file, read from the disk when they are asked for: what is held is where its lines begin, 8 bytes a row.

    The first rows are checked when the file is opened. `bad` holds the message of every one that was skipped (on_bad "skip"); "error"
    raises at the first. A row further on shows its faults when it is drawn.
    """

    together = 1  # neighbouring rows that share a batch
    CHECKED = 5000  # rows that are checked at once; in a file no longer than that their pictures too, so that a broken one shows now

    def __init__(self, path, tokenizer, on_bad="error"):
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on-bad-data is {on_bad!r}: 'error' or 'skip'")
        self.path, self.tokenizer, self.bad = Path(path), tokenizer, []
        if not self.path.is_file():
            raise ValueError(f"{path} not found: --data wants scenes, or a file of JSON lines")
        self.file, self.starts = open(self.path, "rb"), line_starts(self.path)
        lines = len(self.starts) - 1
        first = min(lines, self.CHECKED)
        checked = [number for number in range(first) if self.good(number, lines <= self.CHECKED, on_bad)]
        self.numbers = np.concatenate([np.array(checked, dtype=np.int64), np.arange(first, lines)])  # (rows,) their lines
        if len(self) < 2:
            why = f"; first: {self.bad[0]}" if self.bad else ""
            raise ValueError(f"{path}: {len(self)} usable rows ({len(self.bad)} bad); at least 2 are needed{why}")

    def line(self, number):
        """The text of line `number`, counted from 0; safe to call from several processes at once."""
        start, end = self.starts[number : number + 2].tolist()
        return os.pread(self.file.fileno(), end - start, start).decode("utf-8", errors="replace")

    def good(self, number, decode, on_bad):
        """Is this line a usable row? A blank one is none, without being bad."""
        try:
            if not self.line(number).strip():
                return False
            row = self.parsed(number)
            if decode:
                self.picture(row)
        except BadRow as error:
            if on_bad == "error":
                raise
            self.bad.append(str(error))
            return False
        return True

    def parsed(self, number):
        """The row on line `number` as parse_pair gives it; BadRow when the tokenizer refuses one of its captions."""
        row = parse_pair(self.line(number), f"{self.path}:{number + 1}", self.path.parent)
        try:
            for caption in [*row["short"], *([row["long"]] if row["long"] else [])]:
                self.tokenizer.checked(caption)
        except ValueError as error:
            raise BadRow(f"{row['where']}: {error}") from None
        return row

    def picture(self, row):
        try:
            return open_image(row["image"])
        except ValueError as error:
            raise BadRow(f"{row['where']}: {error}") from None

    def held_out(self, count, seed="holdout"):
        """Take up to `count` random rows with a short caption out of this file's rows; returns them as parse_pair gives them.

        No more than 20 times as many are looked at: a file may have 8 million rows and no short caption.
        """
        taken = {}
        for index in np.random.default_rng(list(seed.encode())).permutation(len(self))[: 20 * count].tolist():
            with contextlib.suppress(BadRow):  # one beyond the checked ones: training will come upon it
                row = self.parsed(self.numbers[index])
                if row["short"]:
                    taken[index] = row
            if len(taken) == count:
                break
        self.numbers = np.delete(self.numbers, list(taken))
        return list(taken.values())

    def __len__(self):
        return len(self.numbers)

    def row(self, index, rng):
        """{"image": RGB picture, "short": one of its captions or None, "long": caption or None}; rng draws the caption."""
        row = self.parsed(self.numbers[index])
        short = rng.choice(row["short"]) if row["short"] else None
        return {"image": self.picture(row), "short": short, "long": row["long"], "where": row["where"]}


class Scenes:
    """`count` rendered scenes of one seed, with the same interface as Pairs. Siblings (see scene_row) share a batch: hard negatives."""

    together = 2

    def __init__(self, seed, count, size):
        self.seed, self.count, self.size = seed, count, size

    def __len__(self):
        return self.count

    def row(self, index, rng):
        return scene_row(self.seed, index, self.size) | {"where": f"scene {index}"}


TRIPLE_COLUMNS = ("sent0", "sent1", "hard_neg")
TEXT_ROW = {"image": None, "short": None, "long": None}  # what a row without a picture says of one


class SceneTriples:
    """Rows for text-only training, from the grammar of the scenes: a caption, a paraphrase and a hard negative of a random category."""

    together = 1

    def __init__(self, seed, count):
        self.seed, self.count = seed, count

    def __len__(self):
        return self.count

    def row(self, index, rng):
        category = random.Random(f"category {self.seed} {index}").choice(sorted(CATEGORIES))
        return TEXT_ROW | {"triple": caption_triple(self.seed, index, category)[1], "where": f"triple {index}"}


class Triples:
    """Rows for text-only training from a CSV file with the columns sent0, sent1, hard_neg, as E5-V's NLI data."""

    together = 1

    def __init__(self, path, tokenizer):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path} not found: --text-data wants scenes, or a CSV file with the columns {', '.join(TRIPLE_COLUMNS)}")
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not set(TRIPLE_COLUMNS) <= set(reader.fieldnames or ()):
                raise ValueError(f"{path}: the first line is {reader.fieldnames}; wanted the columns {', '.join(TRIPLE_COLUMNS)}")
            self.rows = []
            for row in reader:
                try:
                    self.rows.append((tuple(tokenizer.checked(row[name]) for name in TRIPLE_COLUMNS), f"{path}:{reader.line_num}"))
                except ValueError as error:
                    raise BadRow(f"{path}:{reader.line_num}: {error}") from None
        if len(self.rows) < 2:
            raise ValueError(f"{path}: {len(self.rows)} rows; at least 2 are needed")

    def __len__(self):
        return len(self.rows)

    def row(self, index, rng):
        triple, where = self.rows[index]
        return TEXT_ROW | {"triple": triple, "where": where}


class Joined:
    """Rows of pairs, each with a triple of texts beside it."""

    def __init__(self, pairs, triples):
        self.pairs, self.triples, self.together, self.bad = pairs, triples, pairs.together, getattr(pairs, "bad", [])

    def __len__(self):
        return len(self.pairs)

    def row(self, index, rng):
        return self.pairs.row(index, rng) | {"triple": self.triples.row(index % len(self.triples), rng)["triple"]}


# ------------------------------------------------------------------------------------------------------ the scenes

COLOURS = {"red": (214, 39, 40), "green": (34, 150, 62), "blue": (38, 86, 222), "yellow": (247, 220, 50),
           "orange": (250, 138, 22), "purple": (132, 55, 176), "pink": (250, 152, 196), "cyan": (58, 206, 214)}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.50, "large": 0.84}  # width of the object as a share of its cell
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = {"white": (244, 244, 240), "gray": (134, 138, 142), "tan": (205, 178, 138), "brown": (104, 70, 44)}
GRID = 3  # cells a side; one object a cell at most
POSITIONS = ("top-left", "top-center", "top-right", "middle-left", "center", "middle-right", "bottom-left", "bottom-center", "bottom-right")
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
        words = [getattr(self, name) for name in ("size", "texture") if name in attributes] + [self.colour, self.shape]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """2 to 4 objects, no two alike in colour and shape, each in a cell of its own, on a plain background."""

    things: tuple
    background: str


def make_scene(seed, index, counts=(2, 3, 4)):
    """The scene that (seed, index) decides."""
    rng = random.Random(f"scene {seed} {index}")
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], rng.choice(counts))
    cells = rng.sample(range(GRID * GRID), len(kinds))
    things = tuple(
        Thing(colour, shape, rng.choice(list(SIZES)), rng.choice(TEXTURES), cell, (rng.uniform(-0.07, 0.07), rng.uniform(-0.07, 0.07)))
        for (colour, shape), cell in zip(kinds, cells)
    )
    return Scene(things, rng.choice(list(BACKGROUNDS)))


def relations(a, b):
    """The relation words that are true of "a ... b"."""
    (row_a, col_a), (row_b, col_b) = divmod(a.cell, GRID), divmod(b.cell, GRID)
    checks = {"left of": col_a < col_b, "right of": col_a > col_b, "above": row_a < row_b, "below": row_a > row_b}
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
            for dx, dy in ((-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t), (t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t))
        ]
    assert shape == "star", shape
    spokes = [(r * (1.08 if k % 2 == 0 else 0.44), math.pi * (k / 5 - 0.5)) for k in range(10)]
    return [(x + length * math.cos(angle), y + length * math.sin(angle)) for length, angle in spokes]


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
            pen.ellipse((middle - width / 4, middle - width / 4, middle + width / 4, middle + width / 4), fill=0)
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
                pen.ellipse((u - step * 0.42, v - step * 0.42, u + step * 0.42, v + step * 0.42), fill=dark)
    canvas.paste(paint, (left, top), mask)


def render(scene, size=96):
    """The scene as an RGB picture of size x size pixels."""
    oversampling = 2
    canvas = Image.new("RGB", (size * oversampling, size * oversampling), BACKGROUNDS[scene.background])
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
        parts = [thing.phrase(shown) + (f" {POSITIONS[thing.cell]}" if self.positions else "") for thing, shown in self.mentions]
        if self.relation:
            parts[:2] = [f"{parts[0]} {self.relation} {parts[1]}"]
        return self.opening + join_words(parts) + (f" on a {self.background} background" if self.background else "")


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
        if any(getattr(thing, name) != getattr(real, name) for name in shown) or (caption.positions and thing.cell != real.cell):
            return False
    if caption.relation and caption.relation not in relations(*(present[thing.kind] for thing, _ in caption.mentions[:2])):
        return False
    return caption.background in (None, scene.background)


OPENINGS = ("", "", "", "a picture of ", "an image of ", "there is ", "the image shows ")
ATTRIBUTES = ("size", "texture")  # what a caption may say of an object beside colour, shape and place


def short_caption(scene, rng, style=None, mentions=None, attributes=ATTRIBUTES):
    """A true caption of 2 or 3 objects: style "relation", "position" or "list", drawn when None; attributes and background at times."""
    style = style or rng.choice(("relation", "relation", "position", "position", "list"))
    count = mentions or rng.randint(2, min(3, len(scene.things)))
    told = [(thing, tuple(name for name in attributes if rng.random() < 0.3)) for thing in rng.sample(scene.things, count)]
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
    things = sorted(scene.things, key=lambda thing: thing.cell) if rng.random() < 0.5 else rng.sample(scene.things, len(scene.things))
    sentence, count = rng.choice(SENTENCES), NUMBERS[len(things)]
    ground = rng.choice((f"the image shows {count} on a {scene.background} background.", f"there are {count}. the background is {scene.background}."))
    body = [sentence.format(thing=thing.phrase(attributes), place=POSITIONS[thing.cell]) for thing in things]
    for _ in range(rng.randint(1, len(things) - 1) if related else 0):
        a, b = rng.sample(things, 2)
        body.append(f"the {' '.join(a.kind)} is {rng.choice(relations(a, b))} the {' '.join(b.kind)}.")
    return " ".join([ground, *body] if rng.random() < 0.5 else [*body, ground])


def one_word(scene, rng):
    """One content word that is true of the scene, at random: what "in one word" is answered with in the generative stage."""
    thing = rng.choice(scene.things)
    return rng.choice((thing.colour, thing.colour, thing.shape, thing.shape, POSITIONS[thing.cell], scene.background))


def few_words(scene, rng):
    """Colour and shape of two objects."""
    return ", ".join(" ".join(thing.kind) for thing in rng.sample(scene.things, 2))


def question(scene, rng, attributes=ATTRIBUTES):
    """A (question, answer) about the scene: where an object is, or what is at a place."""
    thing = rng.choice(scene.things)
    name, place = " ".join(thing.kind), POSITIONS[thing.cell]
    return rng.choice(((f"where is the {name}?", place), (f"what is at the {place}?", thing.phrase(attributes))))


# Hard negatives after SugarCrepe: one edit makes the caption false of the scene and leaves its wording alone. "_pos" are this project's
# own: position words as further relations and roles.
CATEGORIES = {
    "replace_obj": "Replace", "replace_att": "Replace", "replace_rel": "Replace", "replace_pos": "Replace",
    "swap_obj": "Swap", "swap_att": "Swap", "swap_pos": "Swap", "add_obj": "Add", "add_att": "Add",
}  # fmt: skip
STYLE_OF = {"replace_rel": "relation", "swap_obj": "relation", "replace_pos": "position", "swap_pos": "position"}


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
        name, values = rng.choice([("colour", COLOURS)] + [(name, {"size": SIZES, "texture": TEXTURES}[name]) for name in shown])
        mentions[spot] = dataclasses.replace(thing, **{name: other(rng, values, getattr(thing, name))}), shown
    elif category == "replace_pos":
        mentions[spot] = dataclasses.replace(thing, cell=other(rng, range(GRID * GRID), thing.cell)), shown
    elif category == "swap_obj":
        mentions[:2] = mentions[1::-1]
    elif category == "swap_pos":
        mentions[:2] = (dataclasses.replace(first, cell=second.cell), first_shown), (dataclasses.replace(second, cell=first.cell), second_shown)
    elif category == "swap_att":
        mentions[:2] = (
            (dataclasses.replace(first, colour=second.colour), first_shown),
            (dataclasses.replace(second, colour=first.colour), second_shown),
        )
    elif category == "add_obj":
        cell = other(rng, range(GRID * GRID), thing.cell)
        mentions.append((Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(SIZES)), rng.choice(TEXTURES), cell), ()))
    elif category == "add_att":
        missing = [name for name in ("size", "texture") if name not in shown]
        if not missing:
            return None
        name = rng.choice(missing)
        wrong = dataclasses.replace(thing, **{name: other(rng, {"size": SIZES, "texture": TEXTURES}[name], getattr(thing, name))})
        mentions[spot] = wrong, tuple(n for n in ("size", "texture") if n in shown or n == name)
    return dataclasses.replace(caption, mentions=tuple(mentions))


def edited_caption(seed, index, category):
    """(scene, true Caption, false Caption): the item that (seed, index, category) decides."""
    scene, rng = make_scene(seed, index), random.Random(f"negative {seed} {index} {category}")
    while True:
        caption = short_caption(scene, rng, STYLE_OF.get(category), mentions=2 if category == "add_obj" else None)
        negative = edit(caption, category, rng)
        kinds = [thing.kind for thing, _ in negative.mentions] if negative else []
        if negative and str(negative) != str(caption) and len(set(kinds)) == len(kinds) and not is_true(negative, scene):
            return scene, caption, negative
        if category == "swap_att" and len({thing.colour for thing in scene.things}) == 1:  # nothing to swap in a scene of one colour
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
        return dataclasses.replace(caption, opening=rng.choice(OPENINGS), mentions=tuple(mentions), relation=OPPOSITE[caption.relation])
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
            exchanged = dataclasses.replace(a, colour=b.colour), dataclasses.replace(b, colour=a.colour)
        else:
            exchanged = dataclasses.replace(a, cell=b.cell), dataclasses.replace(b, cell=a.cell)
        mirrored = dataclasses.replace(scene, things=(*exchanged, *rest))
        relation = rng.choice(relations(a, b)) if kind == "relation" else None
        captions = [Caption("", ((x, ()), (y, ())), relation, kind == "position", None) for x, y in ((a, b), exchanged)]
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
