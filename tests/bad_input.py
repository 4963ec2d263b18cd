"""Bad inputs of many kinds against all commands, and mutants of images. By hand.

    python tests/bad_input.py [--only KIND] [--limit N]  # some 2,500 cases, a fork for each
    python tests/bad_input.py --images 20000  # mutants against open_image and ImageProcessor

A case is a folder of small valid inputs (build_world), one mutation, and a command line that reads
what was mutated. It passes when the command ends with exit code 2 and one line that names the file
or the flag, when the folder is as before, and when it took under 2 GB. Where one row of many is bad
it is to be left out, or reported: that is checked instead.

Not here: kills (kill.py), full disks, two processes in one folder.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import eval as benchmarks
import train
import vladva
from extras import export
from model import LVLM, parse_config, read_json, rename_key

SECONDS, MEMORY, MUTANT_MEMORY = 20, 2e9, 500e6  # that a case, or an image, may take
PAIRS = "--model model --data pairs.jsonl --batch-size 4 --holdout 4 --lora-rank 2"
COCO = "eval --task coco --folder coco --captions 1"
IMAGENET = "eval --task imagenet --folder imagenet --classes classes.json --templates all"
STUDY = "extras.studies prompts --data pairs.jsonl --items 12 --prompts prompts.json --out studied"
COMMANDS = {  # name: module, and arguments that are valid in the world
    "vladva": "vladva images/0.png text --model model",
    "adapter": "vladva images/0.png text --model model --adapter run",
    "shards": "vladva images/0.png text --model shards",
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
NAN, INF, ABSENT = float("nan"), float("inf"), object()
POOLS = {  # values of which none is right for a field of that kind
    "size": (-1, 0, 10**6, 10**30, 1.5, "8", [8], {}, True, NAN),
    "count": (-1, 0, 1.5, "8", [8], {}, True, NAN),
    "id": (-1, 10**6, 1.5, "3", {}, True, [], [-1]),
    "layer": (100, -100, 1.5, "x", [-2], {}, True, None),
    "rate": (-1, NAN, INF, "x", [1], {}, True),
    "factor": (NAN, INF, "x", [1], {}, True),
    "switch": ("yes", 1, [], {}, [True]),
    "choice": ("other", 5, [], {}, [1]),
    "text": (5, [], {}, None, True),
    "template": (5, [], None, "", "no fields", "{prompt}{prompt}{caption}<image>"),
    "object": (5, "x", [], None, ABSENT, "@nested", "@digits"),
    "list": (5, "x", {}, None, ABSENT),
    "colour": ([], [1], "x", [NAN] * 3, 5, {}, ["a"] * 3, [[1, 2, 3]] * 3, [0, -1, INF]),
    "name": (5, None, [], {}, "", ".", "../outside.png", "none.png", ABSENT, "x" * 300, "@digits")
    + (str(ROOT / "docs" / "report.png"), "x" * 5000, "\ud800.png", "a\0b.png"),
    "caption": (5, None, [], {}, ABSENT, " ", "a </s> b", "<image>", "\ud800"),
    "number": ("x", None, [], {}, ABSENT, NAN, True),
    "shards": (5, "x", [], {}, None, ABSENT, {"a": 5}, {"a": ""}, {"a": "."}, {"a": ["x"]})
    + ({"a": str(data.TINY / "model.safetensors")}, {"a": "../model/model.safetensors"})
    + ({"a": "none.safetensors"}, {"a": "/dev/zero"}, {"a": "x" * 300}, {"a": None}),
}
# file: commands that read it; below it a pool, and the fields that get its values
FILES = """
model/config.json: vladva train eval scenes fill export tokens e5v ablation
  size vision_config.hidden_size vision_config.intermediate_size vision_config.num_hidden_layers
  size vision_config.num_attention_heads vision_config.image_size vision_config.patch_size
  size text_config.vocab_size text_config.hidden_size text_config.intermediate_size
  size text_config.num_hidden_layers text_config.num_attention_heads
  size text_config.num_key_value_heads
  count text_config.max_position_embeddings
  rate vision_config.layer_norm_eps text_config.rms_norm_eps text_config.rope_theta
  id image_token_index text_config.eos_token_id text_config.bos_token_id
  layer vision_feature_layer
  switch text_config.tie_word_embeddings
  choice model_type projector_hidden_act vision_feature_select_strategy vision_config.model_type
  choice text_config.hidden_act text_config.rope_scaling
  object vision_config text_config
qwen/config.json: qwen
  size hidden_size num_hidden_layers num_attention_heads vision_config.depth
  size vision_config.embed_dim vision_config.num_heads vision_config.mlp_ratio
  size vision_config.patch_size vision_config.spatial_merge_size
  id image_token_id eos_token_id
  rate rope_theta rms_norm_eps
  colour rope_scaling.mrope_section
  object vision_config
qwen/preprocessor_config.json: qwen
  count min_pixels max_pixels
model/preprocessor_config.json: vladva train eval scenes studies export tokens e5v
  choice size resample do_resize crop_size do_center_crop rescale_factor
  colour image_mean image_std
model/tokenizer.json: vladva train eval scenes export tokens e5v check
  object model model.vocab
  choice added_tokens post_processor pre_tokenizer
model/model.safetensors: vladva train eval scenes fill export tokens e5v
shards/model.safetensors.index.json: shards
  shards weight_map
shards/b.safetensors: shards
merged/vladva.json: merged
  object config
  count config.lora_rank
  template config.image_template
half/config.json: resume
  count steps batch_size micro_batch_size save_every lora_rank
  rate lr temperature next_token_weight
  switch gradient_caching soft_prompts lora learn_temperature
  text model data image_prompt
half/checkpoints/step-000001.safetensors: resume
run/metrics.jsonl: plots
  number 0.contrastive 0.lr 1.peak_bytes 1.grad_norm
  object 0
run/scores.json: export
  object before after.scores
run/adapter.safetensors: adapter eval export tokens
  object config
  size config.lora_rank
  template config.image_template config.text_template
  text config.image_prompt config.loss
  factor config.lora_alpha
  rate config.temperature config.next_token_weight
  switch config.lora config.soft_prompts config.learn_temperature
  choice config.image_mode config.unknown
  count config.min_pixels
pairs.jsonl: train studies
coco.npz: npz
coco/dataset_coco.json: eval npz
  list images images.0.sentences
  object images.0 images.0.sentences.0
  name images.0.filename
  caption images.0.sentences.0.raw
nocaps/nocaps_val_4500_captions.json: nocaps
  list images annotations
  name images.0.file_name
  caption annotations.0.caption
  choice images.0.domain annotations.0.image_id
sugarcrepe/swap_att.json: sugarcrepe sugarcrepe_pp
  object 0
  name 0.filename
  caption 0.caption 1.negative_caption
winoground/examples.jsonl: winoground
  object 0
  name 0.image_0
  caption 1.caption_1
classes.json: imagenet
  list classnames templates
  caption classnames.0 templates.0
result.json: paper
  object scores
  number task
llava.json: llava
  list 0.conversations
  object 0.conversations.1
captions.json: coco
  list images annotations
  choice annotations.0.image_id
drop.json: llava
  list 0
prompts.json: studies
  object 0
  caption 0.image 1.text
triples.csv: e5v
original/config.json: original
  size hidden_size num_hidden_layers vocab_size
  choice mm_projector_type
  layer mm_vision_select_layer
original/tokenizer.json: original
original/pytorch_model.bin: original
"""
FINE = {  # what a file may be as a whole
    "model/preprocessor_config.json": ("{}",),
    "merged/vladva.json": ("absent", "/none", "link to itself"),
    "run/scores.json": ("absent", "/none", "link to itself", "{}"),
    "half/checkpoints/step-000001.safetensors": ("absent",),
}
VALUES = {  # kind of a flag: values of which none is right
    "int": ("-1", "x", "1.5", "", "nan"),
    "positive": ("0", "-1", "x", "1.5", "", "nan"),
    "float": ("-1", "nan", "x", "", "1,5"),
    "input": ("none/at/all", "x" * 300, "x" * 5000, "\udcff", "fifo", "loop", "images/0.png"),
    "folder": ("pairs.jsonl", "pairs.jsonl/x", "x" * 300, "x/" * 3000, "/proc/x", "loop", "fifo"),
    "output": ("none/x", "images", "pairs.jsonl/x", "x" * 300, "/proc/x", "x/" * 3000),
    "device": ("x", "cuda", "cuda:99", "", "meta"),
    "choice": ("x", "", "5"),
    "switch": ("=x",),
}
FLAGS = """
train: input --data --model; folder --out; device --device; choice --loss --image-mode --dtype
train: positive --steps --micro-batch-size --save-every --eval-every --lora-rank --batch-size
train: int --seed --num-workers --holdout; float --epochs --lr
train: float --max-grad-norm --temperature --next-token-weight; switch --nope --resume --lora
ablation: positive --seeds --jobs; folder --out; input --data
e5v: input --text-data --data; folder --out
vladva: input --model --adapter; choice --dtype; device --device
eval: input --folder --model --adapter; output --json --save-embeddings; int --captions
eval: choice --task --templates --row --dtype; device --device
npz: input --embeddings
imagenet: input --classes --folder
studies: input --prompts --data; device --device
tokens: positive --items; folder --out; input --model --adapter
fill: positive --batch-size; output --out; input --model --adapter
llava: output --out; input --drop
scenes: positive --holdout; output --json; choice --task
export: folder --out; input --model --adapter
check: input --model; switch --nope --decode
plots: switch --nope
plan: switch --nope
search: positive --top --dim; output --sheet; input --model --adapter
"""
# command: further arguments: what the line names
LINES = """
train: --steps 1: --steps
train: --no-lora --no-soft-prompts: LoRA
train: --out run: run holds
train: --out half: half holds
train: --out leftover: leftover holds
train: --resume: out
train: --holdout 11: --holdout
train: --seed 111111111111111111111111111111: --seed
train: --lora-rank 1000000: --lora-rank
train: --lora-rank 1000000000000: --lora-rank
train: --num-workers 1000000: --num-workers
train: --lr inf: --lr
train: --epochs inf: --epochs
train: --epochs 1e300: --epochs
train: --temperature 2: --temperature
train: --next-token-weight inf: --next-token-weight
resume: --lr 5: lr
resume: --steps 9: steps
resume: --model shards: model
ablation: --out run: run holds
ablation: --out leftover: leftover holds
ablation: --holdout 0: --holdout
e5v: --out half: half holds
export: --out model: model holds
fill: --out pairs.jsonl: pairs.jsonl is there
llava: --out pairs.jsonl: pairs.jsonl is there
"""

# --------------------------------------------------------------------------- the valid inputs

TEXTS = ("a red circle", "a blue square", "two green rings", "a circle above a square")
LONG = "a red circle stands above a blue square and left of two green rings . " * 3


def write(path: Path | str, content) -> None:
    """Write bytes, a text, or JSON (a line each for .jsonl) into a new file."""
    path = Path(path)
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


def read(path: Path):
    """What `write` wrote."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return read_json(path, object)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a safetensors file, in memory, and its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return {key: tensor.clone() for key, tensor in load_file(path).items()}, metadata


def build_world() -> None:
    """Small valid inputs of all commands, in the current folder."""
    for folder in ("images", "coco/images", "nocaps/images", "sugarcrepe/images"):
        build_images(folder)
    for folder in ("winoground/images", "imagenet/val/n01", "imagenet/val/n02"):
        build_images(folder)
    shutil.copy("images/0.png", "outside.png")
    shutil.copy("images/0.png", "../outside.png")
    os.symlink("../../outside.png", "images/link.png")
    rows = []
    for i in range(12):
        rows.append({"image": f"images/{i}.png", "short": TEXTS[i % 4], "long": LONG})
    write("pairs.jsonl", rows)
    build_models()
    build_benchmarks()
    os.symlink("loop", "loop")
    # a run; the same, interrupted after its first step; what is left of it without config.json
    train.main(f"{PAIRS} --steps 2 --save-every 1 --out run".split())
    shutil.copytree("run", "half", ignore=shutil.ignore_patterns("*002*", "adapter*", "scores*"))
    shutil.copytree("half/checkpoints", "leftover/checkpoints")
    export.main("--model model --adapter run --out merged".split())


def build_images(folder: str) -> None:
    noise = np.random.RandomState(0)
    Path(folder).mkdir(parents=True)
    for i in range(12):
        image = Image.fromarray(noise.randint(0, 256, (24, 32, 3), dtype=np.uint8))
        image.save(f"{folder}/{i}.png")


def build_models() -> None:
    """The tiny model as it is, in two shards, and as the original LLaVA has it; a Qwen2-VL."""
    shutil.copytree(data.TINY, "model")
    make_qwen_folder(Path("qwen"), qwen_config())
    tensors, _ = load(data.TINY / "model.safetensors")
    shutil.copytree(data.TINY, "shards", ignore=shutil.ignore_patterns("*.safetensors"))
    weight_map = {}
    for index, key in enumerate(tensors):
        weight_map[key] = "a.safetensors" if index % 2 else "b.safetensors"
    for name in ("a.safetensors", "b.safetensors"):
        shard = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        save_file(shard, f"shards/{name}")
    write("shards/model.safetensors.index.json", {"weight_map": weight_map})
    # the original: a flat config.json, other names, no <image>, the tower in CLIP's folder
    raw = read(Path("model/config.json"))
    flat = raw["text_config"] | {"model_type": "llava", "mm_projector_type": "mlp2x_gelu"}
    flat |= {"mm_vision_tower": "clip", "mm_vision_select_layer": -2, "tie_word_embeddings": False}
    write("original/config.json", flat)
    write("clip/config.json", raw["vision_config"])
    shutil.copy("model/preprocessor_config.json", "clip")
    text = Path("model/tokenizer.json").read_text(encoding="utf-8")
    text = text.replace('"<image>"', '"<3>"').replace('"<pad>"', '"<4>"')
    write("original/tokenizer.json", text)
    names = (
        (r"^vision_tower\.", "clip."),
        (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
        (r"^language_model\.model", "model"),
    )
    # its head is not tied, so the table of embeddings is there twice
    tensors = {rename_key(key, names): tensor for key, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tower = {}
    for key in [key for key in tensors if key.startswith("clip.")]:
        tower[key.removeprefix("clip.")] = tensors.pop(key)
    save_file(tower, "clip/model.safetensors")
    torch.save(tensors, "original/pytorch_model.bin")


def build_benchmarks() -> None:
    """Files of benchmarks and of captions."""
    names = [f"{i}.png" for i in range(4)]
    test = []
    for name, text in zip(names, TEXTS):
        test.append({"split": "test", "filename": name, "sentences": [{"raw": text}]})
    nocaps = {"images": [], "annotations": []}
    for i, domain in enumerate(("in-domain", "near-domain", "out-domain")):
        nocaps["images"].append({"id": i, "file_name": names[i], "domain": domain})
        nocaps["annotations"].append({"image_id": i, "caption": TEXTS[i]})
    winoground = {"image_0": "0", "image_1": "1", "caption_0": TEXTS[0], "caption_1": TEXTS[1]}
    negative = {"filename": "0.png", "caption": TEXTS[0], "caption2": TEXTS[1]}
    negative |= {"negative_caption": TEXTS[2]}
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red circle"}]
    for name, content in {
        "coco/dataset_coco.json": {"images": test},
        "nocaps/nocaps_val_4500_captions.json": nocaps,
        "winoground/examples.jsonl": [winoground] * 2,
        "classes.json": {"classnames": ["ring", "star"], "templates": ["a {}."]},
        "result.json": {"task": "coco", "paper_row": None, "scores": {"text_to_image R@1": 5.0}},
        "llava.json": [{"image": "images/0.png", "conversations": turns}] * 2,
        "captions.json": nocaps,
        "drop.json": [{"filename": "7.png"}],
        "triples.csv": "sent0,sent1,hard_neg\n" + "a ring,one ring,a star\n" * 8,
        "prompts.json": [{"image": "One word:", "text": "One word:"}] * 2,
    }.items():
        write(name, content)
    for category in itertools.chain(*benchmarks.GROUPS.values()):
        write(f"sugarcrepe/{category}.json", [negative] * 2)
    emb = np.random.RandomState(0).randn(4, 8).astype(np.float32)
    np.savez("coco.npz", image_emb=emb, text_emb=emb, images=names, texts=TEXTS)


# -------------------------------------------------------------------------------- the mutations


def set_field(raw, place: str, value) -> None:
    *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in parents:
        raw = raw[key]
    if value is ABSENT:
        del raw[last]
    else:
        raw[last] = value


def change_field(path: Path, place: str, value) -> None:
    """Set a field of a JSON file, or of the JSON text in an adapter's metadata."""
    if path.suffix != ".safetensors":
        raw = read(path)
        set_field(raw, place, value)
        write(path, raw)
        return
    tensors, metadata = load(path)
    raw = json.loads(metadata["adapter"])
    set_field(raw, place, value)
    write(path, raw)
    metadata = {"adapter": path.read_text().strip()}
    path.unlink()
    save_file(tensors, path, metadata)


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
    contents = {what: what for what in ("absent", "folder", "FIFO", "/none", "/dev/null")}
    contents |= {"link to itself": Path(name).name, "empty": b"", "zeros": bytes(5000)}
    contents |= {"pickle": pickle.dumps(Canary()), "noise": random.Random(0).randbytes(5000)}
    if ".json" in name:
        for text in ("null", "5", '"x"', "[1]", "NaN", "{}", "[" * 100_000, "1" * 5000, "[[]]"):
            contents[text[:6]] = text.encode()
        contents["not UTF-8"] = b'{"a": "\xff\xfe"}'
    if name.endswith(".csv"):
        for rows in ("a,b,</s>", "a,b", "a,b," + "x" * 200_000, 'a,"b', "a,b, "):
            contents[rows[:9]] = f"sent0,sent1,hard_neg\n{rows}\nc,d,e\n".encode()
    if name.endswith(".safetensors"):
        # what a header may claim of bytes that are not there, or that are another tensor's
        huge = {"a": {"shape": [10**7, 10**7], "dtype": "F32", "data_offsets": [0, 4 * 10**14]}}
        twice = {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]}
        for label, raw in (("huge", huge), ("overlap", {"a": twice, "b": twice}), ("list", [])):
            text = json.dumps(raw).encode()
            contents[label] = struct.pack("<Q", len(text)) + text + bytes(8)
        contents |= {"long header": struct.pack("<Q", 2**63) + b"{}", "short": b"\2\0\0\0\0\0\0\0{"}
    return contents


TENSOR_CHANGES = {
    "absent": lambda tensor: None,
    "1 more dimension": lambda tensor: tensor[None].clone(),
    "twice as long": lambda tensor: torch.cat([tensor.reshape(-1)] * 2),
    "int64": lambda tensor: tensor.long(),
    "bool": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "NaN": lambda tensor: torch.full_like(tensor, NAN),
    "inf": lambda tensor: torch.full_like(tensor, INF),
}


def change_tensor(path: Path, ending: str, change: Callable) -> None:
    """Change one tensor of a safetensors file, whose name ends so."""
    tensors, metadata = load(path)
    key = [key for key in sorted(tensors) if key.endswith(ending)][-2]
    tensors |= {key: change(tensors[key])}
    if tensors[key] is None:
        del tensors[key]
    path.unlink()
    save_file(tensors, path, metadata)


def png(width: int, height: int, bits: int = 8) -> bytes:
    """A PNG whose header says so, and whose rows are missing."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(9)), b"IEND"):
        content += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return content


def image_contents() -> dict[str, bytes | str]:
    # a name in .jpg or .png says nothing: Pillow goes by the first bytes
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    contents = {"EPS": eps, "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "GIF": b"GIF89a"}
    contents |= {"bomb": png(60_000, 60_000), "no rows": png(400, 400), "2**31": png(2**31, 2**31)}
    contents |= {"0 x 0": png(0, 0), "77 bits": png(4, 4, 77), "BMP": b"BM" + b"\xff" * 60}
    contents |= {"JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF", "TIFF": b"II*\0\x08\0\0\0" + b"\xff" * 200}
    for size in ((1, 200_000), (200_000, 1), (13_000, 13_000)):
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        contents[f"{size}"] = file.getvalue()
    return contents | file_contents("image")


def bad_rows() -> Iterator[tuple[str, object]]:
    """(label, fields that differ in a row of pairs.jsonl, or bytes for the whole line)."""
    for value in (*POOLS["name"], "images", "fifo", "loop", "images/link.png"):
        yield f"image {label_of(value)}", {"image": value}
    # captions: of a wrong type, without words, with a token that the model would obey
    for side in ("short", "long"):
        for value in (5, "", " ", {}, True, "a </s> b", "<image>", "\ud800", "@digits", "@nested"):
            yield f"{side} {value!r}", {side: value}
    for value in ([5], ["a", None], [["a"]], [""], ["a", "\ud800"]):
        yield f"short {value}", {"short": value}
    for value in (5, "x", [1], "@nested", "@digits"):
        yield f"generated {value}", {"generated": value}
    yield "no caption", {"short": None, "long": None}
    yield "unknown key", {"caption": "a"}
    # the line as a whole
    for text in ("null", "5", "[]", '"x"', "{}", "{", "NaN", "[" * 10**5, "1" * 5000, "\0" * 9):
        yield f"line {text[:12]!r}", text.encode()
    yield "line of no UTF-8", b"\xff\xfe\xff"
    yield "line of 100 MB", b'{"image": "images/0.png", "short": "' + b"a " * 50_000_000 + b'"}'


def change_rows(root: Path, change, image: bytes | str, numbers: range) -> None:
    """Spoil rows of pairs.jsonl; images/new.png is as `put` says."""
    put(root / "images" / "new.png", image)
    lines = (root / "pairs.jsonl").read_bytes().splitlines()
    for number in numbers:
        lines[number] = change
        if isinstance(change, dict):
            row = json.loads((root / "pairs.jsonl").read_bytes().splitlines()[number])
            row |= {"long": None} | change
            write(root / "row.json", {k: v for k, v in row.items() if v is not ABSENT})
            lines[number] = (root / "row.json").read_bytes().strip()
            (root / "row.json").unlink()
    write(root / "pairs.jsonl", b"\n".join(lines) + b"\n")


def bad_members() -> Iterator[tuple[str, dict]]:
    """(label, {member of an .npz file: array, bytes as they stand in it, or None: absent})."""
    emb = np.ones((4, 8), dtype=np.float32)
    canary = np.array([[Canary()] * 8] * 4, dtype=object)
    values = {"absent": None, "1-d": emb[0], "3-d": emb[None], "0-d": emb[0, 0], "short": emb[:3]}
    values |= {"long": np.ones((5, 8)), "no width": emb[:, :0], "other width": emb[:, :7]}
    values |= {"NaN": emb * NAN, "inf": emb * INF, "complex": emb * 1j, "pickle": canary}
    values |= {"strings": emb.astype(str), "dates": emb.astype("M8[s]"), "empty": b""}
    values |= {"records": np.zeros(4, "f4,f4"), "noise": b"\x93NUMPY\x01\0noise"}
    # a header without the numbers that it announces
    for shape in ((10**9, 8), (10**14, 8), (-4, 8), (4, 8)):
        header = io.BytesIO()
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, about)
        values[f"no rows of {shape}"] = header.getvalue()
    for member, label in itertools.product(("image_emb", "text_emb"), values):
        yield f"{member} {label}", {member: values[label]}
    names = (["x"] * 4, ["x"], 5, np.ones(4), np.array([Canary()] * 4), b"noise")
    for member, value in itertools.product(("images", "texts"), names):
        yield f"{member} {value!r:.20}", {member: value}


def change_members(path: Path, changes: dict) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    path.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, value in arrays.items():
            content = io.BytesIO(value if isinstance(value, bytes) else b"")
            if not isinstance(value, bytes | None):
                np.save(content, value)
            if value is not None:
                file.writestr(f"{name}.npy", content.getvalue())


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
    """Fields, then whole files, then tensors; the commands that read a file take turns."""
    readers = {}

    def case(name, label, function, *args):
        field = args[0].split(".")[-1] if function is change_field else Path(name).name
        names = (Path(name).name, name.split("/")[0], field, f"--{field}".replace("_", "-"))
        if name == "pairs.jsonl":
            names += ("--holdout",)  # more than its rows
        mutate = lambda root: function(root / name, *args)
        return Case(name, label, next(readers[name]), names, mutate=mutate)

    for line in FILES.strip().splitlines():
        if ": " in line:
            name, commands = line.split(": ")
            readers[name] = itertools.cycle(commands.split())
            continue
        pool, *places = line.split()
        for place, value in itertools.product(places, POOLS[pool]):
            if value is ABSENT and place[-1].isdigit():
                continue  # of a list: a shorter list
            yield case(name, f"{place} {label_of(value)}", change_field, place, value)
    for name in readers:
        for label, content in file_contents(name).items():
            if label not in FINE.get(name, ""):
                yield case(name, label, put, content)
        if not name.endswith(".jsonl"):
            yield case(name, "cut", lambda path: write(path, path.read_bytes()[:-200]))
        endings = (".exp_avg", ".step", ".value") if "checkpoints" in name else ("",)
        if name.endswith(".safetensors"):
            for ending, label in itertools.product(endings, TENSOR_CHANGES):
                change = TENSOR_CHANGES[label]
                yield case(name, f"tensor{ending} {label}", change_tensor, ending, change)
    for label, changes in bad_members():
        yield case("coco.npz", label, change_members, changes)


def image_cases() -> Iterator[Case]:
    """Images on the command line, in benchmarks, and of rows of pairs."""
    images = {"vladva": "images/0.png", "eval": "coco/images/1.png"}
    images |= {"winoground": "winoground/images/1.png", "imagenet": "imagenet/val/n01/3.png"}
    commands = itertools.cycle(images)
    for label, content in image_contents().items():
        command = next(commands)
        name = images[command]
        mutate = lambda root, name=name, content=content: put(root / name, content)
        names = (Path(name).name, f"image {Path(name).stem}")
        yield Case("image", label, command, names, mutate=mutate)
        if isinstance(content, bytes):
            mutate = lambda root, content=content: put(root / "images" / "3.png", content)
            names = ("images/3.png",)
            yield Case("image", label, "search", names, mutate=mutate, expected="reported")
        yield from pair_cases("image in pairs", label, {"image": "images/new.png"}, content)


def pair_cases(kind: str, label: str, change, image: bytes | str = "absent") -> Iterator[Case]:
    """One row of pairs.jsonl is bad, for several commands; then all of them are."""
    # both read rows through Pairs; the length of the label is as good as a coin
    command = ("train", "studies")[len(label) % 2]
    expected = {command: "left out", "check": "reported"}
    # captions are not read again where none is missing
    if isinstance(change, bytes) or "image" in change:
        expected["fill"] = "left out"
    for name, what in expected.items():
        mutate = lambda root: change_rows(root, change, image, range(4, 5))
        yield Case(kind, label, name, ("pairs.jsonl:5",), mutate=mutate, expected=what)
    if "100 MB" not in label:
        mutate = lambda root: change_rows(root, change, image, range(12))
        yield Case(kind, f"{label}, all rows", command, ("pairs.jsonl",), mutate=mutate)


def flag_cases() -> Iterator[Case]:
    for line in FLAGS.strip().splitlines():
        command, kinds = line.split(": ")
        for part in kinds.split("; "):
            kind, *flags = part.split()
            for flag, value in itertools.product(flags, VALUES[kind]):
                arguments = (flag, value) if kind != "switch" else (flag + value,)
                names = (flag, ascii(value[:99] or flag)[1:-1], flag[2:].replace("-", "_"))
                kind_of_case = "output" if kind in ("output", "folder") else "flag"
                yield Case(kind_of_case, f"{flag} {label_of(value)}", command, names, arguments)
    for line in LINES.strip().splitlines():
        command, arguments, name = line.split(": ")
        yield Case("flag", arguments, command, (name,), tuple(arguments.split()))


def all_cases() -> list[Case]:
    cases = []
    for name in COMMANDS:
        if name != "plan":  # which writes into docs/
            cases.append(Case("valid", "as it is", name, (), expected="accepted"))
    cases += [*file_cases(), *image_cases()]
    for label, change in bad_rows():
        cases += pair_cases("row", label, change)
    return cases + list(flag_cases())


# -------------------------------------------------------------------------- running and judging


@dataclass(frozen=True)
class Ending:
    status: int  # the exit code, or less the number of the signal
    output: str
    errors: str
    seconds: float
    memory: int  # bytes, at the highest
    changed: list[str]  # files that are new, gone, or other than before


def in_fork(folder: Path, function: Callable, *args, seconds: int = SECONDS) -> Ending:
    """What becomes of function(*args) in a process of its own, in a folder."""
    before = snapshot(folder)
    start = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = os.fork()
        if process == 0:
            run_and_exit(folder, function, args, output, errors, seconds)
        _, status, usage = os.wait4(process, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)  # what it started
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    after = snapshot(folder)
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    seconds = time.monotonic() - start
    status = os.waitstatus_to_exitcode(status)
    return Ending(status, *texts, seconds, usage.ru_maxrss * 1024, changed)


def run_and_exit(folder: Path, function: Callable, args, output, errors, seconds: int) -> None:
    """The forked process: never returns."""
    code = 0
    try:
        os.setpgid(0, 0)
        signal.alarm(seconds)  # without a handler it ends the process
        # a request for far more memory fails at once, and does not fill the machine
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(2 * MEMORY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with open(os.devnull) as nothing:
            for number, file in enumerate((nothing, output, errors)):
                os.dup2(file.fileno(), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        torch.set_num_threads(1)
        os.chdir(folder)
        function(*args)
    finally:
        error = sys.exc_info()[1]
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            code = 1
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def snapshot(folder: Path) -> dict[str, tuple]:
    """{name: (mode, bytes, check sum of a small file)} of all that lies in a folder."""
    stamps = {}
    for here, folders, files in os.walk(folder):
        for path in (Path(here, name) for name in (*folders, *files)):
            status = path.lstat()
            stamp = (status.st_mode,)
            if path.is_file() and not path.is_symlink():
                small = status.st_size < 100_000
                stamp += (status.st_size, zlib.crc32(path.read_bytes()) if small else 0)
            stamps[str(path.relative_to(folder))] = stamp
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
    lines = ending.errors.splitlines()
    notes = [line for line in lines if line.startswith("left out: ")]
    rest = [line for line in lines if line not in notes]
    last = rest[-1][:200] if rest else ""
    # the worst first: what killed the process, then memory, then a traceback
    if ending.status < 0:
        return signal.Signals(-ending.status).name + f" after {ending.seconds:.0f} s"
    if ending.memory > MEMORY or ALLOCATION.search(ending.errors):
        return f"{ending.memory / 1e9:.1f} GB: {last}"
    if "Traceback" in ending.errors:
        places = re.findall(rf'File "{ROOT}/(\S+\.py)", line (\d+), in (\w+)', ending.errors)
        errors = [line for line in rest if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
        return f"traceback: {' '.join(places[-1])}: {errors[-1:]}"
    # a row that is left out or reported does not end the command
    if case.expected != "refused":
        text = {"accepted": "", "left out": "".join(notes), "reported": ending.output}
        if ending.status or rest:
            return f"exit {ending.status}, {len(rest)} lines: {last}"
        silent = case.names and case.names[0] not in text[case.expected]
        return f"{case.names[0]} is not {case.expected}" if silent else None
    # all others end in one line
    if ending.status != 2:
        return f"exit {ending.status}: {last}"
    if len(rest) != 1 or not last.startswith("error: "):
        return f"{len(rest)} lines: {last}"
    if not any(name in last for name in case.names):
        return f"names none of {case.names}: {last}"
    if ending.changed:
        return f"changed {ending.changed[:4]}: {last}"
    # a path for results is to be tried before they are computed
    if case.kind == "output" and re.search("R@1|shown", ending.output):
        return f"only after the work: {last}"
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
    """Run cases, print the failures and a table by kind; returns how many failed."""
    world = make_world(folder)
    counts, passed, broken = Counter(), Counter(), set()
    for case in cases:
        if case.command in broken:
            continue
        ending = run_case(case, world, folder / "case")
        wrong = problem(case, ending)
        counts[case.kind] += 1
        passed[case.kind] += wrong is None
        if wrong:
            print(f"{case.kind} | {case.label} | {case.command} | {wrong}", flush=True)
            # what does not take its valid input is not tried with others
            if case.kind == "valid":
                broken.add(case.command)
    rows = [[kind, str(counts[kind]), str(passed[kind])] for kind in counts]
    rows.append(["all", str(counts.total()), str(passed.total())])
    print(data.format_table(["kind", "cases", "passed"], rows))
    return counts.total() - passed.total()


# ------------------------------------------------------------------------------ mutants of images


def sample_images() -> list[bytes]:
    """Valid files of six formats, with and without EXIF."""
    rng = np.random.RandomState(0)
    pixels = np.kron(rng.randint(0, 256, (8, 10, 3)), np.ones((6, 6, 1))).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # the orientation
    exif[270] = "a caption"
    exif.get_ifd(34665)[36867] = "2024:01:01 00:00:00"
    forms = {"JPEG": "RGB L CMYK", "PNG": "RGBA P L I;16", "WEBP": "RGB RGBA", "GIF": "P"}
    forms |= {"TIFF": "RGB L", "AVIF": "RGB"}
    samples = []
    for form, modes in forms.items():
        image = Image.fromarray(pixels)
        for number, mode in enumerate(modes.split()):
            image = image.convert(mode)
            options = {"compression": ("tiff_lzw", "jpeg")[number % 2]}  # TIFF alone takes it
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
    samples = sample_images()
    config = parse_config(read_json(data.TINY / "config.json"))
    processors = []
    for mode in ("crop", "pad"):
        method = vladva.VladVAConfig(image_mode=mode)
        processors.append(data.ImageProcessor(data.TINY, config, method))
    # a process opens 500; after one that ends it, another goes on behind the mutant that did it
    start = refused = failures = 0
    noise = []  # what C libraries wrote to the terminal by themselves
    while start < count:
        numbers = range(start, min(count, start + 500))
        ending = in_fork(folder, open_mutants, samples, numbers, processors, seconds=300)
        lines = ending.output.split()
        refused += lines.count("refused")
        start = numbers.stop
        if ending.status:
            failures += 1
            start = 1 + int([line for line in lines if line != "refused"][-1])
            print(f"mutant {start - 1}: {ending.status}, {ending.errors.splitlines()[-1:]}")
        elif ending.errors:
            noise += ending.errors.splitlines()
    opened = count - refused - failures
    print(f"{len(noise):,} lines on stderr beside them; the first: {noise[:2]}")
    print(f"{count:,} mutants: {opened:,} opened, {refused:,} refused, {failures:,} failures")
    return failures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bad_input.py", description="Bad inputs, all commands.")
    parser.add_argument("--only", metavar="KIND", help="cases of a kind, or of a command")
    parser.add_argument("--limit", type=int, help="so many of the cases, at random (default: all)")
    parser.add_argument("--images", type=int, metavar="N", help="mutants of images instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = all_cases()
    if args.only:
        cases = [case for case in cases if args.only in (case.kind, case.command)]
    if args.limit:
        cases = random.Random(0).sample(cases, min(args.limit, len(cases)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        failures = run_mutants(args.images, folder) if args.images else run_cases(cases, folder)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
