"""A random LLaVA-shaped folder in the hub's layout, small enough that a test takes milliseconds."""

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from model import LVLM, parse_config, save_lvlm, to_ours
from vladva import Settings, VladVA

torch.set_num_threads(2)
TINY, RECORDED = data.TINY, Path(__file__).parent / "recorded"

CLIP_L_336 = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
              "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}  # fmt: skip
VICUNA_7B = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "torch_dtype": "float16", "vocab_size": 32064}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
HUB_CONFIGS = {  # what config.json of llava-hf/llava-1.5-{7b,13b}-hf says
    size: {"model_type": "llava", "ignore_index": -100, "image_token_index": 32000, "pad_token_id": 32001, "projector_hidden_act": "gelu",
           "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "torch_dtype": "float16", "tie_word_embeddings": False,
           "text_config": text, "vision_config": CLIP_L_336}
    for size, text in (("7b", VICUNA_7B), ("13b", VICUNA_13B))
}  # fmt: skip


def random_config(**text):
    """A config.json with grouped-query heads and untied embeddings, on the tiny model's vocabulary."""
    raw = json.loads((TINY / "config.json").read_text())
    raw["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    raw["text_config"] |= {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    } | text
    return raw | {"tie_word_embeddings": raw["text_config"]["tie_word_embeddings"]}


def make_folder(folder, raw, seed=0, std=0.2):
    """Write random float32 weights and the tiny model's tokenizer and preprocessor."""
    torch.manual_seed(seed)
    lvlm = LVLM(parse_config(raw))
    with torch.no_grad():
        for p in lvlm.parameters():
            p.normal_(std=std)
    save_lvlm(lvlm, folder, torch.float32)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def write_llama_tokenizer(folder):
    """The Llama tokenizer of recorded/, in the hub's form: entries that record_tokenizer.py left out are filled with unused ones."""
    raw = json.loads((RECORDED / "llama_tokenizer.json").read_text(encoding="utf-8"))
    ids = set(raw["model"]["vocab"].values())
    raw["model"]["vocab"] |= {f"<left out {i}>": i for i in range(32000) if i not in ids}
    (Path(folder) / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("random"), random_config())


def shaken(model):
    """The model with adapters attached and made to matter: lora_b is not zero, soft prompts are not the hand prompts."""
    torch.manual_seed(1)
    model.attach()
    with torch.no_grad():
        for name, p in model.trained():
            if "lora_b" in name or "soft" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def random_model(random_folder):
    """A fresh random VladVA with a shaken adapter."""
    return shaken(VladVA.from_pretrained(random_folder, settings=Settings(rank=4)))


@pytest.fixture(scope="session")
def scene_rows():
    """Eight training pairs; row 1 has no long caption, row 2 no short one."""
    rows = [data.scene_row(5, i) for i in range(8)]
    rows[1]["long"], rows[2]["short"] = None, None
    return rows


# ------------------------------------------------------------------------------------------------------ what record.py and its readers share


def drawn(name, shape):
    """Normal numbers that the name decides; numpy keeps this generator as it is for good."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32))


def drawn_weight(name, shape):
    """A weight of a random model; name in any layout."""
    values = drawn(to_ours(name), shape)
    return 1 + 0.2 * values if "norm" in name and name.endswith("weight") else values * (0.3 if len(shape) > 1 else 0.1)


def shapes_by_layer(named):
    """{name with * for the layer's number: [how many, shape]} of (name, tensor) pairs; layers must be alike."""
    shapes = {}
    for name, p in named:
        entry = shapes.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.*.", name), [0, list(p.shape)])
        assert entry[1] == list(p.shape), name
        entry[0] += 1
    return shapes


def lora_weight(layer, part, shape):
    """lora_a or lora_b of a decoder layer such as layers.0.mlp.up_proj."""
    return 0.2 * drawn(f"{layer}.{part}", shape)


def drawn_picture(size):
    """A picture (height, width, 3) of smooth noise. size: (width, height)."""
    width, height = size
    coarse = np.random.RandomState(width * 1000 + height).randint(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return np.kron(coarse, np.ones((4, 4, 1)))[:height, :width].astype(np.uint8)


def sequences(raw):
    """([ids of two rows of different lengths], pixels (2, 3, side, side)) for a config of record.py."""
    vision, image = raw["vision_config"], raw["image_token_index"]
    count = (vision["image_size"] // vision["patch_size"]) ** 2
    draw = np.random.RandomState(7)
    words = lambda n: [int(t) for t in draw.randint(6, raw["text_config"]["vocab_size"], n)]
    rows = [[1, *words(before), *[image] * count, *words(after)] for before, after in ((4, 9), (2, 3))]
    return rows, drawn("pixels", (2, 3, vision["image_size"], vision["image_size"]))
