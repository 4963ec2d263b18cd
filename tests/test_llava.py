"""LLaVA-1.5 exactly: recorded outputs of transformers and peft, key layouts, full-size shapes,
pixels, Llama's token ids, names and the hub's cache.

Not here: the original LLaVA's layout (test_convert_llava.py), merged folders (test_export.py).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    HUB_CONFIGS,
    RECORDED,
    make_folder,
    random_config,
    seeded_image,
    seeded_lora_weight,
    seeded_tensor,
    seeded_weight,
    sequences,
    shapes_by_layer,
    write_llama_tokenizer,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import vladva
from extras.export import hub_key
from lora import attach_lora, lora_disabled, lora_layers, merge_lora
from model import LVLM, generate, load_lvlm, parse_config, rename_key
from vladva import VladVA, VladVAConfig

CASES = ("multi_head", "grouped_query", "tied")


def recorded(name):
    """(tensors, what they were recorded of)."""
    with safe_open(RECORDED / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["about"])


def assert_close(ours, reference):
    """Within 1e-4 of the largest value: the project's bound for float32 sums in another order."""
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


# ------------------------------------------------------------------------------------- layouts

INTO_ONE_MODEL = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
LAYOUTS = {  # prefixes of the hub's names and what they are instead
    "hub": (),
    "transformers 4.52": (*INTO_ONE_MODEL, ("vision_tower.", "model.vision_tower.")),
    "transformers 5": (*INTO_ONE_MODEL, ("vision_tower.vision_model.", "model.vision_tower.")),
    "transformers 5, saved": (("vision_tower.vision_model.", "vision_tower."),),
}


def write_layout(folder, raw, layout):
    """A folder with the seeded weights of a config, their names in one of the layouts."""
    config = parse_config(raw)
    with torch.device("meta"):
        lvlm = LVLM(config)
    tensors = {}
    for name, p in lvlm.named_parameters():
        name = hub_key(name, config)
        tensor = seeded_weight(name, p.shape)
        for old, new in LAYOUTS[layout]:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        tensors[name] = tensor
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


@torch.no_grad()
def outputs(lvlm, raw):
    """What record.py records, from this project's functions; both in one right-padded batch."""
    input_ids, pixels = sequences(raw)
    lengths = torch.tensor([len(ids) for ids in input_ids])
    rows = [torch.tensor(ids) for ids in input_ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    features = lvlm.image_features(pixels)
    image_tokens = (padded == raw["image_token_index"]).nonzero(as_tuple=True)
    embeds = lvlm.decoder.embed_tokens(padded).index_put(image_tokens, features.flatten(0, 1))
    hidden_states = lvlm.decoder(embeds)
    answers = generate(lvlm, embeds, lengths, max_new_tokens=16)
    results = {"features": features}
    for n, length in enumerate(lengths):
        results[f"hidden.{n}"] = hidden_states[n, :length]
        results[f"logits.{n}"] = lvlm.lm_head(hidden_states[n, :length])
        results[f"greedy.{n}"] = torch.tensor(answers[n])
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_transformers_in_every_layout(case, layout, tmp_path):
    """Image features, hidden states, logits and 16 greedy tokens of two sequences in one batch."""
    reference, raw = recorded(case)
    lvlm = load_lvlm(write_layout(tmp_path, raw, layout))
    object.__setattr__(lvlm.config, "end_tokens", [-1])  # recorded without an end
    results = outputs(lvlm, raw)
    assert results.keys() == reference.keys()
    for name, value in reference.items():
        if name.startswith("greedy"):
            assert torch.equal(results[name], value)
        else:
            assert_close(results[name], value)


def test_lora_equals_peft_before_and_after_merging(tmp_path):
    reference, about = recorded("lora")
    decoder = load_lvlm(write_layout(tmp_path, about["config"], "hub")).decoder
    attach_lora(decoder, about["rank"], about["alpha"])
    embeds = seeded_tensor("embeds", (2, 11, about["config"]["text_config"]["hidden_size"]))
    with torch.no_grad():
        for name, layer in lora_layers(decoder).items():
            layer.lora_a.copy_(seeded_lora_weight(name, "lora_a", layer.lora_a.shape))
            layer.lora_b.copy_(seeded_lora_weight(name, "lora_b", layer.lora_b.shape))
        assert_close(decoder(embeds), reference["hidden"])
        with lora_disabled(decoder):
            assert (decoder(embeds) - reference["hidden"]).abs().max() > 0.1  # the adapter matters
        merge_lora(decoder)
        assert_close(decoder(embeds), reference["merged"])


@pytest.mark.parametrize("size, num_trained", [("7b", 39_976_960), ("13b", 62_586_880)])
def test_full_size_models_have_every_key_and_shape_of_transformers(size, num_trained):
    """On the meta device: nothing of the 14 or 27 GB is made."""
    config = parse_config(HUB_CONFIGS[size])
    with torch.device("meta"):
        lvlm = LVLM(config)
    expected = {}
    for name, value in json.loads((RECORDED / "shapes.json").read_text())[size].items():
        name = rename_key(name.replace("*", "7"), config.key_patterns)
        expected[name.replace(".7.", ".*.")] = value
    assert shapes_by_layer(lvlm.named_parameters()) == expected
    attach_lora(lvlm.decoder, rank=16, alpha=16)
    trained = sum(p.numel() for name, p in lvlm.named_parameters() if "lora_" in name)
    assert trained == num_trained


# -------------------------------------------------------------------------------------- images


def write_image_settings(folder, changes, name="preprocessor_config.json"):
    """The settings of llava-hf's processor for images of 28 x 28 pixels, with some changes."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 28},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.CLIP_MEAN),
        "image_std": list(data.CLIP_STD),
    }
    settings |= changes
    if name == "processor_config.json":  # as transformers 5 writes it
        settings = {"image_processor": settings, "processor_class": "LlavaProcessor"}
    (folder / name).write_text(json.dumps(settings))


def image_processor(folder, **config):
    """The processor of a folder for a tower of 28 x 28 pixels."""
    raw = random_config()
    raw["vision_config"] |= {"image_size": 28, "patch_size": 7}
    return data.ImageProcessor(folder, parse_config(raw), VladVAConfig(**config))


def test_pixels_equal_transformers_for_every_size_mode_and_step(tmp_path):
    """CLIPImageProcessor as llava-hf uses it, and the original's padding with the mean colour."""
    reference, steps = recorded("pixels")
    for name, value in reference.items():
        step, size, mode = name.split(".")
        write_image_settings(tmp_path, steps[step])
        processor = image_processor(tmp_path, image_mode=step)
        width, height = size.split("x")
        image = Image.fromarray(seeded_image((int(width), int(height)))).convert(mode)
        # a few float32 roundings of values around 2
        torch.testing.assert_close(processor(data.open_image(image)), value, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"size": 28, "crop_size": 28},
        {"rescale_factor": 0.00392156862745098},
    ],
)
def test_image_settings_are_read_from_either_file_of_the_hub(changes, tmp_path):
    """processor_config.json, which transformers 5 writes, counts if the older file is missing."""
    image = Image.fromarray(seeded_image((40, 28)))
    write_image_settings(tmp_path, {})
    wanted = image_processor(tmp_path)(image)
    (tmp_path / "preprocessor_config.json").unlink()
    mean = {"image_mean": [0.1, 0.2, 0.3]}
    write_image_settings(tmp_path, changes, "processor_config.json")
    assert torch.equal(image_processor(tmp_path)(image), wanted)
    write_image_settings(tmp_path, changes | mean)  # the older file wins
    assert not torch.equal(image_processor(tmp_path)(image), wanted)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": {"shortest_edge": 28, "longest_edge": 56}}, "size is .*longest_edge"),
        ({"size": {"shortest_edge": 33}}, "size is"),
        ({"size": {"height": 28, "width": 28}}, "size is"),
        ({"crop_size": {"height": 24, "width": 24}}, "crop_size is"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is"),
    ],
)
def test_image_settings_that_cannot_be_honoured_are_refused_by_name(changes, message, tmp_path):
    write_image_settings(tmp_path, changes)
    with pytest.raises(ValueError, match=f"preprocessor_config.json.*{message}"):
        image_processor(tmp_path)


def test_a_folder_without_image_settings_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="preprocessor_config.json is missing"):
        image_processor(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="/processor_config.json"):
        image_processor(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [({"image_mode": "squeeze"}, "'squeeze'"), ({"max_pixels": 5}, "no pixel budget")],
)
def test_image_modes_that_llava_does_not_have_are_refused(config, message, tmp_path):
    write_image_settings(tmp_path, {})
    with pytest.raises(ValueError, match=message):
        image_processor(tmp_path, **config)


# --------------------------------------------------------------------------- Llama's tokenizer


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A random model with Llama's vocabulary of 32,064 rows and its tokenizer, as llava-hf's."""
    small = {"hidden_size": 16, "intermediate_size": 24}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    raw = random_config(vocab_size=32064, **small, **heads) | {"image_token_index": 32000}
    folder = make_folder(tmp_path_factory.mktemp("llama"), raw)
    write_llama_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder):
    return VladVA.from_pretrained(llama_folder, config=VladVAConfig(lora_rank=2))


GOLDEN_TEXT = "USER: <image>\nDescribe the image in detail. ASSISTANT:"
GOLDEN_BEFORE = [1, 3148, 1001, 29901, 29871]
GOLDEN_AFTER = [29871, 13, 4002, 29581, 278, 1967, 297, 9493, 29889]
GOLDEN_AFTER += [319, 1799, 9047, 13566, 29901]


def test_golden_ids(llama):
    """One BOS; the space that Llama's normaliser puts before each piece between special tokens is
    kept, as tokenizer.json says."""
    assert llama.tokenizer.encode("Hello world").ids == [1, 15043, 3186]
    assert llama.tokenizer.encode(GOLDEN_TEXT).ids == [*GOLDEN_BEFORE, 32000, *GOLDEN_AFTER]


def test_the_spans_of_the_golden_ids_are_found_by_their_characters(llama):
    """The prompt is `Describe` to `.`, the summary token the last `:`, for images of any size."""
    prompt = "Describe the image in detail."
    prefix, prompt_char = data.fill_template(vladva.GENERATE_TEMPLATE, prompt)
    assert prefix == GOLDEN_TEXT
    encoding = llama.tokenizer.encode(prefix)
    assert data.find_spans(encoding.offsets, prefix, prompt, prompt_char) == (8, 7, 19)
    for rows, columns in ((1, 1), (2, 3), llama.lvlm.config.image_grid()):
        count = rows * columns
        answer = llama.sequence(vladva.GENERATE_TEMPLATE, prompt, grid=(rows, columns))
        assert answer.input_ids == [*GOLDEN_BEFORE, *[32000] * count, *GOLDEN_AFTER]
        assert (answer.prompt_start, answer.prompt_length) == (7 + count, 7)
        assert answer.summary_index == len(answer.input_ids) - 1


def test_the_parts_of_a_llama_sequence(llama):
    """The prompt's span, the ":" of ASSISTANT: as summary token, one </s> behind the caption."""

    def pieces(ids):
        return " ".join(llama.tokenizer.inner.id_to_token(token_id) for token_id in ids)

    image = llama.image_sequence("A red circle.")
    ids = image.input_ids
    prompt = ids[image.prompt_start :][: image.prompt_length]
    assert pieces(prompt) == "▁Sum mar ize ▁the ▁provided ▁image ▁in ▁one ▁word :"
    around_summary = ids[image.summary_index - 3 : image.summary_index + 3]
    assert pieces(around_summary) == "ASS IST ANT : ▁US ER"
    assert pieces(ids[image.caption_start :]) == "▁A ▁red ▁circle . </s>"
    rows, columns = llama.lvlm.config.image_grid()
    assert (ids.count(1), ids.count(2), ids.count(32000)) == (1, 1, rows * columns)
    text = llama.text_sequence("a red circle")
    last_of_prompt = text.prompt_start + text.prompt_length - 1
    rest = text.input_ids[last_of_prompt:]
    assert pieces(rest) == ": ▁a ▁red ▁circle <0x0A> ASS IST ANT :"


def test_the_end_of_a_long_caption_is_one_token_whatever_the_tokenizer_makes_of_its_text(
    llama_folder, tmp_path
):
    """Vicuna's tokenizer.json has "normalized": true on </s>, and reads it after a word as three
    pieces."""
    folder = shutil.copytree(llama_folder, tmp_path / "vicuna")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    for token in raw["added_tokens"][:3]:
        token["normalized"] = True
    path.write_text(json.dumps(raw))
    model = VladVA.from_pretrained(folder)
    assert model.tokenizer.encode("a red circle.</s>").ids[-1] != 2
    assert model.image_sequence("A red circle.").input_ids[-2:] == [29889, 2]


# -------------------------------------------------------------------- names, the cache, the hub


def hub_cache(home, repo, source):
    """A model folder put into a Hugging Face cache as the hub's own client lays it out."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    blobs = root / "blobs"
    snapshot = root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        blob = blobs / f"blob-of-{path.name}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abcd")


def command(home, *arguments, **environment):
    """Run a command line of this project in a process of its own with HF_HOME set."""
    env = {"HF_HOME": str(home), **environment}
    for name, value in os.environ.items():
        if not name.startswith(("HF_", "HUGGINGFACE")):
            env[name] = value
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=data.TINY.parents[1],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_name_runs_on_the_hubs_cache(random_folder, tmp_path):
    hub_cache(tmp_path / "home", "llava-hf/llava-1.5-7b-hf", random_folder)
    image = tmp_path / "image.png"
    Image.fromarray(seeded_image((40, 30))).save(image)
    arguments = ["vladva.py", str(image), "a red circle", "--model", "llava-1.5-7b"]
    done = command(tmp_path / "home", *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    model = VladVA.from_pretrained(random_folder)
    sim = vladva.similarity(model.encode_image([image]), model.encode_text(["a red circle"]))
    assert f"{sim.item():.3f}" in done.stdout


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_an_empty_cache_and_no_network_end_in_one_line(tmp_path, environment):
    start = time.time()
    arguments = ["vladva.py", "a.png", "a red circle", "--model", "llava-1.5-7b"]
    done = command(tmp_path, *arguments, **environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and time.time() - start < 15
    for part in ("llava-hf/llava-1.5-7b-hf", "--model FOLDER"):
        assert part in done.stderr
    assert str(tmp_path / "hub") in done.stdout + done.stderr  # where the cache is


def test_a_hub_id_is_asked_of_the_hubs_client_without_pickles(random_folder, monkeypatch, capsys):
    """The client is replaced; the real one fetches what the cache lacks."""
    calls = []

    def snapshot_download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return str(random_folder)

    monkeypatch.setattr(data, "snapshot_download", snapshot_download)
    assert data.model_folder("someone/some-llava") == random_folder
    assert calls == [("someone/some-llava", ["*.safetensors", "*.json"])]
    assert "someone/some-llava: what" in capsys.readouterr().out


def test_an_incomplete_cache_without_network_names_the_missing_file(random_folder, tmp_path):
    hub_cache(tmp_path / "home", "someone/some-llava", random_folder)
    for shard in (tmp_path / "home").rglob("*.safetensors"):
        shard.unlink()
    arguments = ["vladva.py", "a.png", "a red circle", "--model", "someone/some-llava"]
    done = command(tmp_path / "home", *arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model.safetensors not found" in done.stderr


@pytest.mark.parametrize("name", ["nowhere", "./no/such", "/no/such", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"no model.* '{name}': give tiny, .*a hub id"):
        data.model_folder(name)


# ------------------------------------------------------------------------------------ refusals


def test_a_pickle_is_not_read(random_folder, tmp_path):
    folder = shutil.copytree(random_folder, tmp_path / "pickled")
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.safetensors not found"):
        load_lvlm(folder)
    torch.save({"a": torch.ones(2)}, folder / "model.safetensors")  # a pickle under the right name
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        load_lvlm(folder)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.language_model.norm.weight", torch.ones(64), "model.language_model.norm.weight is"),
        (
            "multi_modal_projector.linear_1.bias",
            torch.zeros(64, dtype=torch.int8),
            "linear_1.bias is .*[iI](nt)?8",
        ),
    ],
)
def test_doubled_and_quantised_weights_are_refused(random_folder, tmp_path, name, tensor, message):
    folder = shutil.copytree(random_folder, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lvlm(folder)


def test_what_cannot_be_loaded_ends_in_one_line_before_any_training(random_folder, tmp_path):
    folder = shutil.copytree(random_folder, tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    out = tmp_path / "run"
    done = command(tmp_path, "train.py", "--model", str(folder), "--out", str(out))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cut/model.safetensors cannot be read" in done.stderr
    assert not out.exists()


def test_a_small_model_is_loaded_in_float32_on_a_cpu_unless_a_dtype_is_named(random_folder):
    assert load_lvlm(random_folder).dtype == torch.float32
    assert load_lvlm(random_folder, dtype=torch.bfloat16).dtype == torch.bfloat16
