"""Everything that comes from files or is rendered: tokenizer, pictures, training pairs, and the scenes of the embedded default.

    python data.py convert SOURCE ... --out pairs.jsonl               # public caption files, joined on the picture: docs/data.md
    python data.py check pairs.jsonl --model llava-1.5-7b             # what is in them
    python data.py fill pairs.jsonl --model llava-1.5-7b --out filled.jsonl      # have a model write the captions that are missing
    python -c "import data; data.render(data.make_scene(seed=0, index=7)).save('scene.png')"

Pairs are JSON lines, one picture a line, paths relative to the file:
    {"image": "a.jpg", "short": "a red bus" | ["a red bus", "..."] | null, "long": "..." | null}
and, where a caption was written by a model, who wrote it: "generated": {"long": {"model": "llava-1.5-7b", "prompt": "Describe ..."}}.
A row without any caption is for `fill`; training refuses it.

Scenes are pictures rendered with Pillow, decided by (seed, index) alone: 2 to 4 objects with colour, shape, size and texture on a 3 x 3
grid, with short and long captions, questions, hard negatives after SugarCrepe and pairs after Winoground.

Not here: prompts and templates (vladva.py), files of benchmarks (eval.py).
"""

import argparse
import array
import contextlib
import csv
import dataclasses
import hashlib
import heapq
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import struct
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from model import (
    ARCHITECTURES,
    DTYPES,
    ranks,
    read_config,
    read_json,
    shard_files,
    wait_for_ranks,
    write_json,
)

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
        files = [
            f
            for f in HfApi().model_info(repo, files_metadata=True, timeout=10).siblings
            if f.rfilename.endswith((".safetensors", ".json"))
        ]
        size = sum(f.size or 0 for f in files)
        print(
            f"fetching {repo}: {len(files)} files, {size / 1e9:.1f} GB, into {constants.HF_HUB_CACHE}",
            flush=True,
        )
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
    return next((place for place in places if (place / "config.json").is_file()), None) or cached(
        named
    )


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
    kept = {
        key: value
        for key, value in raw.items()
        if key
        not in ("added_tokens_decoder", "auto_map", "add_bos_token", "add_eos_token", "legacy")
    }
    write_json(described, kept | {"tokenizer_class": "PreTrainedTokenizerFast"})


# ------------------------------------------------------------------------------------------------------ tokenizer


@dataclass(frozen=True)
class Chat:
    """How an architecture spells a conversation that vladva.py writes in the paper's words: USER:, ASSISTANT:, <image>."""

    image: str  # the token that stands for a picture
    eos_id: int  # when config.json says none: the default of transformers' config class
    bos_id: (
        int | None
    )  # the same, of the token that every text begins with; None: texts begin with none
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
        if (
            self.image_id >= rows
        ):  # the original LLaVA, which cuts the text at <image> instead of having a token for it
            self.inner.add_special_tokens(
                [tokenizers.AddedToken("<image>", special=True, normalized=False)]
            )
            self.image_id = self.inner.token_to_id("<image>")
        self.bos_id = self.chat.bos_id and text.get("bos_token_id", self.chat.bos_id)
        self.eos_id = text.get("eos_token_id", self.chat.eos_id)
        self.pad_id = self.eos_id  # never seen by a real token, so any id serves
        self.placeholder_id = self.image_id if self.image_id < rows else self.pad_id
        eos, image = self.inner.id_to_token(self.eos_id), self.inner.id_to_token(self.image_id)
        self.special = sorted(
            token.content
            for token in self.inner.get_added_tokens_decoder().values()
            if token.special
        )
        needed = re.findall(r"<\|\w+\|>", "".join(becomes for _, becomes in self.chat.spelling))
        if (
            eos is None
            or image != self.chat.image
            or any(self.inner.token_to_id(token) is None for token in needed)
        ):
            raise ValueError(
                f"{path} has {image!r} at id {self.image_id} and {eos!r} at id {self.eos_id}: config.json says {self.chat.image} and an "
                f"end-of-sequence token{', the chat template ' * bool(needed)}{' '.join(needed)}, so the two files do not belong together"
            )
        begin = self.inner.encode("a").ids
        if self.bos_id is not None and (begin[0] != self.bos_id or begin.count(self.bos_id) != 1):
            raise ValueError(
                f"{path} does not put one beginning-of-sequence token (id {self.bos_id}) first: it is not LLaVA-1.5's tokenizer"
            )
        highest = max(token for token in self.inner.get_vocab().values() if token != self.image_id)
        if highest >= rows:
            raise ValueError(
                f"{path} has {self.inner.id_to_token(highest)!r} at id {highest}, but the model embeds {rows} tokens"
            )

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

    def plain(self, texts):
        """tokenizers.Encoding of each text by itself, without special tokens: its length is what LIMITS speak of."""
        return self.inner.encode_batch(texts, add_special_tokens=False)

    def with_tokens(self, names):
        """A copy of the tokenizers.Tokenizer with special tokens added at its end."""
        copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
        copy.add_special_tokens(
            [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
        )
        return copy

    def checked(self, text):
        """The text without blanks at its ends, or ValueError: empty, or holding what would become a special token."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"empty text {text!r}: a caption or prompt needs words")
        found = [token for token in self.special if token in text]
        if found:
            raise ValueError(
                f"text holds {found[0]!r}, which this model reads as a special token: remove it from {text[:60]!r}"
            )
        return text.strip()


# ------------------------------------------------------------------------------------------------------ pictures

PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")  # names that end so
BROKEN_IMAGE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)  # what Pillow raises


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
            raise ValueError(
                f"{source}: cannot be decoded as a picture ({type(error).__name__}: {error})"
            ) from None
    return to_rgb(ImageOps.exif_transpose(source))


def to_rgb(image):
    """Any PIL mode -> RGB; 16-bit greys keep their upper 8 bits, which Pillow's own conversion would clip to white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(
            (values / (256 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8)
        )
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
            raise ValueError(
                f"--min-pixels and --max-pixels are {budget}, but LLaVA-1.5 takes every picture at {side} x {side}: leave them out"
            )
        self.mode, self.side, self.largest = mode, side, config.grid()
        size, crop = self.raw.get("size", side), self.raw.get("crop_size", side)
        self.resize = (
            size.get("shortest_edge", size) if isinstance(size, dict) else size
        )  # an int, or {"height", "width"}
        self.crop = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        if self.steps["center_crop"] and self.crop != (side, side):
            raise ValueError(
                f"{path}: crop_size is {self.crop}, but the vision tower takes {side} x {side}"
            )

    def read_steps(self, path):
        """What preprocessor_config.json says in any architecture."""
        self.raw = raw = read_json(path)
        self.steps = {
            step: raw.get(f"do_{step}", True)
            for step in ("resize", "center_crop", "rescale", "normalize")
        }
        self.resample = Image.Resampling(raw.get("resample", 3))
        self.factor = raw.get("rescale_factor", 1 / 255)
        self.mean, self.std = (
            np.array(raw.get("image_mean", CLIP_MEAN)),
            np.array(raw.get("image_std", CLIP_STD)),
        )

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
            raise ValueError(
                f"preprocessed picture is {image.width} x {image.height}, but the vision tower takes {self.side} x {self.side}"
            )
        return image

    def normalised(self, image):
        """RGB picture -> (3, height, width) float32, rescaled and normalised."""
        pixels = np.asarray(image).astype(np.float64)  # (height, width, 3)
        pixels = pixels * self.factor if self.steps["rescale"] else pixels
        pixels = (pixels - self.mean) / self.std if self.steps["normalize"] else pixels
        return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy())


def image_processor(folder, config, *how):
    """The image processor that config.json's model_type asks for; its arguments are all classes'."""
    module = ARCHITECTURES.get(config.model_type)
    processor = importlib.import_module(module).image_processor if module else ImageProcessor
    return processor(folder, config, *how)


# ------------------------------------------------------------------------------------------------------ training pairs

LIMITS = {
    "short": range(1, 30),
    "long": range(30, 501),
}  # tokens of a caption, without special ones (paper Sec. 3.2)
SENTENCE_END = re.compile(r"""[.!?]["')\]]*(?=\s|$)""")


def cut(text, side, tokenizer):
    """The caption, or its beginning where it has more tokens than LIMITS[side]: up to the last sentence end within them, else to a word's end."""
    limits, (encoding,) = LIMITS[side], tokenizer.plain([text])
    if len(encoding) <= limits[-1]:
        return text
    least, most = (
        encoding.offsets[limits[0] - 1][1],
        min(encoding.offsets[limits[-1] - 1][1], encoding.offsets[limits[-1]][0]),
    )  # characters
    sentences = [m.end() for m in SENTENCE_END.finditer(text) if least <= m.end() <= most]
    words = [m.start() for m in re.finditer(r"\s+", text[: most + 1]) if m.start() > 0]
    return text[: [most, *words, *sentences][-1]]


class BadRow(ValueError):
    """A row of a pairs file that cannot be used; the message names file and line."""


def parse_row(line, where):
    """One JSON line -> {"image": str as written, "short": [captions], "long": caption or None, "generated": {side: ...}}; BadRow if it is none."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRow(f"{where}: not a JSON object ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise BadRow(
            f'{where}: wanted {{"image": "path", "short": ..., "long": ...}}, got {line.strip()[:80]}'
        )
    unknown = sorted(row.keys() - {"image", "short", "long", "generated"})
    if unknown:
        raise BadRow(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; known are image, short, long, generated"
        )
    short, long = row.get("short"), row.get("long")
    short = [] if short is None else [short] if isinstance(short, str) else short
    if not isinstance(short, list):
        raise BadRow(f"{where}: short is {short!r}; wanted a caption, a list of captions or null")
    for caption in [*short, *([] if long is None else [long])]:
        if not isinstance(caption, str) or not caption.strip():
            raise BadRow(f"{where}: empty caption {caption!r}; leave the key out instead")
    generated = row.get("generated", {})
    if not isinstance(generated, dict) or generated.keys() - LIMITS.keys():
        raise BadRow(
            f'{where}: generated is {generated!r}; wanted {{"short" or "long": {{"model": ..., "prompt": ...}}}}'
        )
    return {"image": row["image"], "short": short, "long": long, "generated": generated}


def parse_pair(line, where, folder):
    """One JSON line -> {"image": path, "short": [captions], "long": caption or None, "where": "file:line"}. BadRow says what is wrong."""
    row = parse_row(line, where)
    if not row["short"] and row["long"] is None:
        raise BadRow(
            f"{where}: neither a short nor a long caption (python data.py fill has a model write them)"
        )
    path = folder / row["image"]
    if not path.is_file():
        raise BadRow(f"{where}: picture {path} not found")
    return {"image": path, "short": row["short"], "long": row["long"], "where": where}


def lines_of(path):
    """The lines of a file, as text. One ends at a line feed alone; what is not UTF-8 is replaced."""
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        yield from file


def write_lines(path, lines, mode="w"):
    """Strings as the lines of a file."""
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def line_at(file, starts, number):
    """Line `number` of an open file, as lines_of gives it; safe to call from several processes at once. starts: its line_index."""
    start, end = starts[number : number + 2].tolist()
    return os.pread(file.fileno(), end - start, start).decode("utf-8", errors="replace")


def line_starts(path, chunk=1 << 22):
    """Where each line of a file begins, and where the last one ends: (lines + 1,) integers, without holding the file in memory."""
    parts, size = [np.zeros(1, dtype=np.int64)], Path(path).stat().st_size
    with open(path, "rb") as file:
        for start in range(0, size, chunk):
            parts.append(
                np.flatnonzero(np.frombuffer(file.read(chunk), dtype=np.uint8) == ord("\n"))
                + (start + 1)
            )
    starts = np.concatenate(parts)
    return starts if starts[-1] == size else np.append(starts, size)


INDEXED = 1 << 26  # bytes from which on a file's index is kept beside it


def line_index(path):
    """line_starts of a file; of a large one memory-mapped from PATH.index.npy, made when it is missing or not of this file as it is now."""
    about, stored = path.stat(), Path(f"{path}.index.npy")
    if about.st_size < INDEXED:
        return line_starts(path)
    if stored.is_file() and (index := np.load(stored, mmap_mode="r"))[[0, -1]].tolist() == [
        about.st_mtime_ns,
        about.st_size,
    ]:
        return np.asarray(index)[1:]
    partial = stored.with_name(
        f"{stored.name}.{os.getpid()}.partial"
    )  # other processes may be about it too
    starts = line_starts(path)
    try:
        with open(partial, "wb") as file:
            np.save(file, np.append(about.st_mtime_ns, starts))
        partial.replace(stored)
    except OSError:  # a folder that cannot be written to
        return starts
    return line_index(path)


class Pairs:
    """The rows of a pairs file, read from the disk when they are asked for: what is held is their line numbers, 8 bytes a row, and as
    much for where the lines begin (see line_index).

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
        self.file, self.starts = open(self.path, "rb"), line_index(self.path)
        lines = len(self.starts) - 1
        first = min(lines, self.CHECKED)
        checked = [
            number for number in range(first) if self.good(number, lines <= self.CHECKED, on_bad)
        ]
        self.numbers = np.concatenate(
            [np.array(checked, dtype=np.int64), np.arange(first, lines)]
        )  # (rows,) their lines
        if len(self) < 2:
            why = f"; first: {self.bad[0]}" if self.bad else ""
            raise ValueError(
                f"{path}: {len(self)} usable rows ({len(self.bad)} bad); at least 2 are needed{why}"
            )

    def line(self, number):
        """The text of line `number`, counted from 0."""
        return line_at(self.file, self.starts, number)

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
        for index in (
            np.random.default_rng(list(seed.encode())).permutation(len(self))[: 20 * count].tolist()
        ):
            with contextlib.suppress(
                BadRow
            ):  # one beyond the checked ones: training will come upon it
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
        """{"image": RGB picture, "short": one of its captions or None, "long": caption or None, "cut": captions cut}; rng draws the caption."""
        row = self.parsed(self.numbers[index])
        told = {"short": rng.choice(row["short"]) if row["short"] else None, "long": row["long"]}
        kept = {side: text and cut(text, side, self.tokenizer) for side, text in told.items()}
        return {
            "image": self.picture(row),
            **kept,
            "where": row["where"],
            "cut": sum(kept[side] != told[side] for side in told),
        }


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
        return TEXT_ROW | {
            "triple": caption_triple(self.seed, index, category)[1],
            "where": f"triple {index}",
        }


class Triples:
    """Rows for text-only training from a CSV file with the columns sent0, sent1, hard_neg, as E5-V's NLI data."""

    together = 1

    def __init__(self, path, tokenizer):
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"{path} not found: --text-data wants scenes, or a CSV file with the columns {', '.join(TRIPLE_COLUMNS)}"
            )
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not set(TRIPLE_COLUMNS) <= set(reader.fieldnames or ()):
                raise ValueError(
                    f"{path}: the first line is {reader.fieldnames}; wanted the columns {', '.join(TRIPLE_COLUMNS)}"
                )
            self.rows = []
            for row in reader:
                try:
                    self.rows.append(
                        (
                            tuple(tokenizer.checked(row[name]) for name in TRIPLE_COLUMNS),
                            f"{path}:{reader.line_num}",
                        )
                    )
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
        self.pairs, self.triples, self.together, self.bad = (
            pairs,
            triples,
            pairs.together,
            getattr(pairs, "bad", []),
        )

    def __len__(self):
        return len(self.pairs)

    def row(self, index, rng):
        return self.pairs.row(index, rng) | {
            "triple": self.triples.row(index % len(self.triples), rng)["triple"]
        }


# ------------------------------------------------------------------------------------------------------ public caption files


class JsonStream:
    """A JSON file read in pieces: what is held is a window of it, a chunk or one value wide. It does not look whether commas are missing."""

    BETWEEN, LARGEST = (
        re.compile(r"[\s,:]*"),
        1 << 26,
    )  # what stands between values; characters of one value

    def __init__(self, file, chunk):
        self.file, self.chunk, self.window, self.at, self.ended = file, chunk, "", 0, False

    def refill(self):
        """Let go of what was read, and read a chunk more, or as much again as is still there."""
        more = self.file.read(max(self.chunk, len(self.window) - self.at))
        self.window, self.at, self.ended = self.window[self.at :] + more, 0, not more

    def peek(self):
        """The character that the next value begins with, "" at the end."""
        while (at := self.BETWEEN.match(self.window, self.at).end()) == len(
            self.window
        ) and not self.ended:
            self.refill()
        self.at = at
        return self.window[at : at + 1]

    def value(self):
        """The next value, whole. One that ends with the window may go on behind it, as numbers do."""
        self.peek()
        while True:
            with contextlib.suppress(json.JSONDecodeError):
                value, end = json.JSONDecoder().raw_decode(self.window, self.at)
                if end < len(self.window) or self.ended:
                    self.at = end
                    return value
            if self.ended or len(self.window) - self.at > self.LARGEST:
                raise ValueError(
                    f"{self.file.name} is not JSON: no whole value at {self.window[self.at : self.at + 60]!r}"
                )
            self.refill()

    def members(self, last):
        """Stand before each member of the array or object that begins here, in turn; then behind its last bracket."""
        self.at += 1
        while self.peek() != last:
            yield
        self.at += 1


def json_items(path, chunk=1 << 20):
    """Every (None, element) of a JSON array; of an object every (key, element) of its arrays and (key, value) of what is no array.

    The file is never in memory as a whole. ValueError where it is not JSON.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        stream = JsonStream(file, chunk)
        for _ in stream.members("}") if stream.peek() == "{" else (None,):
            key = stream.value() if stream.peek() == '"' else None
            for _ in stream.members("]") if stream.peek() == "[" else (None,):
                yield key, stream.value()
        if stream.peek():
            raise ValueError(
                f"{path} is not JSON: it goes on behind its end with {stream.window[stream.at : stream.at + 60]!r}"
            )


def conversations(path):
    """LLaVA-Pretrain and ShareGPT4V: the first answer. What is asked holds <image>, before or after the words, and is left out."""
    for _, row in json_items(path):
        if "image" in row:  # LLaVA's later files have rows without a picture
            yield (
                row["image"],
                [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"][0],
            )


def karpathy_captions(path):
    """Karpathy's COCO and Flickr30k, all splits (convert drops those of val and test); the raw sentences, not the tokens."""
    for key, row in json_items(path):
        if key == "images":
            for sentence in row["sentences"]:
                yield (
                    "/".join(filter(None, (row.get("filepath"), row["filename"]))),
                    sentence["raw"],
                )


def coco_captions(path):
    """COCO's captions_*.json, and nocaps: annotations name the id of an image, whose file name stands elsewhere in the file."""
    names = {row["id"]: row["file_name"] for key, row in json_items(path) if key == "images"}
    for key, row in json_items(path):
        if key == "annotations":
            yield names[row["image_id"]], row["caption"]


def table_captions(path):
    """CSV or, when the first line has a tab, TSV (where quotes mean nothing): picture and caption, or columns named as in COLUMNS."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        tabs, _ = "\t" in file.readline(), file.seek(0)
        rows = (
            csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
        )
        first = next(rows, [])
        named = [
            next((i for i, name in enumerate(first) if name.strip().lower() in names), None)
            for names in COLUMNS
        ]
        (image, caption), width, above = (
            ((0, 1), 2, [first]) if None in named else (named, len(first), [])
        )
        for row in filter(None, itertools.chain(above, rows)):
            if len(row) != width:
                raise ValueError(
                    f"{path}:{rows.line_num}: {len(row)} columns, wanted {width}: picture and caption"
                )
            if row[caption].startswith(("http://", "https://")):
                raise ValueError(
                    f"{path}:{rows.line_num}: {row[caption][:60]!r} is an address: wanted pictures on this disk (docs/data.md)"
                )
            yield row[image], row[caption]


COLUMNS = (
    ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name"),
    ("caption", "title", "text"),
)


def folder_captions(folder):
    """Every picture of a folder and those below, with the text of the .txt file beside it; None where there is none."""
    for here, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(PICTURES):
                text = Path(here, name).with_suffix(".txt")
                yield (
                    os.path.relpath(os.path.join(here, name), folder),
                    text.read_text(encoding="utf-8") if text.is_file() else None,
                )


SCHEMAS = {  # of JSON files: where the rows stand (None: the file is an array), a key they have, their reader
    "LLaVA conversations": (None, "conversations", conversations),
    "Karpathy": ("images", "sentences", karpathy_captions),
    "COCO captions": ("annotations", "caption", coco_captions),
}
BROKEN_ROW = (
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    csv.Error,
    UnicodeDecodeError,
    OSError,
)  # what a row in no known form raises


def schema_of(path):
    """(its name, its reader) of a caption file or folder, told by its content. ValueError when none of the known ones fits."""
    if path.is_dir():
        return "pictures with .txt", folder_captions
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        if file.read(4096).lstrip()[:1] not in ("[", "{"):
            return "table", table_captions
    for key, row in json_items(path):
        for name, (place, field, reader) in SCHEMAS.items():
            if key == place and isinstance(row, dict) and field in row:
                return name, reader
        if key is None:
            break
    known = "; ".join(
        f"{name} ({field!r} in the rows{f' of {place!r}' if place else ''})"
        for name, (place, field, _) in SCHEMAS.items()
    )
    raise ValueError(f"{path} is none of: {known}")


class Source:
    """One SOURCE of convert, "[short:|long:]FILE[@FOLDER]": captions of one side, and the folder that its pictures' names begin in.

    Without a side it is the one whose LIMITS the median of the first 100 captions meets, in words.
    """

    def __init__(self, spec):
        side, rest = spec.split(":", 1) if spec.startswith(("short:", "long:")) else (None, spec)
        readings = [(rest, None)] + [
            (rest[: m.start()], rest[m.end() :]) for m in re.finditer("@", rest)
        ]  # a file's name may hold one too
        file, folder = next(
            (reading for reading in readings if os.path.exists(reading[0])), readings[-1]
        )
        self.path = Path(file)
        if not self.path.exists():
            raise ValueError(
                f"{file}: no such file or folder; a SOURCE is [short:|long:]FILE[@FOLDER OF ITS PICTURES]"
            )
        self.folder = (
            Path(folder) if folder else self.path if self.path.is_dir() else self.path.parent
        )
        self.schema, self.reader = schema_of(self.path)
        words = [len(text.split()) for _, text in itertools.islice(self, 100) if text] or [0]
        self.side = side or ("short" if statistics.median(words) < LIMITS["short"].stop else "long")
        self.counts = Counter()

    def __iter__(self):
        """(picture, caption or None), as the file says them."""
        number = 0
        try:
            for image, text in self.reader(self.path):
                if not isinstance(image, str) or not image or not isinstance(text, str | None):
                    raise TypeError(f"picture {image!r}, caption {text!r}")
                yield image, text
                number += 1
        except BROKEN_ROW as error:
            raise ValueError(
                f"{self.path}: what follows caption {number} is not like the others ({type(error).__name__}: {error})"
            ) from None


# ------------------------------------------------------------------------------------------------------ convert: one row a picture

COCO_NAME = re.compile(
    r"(?:^|/)(?:(?:train|val|test|unlabeled)20\d\d/(?:COCO_[a-z]+\d+_)?|COCO_[a-z]+\d+_)(\d{12})\.\w+$"
)


def picture_key(path):
    """What makes two paths one picture: their COCO id, the same in train2014/COCO_train2014_000000000009.jpg and train2017/000000000009.jpg,
    or the path itself."""
    coco = COCO_NAME.search(path)
    return f"COCO {coco[1]}" if coco else path


def bare_name(path):
    """File name without folder, ending and COCO's prefix: how the pictures of evaluation sets are told."""
    return re.sub(r"^COCO_[a-z]+\d+_", "", os.path.splitext(os.path.basename(path))[0])


def evaluation_names(path):
    """bare_name of every picture that a benchmark's file evaluates on: Karpathy's val and test, all of nocaps, COCO captions, SugarCrepe."""
    names = set()
    for _, row in json_items(path):
        if isinstance(row, dict) and row.get("split", "test") in ("val", "test"):
            names.add(bare_name(row.get("filename") or row.get("file_name") or ""))
    if not names - {""}:
        raise ValueError(
            f"{path} names no picture to drop: wanted a benchmark's file, whose rows have 'filename' or 'file_name'"
        )
    return names - {""}


@contextlib.contextmanager
def new_file(path):
    """A text file to write that is there whole or not at all. ValueError when something lies there already, or the disk refuses."""
    path, partial = Path(path), Path(f"{path}.partial")
    refuse_existing(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path} could not be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path):
    """ValueError when there is something at a path that is to be written."""
    if Path(path).exists():
        raise ValueError(f"{path} is there already: choose another name, or delete it first")


def convert(args):
    """Join the captions of all sources on the picture and write a pairs file, pictures in the order in which they come up first.

    Held in memory: 16 bytes a caption while they are read, some 60 while they are joined, and the names of the pictures to drop; the
    captions themselves wait in a temporary file beside OUT. Returns the counts.
    """
    refuse_existing(args.out)
    base, sources = Path(args.out).absolute().parent, [Source(spec) for spec in args.sources]
    drop = {
        path: evaluation_names(path)
        for path in dict.fromkeys(
            [*args.drop, *(str(s.path) for s in sources if s.schema == "Karpathy")]
        )
    }
    dropped, totals = {path: set() for path in drop}, Counter()
    with new_file(args.out) as file, tempfile.TemporaryFile(dir=base) as waiting:
        for records in by_picture(*gather_captions(sources, drop, dropped, waiting, base), waiting):
            for row in joined(records, base, totals):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    rows = [
        [
            str(source.path),
            source.schema,
            source.side,
            *(f"{source.counts[name]:,}" for name in COUNTED),
        ]
        for source in sources
    ]
    say(format_table(["source", "form", "side", *COUNTED], rows))
    for path, names in dropped.items():
        say(f"dropped: {len(names):,} pictures that {path} evaluates on")
    if not drop:
        say("dropped: nothing, as no --drop FILE names the pictures of an evaluation set")
    say(f"{args.out}: {sum(totals[kind] for kind in KINDS):,} pictures, {', '.join(f'{totals[kind]:,} {kind}' for kind in KINDS)}; "
        f"{totals['left out']:,} further long captions of theirs are left out")  # fmt: skip
    return dict(totals) | {f"dropped by {path}": len(names) for path, names in dropped.items()}


COUNTED = ("captions", "empty", "dropped", "found of the first 100")
KINDS = ("with both captions", "short only", "long only", "with none")


def gather_captions(sources, drop, dropped, waiting, base):
    """Write every caption as a line of a temporary file; returns (hash of its picture, where the line begins), each (captions,) integers."""
    hashes, starts = array.array("Q"), array.array("q", [0])
    for source in sources:
        root, counts = os.path.relpath(source.folder, base), source.counts
        for n, (image, text) in enumerate(
            tqdm(
                source,
                desc=f"reading {source.path.name}",
                unit=" captions",
                leave=False,
                disable=None,
            )
        ):
            text = text and (" ".join(text.split()) if source.side == "short" else text.strip())
            counts["captions" if text else "empty"] += 1
            place = os.path.normpath(os.path.join(root, image))
            counts[COUNTED[-1]] += n < 100 and os.path.isfile(os.path.join(base, place))
            testing = [path for path, names in drop.items() if bare_name(image) in names]
            for path in testing:
                dropped[path].add(bare_name(image))
            if testing:
                counts["dropped"] += 1
                continue
            hashes.append(
                int.from_bytes(
                    hashlib.blake2b(picture_key(place).encode(), digest_size=8).digest(), "big"
                )
            )
            starts.append(
                starts[-1]
                + waiting.write(json.dumps([place, source.side, text or None]).encode() + b"\n")
            )
    waiting.flush()
    return np.frombuffer(hashes, dtype=np.uint64), np.frombuffer(starts, dtype=np.int64)


def by_picture(hashes, starts, waiting):
    """The records [picture, side, caption] of gather_captions that have one hash, together; in the order of each group's first record."""
    order = np.argsort(hashes, kind="stable")
    begins = np.flatnonzero(np.append(True, np.diff(hashes[order]) != 0)[: len(order)])
    ends = np.append(begins[1:], len(order))
    for group in tqdm(
        np.argsort(order[begins]), desc="joining", unit=" pictures", leave=False, disable=None
    ):
        yield [
            json.loads(line_at(waiting, starts, i))
            for i in order[begins[group] : ends[group]].tolist()
        ]


def joined(records, base, totals):
    """The row of each picture in some records: of one, unless two pictures have the same hash."""
    pictures = {}
    for place, side, text in records:
        told = pictures.setdefault(
            picture_key(place), {"places": {}, "short": {}, "long": {}}
        )  # dictionaries: each once, in order
        told["places"][place] = None
        told[side] |= {text: None} if text else {}
    for places, short, long in (map(list, told.values()) for told in pictures.values()):
        image = (
            places[0]
            if len(places) == 1
            else next((place for place in places if (base / place).is_file()), places[0])
        )
        totals[KINDS[2 * (not short) + (not long)]] += 1
        totals["left out"] += max(0, len(long) - 1)
        yield {
            "image": image,
            "short": short[0] if len(short) == 1 else short or None,
            "long": long[0] if long else None,
        }


# ------------------------------------------------------------------------------------------------------ check: what a pairs file holds

BINS = (0, 10, 20, 30, 50, 100, 200, 300, 400, 501)  # tokens; the last one is open


def open_tokenizer(model):
    """The tokenizer of a model, without its weights."""
    folder = model_folder(model)
    return Tokenizer(folder, read_config(folder, tower_folder(folder)))


class Census:
    """What `check` counts. Held: 8 bytes a row and 8 a short caption (hashes, for what comes twice), and the first faults in words."""

    def __init__(self):
        self.lengths = {
            side: np.zeros(BINS[-1] + 1, dtype=np.int64) for side in LIMITS
        }  # captions by tokens, the last: and over
        self.counts, self.pictures, self.captions, self.faults = (
            Counter(),
            array.array("q"),
            array.array("q"),
            [],
        )

    def add(self, rows, tokenizer):
        """Count the captions of some rows."""
        for side in LIMITS:
            told = [
                ([row["long"]] if row["long"] else []) if side == "long" else row["short"]
                for row in rows
            ]
            for encoding in tokenizer.plain([text for texts in told for text in texts]):
                self.lengths[side][min(len(encoding), BINS[-1])] += 1
            self.counts.update(
                {
                    (side, "missing"): told.count([]),
                    (side, "written by a model"): sum(side in row["generated"] for row in rows),
                }
            )
        for row in rows:
            self.counts["shortcuts"] += any(
                begins_with(row["long"], text) for text in row["short"] if row["long"]
            )
            self.pictures.append(hash(picture_key(os.path.normpath(row["image"]))))
            self.captions.extend(map(hash, row["short"]))

    def fault(self, kind, message):
        """Count a fault; the first ten are kept in words."""
        self.counts[kind] += 1
        self.faults += [message] if len(self.faults) < 10 else []

    def results(self):
        """{what: how many}, as it is printed."""
        again = lambda hashes: len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.int64)))
        found = {
            name: self.counts[name]
            for name in (
                "rows",
                "malformed rows",
                "pictures found",
                "pictures missing",
                "pictures broken",
            )
        }
        found |= {"pictures that come again": again(self.pictures), "short captions that come again": again(self.captions),
                  "rows whose long caption starts with a short one": self.counts["shortcuts"]}  # fmt: skip
        short, long = LIMITS.values()
        for side, lengths in self.lengths.items():
            parts = {f"under {short.stop} tokens": lengths[: short.stop], f"{long[0]} to {long[-1]}": lengths[long[0] : long.stop],
                     f"over {long[-1]}": lengths[long.stop :]}  # fmt: skip
            found |= {f"{side} captions {name}": int(part.sum()) for name, part in parts.items()}
            found |= {
                f"{side} captions {name}": self.counts[side, name]
                for name in ("missing", "written by a model")
            }
        return found

    def histogram(self):
        """{side: how many captions in each of BINS}."""
        return {
            side: np.add.reduceat(lengths, BINS).tolist() for side, lengths in self.lengths.items()
        }


def begins_with(long, short):
    """Does a short caption merely repeat the start of the long one, letter case and marks aside? A shortcut in training (paper Sec. 3.2.3)."""
    words = re.findall(r"\w+", short.lower())
    return (
        bool(words)
        and re.findall(r"\w+", long[: 2 * len(short) + 20].lower())[: len(words)] == words
    )


def picture_fault(path, decode):
    """("pictures missing" | "pictures broken", message), or None; whether a picture is broken shows only when it is decoded."""
    if not path.is_file():
        return "pictures missing", f"picture {path} not found"
    try:
        return open_image(path) and None if decode else None
    except ValueError as error:
        return "pictures broken", str(error)


def check(args):
    """Count what a pairs file holds and print it, with a histogram of the captions' lengths; returns the numbers.

    The file is read once, a thousand rows at a time; pictures are decoded by args.workers threads.
    """
    path, census, tokenizer = existing_file(args.pairs), Census(), open_tokenizer(args.model)
    if args.picture:
        refuse_existing(args.picture)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least 1 is needed")
    lines = enumerate(
        tqdm(lines_of(path), desc="checking", unit=" rows", leave=False, disable=None), start=1
    )
    with ThreadPoolExecutor(args.workers) as pool:
        while part := list(itertools.islice(lines, 1000)):
            rows = []
            for number, line in part:
                try:
                    rows += (
                        [parse_row(line, f"{path}:{number}") | {"where": f"{path}:{number}"}]
                        if line.strip()
                        else []
                    )
                except BadRow as error:
                    census.fault("malformed rows", str(error))
            census.counts["rows"] += len(rows)
            census.add(rows, tokenizer)
            for row, fault in zip(
                rows,
                pool.map(lambda row: picture_fault(path.parent / row["image"], args.decode), rows),
            ):
                census.counts["pictures found"] += fault is None
                if fault:
                    census.fault(fault[0], f"{row['where']}: {fault[1]}")
    report_census(census, args)
    return census.results()


def existing_file(path):
    """The path of a pairs file; ValueError when there is none."""
    if not Path(path).is_file():
        raise ValueError(
            f"{path} not found: a pairs file is wanted, as python data.py convert writes it"
        )
    return Path(path)


def report_census(census, args):
    """Print the counts and the histogram, and draw it."""
    say(
        format_table(
            [args.pairs, ""], [[name, f"{count:,}"] for name, count in census.results().items()]
        )
    )
    shown, labels = (
        census.histogram(),
        [f"{a} to {b - 1}" for a, b in zip(BINS, BINS[1:])] + [f"over {BINS[-1] - 1}"],
    )
    highest = max(1, *shown["short"], *shown["long"])
    cells = lambda count: (f"{count:,}", ("#" * -(-30 * count // highest)).ljust(30))
    body = [
        [label, *cells(short), *cells(long)] for label, short, long in zip(labels, *shown.values())
    ]
    say("\n" + format_table([f"tokens of {args.model}", "short", "", "long", ""], body))
    for message in census.faults:
        say(message)
    if args.picture:
        draw_histogram(
            shown, labels, highest, f"captions by length, in tokens of {Path(args.model).name}"
        ).save(args.picture)
        say(f"written: {args.picture}")


def draw_histogram(shown, labels, highest, title):
    """The lengths of short and long captions as a picture, a bar a side and bin."""
    page, font, ink = (
        Image.new("RGB", (900, 320), "white"),
        ImageFont.load_default(12),
        (40, 40, 40),
    )
    pen = ImageDraw.Draw(page)
    pen.text((30, 10), title, ink, font)
    for n, (side, colour) in enumerate((("short", COLOURS["blue"]), ("long", COLOURS["orange"]))):
        pen.text((700 + 80 * n, 10), side, colour, font)
        for i, count in enumerate(shown[side]):
            left, top = 30 + 86 * i + 34 * n, 280 - 220 * count / highest
            pen.rectangle((left, top, left + 30, 280), fill=colour)
            pen.text((left + 15, top - 14), f"{count:,}", ink, font, anchor="mt")
    for i, label in enumerate(labels):
        pen.text((62 + 86 * i, 286), label, ink, font, anchor="mt")
    return page


# ------------------------------------------------------------------------------------------------------ fill: captions that are missing


def fill(args):
    """Have a model write the captions that a pairs file lacks: greedily, in batches that file and --batch alone decide, so that a run that
    was killed goes on where it was and ends in the same file. Under torchrun the processes share the batches. Returns the counts.

    OUT.progress holds a file a process, a line a finished batch; a line that was cut off does not count.
    """
    path, prompts = (
        existing_file(args.pairs),
        {"short": args.short_prompt, "long": args.long_prompt},
    )
    refuse_existing(args.out)
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: at least 1 is needed")
    missing, bad = missing_captions(path, args.on_bad_data)
    batches = [
        (side, missing[side][start : start + args.batch])
        for side in LIMITS
        for start in range(0, len(missing[side]), args.batch)
    ]
    from vladva import load_model  # here alone is the method needed, and it imports this module

    model = load_model(args)
    changed = path.stat()
    folder = progress_folder(args, {
        "pairs": f"{path.resolve()}, {changed.st_size} bytes, {changed.st_mtime_ns}", "model": args.model, "adapter": args.adapter,
        "prompts": prompts, "batch": args.batch, "dtype": str(model.lvlm.dtype),
    })  # fmt: skip
    done = finished_batches(folder)
    say(f"{args.pairs}: {', '.join(f'{len(lines):,} {side}' for side, lines in missing.items())} captions are missing; "
        f"{len(done):,} of {len(batches):,} batches of {args.batch} are done")  # fmt: skip
    wait_for_ranks()  # all have seen the same progress before the first one adds to it
    mine = [number for number in range(len(batches)) if number not in done][
        ranks()[0] :: ranks()[1]
    ]
    starts = line_index(path)
    with open_progress(folder) as file, open(path, "rb") as pairs:
        for number in tqdm(
            mine, desc="captioning", unit=" batches", disable=True if ranks()[0] else None
        ):
            side, lines = batches[number]
            rows = [(line_at(pairs, starts, n), f"{path}:{n + 1}") for n in lines]
            captions = write_captions(
                model, rows, path.parent, side, prompts[side], args.on_bad_data
            )
            append_line(file, {"batch": number, "captions": captions})
    wait_for_ranks()
    return merge(args, path, folder, batches, bad, prompts) if ranks()[0] == 0 else None


def missing_captions(path, on_bad):
    """({side: (n,) lines without such a caption, counted from 0}, {line: message} of those that are no row and are left out with "skip")."""
    missing, bad = {side: array.array("q") for side in LIMITS}, {}
    for number, line in enumerate(lines_of(path)):
        try:
            row = (
                parse_row(line, f"{path}:{number + 1}")
                if line.strip()
                else dict.fromkeys(LIMITS, "a blank line")
            )
        except BadRow as error:
            if on_bad == "error":
                raise
            bad[number], row = str(error), dict.fromkeys(LIMITS, "left out")
        for side in LIMITS:
            missing[side].extend([] if row[side] else [number])
    return {side: np.frombuffer(numbers, dtype=np.int64) for side, numbers in missing.items()}, bad


def progress_folder(args, about):
    """OUT.progress, made for the run that `about` describes; ValueError when it holds the captions of another one."""
    folder = Path(f"{args.out}.progress")
    if (folder / "about.json").is_file() and (was := read_json(folder / "about.json")) != about:
        other = [
            f"{name} was {was[name]!r}, not {about[name]!r}"
            for name in about
            if was[name] != about[name]
        ]
        raise ValueError(
            f"{folder} holds what another run has done ({'; '.join(other)}): go on with its flags, or delete it"
        )
    wait_for_ranks()  # all have looked before the first one writes
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
    if ranks()[0] == 0 and not (folder / "about.json").exists():
        with new_file(folder / "about.json") as file:
            json.dump(about, file)
    return folder


def finished_batches(folder):
    """{batch: (file, place of its line)} of all whole lines in a progress folder."""
    done = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        with open(path, "rb") as file:
            place = 0
            for line in file:
                if line.endswith(b"\n"):
                    done[json.loads(line)["batch"]] = path, place
                place += len(line)
    return done


def open_progress(folder):
    """This process's file of a progress folder, to write on behind its last whole line; what is written is not held back."""
    file = open(folder / f"rank-{ranks()[0]:04d}.jsonl", "ab+", buffering=0)
    file.seek(0)
    file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))
    return file


def append_line(file, value):
    """Write a JSON line to an unbuffered file. ValueError when the disk does not take all of it; half a line is dropped by the next run."""
    line = json.dumps(value).encode() + b"\n"
    try:
        written = file.write(line)
    except OSError as error:
        raise ValueError(f"{file.name}: {error}; the same command goes on from here") from None
    if written < len(line):
        raise ValueError(
            f"{file.name}: only {written} of {len(line)} bytes were written; the same command goes on from here"
        )


def write_captions(model, rows, folder, side, prompt, on_bad):
    """What the model says of some (line, where): {"text": of at most LIMITS[side] tokens, "cut": bool} each, or {"bad": message}."""
    pictures, faults = [], {}
    for i, (line, where) in enumerate(rows):
        try:
            pictures.append(open_image(folder / parse_row(line, where)["image"]))
        except ValueError as error:
            if on_bad == "error":
                raise BadRow(f"{where}: {error}") from None
            faults[i] = {"bad": f"{where}: {error}"}
    told = (
        model.generate_batch(pictures, [prompt] * len(pictures), LIMITS[side].stop)
        if pictures
        else []
    )  # a token too many: it went on
    kept = [cut(text, side, model.tokenizer) for text in told]
    answers = iter([{"text": text, "cut": text != whole} for text, whole in zip(kept, told)])
    return [faults.get(i) or next(answers) for i in range(len(rows))]


def merge(args, path, folder, batches, bad, prompts):
    """Write OUT, the rows in their order with what was written for them, and list those left out; then the progress folder goes."""
    done, totals, model = (
        finished_batches(folder),
        Counter(),
        f"{args.model} + {args.adapter}" if args.adapter else args.model,
    )
    below = os.path.relpath(path.parent, Path(args.out).parent)

    def written(its):
        for number, (side, lines) in enumerate(batches):
            if side == its:
                with open(done[number][0], "rb") as file:
                    file.seek(done[number][1])
                    yield from (
                        (line, side, told)
                        for line, told in zip(
                            lines.tolist(), json.loads(file.readline())["captions"]
                        )
                    )

    by_line = itertools.groupby(
        heapq.merge(*map(written, LIMITS), key=lambda item: item[0]), key=lambda item: item[0]
    )
    following, group = next(by_line, (None, ()))
    with new_file(args.out) as out:
        for number, line in enumerate(lines_of(path)):
            new = {}
            if number == following:
                new = {side: told for _, side, told in group}
                bad.update((number, told["bad"]) for told in new.values() if "bad" in told)
                following, group = next(by_line, (None, ()))
            if number in bad or not line.strip():
                continue
            row, said = (
                json.loads(line),
                {side: told["text"] for side, told in new.items() if told["text"]},
            )
            who = row.pop("generated", {}) | {
                side: {"model": model, "prompt": prompts[side]} for side in said
            }
            row |= {
                "image": os.path.normpath(os.path.join(below, row["image"])),
                **said,
                **({"generated": who} if who else {}),
            }
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            totals.update(
                {
                    "rows": 1,
                    "cut": sum(told["cut"] for told in new.values()),
                    "empty": len(new) - len(said),
                }
                | dict.fromkeys(said, 1)
            )
        if bad:
            write_lines(f"{args.out}.bad_rows.txt", [bad[n] for n in sorted(bad)])
    shutil.rmtree(folder)
    say(f"{args.out}: {totals['rows']:,} rows; {model} wrote {totals['short']:,} short and {totals['long']:,} long captions, of which "
        f"{totals['cut']:,} were cut to the paper's lengths, and nothing {totals['empty']:,} times"
        + (f"; {len(bad):,} bad rows are left out: {args.out}.bad_rows.txt" if bad else ""))  # fmt: skip
    return dict(totals)


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


# ------------------------------------------------------------------------------------------------------ command line


def command(main):
    """Decorator of every command line here: a ValueError is the user's, so it ends in one line on stderr and exit code 2."""

    def run(argv=None):
        try:
            return main(argv)
        except ValueError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def say(*words):
    """Print, in the first process only."""
    if ranks()[0] == 0:
        print(*words, flush=True)


def format_table(header, rows):
    """Rows of strings as aligned text; the first column leftwards, the others rightwards."""
    table = [header, *rows]
    widths = [max(len(row[c]) for row in table) for c in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if c == 0 else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def add_model_flags(parser):
    """--model --adapter --device --dtype, the same for every script that takes a model."""
    parser.add_argument(
        "--model",
        default="tiny",
        help=f"{', '.join(NAMES)}, a folder in their layout, or a hub id (default: tiny)",
    )
    parser.add_argument("--adapter", help="folder of a training run (default: the untouched model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda when there is one)")
    parser.add_argument(
        "--dtype",
        help=f"{', '.join(DTYPES)} (default: bfloat16 on cuda, on the cpu float32 if it fits well)",
    )


def command_line():
    """The parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="data.py", description="Pairs files: made of public captions, looked at, completed."
    )
    commands = parser.add_subparsers(required=True, metavar="convert|check|fill")
    to_convert = commands.add_parser(
        "convert", help="public caption files -> one pairs file, joined on the picture"
    )
    to_convert.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="[short:|long:]FILE[@FOLDER OF ITS PICTURES], or a folder of pictures",
    )
    to_convert.add_argument("--out", required=True, metavar="PAIRS.jsonl")
    to_convert.add_argument(
        "--drop",
        nargs="+",
        default=[],
        metavar="FILE",
        help="benchmarks' files: leave out the pictures they evaluate on",
    )
    to_check = commands.add_parser("check", help="count what a pairs file holds")
    to_check.add_argument(
        "--model",
        default="tiny",
        help="whose tokens are counted (default: tiny, which spells what is not about scenes)",
    )
    to_check.add_argument("--picture", metavar="FILE.png", help="also draw the histogram")
    to_check.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="open every picture, not only look for it",
    )
    to_check.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="threads that open pictures (default: the cores)",
    )
    to_fill = commands.add_parser("fill", help="have a model write the captions that are missing")
    add_model_flags(to_fill)
    to_fill.add_argument("--out", required=True, metavar="FILLED.jsonl")
    to_fill.add_argument(
        "--short-prompt",
        default="Provide a brief description of the image.",
        help="(default: %(default)s)",
    )
    to_fill.add_argument(
        "--long-prompt", default="Describe the image in detail.", help="(default: %(default)s)"
    )
    to_fill.add_argument(
        "--batch",
        type=int,
        default=16,
        help="pictures that are captioned together (default: %(default)s)",
    )
    to_fill.add_argument(
        "--on-bad-data",
        choices=("error", "skip"),
        default="error",
        help="a broken row: stop, or leave it out and list it",
    )
    for each in (to_check, to_fill):
        each.add_argument("pairs", metavar="PAIRS.jsonl")
    for each, run in ((to_convert, convert), (to_check, check), (to_fill, fill)):
        each.set_defaults(run=run)
    return parser


@command
def main(argv=None):
    args = command_line().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    from data import (
        main,
    )  # not the one above: vladva imports this file as `data`, and its classes must be ours

    main()
