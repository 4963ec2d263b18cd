"""Everything that comes from files: tokenizer, pictures, and training pairs.

Pairs are JSON lines, one picture a line, paths relative to the file:
    {"image": "a.jpg", "short": "a red bus" | ["a red bus", "..."] | null, "long": "..." | null}
and, where a caption was written by a model, who wrote it: "generated": {"long": {"model": "llava-1.5-7b", "prompt": "Describe ..."}}.
A row without any caption is for `python -m extras.captions fill`; training refuses it.

Not here: prompts and templates (vladva.py), files of benchmarks (eval.py), public caption files (extras/captions.py), scenes
(extras/scenes.py).
"""

import contextlib
import csv
import importlib
import json
import os
import re
import shutil
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image, ImageOps, UnidentifiedImageError

from model import (
    ARCHITECTURES,
    DTYPES,
    ranks,
    read_json,
    shard_files,
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
            f"{where}: neither a short nor a long caption (python -m extras.captions fill has a model write them)"
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


TRIPLE_COLUMNS = ("sent0", "sent1", "hard_neg")
TEXT_ROW = {"image": None, "short": None, "long": None}  # what a row without a picture says of one


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
