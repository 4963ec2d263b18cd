"""Public caption files to training pairs: joined on the picture, looked at, completed.

    python -m extras.captions convert SOURCE ... --out pairs.jsonl               # public caption files, joined on the picture: docs/data.md
    python -m extras.captions check pairs.jsonl --model llava-1.5-7b             # what is in them
    python -m extras.captions fill pairs.jsonl --model llava-1.5-7b --out filled.jsonl      # have a model write the captions that are missing

Pairs files are data.py's. Where a caption was written by a model, a row says who wrote it:
"generated": {"long": {"model": "llava-1.5-7b", "prompt": "Describe ..."}}.
"""

import argparse
import array
import contextlib
import csv
import hashlib
import heapq
import itertools
import json
import os
import re
import shutil
import statistics
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import (
    LIMITS,
    PICTURES,
    BadRow,
    Tokenizer,
    add_model_flags,
    command,
    cut,
    format_table,
    line_at,
    line_index,
    lines_of,
    model_folder,
    open_image,
    parse_row,
    say,
    tower_folder,
    write_lines,
)
from extras.scenes import COLOURS
from model import ranks, read_config, read_json, wait_for_ranks
from vladva import load_model

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
            f"{path} not found: a pairs file is wanted, as python -m extras.captions convert writes it"
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


# ------------------------------------------------------------------------------------------------------ command line


def command_line():
    """The parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.captions",
        description="Pairs files: made of public captions, looked at, completed.",
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
    main()
