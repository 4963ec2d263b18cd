"""Public caption files to training pairs: joined on the image, counted, completed by a model.

    python -m extras.captions convert SOURCE ... --out pairs.jsonl  # one row per image
    python -m extras.captions check pairs.jsonl --model llava-1.5-7b  # what is in it
    python -m extras.captions fill pairs.jsonl --model llava-1.5-7b --out filled.jsonl
    torchrun --nproc-per-node 8 -m extras.captions fill ...  # missing captions, by 8 devices

Not here: the public files and a walk-through (docs/data.md), reading pairs in training (data.py).
"""

import argparse
import csv
import itertools
import json
import os
import re
import statistics
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

import data
from data import MAX_CAPTION_TOKENS, BadRow, format_table, say
from model import parse_config, read_json
from vladva import VladVA, load_model

# ------------------------------------------ public caption files: readers of (image, caption)


def conversation_captions(raw: list) -> Iterator:
    """LLaVA-Pretrain, ShareGPT4V: the first answer; the question holds <image> and is left out."""
    for row in raw:
        if "image" in row:  # LLaVA's later files have rows without an image
            answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
            yield row["image"], answers[0]


def karpathy_captions(raw: dict) -> Iterator:
    """Karpathy's COCO and Flickr30k, all splits: the raw sentences, not the tokens."""
    for row in raw["images"]:
        for sentence in row["sentences"]:
            yield os.path.join(row.get("filepath", ""), row["filename"]), sentence["raw"]


def coco_captions(raw: dict) -> Iterator:
    """COCO's captions_*.json and nocaps: an annotation names the id of an image."""
    names = {row["id"]: row["file_name"] for row in raw["images"]}
    for row in raw["annotations"]:
        yield names[row["image_id"]], row["caption"]


# what the first line of a table may call its columns
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "title", "text")


def table_captions(path: Path) -> Iterator:
    """CSV, or TSV (where quotes mean nothing) when the first line has a tab: image and caption."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        rows = csv.reader(file, **(tabs if "\t" in file.readline() else {}))
        file.seek(0)
        first = next(rows, [])
        header = [name.strip().lower() for name in first]
        image = next((i for i, name in enumerate(header) if name in IMAGE_COLUMNS), None)
        caption = next((i for i, name in enumerate(header) if name in CAPTION_COLUMNS), None)
        width = len(header)
        if image is None or caption is None:
            image, caption, width = 0, 1, 2
            rows_left = itertools.chain([first], rows)
        else:
            rows_left = rows
        for row in filter(None, rows_left):
            where = f"{path}:{rows.line_num}"
            if len(row) != width:
                raise ValueError(f"{where}: {len(row)} columns, wanted {width}")
            if row[caption].startswith(("http://", "https://")):
                address = repr(row[caption][:60])
                raise ValueError(f"{where}: {address} is an address: wanted images on this disk")
            yield row[image], row[caption]


def folder_captions(folder: Path) -> Iterator:
    """Every image of a folder and those below, with the text of the .txt beside it, or None."""
    for here, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(data.IMAGE_SUFFIXES):
                text = Path(here, name).with_suffix(".txt")
                caption = text.read_text(encoding="utf-8") if text.is_file() else None
                yield os.path.relpath(Path(here, name), folder), caption


SCHEMAS = {  # of JSON files: where the rows are (None: the file is a list), a key of theirs, reader
    "LLaVA conversations": (None, "conversations", conversation_captions),
    "Karpathy": ("images", "sentences", karpathy_captions),
    "COCO captions": ("annotations", "caption", coco_captions),
}


def open_captions(path: Path) -> tuple[str, Iterator]:
    """(form, iterator of (image, caption)) of a file or folder, whose content decides the form."""
    if path.is_dir():
        return "images with .txt", folder_captions(path)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        if file.read(4096).lstrip()[:1] not in ("[", "{"):
            return "table", table_captions(path)
    raw = read_json(path, dict | list)
    known = []
    for form, (place, key, reader) in SCHEMAS.items():
        rows = raw.get(place) if isinstance(raw, dict) else {None: raw}.get(place)
        if rows and isinstance(rows, list) and isinstance(rows[0], dict) and key in rows[0]:
            return form, reader(raw)
        known.append(f"{form} ({key!r} in the rows{f' of {place!r}' if place else ''})")
    raise ValueError(f"{path} is none of: {'; '.join(known)}")


class Source:
    """One SOURCE of convert, "[short:|long:]FILE[@FOLDER]": captions of one side, read.

    FOLDER is where its images' names begin. Without a side it is the one that the median of the
    first 100 captions belongs to, in words.
    """

    def __init__(self, spec: str):
        side, whole = spec.split(":", 1) if spec.startswith(("short:", "long:")) else (None, spec)
        file, folder = whole, None
        for at in re.finditer("@", whole):  # the name of a file may hold one too
            if not os.path.exists(file):
                file, folder = whole[: at.start()], whole[at.end() :]
        self.path = Path(file)
        if not self.path.exists():
            wanted = "a SOURCE is [short:|long:]FILE[@FOLDER OF ITS IMAGES]"
            raise ValueError(f"{file}: no such file or folder; {wanted}")
        self.folder = Path(folder or (file if self.path.is_dir() else self.path.parent))
        self.captions = []
        try:
            self.form, captions = open_captions(self.path)
            for image, caption in captions:
                if not image or not isinstance(image, str) or not isinstance(caption, str | None):
                    raise TypeError(f"image {image!r}, caption {caption!r}")
                self.captions.append((image, caption))
        except (LookupError, TypeError, AttributeError, csv.Error, UnicodeDecodeError) as error:
            place = f"what follows caption {len(self.captions)} is not like the others"
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.path}: {place} ({reason})") from None
        words = [len(text.split()) for _, text in self.captions[:100] if text] or [0]
        is_short = statistics.median(words) < MAX_CAPTION_TOKENS["short"] + 1
        self.side = side or ("short" if is_short else "long")


# -------------------------------------------------------------------- convert: a row per image

PREFIX = r"COCO_[a-z]+\d+_"
SPLIT = r"(?:train|val|test|unlabeled)20\d\d/"
COCO_IMAGE = rf"(?:^|/)(?:{SPLIT}(?:{PREFIX})?|{PREFIX})(\d{{12}})\.\w+$"


def image_key(path: str) -> str:
    """What makes two paths one image: the COCO id, which is the same in
    train2014/COCO_train2014_000000000009.jpg and train2017/000000000009.jpg, or the path itself."""
    coco = re.search(COCO_IMAGE, path)
    return f"COCO {coco[1]}" if coco else path


def bare_name(path: str) -> str:
    """File name without folder, suffix and COCO's prefix: how evaluation images are recognised."""
    return re.sub(f"^{PREFIX}", "", os.path.splitext(os.path.basename(path))[0])


def evaluation_names(path: str) -> set[str]:
    """bare_name of all images that a benchmark evaluates on: Karpathy's val and test, and what
    nocaps, COCO captions or SugarCrepe name."""
    raw = read_json(path, dict | list)
    names = set()
    for row in raw if isinstance(raw, list) else raw.get("images") or raw.values():
        if isinstance(row, dict) and row.get("split", "test") in ("val", "test"):
            names.add(bare_name(row.get("filename") or row.get("file_name") or ""))
    names.discard("")
    if not names:
        wanted = "a benchmark's file, whose rows have 'filename' or 'file_name'"
        raise ValueError(f"{path} names no image to drop: wanted {wanted}")
    return names


def check_output(path: str) -> None:
    """ValueError when a file is there already, or cannot be there."""
    if Path(path).exists():
        raise ValueError(f"{path} is there already: choose another name, or delete it first")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{path} could not be written: make its folder first")


def write_rows(path: str, rows: Iterator[dict]) -> None:
    """Write JSON lines; the file is there whole or not at all."""
    partial = Path(f"{path}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


KINDS = ("with both captions", "short only", "long only", "with none")


def convert(args) -> Counter:
    """Join the captions of all sources on the image, images in the order of their first captions.

    All captions are in memory, and one JSON file at a time. Returns the counts.
    """
    check_output(args.out)
    base = Path(args.out).absolute().parent
    sources = [Source(spec) for spec in args.sources]
    karpathy = [str(source.path) for source in sources if source.form == "Karpathy"]
    drop = {path: evaluation_names(path) for path in dict.fromkeys([*args.drop, *karpathy])}
    dropped = {path: set() for path in drop}
    images = {}
    for source in sources:
        join_source(source, images, drop, dropped, base)
    totals = Counter({"images": len(images), **dict.fromkeys(KINDS, 0)})
    write_rows(args.out, joined_rows(images, base, totals))
    for path, names in dropped.items():
        totals[f"dropped by {path}"] = len(names)
    if not drop:
        say("dropped: nothing, as no --drop FILE names the images of an evaluation set")
    say(format_table([args.out, "images"], [[name, f"{n:,}"] for name, n in totals.items()]))
    return totals


def join_source(source: Source, images: dict, drop: dict, dropped: dict, base: Path) -> None:
    """Add the captions of a source to images: {image_key: (paths, short captions, long captions)}.

    drop: {benchmark's file: names of its images}; those that came up go to `dropped`.
    """
    root = os.path.relpath(source.folder, base)
    counts = Counter(captions=0)
    for number, (name, text) in enumerate(source.captions):
        if text:
            text = " ".join(text.split()) if source.side == "short" else text.strip()
        counts["captions" if text else "without a caption"] += 1
        path = os.path.normpath(os.path.join(root, name))
        counts["of the first 100 images found"] += number < 100 and (base / path).is_file()
        benchmarks = [file for file, names in drop.items() if bare_name(name) in names]
        for file in benchmarks:
            dropped[file].add(bare_name(name))
        if benchmarks:
            counts["dropped"] += 1
            continue
        paths, short, long = images.setdefault(image_key(path), ([], [], []))
        captions = short if source.side == "short" else long
        if path not in paths:
            paths.append(path)
        if text and text not in captions:
            captions.append(text)
    words = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    say(f"{source.path} ({source.form}, {source.side}): {words}")


def joined_rows(images: dict, base: Path, totals: Counter) -> Iterator[dict]:
    """A row per image: of several paths the one on the disk, of several long captions the first."""
    for paths, short, long in images.values():
        path = paths[0]
        if len(paths) > 1:
            path = next((path for path in paths if (base / path).is_file()), path)
        totals[KINDS[2 * (not short) + (not long)]] += 1
        totals["further long captions left out"] += len(long[1:])
        if len(short) < 2:
            short = short[0] if short else None
        yield {"image": path, "short": short, "long": long[0] if long else None}


# -------------------------------------------------------------- check: what a pairs file holds

BINS = (0, 10, 20, 30, 50, 100, 200, 300, 400, 501)  # in tokens; the last one is open
LENGTHS = [f"{low} to {end - 1}" for low, end in zip(BINS, BINS[1:])] + ["over 500"]


def read_chunks(path: str, batch_size: int = 1000) -> Iterator[list]:
    """All lines as lists of (place, line, row of data.parse_row or the BadRow that it raised).

    A list ends with the batch_size-th row that lacks a caption, or after 1000 lines.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} not found: wanted a pairs file, as convert writes it")
    chunk, lacking = [], 0
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = data.parse_row(line, where)
                lacking += not (row["short"] and row["long"])
            except BadRow as error:
                row = error
            chunk.append((where, line, row))
            if lacking == batch_size or len(chunk) == 1000:
                yield chunk
                chunk, lacking = [], 0
    if chunk:
        yield chunk


def begins_with(long: str, short: str) -> bool:
    """Does the long caption begin with the words of the short one: a shortcut (Sec. 3.2.3)?"""
    words = re.findall(r"\w+", short.lower())
    return bool(words) and re.findall(r"\w+", long.lower())[: len(words)] == words


def count_row(row: dict, tokenizer: data.Tokenizer, counts: Counter, seen: set) -> None:
    """Add a row of data.parse_row to the counts; seen: hashes of the images and captions so far.

    Captions by length are counted as (side, one of LENGTHS).
    """
    counts["rows"] += 1
    counts["rows without a caption"] += not (row["short"] or row["long"])
    repeats = [begins_with(row["long"], text) for text in row["short"] if row["long"]]
    counts["rows whose long caption starts with a short one"] += any(repeats)
    image = image_key(os.path.normpath(row["image"]))
    for kind, texts in (("images", [image]), ("short captions", row["short"])):
        for text in texts:
            counts[f"{kind} that come again"] += hash((kind, text)) in seen
            seen.add(hash((kind, text)))
    for side, texts in (("short", row["short"]), ("long", [row["long"]] if row["long"] else [])):
        counts[f"{side} captions missing"] += not texts
        counts[f"{side} captions written by a model"] += side in row["generated"]
        for text in texts:
            length = len(tokenizer.inner.encode(text, add_special_tokens=False))
            counts[side, LENGTHS[bisect(BINS, length) - 1]] += 1


def find_faults(where: str, row: dict | BadRow, folder: Path, tokenizer, decode: bool) -> list:
    """[(what training refuses in a row of read_chunks, the same in full), ...]."""
    if isinstance(row, BadRow):
        return [("malformed rows", str(row))]
    faults = []
    for caption in (*row["short"], row["long"]):
        try:
            if caption is not None:
                tokenizer.validate_text(caption)
        except ValueError as error:
            faults.append(("captions with a special token", f"{where}: {error}"))
    image = folder / row["image"]
    if not image.is_file():
        return [*faults, ("images missing", f"{where}: image {image} not found")]
    try:
        if decode:
            data.open_image(image)
    except ValueError as error:
        faults.append(("images broken", f"{where}: {error}"))
    return faults


def check(args) -> Counter:
    """Count what a pairs file holds and print it with the first ten faults; returns the counts."""
    model = data.model_folder(args.model)
    tokenizer = data.Tokenizer(model, parse_config(read_json(model / "config.json")))
    counts, seen, messages = Counter(), set(), []
    with ThreadPoolExecutor() as pool:
        for chunk in read_chunks(args.pairs):
            futures = []
            for where, _, row in chunk:
                if not isinstance(row, BadRow):
                    count_row(row, tokenizer, counts, seen)
                row_args = (where, row, Path(args.pairs).parent, tokenizer, args.decode)
                futures.append(pool.submit(find_faults, *row_args))
            for future in futures:
                for kind, message in future.result():
                    counts[kind] += 1
                    messages = [*messages, message][:10]
    counts["images found"] = counts["rows"] - counts["images missing"] - counts["images broken"]
    table = [[kind, f"{count:,}"] for kind, count in counts.items() if isinstance(kind, str)]
    say(format_table([args.pairs, ""], table))
    highest = max([1, *(count for kind, count in counts.items() if isinstance(kind, tuple))])
    table = []
    for length in LENGTHS:
        cells = [length]
        for side in MAX_CAPTION_TOKENS:
            bar = "#" * -(-30 * counts[side, length] // highest)
            cells += [f"{counts[side, length]:,}", bar.ljust(30)]
        table.append(cells)
    say("\n" + format_table([f"tokens of {args.model}", "short", "", "long", ""], table))
    for message in messages:
        say(message)
    return counts


# ------------------------------------------------------------- fill: captions that are missing


def fill(args) -> Counter | None:
    """Have a model write the captions that a pairs file lacks, greedily.

    Each process appends the chunks that it has finished to its OUT.part-K, a line for each; started
    again, it goes on behind them, and the end is the same file. Returns the counts, in the first.
    """
    check_output(args.out)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: at least 1 is needed")
    num_chunks = sum(1 for _ in read_chunks(args.pairs, args.batch_size))
    model = load_model(args)
    rank, world_size = data.rank_and_world_size()
    file = os.stat(args.pairs)
    settings = {"file": [file.st_size, file.st_mtime_ns], "processes": world_size}
    for name in ("pairs", "model", "adapter", "short_prompt", "long_prompt", "batch_size"):
        settings[name] = getattr(args, name)
    settings["dtype"] = str(model.lvlm.dtype)
    part = Path(f"{args.out}.part-{rank}")
    num_done = open_part(part, settings)
    data.barrier()  # a part of another run stops all processes here
    first = rank + num_done * world_size
    total = len(range(first, num_chunks, world_size))
    say(f"{args.pairs}: {total:,} of {num_chunks:,} chunks are left for each process")
    chunks = itertools.islice(read_chunks(args.pairs, args.batch_size), first, None, world_size)
    bad_rows, rows_seen = data.BadRows(), 0
    with open(part, "ab") as file:
        for chunk in tqdm(chunks, "captioning", total, disable=True if rank else None):
            result = fill_chunk(model, chunk, args)
            bad_rows.add(result["bad"])
            rows_seen += len(chunk)
            bad_rows.check(len(bad_rows.messages), rows_seen)
            file.write(json.dumps(result).encode() + b"\n")
            file.flush()
    data.barrier()
    return merge_parts(args.out, world_size) if rank == 0 else None


def open_part(path: Path, settings: dict) -> int:
    """Make a part of OUT, whose first line is the settings, or count its chunks.

    What a kill left of a line is cut off. ValueError when the part is that of another run.
    """
    header = json.dumps(settings).encode() + b"\n"
    num_lines = size = 0
    with open(path, "ab+") as file:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break
            if num_lines == 0 and line != header:
                other = line.decode().strip()
                raise ValueError(f"{path} is of a run with {other}: delete it to start anew")
            num_lines += 1
            size += len(line)
        file.truncate(size)
        if num_lines == 0:
            file.write(header)
    return max(0, num_lines - 1)


def fill_chunk(model: VladVA, chunk: list, args) -> dict:
    """{"rows": those of a chunk with their captions, "bad": why others are left out, "counts"}."""
    folder = Path(args.pairs).parent
    below = os.path.relpath(folder, Path(args.out).parent)
    rows, bad, counts = [], [], Counter()
    lacking = {side: [] for side in MAX_CAPTION_TOKENS}  # {side: [(row, image), ...]}
    for where, line, parsed in chunk:
        if isinstance(parsed, BadRow):
            bad.append(str(parsed))
            continue
        sides = [side for side in MAX_CAPTION_TOKENS if not parsed[side]]
        try:
            image = data.open_image(folder / parsed["image"]) if sides else None
        except ValueError as error:
            bad.append(f"{where}: {error}")
            continue
        row = json.loads(line)
        row["image"] = os.path.normpath(os.path.join(below, row["image"]))
        rows.append(row)
        for side in sides:
            lacking[side].append((row, image))
    prompts = {"short": args.short_prompt, "long": args.long_prompt}
    writer = f"{args.model} + {args.adapter}" if args.adapter else args.model
    for side, pairs in lacking.items():
        if not pairs:
            continue
        images = [image for _, image in pairs]
        limit = MAX_CAPTION_TOKENS[side] + 1  # one too many shows that the model had more to say
        texts = model.generate_batch(images, [prompts[side]] * len(images), limit)
        for (row, _), text in zip(pairs, texts):
            try:
                caption = data.truncate_caption(text, side, model.tokenizer)
            except ValueError:  # no words, or a special token among them
                counts["unusable answers"] += 1
                continue
            counts["truncated"] += caption != text
            counts[f"{side} captions"] += 1
            generated = row.pop("generated", None) or {}
            generated[side] = {"model": writer, "prompt": prompts[side]}
            row |= {side: caption, "generated": generated}
    return {"rows": rows, "bad": bad, "counts": counts}


def merge_parts(out: str, world_size: int) -> Counter:
    """Write OUT from its parts, which are removed, and OUT.bad_rows.txt. Returns the counts."""
    parts = [open(f"{out}.part-{rank}", "rb") for rank in range(world_size)]
    totals, bad = Counter(), []

    def merged_rows():
        for part in parts:
            part.readline()  # the settings
        for part in itertools.cycle(parts):  # chunk n is a line of part n % world_size
            line = part.readline()
            if not line:
                return
            result = json.loads(line)
            totals.update(result["counts"] | {"rows": len(result["rows"])})
            bad.extend(result["bad"])
            yield from result["rows"]

    write_rows(out, merged_rows())
    if bad:
        text = "".join(f"{message}\n" for message in bad)
        Path(f"{out}.bad_rows.txt").write_text(text, encoding="utf-8")
    for part in parts:
        part.close()
        os.unlink(part.name)
    totals["bad rows left out"] = len(bad)
    say(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in totals.items()))
    return totals


# ------------------------------------------------------------------------------ command line


def build_parser() -> argparse.ArgumentParser:
    """The flags of the three commands."""
    parser = argparse.ArgumentParser(prog="python -m extras.captions")
    commands = parser.add_subparsers(required=True, metavar="convert|check|fill")
    command = commands.add_parser("convert", help="public caption files -> one pairs file")
    command.set_defaults(run=convert)
    source_help = "[short:|long:]FILE[@FOLDER OF ITS IMAGES], or a folder of images"
    command.add_argument("sources", nargs="+", metavar="SOURCE", help=source_help)
    command.add_argument("--out", required=True, help="the pairs file to write (required)")
    drop_help = "benchmarks' files, whose images are left out (default: only Karpathy sources)"
    command.add_argument("--drop", nargs="+", default=[], metavar="FILE", help=drop_help)
    command = commands.add_parser("check", help="count what a pairs file holds")
    command.set_defaults(run=check)
    command.add_argument("pairs", metavar="PAIRS", help="the pairs file to look at")
    command.add_argument("--model", default="tiny", help="whose tokens count (default: tiny)")
    yes_or_no = {"action": argparse.BooleanOptionalAction, "default": True}
    command.add_argument("--decode", help="open every image (default: yes)", **yes_or_no)
    command = commands.add_parser("fill", help="have a model write the captions that are missing")
    command.set_defaults(run=fill)
    command.add_argument("pairs", metavar="PAIRS", help="the pairs file that lacks captions")
    command.add_argument("--out", required=True, help="the pairs file to write (required)")
    default = "(default: %(default)s)"
    prompt = "Provide a brief description of the image."
    command.add_argument("--short-prompt", default=prompt, help=f"asks for short ones {default}")
    prompt = "Describe the image in detail."
    command.add_argument("--long-prompt", default=prompt, help=f"asks for long ones {default}")
    batch_help = f"images that are captioned together {default}"
    command.add_argument("--batch-size", type=int, default=16, help=batch_help)
    data.add_model_flags(command)
    return parser


@data.command
def main(argv: list[str] | None = None) -> Counter | None:
    args = build_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    main()
