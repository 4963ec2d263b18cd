"""A random LLaVA-shaped folder in the hub's layout, small enough that a test takes milliseconds."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import data
from model import LVLM, parse_config, save_lvlm
from vladva import Settings, VladVA

torch.set_num_threads(2)
TINY = Path(data.NAMES["tiny"])


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


def make_folder(folder, raw, seed=0):
    """Write random float32 weights and the tiny model's tokenizer and preprocessor."""
    torch.manual_seed(seed)
    lvlm = LVLM(parse_config(raw))
    with torch.no_grad():
        for p in lvlm.parameters():
            p.normal_(std=0.2)
    save_lvlm(lvlm, folder, torch.float32)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


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
