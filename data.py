"""What comes from files: tokenizer, images, templates as tokens, caption pairs, batches.

Training pairs are JSON lines, one image per line, paths relative to the file:

    {"image": "a.jpg", "short": "a red bus" | ["a red bus", ...] | null, "long": "..." | null}

Without `long` a row adds to the contrastive loss only, without `short` to the next-token loss only;
"generated": {"long": {"model": ..., "prompt": ...}} says that a model wrote a caption.
Not here: prompts and losses (vladva.py), benchmarks (eval.py), public caption files (extras/).
"""

import argparse
import functools
import json
import os
import random
import re
import struct
import sys
import typing
import warnings
import zlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from huggingface_hub import constants, snapshot_download
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import DTYPES, LVLMConfig, check_supported, parse_json, read_json, read_tensors

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
    if os.path.isdir(repo):
        return Path(repo)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repo):
        raise ValueError(f"no model {repo!r:.99}: give {', '.join(MODELS)}, a hub id or a folder")
    say(f"{repo}: what {constants.HF_HUB_CACHE} lacks comes from {constants.ENDPOINT}")
    try:
        return Path(snapshot_download(repo, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:  # the hub's are among them
        raise ValueError(f"{repo} was not fetched ({error!r:.99}): try --model FOLDER") from None


class Tokenizer:
    """tokenizer.json of a model folder as it is, checked against config.json."""

    def __init__(self, folder: str | Path, config: LVLMConfig):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        try:
            self.inner = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is no tokenizer ({error})") from None
        self.encode = self.inner.encode  # text -> .ids, and .offsets in characters
        self.decode = self.inner.decode  # ids -> text without special tokens
        self.pad_token_id = config.end_tokens[0]  # no real token sees it; only not the image's id
        self.image_token_id = config.image_token_id
        # any of them in a caption would end a turn, or stand for an image that is not there
        added = self.inner.get_added_tokens_decoder().values()
        self.special_tokens = sorted(token.content for token in added if token.special)
        # a tokenizer of another model would give ids that mean something else, and no error
        ids = self.encode(f"a{config.image_token}").ids
        bos = config.bos_token_id
        problem = None
        if ids[-1:] != [config.image_token_id]:
            problem = f"{config.image_token} is not one token {config.image_token_id}"
        elif bos is not None and (ids[:1] != [bos] or ids.count(bos) != 1):
            problem = f"not one token {bos} at the beginning of a text"
        elif max(self.inner.get_vocab().values()) >= config.decoder.vocab_size:
            problem = f"ids beyond the {config.decoder.vocab_size} embeddings"
        if problem:
            raise ValueError(f"{path} does not belong to config.json: {problem}")

    def validate_text(self, text: str) -> str:
        """The text without spaces at its ends; ValueError: empty, or with a special token."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"empty text {text!r:.60}: a caption or prompt needs words")
        text.encode()  # refuses, as UnicodeEncodeError, the half characters that JSON may hold
        for token in self.special_tokens:
            if token in text:
                raise ValueError(f"text holds the special token {token!r}: {text[:60]!r}")
        return text.strip()


@dataclass(frozen=True)
class TokenSequence:
    r"""One tokenised template; the other fields index into input_ids. With 2 image tokens:

    <s> USER : Summarize .. word : <image> <image> \n ASSISTANT : USER .. ASSISTANT : a red .. </s>
               ^ prompt_start                                  ^ summary_index      ^ caption_start
    """

    input_ids: list[int]
    prompt_start: int  # first token of the hand prompt
    prompt_length: int  # tokens of the hand prompt: what the soft prompt replaces
    summary_index: int  # the token whose hidden state is the embedding
    caption_start: int | None = None  # first token of the long caption; Eq. 2 counts from here
    position_ids: Tensor | None = None  # (3, T) rotary positions; None: 0 .. T - 1


def fill_template(template: str, prompt: str, caption: str = "") -> tuple[str, int]:
    """(the template with its two fields filled in, the character at which the prompt begins)."""
    before, after = (part.replace("{caption}", caption) for part in template.split("{prompt}"))
    return before + prompt + after, len(before)


def find_spans(offsets: list, prefix: str, prompt: str, prompt_char: int) -> tuple[int, int, int]:
    """(prompt_start, prompt_length, summary_index); offsets: (start, end) character per token."""
    # by characters in one tokenisation of the whole: the parts tokenised apart give other ids,
    # because a tokenizer may join characters across their borders
    prompt_tokens = []
    summary_index = 0
    for index, (start, end) in enumerate(offsets):
        if start < prompt_char + len(prompt) and end > prompt_char:
            prompt_tokens.append(index)
        # the summary token is the last that is not empty
        if start < end <= len(prefix):
            summary_index = index
        assert not start < len(prefix) < end, "a token reaches across the end of the prefix"
    return prompt_tokens[0], len(prompt_tokens), summary_index


class Movable:
    # a frozen dataclass cannot change in place: a copy, with all that can move on the device
    def to(self, device: str | torch.device) -> typing.Any:
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")})


@dataclass(frozen=True)
class Batch(Movable):
    """Right-padded sequences, made on the host: nothing later asks the device for sizes."""

    input_ids: Tensor  # (B, T)
    prompt_start: Tensor  # (B,)
    summary_index: Tensor  # (B,)
    image_token_index: Tensor  # (2, n) row and position of every image token, in order
    caption_index: Tensor  # (M,) flat index b T + t of every state that predicts a caption token
    caption_targets: Tensor  # (M,) those tokens
    prefix_width: int  # tokens up to the last summary token
    position_ids: Tensor | None  # (3, B, T) rotary positions; None: 0 .. T - 1

    def prefixes(self) -> "Batch":
        """The sequences cut after their summary tokens: all that the embeddings depend on."""
        width = self.prefix_width
        cut = {"input_ids": self.input_ids[:, :width], "caption_index": self.caption_index[:0]}
        cut["caption_targets"] = self.caption_targets[:0]
        if self.position_ids is not None:
            cut["position_ids"] = self.position_ids[..., :width]
        return replace(self, **cut)


def collate(sequences: list[TokenSequence], tokenizer: Tokenizer) -> Batch:
    """Pad sequences on the right, where causal attention never lets a real token see it."""
    rows = [torch.tensor(sequence.input_ids) for sequence in sequences]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B, T)
    in_caption = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        if sequence.caption_start is not None:
            in_caption[row, sequence.caption_start : len(sequence.input_ids)] = True
    # in some architectures sequences with an image bring their own rotary positions
    position_ids = None
    if sequences[0].position_ids is not None:
        rows = [sequence.position_ids.T for sequence in sequences]  # B times (T, 3)
        position_ids = pad_sequence(rows, batch_first=True).permute(2, 0, 1)  # (3, B, T)
    return Batch(
        input_ids=input_ids,
        prompt_start=torch.tensor([sequence.prompt_start for sequence in sequences]),
        summary_index=torch.tensor([sequence.summary_index for sequence in sequences]),
        image_token_index=(input_ids == tokenizer.image_token_id).nonzero().T,
        # the state at t - 1 predicts the caption token at t
        caption_index=in_caption.flatten().nonzero()[:, 0] - 1,
        caption_targets=input_ids[in_caption],
        prefix_width=max(sequence.summary_index for sequence in sequences) + 1,
        position_ids=position_ids,
    )


@dataclass(frozen=True)
class TrainingBatch(Movable):
    """Rows of a micro-batch, tokenised."""

    pixels: Tensor | None  # of B images, as the architecture stacks them
    images: Batch | None  # B sequences, with the long captions
    texts: Batch | None  # a sequence for each short caption
    image_of_text: Tensor  # (S,) row in `images` of each row of `texts`
    further_texts: Batch | None  # E sequences, for losses that take them

    def prefixes(self) -> "TrainingBatch":
        return replace(self, images=self.images.prefixes() if self.images else None)

    @property
    def caption_targets(self) -> Tensor:  # (M,)
        return self.images.caption_targets if self.images else self.image_of_text[:0]

    @property
    def num_tokens(self) -> int:  # with the padding
        return sum(b.input_ids.numel() for b in (self.images, self.texts, self.further_texts) if b)


# -------------------------------------------------------------------------------------- images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
# pixels alone: Pillow would start Ghostscript for an EPS, whatever the name of its file
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 64_000_000  # 256 MB once decoded
MAX_RATIO = 200  # of the longer side to the shorter one, as in Qwen2-VL
MAX_SIDE = 10_000  # what is longer is made smaller: "pad" makes a square of it, 400 MB
# what Pillow raises on files that are broken in 20,000 ways
PILLOW_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, SyntaxError, EOFError)
PILLOW_ERRORS += (ArithmeticError, AssertionError, RuntimeError, MemoryError, struct.error)
PILLOW_ERRORS += (zlib.error, Image.DecompressionBombError)


def names_image(argument: str) -> bool:
    """Does a command-line argument name an image file rather than say a text?"""
    return argument.lower().endswith(IMAGE_SUFFIXES) or os.path.isfile(argument)


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """A path or a PIL image of any mode -> opaque RGB, upright; ValueError names a bad file."""
    if not isinstance(source, Image.Image):
        if not os.path.isfile(source):  # nor is a pipe, on which reading would wait
            raise ValueError(f"{source}: no such image file")
        try:
            with Image.open(source, formats=IMAGE_FORMATS) as image:
                return open_image(image)
        except PILLOW_ERRORS as error:
            raise ValueError(f"{source}: cannot be decoded as an image ({error!r:.200})") from None
    # before a pixel is decoded: 500 bytes may ask for gigabytes, here or when they are resized
    shorter, longer = sorted(source.size)
    if shorter * longer > MAX_PIXELS or longer > MAX_RATIO * shorter:
        raise ValueError(f"{longer:,} x {shorter:,} pixels: over {MAX_PIXELS:,} or {MAX_RATIO}:1")
    image = ImageOps.exif_transpose(source)
    # Pillow would clip 16-bit greys to white: they keep their upper 8 bits
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        values = values / 256 if values.max() > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:  # laid on white, as transformers does
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode == "RGB" else image.convert("RGB")
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def read_image_settings(folder: str | Path) -> tuple[Path, dict]:
    """(file, its preprocessing settings) of a model folder."""
    path = Path(folder) / "preprocessor_config.json"
    newer = Path(folder) / "processor_config.json"
    if path.exists() or not newer.exists():
        return path, read_json(path)
    # transformers 5 writes the settings into the file that older ones have beside them
    return newer, read_json(newer).get("image_processor")


# Of the three channels, from preprocessing settings: (mean, standard deviation)
def channel_statistics(settings: dict, where: Path) -> tuple[np.ndarray, np.ndarray]:
    statistics = []
    for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        values = settings.get(key, default)
        numbers = isinstance(values, list | tuple) and {*map(type, values)} <= {int, float}
        if not numbers or len(values) != 3 or not 0 <= min(values) <= max(values) <= 1:
            raise ValueError(f"{where}: {key} is {values!r:.99}, wanted 3 numbers from 0 to 1")
        statistics.append(np.array(values))
    return statistics[0], statistics[1].clip(min=1e-6)


class ImageProcessor:
    """CLIP's preprocessing: shortest edge to the tower's side, then the centre; or "pad" first."""

    def __init__(self, folder: str | Path, lvlm_config: LVLMConfig, vladva_config: typing.Any):
        path, settings = read_image_settings(folder)
        side = lvlm_config.vision.image_size
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        supported = dict.fromkeys(steps, (True,)) | {"resample": (3,), "rescale_factor": (1 / 255,)}
        supported |= {"size": ({"shortest_edge": side}, side)}
        supported |= {"crop_size": ({"height": side, "width": side}, side)}
        check_supported(settings, supported, str(path))
        if vladva_config.min_pixels or vladva_config.max_pixels:
            raise ValueError("min_pixels or max_pixels: LLaVA-1.5 has no pixel budget to set")
        self.mode = vladva_config.image_mode
        self.side = side
        self.mean, self.std = channel_statistics(settings, path)

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB image -> the (side, side) image that the vision tower sees."""
        # "pad": nothing is cut off; in the mean colour, as the original LLaVA-1.5 does
        if self.mode == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in self.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        # resize, keeping the shape, and cut out the centre
        width, height = (self.side * edge // min(image.size) for edge in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left = (width - self.side) // 2
        top = (height - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))

    def __call__(self, image: Image.Image) -> Tensor:  # (3, side, side)
        return normalize_pixels(self.fit(image), self.mean, self.std)

    def split(self, images: list[Image.Image]) -> list[slice]:
        """Images of one batch, in parts whose memory is bounded; those of equal size are one."""
        return [slice(None)]


def normalize_pixels(image: Image.Image, mean: np.ndarray, std: np.ndarray) -> Tensor:
    """RGB image -> (3, height, width) float32: 0 .. 1, less the mean, over the deviation."""
    pixels = (np.asarray(image).astype(np.float64) / 255 - mean) / std  # (height, width, 3)
    return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1).copy())


# ------------------------------------------------------------------------------- caption pairs

MAX_CAPTION_TOKENS = {"short": 29, "long": 500}  # paper Sec. 3.2: under 30; 30 to 500
MIN_CAPTION_TOKENS = {"short": 1, "long": 30}
MAX_LINE_BYTES = 1 << 20
SENTENCE_END = re.compile(r"""[.!?]["')\]]*(?=\s|$)""")


def truncate_caption(text: str, side: str, tokenizer: Tokenizer) -> str:
    """A caption over MAX_CAPTION_TOKENS[side], cut after a sentence, or else after a word."""
    text = tokenizer.validate_text(text)  # without spaces at its ends, as the offsets count
    encoding = tokenizer.encode(text, add_special_tokens=False)
    limit = MAX_CAPTION_TOKENS[side]
    if len(encoding) <= limit:
        return text
    # where it may end, in characters; two tokens can share one
    least = encoding.offsets[MIN_CAPTION_TOKENS[side] - 1][1]
    most = min(encoding.offsets[limit - 1][1], encoding.offsets[limit][0])
    # the last sentence that fits, else the last word, else in the middle of a word
    sentence_ends = [m.end() for m in SENTENCE_END.finditer(text) if least <= m.end() <= most]
    word_ends = [m.start() for m in re.finditer(r"\s+", text[: most + 1])]
    return text[: [most, *word_ends, *sentence_ends][-1]]


class BadRow(ValueError):
    """A row of a pairs file that cannot be used; the message names file and line."""


def parse_row(line: str, where: str) -> dict:
    """A JSON line -> its dict, where "short" is a list, "long" may be None, "generated" a dict."""
    try:
        row = parse_json(line, where)
    except ValueError as error:
        raise BadRow(str(error)) from None
    wanted = '{"image": "path", "short": caption or captions, "long": caption}'
    if not isinstance(row.get("image"), str):
        raise BadRow(f"{where}: wanted {wanted}, got {line:.80}")
    # a misspelled key would silently cost all its captions
    unknown = sorted(row.keys() - {"image", "short", "long", "generated"})
    if unknown:
        raise BadRow(f"{where}: unknown keys {unknown!s:.99}, wanted {wanted}")
    # null means absent, one short caption is a list of one
    row = {key: value for key, value in row.items() if value is not None}
    row = {"short": [], "long": None, "generated": {}} | row
    if not isinstance(row["short"], list):
        row["short"] = [row["short"]]
    for caption in row["short"] if row["long"] is None else [*row["short"], row["long"]]:
        if not isinstance(caption, str) or not caption.strip():
            raise BadRow(f"{where}: empty caption or no text: leave its key out: {line:.80}")
    if not isinstance(row["generated"], dict):
        raise BadRow(f"{where}: generated is {str(row['generated'])!r:.80}, wanted an object")
    return row


# Of a file that another file names: not by an absolute name, "..", or a link that leads elsewhere.
def inside(folder: Path, name: str, root: str | None = None) -> Path:
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(os.path.realpath(root or folder)):
        raise ValueError(f"{name!r:.99} is not in {root or folder}: --images DIR allows another")
    return folder / name


class Pairs:
    """The rows of a pairs file, read from the disk one by one: 16 bytes of a row are in memory."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, images: str | None = None):
        self.path = Path(path)
        self.tokenizer = tokenizer
        self.group_size = 1  # neighbouring rows that share a batch
        self.images = images  # the folder that images may lie in; None: that of the file
        if not self.path.is_file():
            raise ValueError(f"{path} not found: --data wants scenes, or a file of JSON lines")
        self.file = open(self.path, "rb")
        # byte at which each line begins, and the end of the file: (lines + 1,)
        self.starts = np.append(0, np.fromiter(map(len, self.file), dtype=np.int64).cumsum())
        self.numbers = np.flatnonzero(np.diff(self.starts) > 1)  # of the lines that are not empty

    def __len__(self) -> int:
        return len(self.numbers)

    def parse(self, index: int) -> dict:
        """Row `index` with its image as a path and its captions truncated; BadRow says why not."""
        number = self.numbers[index]
        where = f"{self.path}:{number + 1}"
        start, end = self.starts[number : number + 2].tolist()
        if end - start > MAX_LINE_BYTES:
            raise BadRow(f"{where}: {end - start:,} bytes, wanted at most {MAX_LINE_BYTES:,}")
        line = os.pread(self.file.fileno(), end - start, start)  # safe in several processes at once
        row = parse_row(line.decode("utf-8", errors="replace"), where)
        if not row["short"] and row["long"] is None:
            raise BadRow(f"{where}: neither a short nor a long caption")
        tokenizer = self.tokenizer
        try:
            image = inside(self.path.parent, row["image"], self.images)
            short = [truncate_caption(text, "short", tokenizer) for text in row["short"]]
            long = None if row["long"] is None else truncate_caption(row["long"], "long", tokenizer)
        except ValueError as error:
            raise BadRow(f"{where}: {error}") from None
        return row | {"image": image, "short": short, "long": long, "where": where}

    def row(self, index: int, rng: random.Random) -> dict:
        """Row `index`, its image opened, with one of its short captions, which rng draws."""
        row = self.parse(index)
        try:
            image = open_image(row["image"])
        except ValueError as error:
            raise BadRow(f"{row['where']}: {error}") from None
        short = rng.choice(row["short"]) if row["short"] else None
        return row | {"image": image, "short": short}


# -------------------------------------------------------------- files, processes, command line


def write_whole(path: str | Path, write: typing.Callable[[Path], typing.Any]) -> None:
    """A file written aside and renamed: a kill or a full disk leaves the old one as it was."""
    partial = Path(f"{path}.partial")
    partial.unlink(missing_ok=True)  # never through a link that somebody put there
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from None


def write_text(path: str | Path, text: str) -> None:
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


# Indented, so that people can read what a run or an export wrote.
def write_json(path: str | Path, value: typing.Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict | None = None) -> None:
    write_whole(path, functools.partial(save_file, tensors, metadata=metadata))
    path.chmod(0o644)  # safetensors 0.8 lets nobody else read what it writes


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and VladVAConfig, as a dict, of a training run's folder or one in peft's format."""
    path = Path(folder) / "adapter.safetensors"
    if not path.exists() and (path.parent / "adapter_config.json").exists():
        from extras.export import read_peft_adapter

        tensors, config = read_peft_adapter(folder)
        return tensors, vars(config)
    if not path.exists():
        raise ValueError(f"{path} not found: --adapter wants a training run's folder, or peft's")
    tensors, metadata = read_tensors(path)
    if "adapter" not in metadata:
        raise ValueError(f"{path} carries no config: it was not written by this project")
    return tensors, parse_json(metadata["adapter"], path).get("config")


# (number of this process, how many) among those that torchrun started; (0, 1) without it
def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def init_distributed(name: str | None) -> str:
    """The device of that name (None: CUDA, or else the CPU), after joining torchrun's processes."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(default if name is None else name)
        if "LOCAL_RANK" in os.environ and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device).item()  # refuses "meta" too
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {error!s:.200}") from None
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return str(device)


# The sum of a tensor over all processes, in place
def all_reduce_sum(tensor: Tensor) -> Tensor:
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """(rows of all processes in rank order, index of this one's first); their counts may differ."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:  # nothing waits for the device
        return rows, 0
    counts = torch.zeros(world_size, dtype=torch.long, device=rows.device)
    counts[rank] = len(rows)
    counts = all_reduce_sum(counts).tolist()
    # a sum with zeros elsewhere: all_gather would want equal counts
    first = sum(counts[:rank])
    gathered = rows.new_zeros(sum(counts), *rows.shape[1:])
    gathered[first : first + len(rows)] = rows
    return all_reduce_sum(gathered), first


# The strings of all processes, in rank order
def all_gather_strings(strings: list[str]) -> list[str]:
    parts = [strings] * rank_and_world_size()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, strings)
    return sum(parts, [])


def command(main: typing.Callable) -> typing.Callable:
    """Decorator of every command: what goes wrong outside it is one line and an exit code."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> typing.Any:
        # of libraries, and seldom for the user; behind what python -W asks for
        warnings.simplefilter("ignore", append=True)
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except (ValueError, OSError, MemoryError, RecursionError, torch.OutOfMemoryError) as error:
            print("error:", " ".join(str(error).split()) or "out of memory", file=sys.stderr)
            sys.exit(2)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


# once, not in each process
def say(*words: typing.Any, file: typing.Any = None) -> None:
    if rank_and_world_size()[0] == 0:
        print(*words, file=file, flush=True)


# The items in lists of batch_size, with a progress bar
def batches(items: typing.Sequence, batch_size: int, title: str) -> typing.Iterator[list]:
    starts = range(0, len(items), batch_size)
    # no bar for a single batch, nor (None) where there is no terminal
    for start in tqdm(starts, title, leave=False, disable=None if len(starts) > 1 else True):
        yield list(items[start : start + batch_size])


def format_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = []
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# argparse's, whose errors are one line: the usage is what --help is for
class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def add_model_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="tiny", help=f"{', '.join(MODELS)}, a folder, a hub id (default: tiny)")
    add("--adapter", help="a training run's folder, or peft's (default: the untouched model)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=sorted(DTYPES), help="of weights (default: bfloat16; float32 on a cpu)")


def flag(default: typing.Any, help: str, **limits: typing.Any) -> typing.Any:
    """A dataclass field that is also a command-line flag; limits: low, high, or choices."""
    return field(default=default, metadata={"help": help, "high": 1e9, **limits})


# when a config is made, not when flags are parsed: Python callers make configs too
def check_bounds(config: typing.Any) -> None:
    for f in fields(config):
        value = getattr(config, f.name)
        low, high, choices = map(f.metadata.get, ("low", "high", "choices"))
        if value is None:  # decided later
            continue
        wanted = " or ".join(map(repr, choices)) if choices else f"{low} to {high}"
        if (choices and value not in choices) or (low is not None and not low <= value <= high):
            raise ValueError(f"--{f.name.replace('_', '-')} is {value!r}: wanted {wanted}")


# defaults live in the dataclass alone; fields without help are for Python callers
def add_config_flags(parser: Parser, cls: type) -> None:
    for f in filter(lambda f: f.metadata.get("help"), fields(cls)):
        default = "" if f.default is None else f" (default: {f.default})"
        options = {"default": argparse.SUPPRESS, "help": f.metadata["help"] + default}
        kind = (typing.get_args(f.type) or (f.type,))[0]
        options |= {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)
