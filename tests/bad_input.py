"""Bad inputs of many kinds against all commands, and mutants of images. By hand.

    python tests/bad_input.py [--only KIND]  # some 600 cases, a fork for each: 2 minutes
    python tests/bad_input.py --images 20000  # mutants against open_image and ImageProcessor

A case is a folder of small valid inputs (build_world), one mutation, and a command line that reads
what was mutated. It passes when the command ends with exit code 2 and one line that names the file
or the flag, when the folder is as before, and when it took under 2 GB. Where one row of many is bad
it is to be left out, or reported: that is checked instead. A field or a flag gets some of the wrong
values of its kind; who comes next gets the next ones.

Accepted, and so not among the cases: a class name of spaces, as the template around it has words;
files of {} that say nothing wrong; the step in metrics.jsonl and the numbers in a result's scores,
which are printed as they are.
Not here: kills (kill.py), full disks (test_full_disk.py), what .npz files hold (test_eval.py), the
tensors of weights and checkpoints (test_model.py, test_train.py), the original LLaVA's files
(test_convert_llava.py).
"""

import argparse
import importlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
from conftest import make_qwen_folder, qwen_config
from PIL import Image
from safetensors.torch import save_file

import data
import eval as benchmarks
import train
import vladva
from extras import export
from model import LVLM, parse_config, read_json, read_tensors

SECONDS, MEMORY, MUTANT_MEMORY = 20, 2e9, 500e6  # that a case, or an image, may take
PAIRS = "--model model --data pairs.jsonl --batch-size 4 --holdout 4 --lora-rank 2"
COCO = "eval --task coco --folder coco --captions 1"
IMAGENET = "eval --task imagenet --folder imagenet --classes classes.json --templates all"
STUDY = "extras.studies prompts --data pairs.jsonl --items 12 --prompts prompts.json --out studied"
COMMANDS = {  # name: module, and arguments that are valid in the world
    "vladva": "vladva images/0.png text --model model",
    "adapter": "vladva images/0.png text --model model --adapter run",
    "qwen": "vladva images/0.png text --model qwen",
    "merged": "vladva images/0.png text --model merged",
    "train": f"train {PAIRS} --epochs 1 --out out",
    "resume": "train --out half --resume",
    "eval": f"{COCO} --model model --adapter run",
    "npz": f"{COCO} --embeddings coco.npz",
    "nocaps": "eval --task nocaps --folder nocaps --model model",
    "sugarcrepe": "eval --task sugarcrepe --folder sugarcrepe --model model",
    "sugarcrepe_pp": "eval --task sugarcrepe_pp --folder sugarcrepe --model model",
    "winoground": "eval --task winoground --folder winoground --model model",
    "imagenet": f"{IMAGENET} --model model",
    "paper": "eval --task paper result.json",
    "check": "extras.captions check pairs.jsonl --model model",
    "fill": "extras.captions fill pairs.jsonl --model model --out filled.jsonl",
    "llava": "extras.captions convert short:./llava.json --drop drop.json --out joined.jsonl",
    "coco": "extras.captions convert long:captions.json --drop drop.json --out joined.jsonl",
    "export": "extras.export --model model --adapter run --out exported",
    "original": "extras.convert_llava original hub",
    "studies": f"{STUDY} --model model",
    "tokens": "extras.studies tokens --model model --adapter run --items 4 --out studied",
    "ablation": f"extras.ablation {PAIRS} --steps 1 --seeds 1 --out rows",
    "e5v": f"extras.e5v {PAIRS} --steps 1 --text-data triples.csv --out rival",
    "scenes": "extras.scenes --model model --holdout 4 --json scenes.json",
    "plots": "extras.plots run",
    "search": "extras.search images text --model model --adapter run --sheet sheet.png",
    "plan": "extras.plan",
}
for line in COMMANDS.values():  # before any fork
    importlib.import_module(line.split()[0])
NAN, ABSENT = float("nan"), object()
WRONG = {  # for a value of that type in a JSON file
    int: (-1, 10**30, 1.5, "8", [8], {}, True, NAN),
    float: (-1, NAN, "x", [1], {}, True, None),
    bool: ("yes", None, [], {}, 5),
    str: (5, None, [], {}, "a </s> b", "\ud800", True),
    list: (5, "x", {}, None, [[]], "@nested"),
    dict: (5, "x", [], None, "@nested", "@digits"),
}
# file: commands that read it: its fields; a "+" ends one that may not be missing either
FILES = """
model/config.json: vladva train eval scenes fill export tokens e5v ablation: vision_config+
  vision_config.hidden_size vision_config.num_hidden_layers vision_config.num_attention_heads
  vision_config.patch_size vision_config.layer_norm_eps vision_config.model_type model_type+
  text_config+ text_config.vocab_size text_config.hidden_size text_config.num_key_value_heads
  text_config.rms_norm_eps text_config.hidden_act image_token_index+
qwen/config.json: qwen: hidden_size num_attention_heads vision_config.depth rope_scaling
  vision_config.spatial_merge_size rope_scaling.mrope_section vision_config image_token_id
model/preprocessor_config.json: vladva train eval scenes studies export tokens: resample size
  rescale_factor image_mean image_std do_center_crop
model/tokenizer.json: vladva train eval scenes export tokens e5v check: model+ model.vocab+
model/model.safetensors: vladva train eval scenes fill export tokens e5v:
merged/vladva.json: merged: config.lora_rank config.image_template config.soft_prompts
half/config.json: resume: steps+ lora_rank lr temperature model gradient_caching soft_prompts+
half/checkpoints/step-000001.safetensors: resume:
run/metrics.jsonl: plots: 0.contrastive+ 1.grad_norm
run/scores.json: export: before+ after.scores+
run/adapter.safetensors: adapter eval export tokens: config+ config.lora_rank config.text_template
  config.temperature config.next_token_weight config.lora config.image_mode config.image_prompt
coco.npz: npz:
coco/dataset_coco.json: eval npz: images+ images.0.sentences+ images.0.filename+
nocaps/nocaps_val_4500_captions.json: nocaps: images+ annotations+ annotations.0.caption+
sugarcrepe/swap_att.json: sugarcrepe sugarcrepe_pp: 0.caption+ 1.negative_caption+ 0.filename+
winoground/examples.jsonl: winoground: 1.caption_1+ 0.image_0+
classes.json: imagenet: classnames+ templates+ templates.0
result.json: paper: scores+ task+
llava.json: llava: 0.conversations+
captions.json: coco: images+ annotations+
drop.json: llava:
prompts.json: studies: 0.image+ 1.text
triples.csv: e5v:
images/0.png: vladva:
coco/images/1.png: eval:
winoground/images/1.png: winoground:
imagenet/val/n01/3.png: imagenet:
"""
FINE = ("{}", "absent", "/none", "link to itself")  # what some files may be as a whole
FINE_FILES = ("model/preprocessor_config.json", "merged/vladva.json", "run/scores.json")
FINE_FILES += ("half/checkpoints/step-000001.safetensors", "imagenet/val/n01/3.png")
LONG_NAMES = ("x" * 300, "x/" * 3000)
VALUES = {  # kind of a flag: values of which none is right
    "int": ("-1", "x", "1.5", "", "nan"),
    "positive": ("0", "-1", "x", "1.5", "", "nan"),
    "float": ("-1", "nan", "x", "", "1,5"),
    "input": ("none/at/all", *LONG_NAMES, "\udcff", "fifo", "loop", "images/0.png"),
    "folder": ("pairs.jsonl", "pairs.jsonl/x", *LONG_NAMES, "/proc/x", "loop", "fifo"),
    "output": ("none/x", "images", "pairs.jsonl/x", *LONG_NAMES, "/proc/x"),
    "choice": ("x", "", "5"),
}
FLAGS = """
train: input --data --model; folder --out; choice --device --loss --image-mode --dtype
train: positive --steps --micro-batch-size --save-every --eval-every --lora-rank --batch-size
train: int --seed --num-workers --holdout; float --epochs --lr --warmup-ratio
train: float --temperature --next-token-weight
ablation: positive --seeds --jobs; folder --out; input --data
e5v: input --text-data; folder --out
vladva: input --model --adapter; choice --dtype --device
eval: input --folder --model --adapter; output --json --save-embeddings; int --captions
eval: choice --task --templates --row
imagenet: input --classes
studies: input --prompts --data
tokens: positive --items; folder --out; input --adapter
fill: positive --batch-size; output --out; input --model
llava: output --out; input --drop
scenes: positive --holdout; output --json
export: folder --out; input --adapter
search: positive --top --dim; output --sheet
"""
# command: further arguments: what the line names | ...
LINES = """
train: --no-lora --no-soft-prompts: LoRA | --out run: run holds | --out leftover: leftover holds
train: --resume: out | --holdout 11: --holdout | --lora-rank 1000000000000: --lora-rank
train: --num-workers 1000000: --num-workers | --lr inf: lr is inf
resume: --lr 5: lr | --model half: model
npz: --embeddings fifo: fifo
ablation: --out leftover: leftover holds
export: --out model: model holds
fill: --out pairs.jsonl: pairs.jsonl is there
check: --nope: --nope
plots: --nope: --nope
plan: --nope: --nope
original: --nope: --nope
"""
TURNS = itertools.count()


def some(values, count: int) -> list:
    """A few of the values; who asks next gets the next ones."""
    start = next(TURNS) * count
    return [values[(start + i) % len(values)] for i in range(min(count, len(values)))]


# --------------------------------------------------------------------------- the valid inputs

TEXTS = ("a red circle", "a blue square", "two green rings", "a circle above a square")
LONG = "a red circle stands above a blue square and left of two green rings . " * 3


def write(path: Path | str, content) -> None:
    """Write bytes, a text, or JSON (a line each for .jsonl) into a new file."""
    path = Path(path)
    # never into a file that is a link, or shared with the world
    if path.is_symlink() or path.is_file():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        rows = content if path.suffix == ".jsonl" else [content]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        # what Python itself would refuse to write
        content = content.replace('"@digits"', "1" * 5000)
        content = content.replace('"@nested"', "[" * 100_000 + "]" * 100_000)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def build_world() -> None:
    """Small valid inputs of all commands, in the current folder."""
    noise = np.random.RandomState(0)
    folders = ("images", "coco/images", "nocaps/images", "sugarcrepe/images", "winoground/images")
    for folder in (*folders, "imagenet/val/n01", "imagenet/val/n02"):
        Path(folder).mkdir(parents=True)
        for i in range(12):
            image = Image.fromarray(noise.randint(0, 256, (24, 32, 3), dtype=np.uint8))
            image.save(f"{folder}/{i}.png")
    # what no file may name: outside of its folder, or a link that leads there
    for name in ("outside.png", "../outside.png"):
        shutil.copy("images/0.png", name)
    os.symlink("../../outside.png", "images/link.png")
    os.symlink("loop", "loop")
    rows = []
    for i in range(12):
        rows.append({"image": f"images/{i}.png", "short": TEXTS[i % 4], "long": LONG})
    write("pairs.jsonl", rows)
    shutil.copytree(data.TINY, "model")
    make_qwen_folder(Path("qwen"), qwen_config())
    build_benchmarks()
    # a run; the same, interrupted after its first step; what is left of it without config.json
    train.main(f"{PAIRS} --steps 2 --save-every 1 --out run".split())
    shutil.copytree("run", "half", ignore=shutil.ignore_patterns("*002*", "adapter*", "scores*"))
    shutil.copytree("half/checkpoints", "leftover/checkpoints")
    export.main("--model model --adapter run --out merged".split())


def build_benchmarks() -> None:
    """Files of benchmarks and of captions."""
    # three images with a caption each, in the forms of Karpathy's split and of nocaps
    test, images, captions = [], [], []
    for i, domain in enumerate(("in-domain", "near-domain", "out-domain")):
        name = {"file_name": f"{i}.png", "filename": f"{i}.png"}
        test.append(name | {"split": "test", "sentences": [{"raw": TEXTS[i]}]})
        images.append(name | {"id": i, "domain": domain})
        captions.append({"image_id": i, "caption": TEXTS[i]})
    pair = {"image_0": "0", "image_1": "1", "caption_0": TEXTS[0], "caption_1": TEXTS[1]}
    negative = {"filename": "0.png", "caption": TEXTS[0], "caption2": TEXTS[1]}
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red circle"}]
    write("coco/dataset_coco.json", {"images": test})
    for name in ("nocaps/nocaps_val_4500_captions.json", "captions.json"):
        write(name, {"images": images, "annotations": captions})
    for category in itertools.chain(*benchmarks.GROUPS.values()):
        write(f"sugarcrepe/{category}.json", [negative | {"negative_caption": TEXTS[2]}] * 2)
    write("winoground/examples.jsonl", [pair] * 2)
    write("classes.json", {"classnames": ["ring", "star"], "templates": ["a {}."]})
    write("result.json", {"task": "coco", "scores": {"text_to_image_R@1": 5.0}})
    write("llava.json", [{"image": "images/0.png", "conversations": turns}] * 2)
    write("drop.json", [{"filename": "7.png"}])
    write("triples.csv", "sent0,sent1,hard_neg\n" + "a ring,one ring,a star\n" * 8)
    write("prompts.json", [{"image": "One word:", "text": "One word:"}] * 2)
    emb = np.random.RandomState(0).randn(3, 8).astype(np.float32)
    np.savez("coco.npz", image_emb=emb, text_emb=emb)


# -------------------------------------------------------------------------------- the mutations


def change_field(path: Path, place: str, turn: int) -> None:
    """Set a field of a JSON file, or of the JSON in an adapter's metadata, to a wrong value."""
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        raw = json.loads(metadata["adapter"])
    elif path.suffix == ".jsonl":
        raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    else:
        raw = read_json(path, object)
    *parents, last = [int(key) if key.isdigit() else key for key in place.rstrip("+").split(".")]
    parent = raw
    for key in parents:
        parent = parent[key]
    # by the type of what is there; a turn more is no field at all
    values = WRONG[type(parent[last])]
    if place.endswith("+") and turn % (len(values) + 1) == len(values):
        del parent[last]
    else:
        parent[last] = values[turn % len(values)]
    write(path, raw)
    if path.suffix == ".safetensors":
        text = path.read_text().strip()
        path.unlink()
        save_file(tensors, path, {"adapter": text})


class Canary:
    """A pickle that makes a folder when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def put(path: Path, content: bytes | str) -> None:
    """Bytes in a file's place, or nothing, a folder, a FIFO, or a link to a name."""
    if isinstance(content, bytes):
        return write(path, content)
    if path.is_file() or path.is_symlink():
        path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "FIFO":
        os.mkfifo(path)
    elif content != "absent":
        os.symlink(content, path)


def file_contents(name: str) -> dict[str, bytes | str]:
    """{label: what `put` puts in the place of a file with such a name}."""
    # no file, or one that is none; then bytes that mean nothing, or would run code
    contents = {what: what for what in ("absent", "folder", "FIFO", "/none", "/dev/null")}
    contents |= {"link to itself": Path(name).name, "empty": b"", "zeros": bytes(5000)}
    contents |= {"pickle": pickle.dumps(Canary()), "noise": random.Random(0).randbytes(5000)}
    # JSON of another kind, too deep, too long, or no UTF-8
    texts = ("null", '"x"', "[1]", "NaN", "{}", "[" * 100_000, "1" * 5000, "[[]]", '{"a": "')
    for text in texts if ".json" in name else ():
        contents[text[:6]] = text.encode() + b"\xff" * text.endswith(' "')
    for row in ("a,b,</s>", "a,b", 'a,"b', "a,b, ") if name.endswith(".csv") else ():
        contents[row] = f"sent0,sent1,hard_neg\n{row}\nc,d,e\n".encode()
    contents |= image_contents() if name.endswith(".png") else {}
    if name.endswith(".safetensors"):
        # what a header may claim of bytes that are not there, or that are another tensor's
        huge = {"a": {"shape": [10**7, 10**7], "dtype": "F32", "data_offsets": [0, 4 * 10**14]}}
        twice = {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]}
        for label, raw in (("huge", huge), ("overlap", {"a": twice, "b": twice}), ("list", [])):
            text = json.dumps(raw).encode()
            contents[label] = struct.pack("<Q", len(text)) + text + bytes(8)
    return contents


def image_contents() -> dict[str, bytes]:
    # a name in .jpg or .png says nothing: Pillow goes by the first bytes
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    contents = {"EPS": eps, "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "GIF": b"GIF89a"}
    # too many pixels, or too long a side; then a header that alone says so
    for size in ((1, 200_000), (200_000, 1), (13_000, 13_000)):
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        contents[f"{size}"] = file.getvalue()
    for size in ((60_000, 60_000, 8), (400, 400, 8), (0, 0, 8), (2**31, 2**31, 8), (4, 4, 77)):
        header = b"IHDR" + struct.pack(">IIBBBBB", *size, 0, 0, 0, 0)
        header += struct.pack(">I", zlib.crc32(header))
        contents[f"header {size}"] = contents["(1, 200000)"][:12] + header + b"\0\0\0\0IEND"
    return contents


def bad_rows() -> Iterator[tuple[str, object]]:
    """(label, fields that differ in a row of pairs.jsonl, or bytes for the whole line)."""
    # images: of a wrong type, outside the folder, too long a name, no regular file
    names = (5, None, [], "", ".", "../outside.png", "none.png", ABSENT, "@digits", "a\0b.png")
    names += (str(ROOT / "docs" / "report.png"), "x" * 300, "x" * 5000, "\ud800.png", "images")
    for value in (*names, "fifo", "loop", "images/link.png", "pairs.jsonl"):
        yield f"image {label_of(value)}", {"image": value}
    # captions: of a wrong type, without words, with a token that the model would obey
    for side in ("short", "long"):
        for value in (5, "", " ", {}, True, "a </s> b", "<image>", "\ud800", "@digits", "@nested"):
            yield f"{side} {value!r}", {side: value}
    for value in ([5], ["a", None], [["a"]], [""]):
        yield f"short {value}", {"short": value}
    for value in (5, "x", "@nested", "@digits"):
        yield f"generated {value}", {"generated": value}
    yield "no caption", {"short": None, "long": None}
    yield "unknown key", {"caption": "a"}
    # the line as a whole
    for text in ("null", "5", "[]", "{}", "{", "NaN", "[" * 10**5, "1" * 5000, "\0" * 9):
        yield f"line {text[:12]!r}", text.encode()
    yield "line of no UTF-8", b"\xff\xfe\xff"
    yield "line of 100 MB", b'{"image": "images/0.png", "short": "' + b"a " * 50_000_000 + b'"}'


def change_rows(root: Path, change, numbers: range) -> None:
    """Spoil rows of pairs.jsonl."""
    lines = (root / "pairs.jsonl").read_bytes().splitlines()
    for number in numbers:
        if isinstance(change, dict):
            row = json.loads(lines[number]) | {"long": None} | change
            write(root / "row.json", {k: v for k, v in row.items() if v is not ABSENT})
            lines[number] = (root / "row.json").read_bytes().strip()
            (root / "row.json").unlink()
        else:
            lines[number] = change
    write(root / "pairs.jsonl", b"\n".join(lines) + b"\n")


# ------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Case:
    kind: str
    label: str
    command: str  # of COMMANDS
    names: tuple[str, ...]  # the line must hold one of them
    arguments: tuple[str, ...] = ()  # further ones
    mutate: Callable = lambda root: None  # of the world's folder
    expected: str = "refused"  # or "accepted"; "left out" and "reported": a row, with its name


def label_of(value) -> str:
    text = "absent" if value is ABSENT else repr(value)
    return text if len(text) < 60 else f"{text[:20]} ({len(text):,})"


def file_cases() -> Iterator[Case]:
    """Fields, whole files and tensors; the commands that read a file take turns."""
    for line in FILES.strip().replace("\n  ", " ").splitlines():
        name, commands, fields = (part.strip() for part in line.split(":"))
        readers = itertools.cycle(commands.split())
        names = (Path(name).name, name.split("/")[0])
        # of ImageNet the folder is named, which the class names go with
        names += ("imagenet",) if name == "classes.json" else ()

        def case(label, function, *args, name=name, readers=readers, names=names):
            field = label.split("+")[0].split(" ")[0].split(".")[-1]
            fields = (field, f"--{field}".replace("_", "-"))
            mutate = lambda root: function(root / name, *args)
            return Case(name, label, next(readers), names + fields, mutate=mutate)

        # a closure a case: what it changes is another copy of the world
        for field in fields.split():
            for turn in range(3 * next(TURNS), 3 * next(TURNS)):
                yield case(f"{field} wrong {turn}", change_field, field, turn)
        contents = file_contents(name)
        labels = [label for label in contents if name not in FINE_FILES or label not in FINE]
        for label in some(labels, 11 if name.endswith(".png") else 5):
            yield case(label, put, contents[label])
        if not name.endswith(".jsonl"):
            yield case("cut", lambda path: write(path, path.read_bytes()[:-200]))


def row_case(label: str, change) -> Case:
    """One row of pairs.jsonl is bad, or all of them; four commands take turns."""
    (command,) = some(("train", "check", "studies", "fill", "all"), 1)
    # captions are not read again where none is missing
    if command == "fill" and isinstance(change, dict) and "image" not in change:
        command = "check"
    if command == "all" and "100 MB" not in label:
        mutate = lambda root: change_rows(root, change, range(12))
        return Case("row", f"{label}, all rows", "train", ("pairs.jsonl",), mutate=mutate)
    command = "train" if command == "all" else command
    expected = "reported" if command == "check" else "left out"
    mutate = lambda root: change_rows(root, change, range(4, 5))
    return Case("row", label, command, ("pairs.jsonl:5",), mutate=mutate, expected=expected)


def flag_cases() -> Iterator[Case]:
    for line in FLAGS.strip().splitlines():
        command, kinds = line.split(": ")
        for part in kinds.split("; "):
            kind, *flags = part.split()
            kind_of_case = "output" if kind in ("output", "folder") else "flag"
            for flag in flags:
                for value in some(VALUES[kind], 3):
                    names = (flag, ascii(value[:99] or flag)[1:-1], flag[2:].replace("-", "_"))
                    label = f"{flag} {label_of(value)}"
                    yield Case(kind_of_case, label, command, names, (flag, value))
    for line in LINES.strip().splitlines():
        command, cases = line.split(": ", 1)
        for arguments, name in (case.split(": ") for case in cases.split(" | ")):
            yield Case("flag", arguments, command, (name,), tuple(arguments.split()))


def all_cases() -> list[Case]:
    cases = []
    for name in COMMANDS:
        if name not in ("plan", "original"):  # one writes into docs/, the other lacks its weights
            cases.append(Case("valid", "as it is", name, (), expected="accepted"))
    rows = [row_case(label, change) for label, change in bad_rows()]
    return [*cases, *file_cases(), *rows, *flag_cases()]


# -------------------------------------------------------------------------- running and judging


@dataclass(frozen=True)
class Ending:
    status: int  # the exit code, or less the number of the signal
    output: str
    errors: str
    changed: list[str]  # files that are new, gone, or other than before


def in_fork(folder: Path, function: Callable, *args, seconds: int = SECONDS) -> Ending:
    """What becomes of function(*args) in a process of its own, in a folder."""
    # beside the folder: in it they would be files that the command has left
    before = snapshot(folder)
    files = [Path(f"{folder}.{name}") for name in ("output", "errors")]
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_limited, args=(folder, files, function, args))
    process.start()
    process.join(seconds)
    process.kill()  # what has not ended by then
    process.join()
    after = snapshot(folder)
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return Ending(process.exitcode, *texts, changed)


def run_limited(folder: Path, files: list[Path], function: Callable, args) -> None:
    """In the forked process, whose output goes into two files."""
    # a request for far more memory fails at once, and does not fill the machine
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    torch.set_num_threads(1)
    os.chdir(folder)
    function(*args)


def snapshot(folder: Path) -> dict[str, tuple]:
    """{path: (mode, bytes, check sum of a small file)} of all that lies in a folder."""
    # large ones by their size: they are weights, which nothing writes in place
    stamps = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        small = path.is_file() and not path.is_symlink() and status.st_size < 100_000
        size = status.st_size if path.is_file() else 0
        stamps[str(path)] = (status.st_mode, size, zlib.crc32(path.read_bytes()) if small else 0)
    return stamps


def link_or_copy(source: str, target: str) -> None:
    # nothing opens weights to write: a mutation or a save puts another file in their place
    (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)


def run_case(case: Case, world: Path, folder: Path) -> Ending:
    """Run a case in `folder`, a copy of the world that it makes and removes."""
    shutil.copytree(world, folder, symlinks=True, copy_function=link_or_copy)
    os.mkfifo(folder / "fifo")
    case.mutate(folder)
    module, *arguments = COMMANDS[case.command].split()
    main = importlib.import_module(module).main
    ending = in_fork(folder, main, [*arguments, *case.arguments])
    shutil.rmtree(folder)
    return ending


ALLOCATION = re.compile("MemoryError|out of memory|not enough memory|allocate memory|to allocate")


def problem(case: Case, ending: Ending) -> str | None:
    """What is wrong with the way in which a case ended, or None."""
    notes, rest = [], []
    for line in ending.errors.splitlines():
        (notes if line.startswith("left out: ") else rest).append(line)
    last = f"exit {ending.status}, {len(rest)} lines: {rest[-1:]!s:.200}"
    # what killed the process, or took too long, too much memory, or ended in a traceback
    if ending.status not in (0, 2) or ALLOCATION.search(ending.errors):
        places = re.findall(rf'File "{ROOT}/(\S+\.py)", line (\d+), in (\w+)', ending.errors)
        return f"{last} {places[-1:]}"
    # a row that is left out or reported does not end the command
    if case.expected != "refused":
        text = {"accepted": "", "left out": "".join(notes), "reported": ending.output}
        silent = case.names and case.names[0] not in text[case.expected]
        return last if ending.status or rest or silent else None
    # all others end in one line, with nothing changed; a path for results is tried before the work
    if ending.status != 2 or len(rest) != 1 or not rest[0].startswith("error: "):
        return last
    if not any(name in rest[0] for name in case.names):
        return f"names none of {case.names}: {last}"
    if ending.changed or (case.kind == "output" and re.search("R@1|shown", ending.output)):
        return f"changed {ending.changed[:4]}, or only after the work: {last}"
    return None


def make_world(folder: Path) -> Path:
    """The folder of valid inputs below `folder`, made in a fork."""
    # once here, and not in each fork: what torch imports for the first model on "meta" (1.3 s)
    with torch.device("meta"):
        LVLM(parse_config(read_json(data.TINY / "config.json")))
    world = folder / "world"
    world.mkdir()
    ending = in_fork(world, build_world, seconds=300)
    assert ending.status == 0, ending.errors
    return world


def run_cases(cases: list[Case], folder: Path) -> int:
    """Run cases and print the failures; returns how many failed."""
    world = make_world(folder)
    failures = Counter()
    for case in cases:
        if wrong := problem(case, run_case(case, world, folder / "case")):
            failures[case.kind] += 1
            print(f"{case.kind} | {case.label} | {case.command} | {wrong}", flush=True)
    print(f"{len(cases) - failures.total()} of {len(cases)} passed; failures: {dict(failures)}")
    return failures.total()


# ------------------------------------------------------------------------------ mutants of images


def sample_images() -> list[bytes]:
    """Valid files of six formats, with and without EXIF."""
    rng = np.random.RandomState(0)
    pixels = np.kron(rng.randint(0, 256, (8, 10, 3)), np.ones((6, 6, 1))).astype(np.uint8)
    # what a damaged orientation did was one of the ways out
    exif = Image.Exif()
    exif[274] = 6  # the orientation
    exif.get_ifd(34665)[36867] = "2024:01:01 00:00:00"
    samples = []
    forms = "JPEG RGB, JPEG L, JPEG CMYK, PNG RGBA, PNG P, PNG L, PNG I;16, WEBP RGB, WEBP RGBA"
    for number, form in enumerate(f"{forms}, GIF P, TIFF RGB, TIFF L, AVIF RGB".split(", ")):
        form, mode = form.split()
        options = {"compression": ("tiff_lzw", "jpeg")[number % 2]}  # TIFF alone takes it
        image = Image.fromarray(pixels).convert("L" if mode == "I;16" else "RGB").convert(mode)
        file = io.BytesIO()
        image.save(file, form, exif=b"" if number % 2 else exif, **options)
        samples.append(file.getvalue())
    return samples


def mutant(samples: list[bytes], number: int) -> bytes:
    """A sample with one kind of damage; the same number gives the same."""
    rng = random.Random(number)
    content = bytearray(samples[number % len(samples)])
    size = len(content)
    exif = max(content.find(b"II*\0"), content.find(b"MM\0*"), 0)
    kind = rng.choice(("bytes", "header", "EXIF", "number", "cut", "splice"))
    # most in the header or in EXIF, where the readers branch
    if kind == "cut":
        del content[rng.randrange(size) :]
    elif kind == "splice":
        content[: rng.randrange(4, 200)] = rng.choice(samples)[: rng.randrange(4, 200)]
    elif kind == "number":
        place = rng.randrange(size - 4)
        value = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 10**5))
        content[place : place + 4] = struct.pack(rng.choice("<>") + "I", value)
    else:
        first, end = {"header": (0, 64), "EXIF": (exif, exif + 120)}.get(kind, (0, size))
        for _ in range(rng.choice((1, 2, 4, 16))):
            content[rng.randrange(first, min(end, size))] = rng.randrange(256)
    # half of the PNGs get right check sums, so that what is behind them is read
    place = 8 if content.startswith(b"\x89PNG") and rng.random() < 0.5 else len(content)
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(content)


def peak_memory() -> int:
    """Bytes at the highest since the last call, in this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def open_mutants(samples: list[bytes], numbers: range, processors: list) -> None:
    """Open mutants one by one; prints the number of each before, and "refused" behind it."""
    path = Path("mutant.jpg").absolute()
    for number in numbers:
        print(number, flush=True)
        write(path, mutant(samples, number))
        # twice: the first one ends what was before. What is resident counts: decoders ask for
        # address space that they never touch
        peak_memory()
        before = peak_memory()
        try:
            image = data.open_image(path)
            for processor in processors:
                assert processor(image).isfinite().all()
        except ValueError as error:
            assert str(path) in str(error), error
            print("refused")
        memory = peak_memory() - before
        assert memory < MUTANT_MEMORY, f"{memory / 1e6:.0f} MB"


def run_mutants(count: int, folder: Path) -> int:
    """Open mutants in forked processes; returns how many were neither opened nor refused."""
    (folder / "mutants").mkdir()
    samples = sample_images()
    config = parse_config(read_json(data.TINY / "config.json"))
    processors = []
    for mode in ("crop", "pad"):
        method = vladva.VladVAConfig(image_mode=mode)
        processors.append(data.ImageProcessor(data.TINY, config, method))
    # a process opens 500; after one that ends it, another goes on behind the mutant that did it
    start = refused = failures = 0
    while start < count:
        numbers = range(start, min(count, start + 500))
        arguments = (open_mutants, samples, numbers, processors)
        ending = in_fork(folder / "mutants", *arguments, seconds=300)
        lines = ending.output.split()
        refused += lines.count("refused")
        start = numbers.stop
        if ending.status:
            failures += 1
            start = 1 + int([line for line in lines if line != "refused"][-1])
            print(f"mutant {start - 1}: {ending.status}, {ending.errors.splitlines()[-1:]}")
    opened = count - refused - failures
    print(f"{count:,} mutants: {opened:,} opened, {refused:,} refused, {failures:,} failures")
    return failures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bad_input.py", description="Bad inputs, all commands.")
    parser.add_argument("--only", metavar="KIND", help="cases of a kind, or of a command")
    parser.add_argument("--images", type=int, metavar="N", help="mutants of images instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = all_cases()
    if args.only:
        cases = [case for case in cases if args.only in (case.kind, case.command)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        failures = run_mutants(args.images, folder) if args.images else run_cases(cases, folder)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
