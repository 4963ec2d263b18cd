"""Public caption files to training pairs: joined on the image, counted, completed by a model.

    python -m extras.captions convert short:a.json long:b.json --out pairs.jsonl  # a row per image
    python -m extras.captions check pairs.jsonl --model llava-1.5-7b  # what is in it
    python -m extras.captions fill pairs.jsonl --model llava-1.5-7b --out filled.jsonl
    torchrun --nproc-per-node 8 -m extras.captions fill ...  # missing captions, by 8 devices

Not here: the public files and a walk-through (docs/data.md), reading pairs in training (data.py).
"""

import argparse
import functools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
from data import MAX_CAPTION_TOKENS, MIN_CAPTION_TOKENS, BadRow, say, write_whole
from eval import BadRows
from model import parse_config, read_json
from vladva import VladVA, VladVAConfig, load_model

# what `fill` asks for; the long prompt is the paper's (Sec. 3.2.3), the short one LLaVA's
PROMPTS = {"short": "Provide a brief description of the image."}
PROMPTS["long"] = VladVAConfig.detail_prompt

# ------------------------------------------ public caption files: readers of (image, caption)


def conversation_captions(raw: list) -> Iterator[tuple]:
    """LLaVA-Pretrain, ShareGPT4V: the first answer; the question holds <image> and is left out."""
    for row in raw:
        if "image" in row:  # LLaVA's later files have rows without an image
            answers = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
            yield row["image"], answers[0]


def coco_captions(raw: dict) -> Iterator[tuple]:
    """COCO's captions_*.json and nocaps: an annotation names the id of an image."""
    names = {row["id"]: row["file_name"] for row in raw["images"]}
    for row in raw["annotations"]:
        yield names[row["image_id"]], row["caption"]


def folder_captions(folder: Path) -> Iterator[tuple]:
    """Every image of a folder and those below, with the text of the .txt beside it, or None."""
    for path in sorted(folder.rglob("*")):
        if path.name.lower().endswith(data.IMAGE_SUFFIXES):
            text = path.with_suffix(".txt")
            caption = text.read_text(encoding="utf-8") if text.is_file() else None
            yield str(path.relative_to(folder)), caption


def read_source(spec: str) -> tuple[str, str, list]:
    """(side, folder where the images' names begin, captions) of SIDE:FILE[@FOLDER]."""
    side, _, path = spec.partition(":")
    folder = ""
    # a file's name may hold an @ too
    if not os.path.exists(path):
        path, _, folder = path.partition("@")
    if side not in ("short", "long") or not os.path.exists(path):
        wanted = "short: or long:, a file or folder, and perhaps @FOLDER OF ITS IMAGES"
        raise ValueError(f"no SOURCE {spec}: wanted {wanted}")
    captions = []
    try:
        # the content decides: a folder, LLaVA's list of rows, or COCO's object of two lists
        if os.path.isdir(path):
            reader = folder_captions(Path(path))
        else:
            raw = read_json(path, dict | list)
            reader = conversation_captions(raw) if isinstance(raw, list) else coco_captions(raw)
        # one row in another form ends it: to pass over them might lose thousands in silence
        for image, caption in reader:
            if not image or not isinstance(image, str) or not isinstance(caption, str | None):
                raise TypeError(f"image {image!r:.100}, caption {caption!r:.100}")
            captions.append((image, caption or ""))
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        place = f"{path}: what follows caption {len(captions)} ({type(error).__name__}: {error})"
        wanted = "LLaVA's conversations, COCO's captions or a folder of images"
        raise ValueError(f"{place} is not as published: wanted {wanted}") from None
    if not captions:
        raise ValueError(f"{path} holds no images")
    say(f"{path} ({side}): {len(captions):,} rows")
    folder = folder or (path if os.path.isdir(path) else Path(path).parent)
    return side, str(folder), captions


# -------------------------------------------------------------------- convert: a row per image


def bare_name(path: str) -> str:
    """File name without folder, suffix and COCO's prefix: how evaluation images are recognised."""
    return re.sub(r"^COCO_[a-z]+\d+_", "", os.path.splitext(os.path.basename(path))[0])


def evaluation_names(path: str) -> set[str]:
    """bare_name of the images of a benchmark: Karpathy's val and test, all that others name."""
    rows = read_json(path, dict | list)
    try:
        # Karpathy, COCO and nocaps have a list of images, SugarCrepe a dict of rows
        if isinstance(rows, dict):
            rows = rows.get("images") or rows.values()
        rows = [row for row in rows if row.get("split", "test") in ("val", "test")]
        names = {bare_name(row.get("filename") or row["file_name"]) for row in rows}
    except (LookupError, TypeError, AttributeError):
        names = set()
    # all or nothing: an image of a row in another form would stay in training
    if not names:
        raise ValueError(f"{path}: wanted a list of images, all with 'filename' or 'file_name'")
    return names


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a new text file; half a character, which JSON may hold, becomes a question mark."""
    with open(path, "x", encoding="utf-8", errors="replace") as file:
        file.writelines(lines)


def row_line(image: str, row: dict) -> str:
    """A line of a pairs file: one short caption is a text, several are a list, none is null."""
    short = row["short"] if len(row["short"]) > 1 else next(iter(row["short"]), None)
    line = {"image": image, "short": short, "long": next(iter(row["long"]), None)}
    if row.get("generated"):
        line["generated"] = row["generated"]
    return json.dumps(line, ensure_ascii=False) + "\n"


def convert(args: argparse.Namespace) -> Counter:
    """Join the captions of all sources, which fit into memory, on the image; returns the counts."""
    drop = {}  # {bare_name: the benchmark that has it}
    for path in args.drop:
        drop |= dict.fromkeys(evaluation_names(path), path)
    base = Path(args.out).absolute().parent
    images = {}  # {path from the pairs file: {"short": captions, "long": captions}}
    dropped = set()
    for spec in args.sources:
        side, folder, captions = read_source(spec)
        root = os.path.relpath(folder, base)
        for name, text in captions:
            # by name alone: Karpathy's train2014/COCO_train2014_x.jpg is train2017/x.jpg elsewhere
            if bare_name(name) in drop:
                dropped.add(bare_name(name))
                continue
            # an image is its whole path: equal names in two folders are two images
            path = os.path.normpath(os.path.join(root, name))
            texts = images.setdefault(path, {"short": [], "long": []})[side]
            # line breaks mean nothing in a short caption; a long one has paragraphs
            text = " ".join(text.split()) if side == "short" else text.strip()
            if text and text not in texts:
                texts.append(text)
    counts = Counter(images=len(images))
    for texts in images.values():
        sides = [side for side in texts if texts[side]]
        counts[f"with {' and '.join(sides) or 'no'} captions"] += 1
        counts["further long captions left out"] += len(texts["long"][1:])
    for path in args.drop:
        counts[f"dropped by {path}"] = sum(drop[name] == path for name in dropped)
    lines = (row_line(path, texts) for path, texts in images.items())
    write_whole(args.out, functools.partial(write_lines, lines=lines))
    say(data.format_table([args.out, ""], [[name, f"{n:,}"] for name, n in counts.items()]))
    return counts


# -------------------------------------------------------------- check: what a pairs file holds


def read_row(pairs: data.Pairs, index: int) -> dict:
    """A row with "where" and its captions, not cut, as two lists; BadRow says why not."""
    # as data.Pairs.parse reads it, which cuts captions and refuses rows that wait for `fill`
    number = pairs.numbers[index]
    where = f"{pairs.path}:{number + 1}"
    start, end = pairs.starts[number : number + 2].tolist()
    if end - start > data.MAX_LINE_BYTES:
        raise BadRow(f"{where}: {end - start:,} bytes, wanted at most {data.MAX_LINE_BYTES:,}")
    line = os.pread(pairs.file.fileno(), end - start, start)
    row = data.parse_row(line.decode("utf-8", errors="replace"), where)
    return row | {"where": where, "long": [row["long"]] if row["long"] else []}


def try_row(pairs: data.Pairs, index: int) -> tuple[dict | None, str]:
    """(a row, if it is one, why training would leave it out, or "")."""
    row = None
    try:
        row = read_row(pairs, index)
        pairs.row(index, random.Random(0))
    except BadRow as error:
        return row, " ".join(str(error).split())[:300]
    return row, ""


def count_lengths(row: dict, tokenizer: data.Tokenizer, counts: Counter) -> None:
    """Count the captions of a row by their tokens, before training cuts them."""
    for side in ("short", "long"):
        low = MIN_CAPTION_TOKENS[side]
        high = MAX_CAPTION_TOKENS[side]
        for text in row[side]:
            length = len(tokenizer.encode(text, add_special_tokens=False))
            counts[f"{side} captions under {low} tokens"] += length < low
            counts[f"{side} captions of {low} to {high} tokens"] += low <= length <= high
            counts[f"{side} captions over {high} tokens, cut in training"] += length > high


def check(args: argparse.Namespace) -> Counter:
    """Count what a pairs file holds, with the first ten rows that training would leave out."""
    model = data.model_folder(args.model)
    tokenizer = data.Tokenizer(model, parse_config(read_json(model / "config.json")))
    pairs = data.Pairs(args.pairs, tokenizer, args.images)
    counts = Counter({"rows": len(pairs), "rows that training leaves out": 0})
    messages = []
    # threads: most of the time goes into decoding images, which Pillow does without Python's lock
    with ThreadPoolExecutor() as pool:
        for indices in data.batches(range(len(pairs)), 1000, "checking"):
            for row, message in pool.map(functools.partial(try_row, pairs), indices):
                if row:
                    for side in ("short", "long"):
                        counts[f"{side} captions missing"] += not row[side]
                        counts[f"{side} captions written by a model"] += side in row["generated"]
                if message:
                    counts["rows that training leaves out"] += 1
                    messages = [*messages, message][:10]
                else:
                    count_lengths(row, tokenizer, counts)
    table = [[name, f"{count:,}"] for name, count in counts.items()]
    table = data.format_table([args.pairs, f"tokens of {args.model}"], table)
    say("\n".join([table, *messages]))
    return counts


# ------------------------------------------------------------- fill: captions that are missing


def fill(args: argparse.Namespace) -> None:
    """Have a model write the captions that a pairs file lacks, greedily.

    OUT.part has a line for each row that is done, in order; the first process writes those of all.
    Started again, with any number of processes, fill goes on behind them.
    """
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: at least 1 is needed")
    pairs = data.Pairs(args.pairs, None, args.images)
    model = load_model(args)
    rank, world_size = data.rank_and_world_size()
    part = Path(f"{args.out}.part")
    # only the first process sees the file: the others may be on other machines
    num_done = open_part(part, args) if rank == 0 else 0
    num_done = int(data.all_gather_strings([str(num_done)])[0])
    say(f"{args.pairs}: {len(pairs) - num_done:,} of {len(pairs):,} rows are left")
    bad_rows = BadRows()
    num_rows = 0
    num_together = args.batch_size * world_size
    for indices in data.batches(range(num_done, len(pairs)), num_together, "captioning"):
        # neighbouring rows for each process; in the last step some may have none
        indices = indices[rank * args.batch_size :][: args.batch_size]
        lines = data.all_gather_strings(fill_rows(model, pairs, indices, args))
        bad_rows.add([json.loads(line) for line in lines if line.startswith('"')])
        num_rows += len(lines)
        # before they are written: with the images mended, these rows are tried again
        if problem := bad_rows.problem(num_rows):
            raise ValueError(problem)
        if rank == 0:
            with open(part, "a", encoding="utf-8", errors="replace") as file:
                file.writelines(lines)
    if rank == 0:
        write_filled(part, args.out)


def open_part(path: Path, args: argparse.Namespace) -> int:
    """Begin OUT.part with what decides the captions, or count the rows that it has."""
    file = os.stat(args.pairs)
    flags = [args.pairs, args.model, args.adapter, args.dtype]
    header = json.dumps([*flags, file.st_size, file.st_mtime_ns]).encode() + b"\n"
    if path.is_symlink():
        raise ValueError(f"{path} is a link, and not written through: delete it")
    if not path.exists():
        path.write_bytes(header)
    with open(path, "rb+") as part:
        first = part.readline()
        if first != header:
            other = first.decode(errors="replace").strip()[:1000]
            raise ValueError(f"{path} is of a run with {other}: delete it to start anew")
        # of the last line a kill or a full disk may have left the beginning
        lengths = [len(line) for line in part if line.endswith(b"\n")]
        part.truncate(len(header) + sum(lengths))
    return len(lengths)


def open_row(pairs: data.Pairs, index: int, tokenizer: data.Tokenizer) -> dict | str:
    """A row of read_row with its image, "pixels", if it lacks a caption; or why it is left out."""
    try:
        row = read_row(pairs, index)
        # what training would leave out is left out here
        for text in row["short"] + row["long"]:
            tokenizer.validate_text(text)
        path = data.inside(pairs.path.parent, row["image"], pairs.images)
        if not (row["short"] and row["long"]):
            row["pixels"] = data.open_image(path)
        return row
    except BadRow as error:
        return str(error)
    except ValueError as error:
        return f"{row['where']}: {error}"


def fill_rows(model: VladVA, pairs: data.Pairs, indices, args: argparse.Namespace) -> list[str]:
    """A JSON line for each row: the row, completed, or a text that says why it is left out."""
    rows = [open_row(pairs, index, model.tokenizer) for index in indices]
    writer = f"{args.model} + {args.adapter}" if args.adapter else args.model
    for side, prompt in PROMPTS.items():
        lacking = [row for row in rows if isinstance(row, dict) and not row[side]]
        images = [row["pixels"] for row in lacking]
        # one token too many shows that the model had more to say
        limit = MAX_CAPTION_TOKENS[side] + 1
        texts = model.generate_batch(images, [prompt] * len(images), limit) if images else []
        for row, text in zip(lacking, texts):
            try:
                row[side] = [data.truncate_caption(text, side, model.tokenizer)]
                row["generated"][side] = {"model": writer, "prompt": prompt}
            except ValueError:
                continue  # no words, or a special token among them: the caption stays missing
    # paths are relative to their file, and OUT may lie in another folder
    lines = []
    below = os.path.relpath(pairs.path.parent, Path(args.out).parent)
    for row in rows:
        if isinstance(row, str):
            lines.append(json.dumps(" ".join(row.split())[:300]) + "\n")
        else:
            lines.append(row_line(os.path.normpath(os.path.join(below, row["image"])), row))
    return lines


def write_filled(part: Path, out: str) -> None:
    """Write OUT and, if rows were left out, OUT.bad_rows.txt from OUT.part, which is removed."""
    # a list holds the flags, an object a row, a text why one is left out
    with open(part, encoding="utf-8") as file:
        bad = [json.loads(line) + "\n" for line in file if line.startswith('"')]
    # OUT last: once it is there, all is
    if bad:
        write_whole(f"{out}.bad_rows.txt", functools.partial(write_lines, lines=bad))
    with open(part, encoding="utf-8") as file:
        lines = (line for line in file if line.startswith("{"))
        write_whole(out, functools.partial(write_lines, lines=lines))
    part.unlink()
    say(f"{out} is written, {len(bad):,} bad rows left out")


# ------------------------------------------------------------------------------ command line


@data.command
def main(argv: list[str] | None = None) -> Counter | None:
    parser = data.Parser(prog="python -m extras.captions")
    runs = {"convert": convert, "check": check, "fill": fill}
    commands = parser.add_subparsers(required=True, dest="command", metavar="|".join(runs))
    command = commands.add_parser("convert", help="public caption files -> one pairs file")
    source_help = "short: or long:, then FILE[@FOLDER OF ITS IMAGES] or a folder of images"
    command.add_argument("sources", nargs="+", metavar="SOURCE", help=source_help)
    command.add_argument("--out", required=True, help="the pairs file to write (required)")
    drop_help = "benchmarks' files, whose images are left out (default: none)"
    command.add_argument("--drop", nargs="+", default=[], metavar="FILE", help=drop_help)
    pairs = data.Parser(add_help=False)
    pairs.add_argument("pairs", metavar="PAIRS", help="the pairs file to read")
    pairs.add_argument("--images", metavar="FOLDER", help="of images (default: that of PAIRS)")
    command = commands.add_parser("check", help="count what a pairs file holds", parents=[pairs])
    command.add_argument("--model", default="tiny", help="whose tokens count (default: tiny)")
    command = commands.add_parser("fill", help="write the missing captions", parents=[pairs])
    command.add_argument("--out", required=True, help="the pairs file to write (required)")
    command.add_argument("--batch-size", type=int, default=16, help="rows at once (default: 16)")
    data.add_model_flags(command)
    args = parser.parse_args(argv)
    if args.command != "check" and (
        os.path.lexists(args.out) or not Path(args.out).parent.is_dir()
    ):
        raise ValueError(f"{args.out} is there already, or its folder is not: wanted a new file")
    return runs[args.command](args)


if __name__ == "__main__":
    main()
