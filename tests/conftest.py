"""Random LLaVA-shaped and Qwen2-VL-shaped folders in the hub's layout, small enough that a test takes milliseconds."""

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import data
from extras import scenes
from model import LVLM, parse_config, save_lvlm, to_ours, write_json
from vladva import Settings, VladVA

torch.set_num_threads(2)
TINY, RECORDED = data.TINY, Path(__file__).parent / "recorded"

CLIP_L_336 = {"model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
              "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}  # fmt: skip
VICUNA_7B = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
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


QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
                "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                "<|video_pad|>"]  # fmt: skip
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_PROCESSOR = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
                  "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}  # fmt: skip


def qwen_ids(first):
    """What config.json says of the special tokens, which begin at id `first`."""
    ids = {
        "bos": 0,
        "eos": 2,
        "vision_start": 9,
        "vision_end": 10,
        "vision": 11,
        "image": 12,
        "video": 13,
    }
    return {f"{name}_token_id": first + place for name, place in ids.items()}


QWEN_2B = {  # what config.json of Qwen/Qwen2-VL-2B-Instruct says
    "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, **qwen_ids(151643), "hidden_act": "silu", "hidden_size": 1536,
    "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2_vl",
    "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536, "patch_size": 14,
                      "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936,
}  # fmt: skip


def qwen_config(first=600, **text):
    """A small config.json in the hub's flat form; special tokens begin at id `first`, image tokens have 12 pixels a side."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {
        "depth": 3,
        "embed_dim": 48,
        "mlp_ratio": 2,
        "num_heads": 3,
        "hidden_size": 64,
        "patch_size": 6,
    }
    small |= {
        "max_position_embeddings": 1024,
        "rope_theta": 5e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    small |= {"vocab_size": 620, "torch_dtype": "float32"}
    return (
        QWEN_2B
        | small
        | qwen_ids(first)
        | text
        | {"vision_config": QWEN_2B["vision_config"] | vision}
    )


def write_qwen_tokenizer(folder, first):
    """A byte-level BPE tokenizer.json in Qwen2's form, trained on some captions, its special tokens beginning at id `first`."""
    captions = [
        text
        for i in range(40)
        for text in (scenes.scene_row(3, i)["short"], scenes.scene_row(3, i)["long"])
    ]
    prompts = [
        Settings.image_prompt,
        Settings.text_prompt,
        Settings.detail_prompt,
        "system\nYou are a helpful assistant.",
        "user\n",
        "assistant\n",
    ]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer, inner.decoder = tokenizers.normalizers.NFC(), tokenizers.decoders.ByteLevel()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [split, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        captions + prompts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=letters, show_progress=False
        ),
    )
    raw = json.loads(inner.to_str())
    taken = set(raw["model"]["vocab"].values())
    raw["model"]["vocab"] |= {f"<left out {i}>": i for i in range(first) if i not in taken}
    shared = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    raw["added_tokens"] = [
        {"id": first + n, "content": token, **shared} for n, token in enumerate(QWEN_SPECIAL)
    ]
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(Path(folder) / "tokenizer_config.json", described)
    (Path(folder) / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")


def make_qwen_folder(folder, raw, seed=0, std=0.2, **processor):
    """Write random float32 weights, tokenizer and preprocessor; pictures have 4 to 12 image tokens unless told otherwise."""
    torch.manual_seed(seed)
    lvlm = LVLM(parse_config(raw))
    with torch.no_grad():
        for name, p in lvlm.named_parameters():
            p.normal_(std=std).add_(
                1.0 * (("norm" in name or "ln_q" in name) and name.endswith("weight"))
            )
    save_lvlm(lvlm, folder, torch.float32)
    write_qwen_tokenizer(folder, raw["bos_token_id"])
    side = lvlm.config.vision.token_side
    sizes = {
        "patch_size": lvlm.config.vision.patch_size,
        "min_pixels": 4 * side**2,
        "max_pixels": 12 * side**2,
    }
    write_json(Path(folder) / "preprocessor_config.json", QWEN_PROCESSOR | sizes | processor)
    return folder


def random_config(**text):
    """A config.json with grouped-query heads and untied embeddings, on the tiny model's vocabulary."""
    raw = json.loads((TINY / "config.json").read_text())
    raw["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
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
    rows = [scenes.scene_row(5, i) for i in range(8)]
    rows[1]["long"], rows[2]["short"] = None, None
    return rows


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return make_qwen_folder(tmp_path_factory.mktemp("qwen"), qwen_config())


@pytest.fixture
def qwen_model(qwen_folder):
    """A fresh random VladVA of Qwen2-VL's shape with a shaken adapter."""
    return shaken(VladVA.from_pretrained(qwen_folder, settings=Settings(rank=4)))


# ------------------------------------------------------------------------------------------------------ what record.py and its readers share


def drawn(name, shape):
    """Normal numbers that the name decides; numpy keeps this generator as it is for good."""
    return torch.from_numpy(
        np.random.RandomState(zlib.crc32(name.encode()))
        .standard_normal(tuple(shape))
        .astype(np.float32)
    )


def drawn_weight(name, shape):
    """A weight of a random model; name in any layout."""
    values = drawn(to_ours(name), shape)
    return (
        1 + 0.2 * values
        if ("norm" in name or "ln_q" in name) and name.endswith("weight")
        else values * (0.3 if len(shape) > 1 else 0.1)
    )


def shapes_by_layer(named):
    """{name with * for the layer's number: [how many, shape]} of (name, tensor) pairs; layers must be alike."""
    shapes = {}
    for name, p in named:
        entry = shapes.setdefault(
            re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.*.", name), [0, list(p.shape)]
        )
        assert entry[1] == list(p.shape), name
        entry[0] += 1
    return shapes


def lora_weight(layer, part, shape):
    """lora_a or lora_b of a decoder layer such as layers.0.mlp.up_proj."""
    return 0.2 * drawn(f"{layer}.{part}", shape)


def drawn_picture(size):
    """A picture (height, width, 3) of smooth noise. size: (width, height)."""
    width, height = size
    coarse = np.random.RandomState(width * 1000 + height).randint(
        0, 256, (height // 4 + 1, width // 4 + 1, 3)
    )
    return np.kron(coarse, np.ones((4, 4, 1)))[:height, :width].astype(np.uint8)


def sequences(raw):
    """([ids of two rows of different lengths], pixels (2, 3, side, side)) for a config of record.py."""
    vision, image = raw["vision_config"], raw["image_token_index"]
    count = (vision["image_size"] // vision["patch_size"]) ** 2
    draw = np.random.RandomState(7)
    words = lambda n: [int(t) for t in draw.randint(6, raw["text_config"]["vocab_size"], n)]
    rows = [
        [1, *words(before), *[image] * count, *words(after)] for before, after in ((4, 9), (2, 3))
    ]
    return rows, drawn("pixels", (2, 3, vision["image_size"], vision["image_size"]))


QWEN_PICTURES = ((45, 33), (45, 83))  # odd sizes: 3 x 4 and 4 x 2 image tokens


def qwen_rows(raw, grids):
    """[ids of a row per picture] of different lengths; grids: (rows, columns) of image tokens."""
    draw = np.random.RandomState(11)
    words = lambda n: [int(t) for t in draw.randint(0, raw["bos_token_id"], n)]
    opening, closing, image = (
        raw[f"{name}_token_id"] for name in ("vision_start", "vision_end", "image")
    )
    return [
        [*words(before), opening, *[image] * (r * c), closing, *words(after)]
        for (before, after), (r, c) in zip(((4, 9), (2, 3)), grids)
    ]
