"""Random model folders in the hub's layout, small enough that a test takes milliseconds.

Not here: the recorded reference outputs (record.py writes them; test_llava.py and test_qwen2_vl.py
read them), the layers as naive loops (test_model.py).
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import data
from data import write_json
from extras import scenes
from extras.export import save_lvlm
from model import LVLM, LVLMConfig, parse_config, rename_key
from vladva import VladVA, VladVAConfig

torch.set_num_threads(1)  # small models: more would wait for one another on a busy machine
TINY = data.TINY
RECORDED = Path(__file__).parent / "recorded"


# A process that has asked for GPUs cannot hide them from its forks later.
def pytest_configure():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
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


def hub_config(text_config: dict) -> dict:
    """What config.json of llava-hf/llava-1.5-{7b,13b}-hf says."""
    return {
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "text_config": text_config,
        "vision_config": CLIP_L_336,
    }


HUB_CONFIGS = {"7b": hub_config(VICUNA_7B), "13b": hub_config(VICUNA_13B)}

# ----------------------------------------------------------------------------------- Qwen2-VL

QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}


def qwen_ids(first: int) -> dict[str, int]:
    """What config.json says of the special tokens, which begin at id `first`."""
    return {
        "bos_token_id": first,
        "eos_token_id": first + 2,
        "vision_start_token_id": first + 9,
        "vision_end_token_id": first + 10,
        "vision_token_id": first + 11,
        "image_token_id": first + 12,
        "video_token_id": first + 13,
    }


QWEN_2B = {  # what config.json of Qwen/Qwen2-VL-2B-Instruct says
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    **qwen_ids(151643),
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def qwen_config(first: int = 600, **text) -> dict:
    """A small config.json in the hub's flat form; an image token has 12 pixels a side.

    The special tokens begin at id `first`; `text` changes fields of the decoder.
    """
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_theta": 5e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vocab_size": 620,
        "torch_dtype": "float32",
    }
    vision = {
        "depth": 3,
        "embed_dim": 48,
        "mlp_ratio": 2,
        "num_heads": 3,
        "hidden_size": 64,
        "patch_size": 6,
    }
    raw = QWEN_2B | small | qwen_ids(first) | text
    return raw | {"vision_config": QWEN_2B["vision_config"] | vision}


def write_qwen_tokenizer(folder: Path, first: int) -> None:
    """A byte-level BPE tokenizer.json in Qwen2's form, trained on some captions.

    Its special tokens begin at id `first`; ids that training left out are filled with unused ones.
    """
    texts = []
    for i in range(40):
        row = scenes.scene_row(3, i)
        texts += [row["short"], row["long"]]
    texts += [VladVAConfig.image_prompt, VladVAConfig.text_prompt, VladVAConfig.detail_prompt]
    texts += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = tokenizers.normalizers.NFC()
    inner.decoder = tokenizers.decoders.ByteLevel()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=letters, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    raw = json.loads(inner.to_str())
    fill_vocabulary(raw, first)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    raw["added_tokens"] = []
    for token_id, token in enumerate(QWEN_SPECIAL, start=first):
        raw["added_tokens"].append({"id": token_id, "content": token, "special": True, **flags})
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(Path(folder) / "tokenizer_config.json", about)
    (Path(folder) / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")


def fill_vocabulary(raw: dict, size: int) -> None:
    """Give each id below `size` that a tokenizer.json lacks an unused entry."""
    vocabulary = raw["model"]["vocab"]
    ids = set(vocabulary.values())
    vocabulary |= {f"<left out {i}>": i for i in range(size) if i not in ids}


def make_qwen_folder(folder: Path, raw: dict, seed: int = 0, std: float = 0.2, **processor):
    """Write random float32 weights, tokenizer and preprocessor: 4 to 12 image tokens an image."""
    torch.manual_seed(seed)
    lvlm = LVLM(parse_config(raw))
    with torch.no_grad():
        for name, p in lvlm.named_parameters():
            p.normal_(std=std)
            if is_norm_weight(name):
                p.add_(1.0)
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


# ----------------------------------------------------------------------------------- LLaVA-1.5


def random_config(**text) -> dict:
    """A config.json with grouped-query heads, an untied head and the tiny model's vocabulary."""
    raw = json.loads((TINY / "config.json").read_text())
    raw["vision_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    raw["text_config"] |= small | text
    return raw | {"tie_word_embeddings": raw["text_config"]["tie_word_embeddings"]}


def make_folder(folder: Path, raw: dict, seed: int = 0, std: float = 0.2) -> Path:
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


def write_llama_tokenizer(folder: Path) -> None:
    """The Llama tokenizer of recorded/, with unused entries where record_tokenizer.py cut."""
    raw = json.loads((RECORDED / "llama_tokenizer.json").read_text(encoding="utf-8"))
    fill_vocabulary(raw, 32000)
    (Path(folder) / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")


# ------------------------------------------------------------------------------------ fixtures


def shaken(model: VladVA) -> VladVA:
    """The model with adapters that matter: lora_b is not zero, soft prompts are no hand prompts."""
    torch.manual_seed(1)
    model.attach()
    with torch.no_grad():
        for name, p in model.trained_parameters().items():
            if "lora_b" in name or "soft" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("random"), random_config())


@pytest.fixture
def random_model(random_folder):
    """A fresh random VladVA with a shaken adapter."""
    return shaken(VladVA.from_pretrained(random_folder, config=VladVAConfig(lora_rank=4)))


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    return make_qwen_folder(tmp_path_factory.mktemp("qwen"), qwen_config())


@pytest.fixture
def qwen_model(qwen_folder):
    """A fresh random VladVA of Qwen2-VL's shape with a shaken adapter."""
    return shaken(VladVA.from_pretrained(qwen_folder, config=VladVAConfig(lora_rank=4)))


@pytest.fixture(scope="session")
def scene_rows():
    """Eight training pairs; row 1 has no long caption, row 2 no short one."""
    rows = [scenes.scene_row(5, i) for i in range(8)]
    rows[1]["long"] = None
    rows[2]["short"] = None
    return rows


# ------------------------------------------------------- what the recording scripts and tests share

# name of a weight in any layout of the two architectures -> its name in LVLM
KEY_PATTERNS = (
    *LVLMConfig.key_patterns,
    (r"^(model\.)?visual\.merger\.", "projector."),
    (r"^(model\.)?visual\.", "vision."),
    (r"^model\.", "decoder."),
)


def seeded_tensor(name: str, shape) -> torch.Tensor:
    """Normal numbers that the name decides; numpy keeps this generator as it is for good."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(generator.standard_normal(tuple(shape)).astype(np.float32))


def seeded_weight(name: str, shape) -> torch.Tensor:
    """A weight of a random model; name in any layout."""
    # the recorded outputs are from when the head's name in LVLM was head
    values = seeded_tensor(rename_key(name, KEY_PATTERNS).removeprefix("lm_"), shape)
    if is_norm_weight(name):
        return 1 + 0.2 * values
    return values * (0.3 if len(shape) > 1 else 0.1)


def is_norm_weight(name: str) -> bool:
    return ("norm" in name or "ln_q" in name) and name.endswith("weight")


def seeded_lora_weight(layer: str, part: str, shape) -> torch.Tensor:
    """lora_a or lora_b of a decoder layer such as layers.0.mlp.up_proj."""
    return 0.2 * seeded_tensor(f"{layer}.{part}", shape)


def seeded_image(size: tuple[int, int]) -> np.ndarray:
    """An image (height, width, 3) of smooth noise. size: (width, height)."""
    width, height = size
    generator = np.random.RandomState(width * 1000 + height)
    coarse = generator.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    return np.kron(coarse, np.ones((4, 4, 1)))[:height, :width].astype(np.uint8)


def shapes_by_layer(named) -> dict[str, list]:
    """{name with * for the layer's number: [how many, shape]} of (name, tensor) pairs.

    The layers must be alike.
    """
    shapes = {}
    for name, p in named:
        pattern = re.sub(r"\.(layers|blocks)\.\d+\.", r".\1.*.", name)
        entry = shapes.setdefault(pattern, [0, list(p.shape)])
        assert entry[1] == list(p.shape), name
        entry[0] += 1
    return shapes


def sequences(raw: dict) -> tuple[list[list[int]], torch.Tensor]:
    """([ids of two sequences of different lengths], pixels (2, 3, side, side)) for record.py."""
    vision = raw["vision_config"]
    side = vision["image_size"]
    image_tokens = [raw["image_token_index"]] * (side // vision["patch_size"]) ** 2
    generator = np.random.RandomState(7)
    input_ids = []
    for num_before, num_after in ((4, 9), (2, 3)):
        before = generator.randint(6, raw["text_config"]["vocab_size"], num_before).tolist()
        after = generator.randint(6, raw["text_config"]["vocab_size"], num_after).tolist()
        input_ids.append([1, *before, *image_tokens, *after])
    return input_ids, seeded_tensor("pixels", (2, 3, side, side))


QWEN_IMAGE_SIZES = ((45, 33), (45, 83))  # (width, height), odd: 3 x 4 and 4 x 2 image tokens


def qwen_sequences(raw: dict, grids) -> list[list[int]]:
    """[ids of a sequence per image], of different lengths; grids: [(rows, columns)] of tokens."""
    generator = np.random.RandomState(11)
    input_ids = []
    for (num_before, num_after), (rows, columns) in zip(((4, 9), (2, 3)), grids):
        before = generator.randint(0, raw["bos_token_id"], num_before).tolist()
        after = generator.randint(0, raw["bos_token_id"], num_after).tolist()
        image_tokens = [raw["image_token_id"]] * (rows * columns)
        start, end = raw["vision_start_token_id"], raw["vision_end_token_id"]
        input_ids.append([*before, start, *image_tokens, end, *after])
    return input_ids


# ---------------------------------------------------------------------------------- processes


def torchrun(*arguments, **env):
    """A script in two processes, one thread each."""
    port = f"--master-port={random.randint(20000, 60000)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", port]
    root = Path(__file__).parent.parent
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'tests'}"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=root, env=os.environ | env, **options
    )


class Forked:
    """function(*arguments) in processes of its own, as many as ranks, as torchrun starts them.

    They are forks of this one: a new interpreter takes three seconds to import what is here.
    """

    def __init__(self, function, *arguments, ranks=1):
        self.printed = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]
        self.processes = []
        port = str(random.randint(20000, 60000))
        for rank in range(ranks):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            todo = (function, arguments, env if ranks > 1 else {})
            process = multiprocessing.get_context("fork").Process(target=self.run, args=todo)
            process.start()
            self.processes.append(process)
            os.setpgid(process.pid, self.processes[0].pid)  # one group: a signal reaches all

    # In the new process.
    def run(self, function, arguments, env):
        for fd, file in enumerate(self.printed, start=1):
            os.dup2(file.fileno(), fd)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        env = {"CUDA_VISIBLE_DEVICES": ""} | env
        os.environ.update({name: str(value) for name, value in env.items()})
        code = 0
        try:
            function(*arguments)
        except SystemExit as stopped:
            code = stopped.code
        sys.stdout.flush()
        os._exit(code)  # multiprocessing would wait for data processes, which ignore its signal

    def running(self):
        return self.processes[0].is_alive()

    def kill(self, number):
        os.killpg(self.processes[0].pid, number)

    def join(self):
        """Exit code of the first process, and what all printed on stdout and stderr."""
        for process in self.processes:
            process.join(timeout=100)
            if process.is_alive():
                self.kill(signal.SIGKILL)
        texts = []
        for file in self.printed:
            file.seek(0)
            texts.append(file.read())
        return self.processes[0].exitcode, *texts

    def finish(self):
        """What processes that all end well printed."""
        _, out, err = self.join()
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), err
        return out, err
