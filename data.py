"""What comes from files: tokenizer, images, templates as tokens, caption pairs, batches.

Training pairs are JSON lines, one image per line, paths relative to the file:

    {"image": "a.jpg", "short": "a red bus" | ["a red bus", ...] | null, "long": "..." | null}

A row without `long` adds to the contrastive loss only, one without `short` to the next-token loss
only. A caption that a model wrote may say so: "generated": {"long": {"model": ..., "prompt": ...}}.

Not here: prompts and losses (vladva.py), benchmark files (eval.py), public caption files
(extras/captions.py), the rendered scenes of the embedded default (extras/scenes.py).
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import random
import re
import struct
import sys
import typing
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from model import DTYPES, LVLMConfig, check_supported, read_json, shard_files

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TINY = Path(__file__).resolve().parent / "assets" / "tiny"
MODELS = {  # name: a folder or a hub id
    "tiny": str(TINY),
    "tiny-llava": "bczhou/tiny-llava-v1-hf",
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "qwen2-vl-2b": "Qwen/Qwen2-VL-2B-Instruct",
}


def model_folder(name: str | Path) -> Path:
    """The folder of a model: one of MODELS, a folder, or a hub id, fetched if it is not cached."""
    repo = MODELS.get(str(name), str(name))
    if Path(repo).is_dir():
        return Path(repo)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo):
        raise ValueError(f"no model {repo!r}: give {', '.join(MODELS)}, a hub id or a folder")
    files = ["*.safetensors", "*.json"]  # no pickles
    try:
        folder = Path(snapshot_download(repo, allow_patterns=files, local_files_only=True))
        if (folder / "config.json").exists() and shard_files(folder):
            return folder
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        pass  # not in the cache, or not all of it
    say(f"{repo} is not whole in {constants.HF_HUB_CACHE}: fetching it from {constants.ENDPOINT}")
    try:
        return Path(snapshot_download(repo, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = f"{type(error).__name__}: {str(error).strip()[:150]}"
        hint = "with the files on this disk: --model FOLDER"
        raise ValueError(f"{repo} could not be fetched ({reason}); {hint}") from None


class Tokenizer:
    """tokenizer.json of a model folder as it is, checked against config.json."""

    def __init__(self, folder: str | Path, config: LVLMConfig):
        path = Path(folder) / "tokenizer.json"
        read_json(path)  # one clear line when it is missing or broken
        self.inner = tokenizers.Tokenizer.from_file(str(path))
        self.encode = self.inner.encode  # text -> .ids, and .offsets in characters
        self.decode = self.inner.decode  # ids -> text without special tokens
        self.pad_token_id = config.eos_token_id  # never seen by a real token: any id would serve
        added = self.inner.get_added_tokens_decoder().values()
        self.special_tokens = sorted(token.content for token in added if token.special)
        ids = self.encode("a").ids
        bos = config.bos_token_id
        problems = {
            f"no {config.image_token} at id {config.image_token_id}":
                self.inner.id_to_token(config.image_token_id) != config.image_token,
            f"no token at id {config.eos_token_id}, the end of a text":
                self.inner.id_to_token(config.eos_token_id) is None,
            f"not one token {bos} at the beginning of a text":
                bos is not None and (ids[0] != bos or ids.count(bos) != 1),
            f"ids beyond the {config.decoder.vocab_size} embeddings":
                max(self.inner.get_vocab().values()) >= config.decoder.vocab_size,
        }  # fmt: skip
        for problem, found in problems.items():
            if found:
                raise ValueError(f"{path} does not belong to config.json: {problem}")

    def validate_text(self, text: str) -> str:
        """The text without spaces at its ends; ValueError when it is empty or would end a turn."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"empty text {text!r}: a caption or prompt needs words")
        for token in self.special_tokens:
            if token in text:
                raise ValueError(f"text holds the special token {token!r}: {text[:60]!r}")
        return text.strip()


# ----------------------------------------------------------------- templates as token sequences


@dataclass(frozen=True)
class TokenSequence:
    """One tokenised template; the other fields index into input_ids. With 2 image tokens:

    <s> USER : Summarize .. word : <image> <image> \\n ASSISTANT : USER .. ASSISTANT : a red .. </s>
               ^ prompt_start                                   ^ summary_index     ^ caption_start
    """

    input_ids: list[int]
    prompt_start: int  # first token of the hand prompt
    prompt_length: int  # tokens of the hand prompt: what the soft prompt replaces
    summary_index: int  # the token whose hidden state is the embedding
    caption_start: int | None = None  # first token of the long caption; Eq. 2 counts from here
    position_ids: Tensor | None = None  # (3, T) rotary positions; None: 0 .. T - 1


def fill_template(template: str, prompt: str, caption: str = "") -> tuple[str, int]:
    """(the template with its two fields filled in, the character at which the prompt begins)."""
    before, after = template.split("{prompt}")
    before = before.replace("{caption}", caption)
    return before + prompt + after.replace("{caption}", caption), len(before)


def find_spans(offsets, prefix: str, prompt: str, prompt_char: int) -> tuple[int, int, int]:
    """(prompt_start, prompt_length, summary_index) in a tokenised text that begins with `prefix`.

    offsets: first and last character of each token. Tokens are found by their characters in one
    tokenisation of the whole: tokenising the parts apart gives other ids, because a tokenizer may
    join characters across their borders.
    """
    prompt_tokens = []
    summary_index = 0
    for index, (start, end) in enumerate(offsets):
        if start < prompt_char + len(prompt) and end > prompt_char:
            prompt_tokens.append(index)
        if start < end <= len(prefix):
            summary_index = index
        assert not start < len(prefix) < end, "a token reaches across the end of the prefix"
    return prompt_tokens[0], len(prompt_tokens), summary_index


def tensors_to(batch, device):
    """A copy of a dataclass with everything that can move on a device."""
    moved = {}
    for f in dataclasses.fields(batch):
        value = getattr(batch, f.name)
        moved[f.name] = value.to(device) if hasattr(value, "to") else value
    return type(batch)(**moved)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences as tensors, made on the host: nothing later asks the device for sizes."""

    input_ids: Tensor  # (B, T)
    prompt_start: Tensor  # (B,)
    summary_index: Tensor  # (B,)
    image_token_index: Tensor  # (2, n) row and position of every image token, in order
    caption_index: Tensor  # (M,) flat index b T + t of every state that predicts a caption token
    caption_targets: Tensor  # (M,) those tokens
    prefix_width: int  # tokens up to the last summary token
    position_ids: Tensor | None  # (3, B, T) rotary positions; None: 0 .. T - 1

    to = tensors_to

    def prefixes(self) -> "Batch":
        """The sequences cut after their summary tokens: all that the embeddings depend on."""
        position_ids = self.position_ids
        if position_ids is not None:
            position_ids = position_ids[..., : self.prefix_width]
        return replace(
            self,
            input_ids=self.input_ids[:, : self.prefix_width],
            caption_index=self.caption_index[:0],
            caption_targets=self.caption_targets[:0],
            position_ids=position_ids,
        )


def collate(sequences: list[TokenSequence], pad_token_id: int, image_token_id: int) -> Batch:
    """Pad sequences on the right, where causal attention never lets a real token see it."""
    width = max(len(sequence.input_ids) for sequence in sequences)
    padded, caption_index, caption_targets, position_ids = [], [], [], []
    for row, sequence in enumerate(sequences):
        ids = sequence.input_ids
        padded.append(ids + [pad_token_id] * (width - len(ids)))
        if sequence.caption_start is not None:
            # the state at t - 1 predicts the token at t
            first, end = sequence.caption_start - 1, len(ids) - 1
            caption_index += range(row * width + first, row * width + end)
            caption_targets += ids[sequence.caption_start :]
        if sequence.position_ids is not None:
            position_ids.append(F.pad(sequence.position_ids, (0, width - len(ids))))
    input_ids = torch.tensor(padded)
    return Batch(
        input_ids=input_ids,
        prompt_start=torch.tensor([sequence.prompt_start for sequence in sequences]),
        summary_index=torch.tensor([sequence.summary_index for sequence in sequences]),
        image_token_index=(input_ids == image_token_id).nonzero().T,
        caption_index=torch.tensor(caption_index, dtype=torch.long),
        caption_targets=torch.tensor(caption_targets, dtype=torch.long),
        prefix_width=max(sequence.summary_index for sequence in sequences) + 1,
        position_ids=torch.stack(position_ids, dim=1) if position_ids else None,
    )


@dataclass(frozen=True)
class TrainingBatch:
    """Rows, tokenised: images with their long captions, short captions, further texts."""

    pixels: Tensor | None  # of B images, as the architecture stacks them
    images: Batch | None  # B sequences
    texts: Batch | None  # a sequence for each short caption
    image_of_text: Tensor  # (S,) row in `images` of each row of `texts`
    further_texts: Batch | None  # E sequences, for losses that take "texts"

    to = tensors_to

    def prefixes(self) -> "TrainingBatch":
        """The same rows without their long captions."""
        return replace(self, images=self.images and self.images.prefixes())

    @property
    def caption_targets(self) -> Tensor:
        """(M,) every token of the long captions."""
        return self.images.caption_targets if self.images else self.image_of_text[:0]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, padding included."""
        batches = (self.images, self.texts, self.further_texts)
        return sum(batch.input_ids.numel() for batch in batches if batch)


# -------------------------------------------------------------------------------------- images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")


def names_image(argument: str) -> bool:
    """Does a command-line argument name an image file rather than say a text?"""
    return argument.lower().endswith(IMAGE_SUFFIXES) or os.path.isfile(argument)


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """A path or a PIL image of any mode -> RGB image, upright (EXIF); ValueError names a bad file."""
    if isinstance(source, Image.Image):
        return to_rgb(ImageOps.exif_transpose(source))
    if not os.path.isfile(source):
        raise ValueError(f"{source}: no such image file")
    try:
        with Image.open(source) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except PILLOW_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{source}: cannot be decoded as an image ({reason})") from None


# what Pillow raises while it opens, decodes, turns or converts a file
PILLOW_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, SyntaxError, EOFError)
PILLOW_ERRORS += (ArithmeticError, RuntimeError, MemoryError, Image.DecompressionBombError)
PILLOW_ERRORS += (struct.error, zlib.error)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB; 16-bit greys keep their upper 8 bits, which Pillow would clip to white."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        values = values / 256 if values.max() > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image centred on a square of one colour, as the original LLaVA-1.5 does."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def read_image_settings(folder: str | Path) -> tuple[Path, dict]:
    """(file, preprocessing settings) of a model folder; transformers 5 writes the second file."""
    path = Path(folder) / "preprocessor_config.json"
    newer = Path(folder) / "processor_config.json"
    if path.exists() or not newer.exists():
        return path, read_json(path)
    return newer, read_json(newer).get("image_processor")


class ImageProcessor:
    """CLIP's preprocessing, as LLaVA-1.5's preprocessor_config.json asks for it.

    vladva_config.image_mode "crop": shortest edge to the tower's side, then its centre; "pad":
    first padded to a square with the mean colour, so that nothing is cut off.
    """

    def __init__(self, folder: str | Path, lvlm_config: LVLMConfig, vladva_config):
        path, settings = read_image_settings(folder)
        side = lvlm_config.vision.image_size
        supported = {"size": ({"shortest_edge": side}, side), "resample": (3,)}
        supported |= {"crop_size": ({"height": side, "width": side}, side)}
        supported |= {"rescale_factor": (1 / 255,), "do_resize": (True,), "do_rescale": (True,)}
        supported |= {"do_center_crop": (True,), "do_normalize": (True,)}
        check_supported(settings, supported, str(path))
        if vladva_config.image_mode not in ("crop", "pad"):
            raise ValueError(f"image mode is {vladva_config.image_mode!r}: wanted 'crop' or 'pad'")
        if vladva_config.min_pixels or vladva_config.max_pixels:
            raise ValueError(f"LLaVA-1.5 takes images of {side} x {side}: no pixel budget to set")
        self.mode = vladva_config.image_mode
        self.side = side
        self.mean = np.array(settings.get("image_mean", CLIP_MEAN))
        self.std = np.array(settings.get("image_std", CLIP_STD))

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB image -> the (side, side) image that the vision tower sees."""
        if self.mode == "pad":
            image = pad_to_square(image, tuple(int(mean * 255) for mean in self.mean))
        short, long = sorted(image.size)
        edges = (self.side, int(self.side * long / short))
        size = edges if image.width <= image.height else edges[::-1]
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        image = image.resize(size, Image.Resampling.BICUBIC)
        return image.crop((left, top, left + self.side, top + self.side))

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> (3, side, side) float32, normalised."""
        return normalize_pixels(self.fit(image), self.mean, self.std)


def normalize_pixels(image: Image.Image, mean: np.ndarray, std: np.ndarray) -> Tensor:
    """RGB image -> (3, height, width) float32: 0 .. 1, less the mean, over the deviation."""
    pixels = (np.asarray(image).astype(np.float64) / 255 - mean) / std  # (height, width, 3)
    return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy())


# ------------------------------------------------------------------------------- caption pairs

MAX_CAPTION_TOKENS = {"short": 29, "long": 500}  # paper Sec. 3.2: under 30; 30 to 500
MIN_LONG_TOKENS = 30
SENTENCE_END = re.compile(r"""[.!?]["')\]]*(?=\s|$)""")


def truncate_caption(text: str, side: str, tokenizer: Tokenizer) -> str:
    """The caption, or its beginning where it has more tokens than MAX_CAPTION_TOKENS[side].

    It then ends with the last sentence that fits, or else with the last word. ValueError when the
    tokenizer refuses it.
    """
    encoding = tokenizer.inner.encode(tokenizer.validate_text(text), add_special_tokens=False)
    limit = MAX_CAPTION_TOKENS[side]
    if len(encoding) <= limit:
        return text
    shortest = MIN_LONG_TOKENS if side == "long" else 1
    least = encoding.offsets[shortest - 1][1]  # in characters
    most = min(encoding.offsets[limit - 1][1], encoding.offsets[limit][0])
    sentence_ends = [m.end() for m in SENTENCE_END.finditer(text) if least <= m.end() <= most]
    word_ends = [m.start() for m in re.finditer(r"\s+", text[: most + 1]) if m.start() > 0]
    return text[: [most, *word_ends, *sentence_ends][-1]]


class BadRow(ValueError):
    """A row of a pairs file that cannot be used; the message names file and line."""


def parse_row(line: str, where: str) -> dict:
    """One JSON line -> {"image": str, "short": [captions], "long": caption or None, "generated": {}}.

    Raises BadRow when it is no such row.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where}: not a JSON object ({error})") from None
    wanted = '{"image": "path", "short": caption or captions, "long": caption}'
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise BadRow(f"{where}: wanted {wanted}, got {line.strip()[:80]}")
    unknown = sorted(row.keys() - {"image", "short", "long", "generated"})
    if unknown:
        raise BadRow(f"{where}: unknown keys {unknown}, wanted {wanted}")
    short, long, generated = (row.get(key) for key in ("short", "long", "generated"))
    short = [short] if isinstance(short, str) else short or []
    captions = [*short, *([] if long is None else [long])] if isinstance(short, list) else [None]
    if not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise BadRow(f"{where}: an empty caption, or something else: leave the key out instead")
    if not isinstance(generated or {}, dict):
        raise BadRow(f"{where}: generated is {generated!r}, wanted an object")
    return {"image": row["image"], "short": short, "long": long, "generated": generated or {}}


def line_starts(path: Path, chunk: int = 1 << 22) -> np.ndarray:
    """Byte at which each line begins, and the end of the file: (lines + 1,) integers."""
    starts = [np.zeros(1, dtype=np.int64)]
    size = path.stat().st_size
    with open(path, "rb") as file:
        for offset in range(0, size, chunk):
            block = np.frombuffer(file.read(chunk), dtype=np.uint8)
            starts.append(np.flatnonzero(block == ord("\n")) + offset + 1)
    starts = np.concatenate(starts)
    return starts if starts[-1] == size else np.append(starts, size)


class Pairs:
    """The rows of a pairs file, read from the disk when they are asked for.

    What is held in memory are 16 bytes a row: where its line begins, and its number.
    """

    group_size = 1  # neighbouring rows that share a batch

    def __init__(self, path: str | Path, tokenizer: Tokenizer):
        self.path = Path(path)
        self.tokenizer = tokenizer
        if not self.path.is_file():
            raise ValueError(f"{path} not found: --data wants scenes, or a file of JSON lines")
        self.starts = line_starts(self.path)
        self.file = open(self.path, "rb")
        self.numbers = np.flatnonzero(np.diff(self.starts) > 1)  # of the lines that are not empty

    def __len__(self) -> int:
        return len(self.numbers)

    def parse(self, index: int) -> dict:
        """Row `index` with its image as a path and its captions truncated; BadRow says why not."""
        number = self.numbers[index]
        start, end = self.starts[number : number + 2].tolist()
        line = os.pread(self.file.fileno(), end - start, start)  # safe in several processes at once
        where = f"{self.path}:{number + 1}"
        row = parse_row(line.decode("utf-8", errors="replace"), where)
        if not row["short"] and row["long"] is None:
            raise BadRow(f"{where}: neither a short nor a long caption")
        try:
            short = [truncate_caption(text, "short", self.tokenizer) for text in row["short"]]
            long = row["long"] and truncate_caption(row["long"], "long", self.tokenizer)
        except ValueError as error:
            raise BadRow(f"{where}: {error}") from None
        return {
            "image": self.path.parent / row["image"],
            "short": short,
            "long": long,
            "where": where,
        }

    def row(self, index: int, rng: random.Random) -> dict:
        """Row `index`, its image opened, with one of its short captions, which rng draws."""
        row = self.parse(index)
        try:
            image = open_image(row["image"])
        except ValueError as error:
            raise BadRow(f"{row['where']}: {error}") from None
        return row | {"image": image, "short": rng.choice(row["short"]) if row["short"] else None}

    def hold_out(self, count: int, bad_rows: "BadRows", seed: str = "holdout") -> list[dict]:
        """Take up to `count` random rows with a short caption out of the file's; images as paths.

        No more than 20 times as many are tried: a file may have 8 million rows and no short caption.
        """
        rows = {}
        order = np.random.default_rng(list(seed.encode())).permutation(len(self))[: 20 * count]
        for num_tried, index in enumerate(order.tolist(), start=1):
            if len(rows) == count:
                break
            try:
                if self.row(index, random.Random(0))["short"]:  # opens the image as well
                    rows[index] = self.parse(index)
            except BadRow as error:
                bad_rows.add([str(error)])
                bad_rows.check(len(bad_rows.messages), num_tried)
        self.numbers = np.delete(self.numbers, list(rows))
        return list(rows.values())


class BadRows:
    """The rule for rows that cannot be used: each is named once and replaced by the next that can.

    More than 3 and more than 1 % of the rows seen so far are too many. `write_to` a file lists them
    there, and takes up what an interrupted run has listed.
    """

    def __init__(self):
        self.path = None
        self.messages = []

    def write_to(self, path: Path) -> None:
        """Keep the list in a file from now on."""
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        new = [message for message in self.messages if message not in before]
        self.path = path
        self.messages = before + new
        self.write(new)

    def add(self, messages: list[str]) -> None:
        """Take note of what was wrong with some rows."""
        for message in (" ".join(message.split()) for message in messages):
            if message not in self.messages:
                self.messages.append(message)
                self.write([message])
                print(f"left out: {message}", file=sys.stderr, flush=True)

    def write(self, messages: list[str]) -> None:
        if self.path is not None and messages:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(f"{message}\n" for message in messages)

    def too_many(self, num_bad: int, rows_seen: int) -> bool:
        """Should the run end? num_bad: how many there are, over all processes."""
        return num_bad > max(3, rows_seen / 100)

    def check(self, num_bad: int, rows_seen: int) -> None:
        """ValueError when there are too many."""
        if self.too_many(num_bad, rows_seen):
            last = "".join(self.messages[-1:])
            raise ValueError(f"{num_bad} of {rows_seen} rows cannot be used; the last: {last}")


# ------------------------------------------------------------------------- files and processes


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    """A safetensors file that is there whole or not at all: written aside, flushed, renamed."""
    partial = Path(f"{path}.partial")
    try:
        save_file(tensors, partial, metadata)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from None


def pick_device(name: str | None) -> str:
    """The device that was asked for, or the first CUDA device, or the CPU."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from None
    return device


def rank_and_world_size() -> tuple[int, int]:
    """(number of this process, how many) among those that torchrun started; (0, 1) without it."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def init_distributed(device: str) -> str:
    """Join the processes that torchrun started; returns this one's device, cuda:<local rank>."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    if torch.device(device).type != "cuda":
        dist.init_process_group("gloo")
        return device
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=torch.device(device))
    return device


def barrier() -> None:
    """Wait until every process is here."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """(the rows of all processes in rank order, index of this one's first); their counts may differ."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return rows, 0
    counts = torch.zeros(world_size, dtype=torch.long, device=rows.device)
    counts[rank] = len(rows)
    counts = all_reduce_sum(counts).tolist()
    padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
    padded = torch.cat([rows, padding])
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, counts)]
    return torch.cat(parts), sum(counts[:rank])


# -------------------------------------------------------------------------------- command line


def command(main):
    """Decorator of every command: bad input ends in one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def say(*words) -> None:
    """Print, in the first process only."""
    if rank_and_world_size()[0] == 0:
        print(*words, flush=True)


def batches(items: Sequence, batch_size: int, title: str) -> Iterator[list]:
    """The items in lists of batch_size, with a progress bar where there is more than one."""
    starts = range(0, len(items), batch_size)
    disable = None if len(starts) > 1 else True  # None: also where there is no terminal
    for start in tqdm(starts, title, leave=False, disable=disable):
        yield list(items[start : start + batch_size])


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of strings as aligned text; the first column leftwards, the others rightwards."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = []
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model --adapter --device --dtype, the same for every command that takes a model."""
    names = ", ".join(MODELS)
    parser.add_argument(
        "--model", default="tiny", help=f"{names}, a folder or a hub id (default: tiny)"
    )
    parser.add_argument("--adapter", help="folder of a training run (default: the untouched model)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    dtype_help = "of the weights (default: bfloat16 on cuda, float32 on the cpu if it fits)"
    parser.add_argument("--dtype", choices=sorted(DTYPES), help=dtype_help)


def flag(default, help: str, low: float | None = None, high: float = math.inf):
    """A dataclass field that is a command-line flag too, with its help and bounds."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


def check_bounds(config) -> None:
    """ValueError for the first field of a dataclass that lies outside the bounds of its flag."""
    for f in dataclasses.fields(config):
        low, value = f.metadata.get("low"), getattr(config, f.name)
        if low is not None and value is not None and not low <= value <= f.metadata["high"]:
            name, high = f.name.replace("_", "-"), f.metadata["high"]
            raise ValueError(f"--{name} is {value}: wanted {low} to {high}")


def add_config_flags(parser: argparse.ArgumentParser, cls) -> None:
    """The flags of a config dataclass; one that is not used is absent from the parsed arguments."""
    for f in dataclasses.fields(cls):
        if "help" not in f.metadata:
            continue
        name = f"--{f.name.replace('_', '-')}"
        default = "" if f.default is None else f" (default: {f.default})"
        options = {"default": argparse.SUPPRESS, "help": f.metadata["help"] + default}
        kind = (typing.get_args(f.type) or (f.type,))[0]
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(name, type=kind, metavar=kind.__name__.upper(), **options)
