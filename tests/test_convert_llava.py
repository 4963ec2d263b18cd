"""The original LLaVA's layout: a folder rewritten in it converts back to the same model."""

import json
import os
import re
import resource
import shutil

import pytest
import torch
from conftest import make_folder, random_config, write_llama_tokenizer
from safetensors.torch import load_file, save_file

from data import write_json
from extras import convert_llava
from model import load_lvlm
from vladva import VladVA, VladVAConfig

WORDS = 32000  # of the original's vocabulary
TOWER = "model.vision_tower.vision_tower."
CLIP = "openai/clip-vit-large-patch14-336"
ORIGINAL_NAMES = (  # the hub's -> the original's
    (r"^vision_tower\.", "model.vision_tower.vision_tower."),
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model."),
)


def original_tensors(folder) -> dict[str, torch.Tensor]:
    """{name in the original's layout: tensor} of a folder in the hub's."""
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        for pattern, name in ORIGINAL_NAMES:
            key = re.sub(pattern, name, key)
        tensors[key] = tensor[:WORDS].clone() if tensor.shape[0] > WORDS else tensor
    return tensors


def tower_tensors(tensors) -> dict[str, torch.Tensor]:
    """The vision tower of an original as a CLIP folder names it."""
    tower = {}
    for key, tensor in tensors.items():
        if key.startswith(TOWER):
            tower[key[len(TOWER) :]] = tensor
    return tower


def write_original(folder, tensors, files=2):
    """Tensors as pytorch_model-*.bin with their index."""
    weight_map = {key: f"pytorch_model-{i % files}.bin" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        part = {key: tensor for key, tensor in tensors.items() if weight_map[key] == name}
        torch.save(part, folder / name)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": weight_map})


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A random LLaVA in the hub's layout with Llama's vocabulary."""
    raw = random_config(vocab_size=32064) | {"image_token_index": WORDS}
    folder = make_folder(tmp_path_factory.mktemp("hub"), raw)
    write_llama_tokenizer(folder)
    return folder


@pytest.fixture
def original(hub_folder, tmp_path):
    """The same in the original's layout; beside it CLIP, whose tower is another than its own."""
    folder = tmp_path / "llava-v1.5"
    clip = tmp_path / CLIP.split("/")[1]
    folder.mkdir()
    clip.mkdir()
    raw = json.loads((hub_folder / "config.json").read_text())
    flat = raw["text_config"] | {
        "model_type": "llava",
        "vocab_size": WORDS,
        "mm_vision_tower": CLIP,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "tune_mm_mlp_adapter": False,
    }
    write_json(folder / "config.json", flat)
    write_json(clip / "config.json", {"model_type": "clip", "vision_config": raw["vision_config"]})
    shutil.copy(hub_folder / "preprocessor_config.json", clip)
    tokenizer = json.loads((hub_folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < WORDS]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    tensors = original_tensors(hub_folder)
    write_original(folder, tensors)
    tower = {key: torch.zeros_like(tensor) for key, tensor in tower_tensors(tensors).items()}
    torch.save(tower, clip / "pytorch_model.bin")
    return folder


def convert(source, out):
    convert_llava.main([str(source), str(out)])
    return out


def test_an_original_folder_converts_to_the_same_logits(original, hub_folder, tmp_path, capsys):
    out = convert(original, tmp_path / "out")
    assert "--image-mode pad" in capsys.readouterr().out
    before, after = load_lvlm(hub_folder), load_lvlm(out)
    ids = torch.tensor([[1, 700, 31999, 5]])
    pixels = torch.randn(1, 3, before.config.vision.image_size, before.config.vision.image_size)
    logits = [
        lvlm.lm_head(lvlm.decoder(lvlm.decoder.embed_tokens(ids))) for lvlm in (before, after)
    ]
    assert torch.equal(logits[0][..., :WORDS], logits[1][..., :WORDS])
    assert torch.equal(before.image_features(pixels), after.image_features(pixels))
    largest = logits[1][..., :WORDS].amax(-1, keepdim=True)
    assert (logits[1][..., WORDS:] < largest).all()  # an added row is never generated


def test_the_converted_folder_embeds_as_the_hub_folder_does(original, hub_folder, tmp_path):
    out = convert(original, tmp_path / "out")
    config = VladVAConfig(image_mode="pad")
    models = [VladVA.from_pretrained(folder, config=config) for folder in (hub_folder, out)]
    texts = ["a red bus", "2 dogs, and a cat."]
    assert torch.equal(models[0].encode_text(texts), models[1].encode_text(texts))
    assert models[1].tokenizer.inner.token_to_id("<image>") == WORDS
    assert models[1].image_sequence().input_ids == models[0].image_sequence().input_ids
    assert models[1].lvlm.config.decoder.vocab_size == 32064
    assert sorted(path.suffix for path in out.iterdir()) == [".json"] * 3 + [".safetensors"]
    for path in (out, *out.iterdir()):
        assert path.stat().st_mode & 0o444 == 0o444, f"others cannot read {path}"


@pytest.mark.parametrize("stored", ["bin", "safetensors"])
def test_the_tower_may_lie_in_the_clip_folder_only(original, hub_folder, tmp_path, stored):
    tensors = original_tensors(hub_folder)
    tower = tower_tensors(tensors)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(TOWER)}
    tower["text_model.final_layer_norm.weight"] = torch.zeros(3)  # the rest of CLIP is not needed
    tower["logit_scale"] = torch.zeros(())
    write_original(original, rest)
    clip = tmp_path / CLIP.split("/")[1]
    if stored == "bin":
        torch.save(tower, clip / "pytorch_model.bin")
    else:
        (clip / "pytorch_model.bin").unlink()
        save_file(tower, clip / "model.safetensors")
    before, after = load_lvlm(hub_folder), load_lvlm(convert(original, tmp_path / "out"))
    for name, p in before.vision.named_parameters():
        assert torch.equal(p, after.vision.get_parameter(name)), name


class Payload:
    def __reduce__(self):
        return (print, ("code from a pickle ran",))


def refuse(capsys, source, out) -> str:
    """The line on stderr with which a conversion ends; nothing may have been written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit) as ended:
        convert(source, out)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err.count("\n") == 1
    assert "code from a pickle ran" not in captured.out
    assert sorted(out.parent.iterdir()) == before
    return captured.err


def test_a_pickle_with_code_in_it_is_refused_in_one_line(original, tmp_path, capsys):
    torch.save({"model.norm.weight": Payload()}, original / "pytorch_model-0.bin")
    error = refuse(capsys, original, tmp_path / "out")
    assert "pytorch_model-0.bin" in error and "more than tensors" in error


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"vocab_size": 31000}, "ids of config.json"),
        ({"vocab_size": "32000"}, "holds no original LLaVA: TypeError"),
        ({"intermediate_size": 97}, "do not fit"),
        ({"mm_vision_tower": "nobody/clip-none"}, "clip-none/config.json is missing"),
        ({"mm_vision_tower": None}, "holds no original LLaVA: TypeError"),
    ],
)
def test_unsupported_settings_are_refused_by_name(original, tmp_path, capsys, setting, message):
    raw = json.loads((original / "config.json").read_text())
    write_json(original / "config.json", raw | setting)
    assert message in refuse(capsys, original, tmp_path / "out")


def test_files_of_another_kind_are_refused_in_one_line(original, hub_folder, tmp_path, capsys):
    """A list for tensors, integer weights, too few words, and JSON that is no tokenizer's."""
    assert "no original LLaVA: KeyError('mm_vision" in refuse(capsys, hub_folder, tmp_path / "out")
    tensors = original_tensors(hub_folder)
    norm = {"model.norm.weight": torch.ones(64, dtype=torch.int8)}
    words = {"lm_head.weight": tensors["lm_head.weight"][:-1].clone()}
    bad_shards = {
        "holds no original LLaVA: AttributeError": [torch.ones(3)],
        "model.norm.weight is torch.int8, wanted plain floats": norm,
        "lm_head.weight is [31999, 64], wanted [32064, 64]": words,
    }
    for message, shard in bad_shards.items():
        torch.save(shard, original / "pytorch_model-2.bin")  # read last
        assert message in refuse(capsys, original, tmp_path / "out")
    (original / "pytorch_model-2.bin").write_bytes(b"PK\x03\x04 and no more")
    assert "pytorch_model-2.bin is broken" in refuse(capsys, original, tmp_path / "out")
    # on a pipe reading would wait
    for name, message in (("pytorch_model-2.bin", "not a file"), ("tokenizer.json", "is missing")):
        content = (original / name).read_bytes()
        (original / name).unlink()
        os.mkfifo(original / name)
        err = refuse(capsys, original, tmp_path / "out")
        assert name in err and message in err
        (original / name).unlink()
        (original / name).write_bytes(content)
    for text in ("{", '{"model": {"type": "BPE"}}'):
        (original / "tokenizer.json").write_text(text)
        assert "tokenizer.json is no tokenizer (" in refuse(capsys, original, tmp_path / "out")
    (tmp_path / CLIP.split("/")[1] / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json is missing" in refuse(capsys, original, tmp_path / "out")


def test_a_missing_shard_and_a_full_target_are_refused(original, hub_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert(original, hub_folder)
    assert "exists already: choose another folder" in capsys.readouterr().err
    (original / "pytorch_model-1.bin").unlink()
    assert "is missing; " in refuse(capsys, original, tmp_path / "out")


def test_a_disk_that_is_full_leaves_no_half_of_a_model(original, tmp_path, capsys):
    """It ended in a traceback, because the error of safetensors is none of Python's own."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # bytes of a file
    try:
        assert "could not be written" in refuse(capsys, original, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert convert(original, tmp_path / "out").is_dir()
