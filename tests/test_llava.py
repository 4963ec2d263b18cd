"""LLaVA-1.5 exactly: recorded outputs of transformers and peft, key layouts, full-size shapes, Llama's token ids, names and the cache."""

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
    drawn,
    drawn_picture,
    drawn_weight,
    lora_weight,
    make_folder,
    random_config,
    sequences,
    shapes_by_layer,
    write_llama_tokenizer,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import lora
import model as lvlm_module
import vladva
from model import LVLM, generate, load_lvlm, parse_config, place, to_hub, to_ours
from vladva import Settings, VladVA

CASES = ("multi_head", "grouped_query", "tied")


def recorded(name):
    """(tensors, what they were recorded of)."""
    with safe_open(RECORDED / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(
            file.metadata()["about"]
        )


def close(ours, reference):
    """Within 1e-4 of the largest value, the project's bound for float32 in another order of summation."""
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


# ------------------------------------------------------------------------------------------------------ layouts


def original_config(raw):
    """The flat config.json that the original LLaVA writes for the same model."""
    top = {
        "mm_vision_tower": "openai/clip-tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    }
    return {
        **raw["text_config"],
        **top,
        "model_type": "llava_llama",
        "mm_vision_select_layer": raw["vision_feature_layer"],
    }


RENAMINGS = {
    "hub": (),
    "transformers 4.52": (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
                          ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector.")),
    "transformers 5": (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
                       ("vision_tower.vision_model.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector.")),
    "transformers 5, saved": (("vision_tower.vision_model.", "vision_tower."),),
    "original": (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model."),
                 ("multi_modal_projector.linear_1.", "model.mm_projector.0."), ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
                 ("vision_tower.", "model.vision_tower.vision_tower.")),
}  # fmt: skip
RENAMINGS["original, CLIP beside"] = (
    *RENAMINGS["original"],
    ("model.vision_tower.vision_tower.", ""),
)


def renamed(name, layout):
    """A name of the hub's layout in another."""
    for old, new in RENAMINGS[layout]:
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return name


def write_layout(folder, raw, layout):
    """The drawn weights of a config in one of the layouts; returns (folder, tower folder or None)."""
    with torch.device("meta"):
        shapes = {to_hub(name): p.shape for name, p in LVLM(parse_config(raw)).named_parameters()}
    tensors = {}
    for hub_name, shape in shapes.items():
        name = renamed(hub_name, layout)
        tensors[name] = drawn_weight(hub_name, shape)
    folder = folder / "llava"
    folder.mkdir()
    if not layout.startswith("original"):
        (folder / "config.json").write_text(json.dumps(raw))
        save_file(tensors, folder / "model.safetensors")
        return folder, None
    (folder / "config.json").write_text(json.dumps(original_config(raw)))
    tower = folder.parent / "clip-tower"
    tower.mkdir()
    (tower / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": raw["vision_config"], "text_config": {}})
    )
    apart = {name: t for name, t in tensors.items() if name.startswith("vision_model.")}
    if apart:
        rest = {
            "text_model.final_layer_norm.weight": torch.ones(3),
            "logit_scale": torch.ones(()),
            "visual_projection.weight": torch.ones(2, 2),
        }
        save_file(
            {**apart, **rest, "vision_model.embeddings.position_ids": torch.zeros(1, 5)},
            tower / "model.safetensors",
        )
    save_file(
        {name: t for name, t in tensors.items() if name not in apart}, folder / "model.safetensors"
    )
    return folder, data.tower_folder(folder)


@torch.no_grad()
def outputs(lvlm, raw):
    """What record.py records, from this project's functions; both rows in one right-padded batch."""
    ids, pixels = sequences(raw)
    found = {"features": lvlm.image_features(pixels)}
    slots = torch.tensor([row.index(raw["image_token_index"]) for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    embeds = place(lvlm.embed(padded), found["features"], slots)
    hidden = lvlm.decoder(embeds)
    greedy = generate(lvlm, embeds, lengths, eos_id=-1, max_new_tokens=16)
    for n, length in enumerate(lengths):
        found |= {
            f"hidden.{n}": hidden[n, :length],
            f"logits.{n}": lvlm.head(hidden[n, :length]),
            f"greedy.{n}": torch.tensor(greedy[n]),
        }
    return found


@pytest.mark.parametrize("layout", RENAMINGS)
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_transformers_in_every_layout(case, layout, tmp_path):
    """Image features, hidden states, logits and 16 greedy tokens, for sequences of different lengths in one batch."""
    reference, raw = recorded(case)
    folder, tower = write_layout(tmp_path, raw, layout)
    found = outputs(load_lvlm(folder, tower=tower), raw)
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        assert (
            torch.equal(found[name], value)
            if name.startswith("greedy")
            else close(found[name], value) is None
        )


def test_lora_equals_peft_before_and_after_merging(tmp_path):
    reference, about = recorded("lora")
    folder, _ = write_layout(tmp_path, about["config"], "hub")
    decoder = load_lvlm(folder).decoder
    lora.attach(decoder, about["rank"], about["alpha"])
    embeds = drawn("embeds", (2, 11, about["config"]["text_config"]["hidden_size"]))
    with torch.no_grad():
        for name, layer in lora.lora_layers(decoder):
            for part in ("lora_a", "lora_b"):
                getattr(layer, part).copy_(lora_weight(name, part, getattr(layer, part).shape))
        close(decoder(embeds), reference["hidden"])
        with lora.disabled(decoder):
            assert (decoder(embeds) - reference["hidden"]).abs().max() > 0.1  # the adapter matters
        lora.merge(decoder)
        close(decoder(embeds), reference["merged"])


@pytest.mark.parametrize("size", ("7b", "13b"))
def test_full_size_models_have_every_key_and_shape_of_transformers(size):
    """On the meta device: nothing of the 14 or 27 GB is made."""
    with torch.device("meta"):
        lvlm = LVLM(parse_config(HUB_CONFIGS[size]))
    theirs = json.loads((RECORDED / "shapes.json").read_text())[size]
    expected = {
        to_ours(name.replace("*", "7")).replace(".7.", ".*."): value
        for name, value in theirs.items()
    }
    assert shapes_by_layer(lvlm.named_parameters()) == expected
    lora.attach(lvlm.decoder, rank=16, alpha=16)
    trained = sum(p.numel() for name, p in lvlm.named_parameters() if "lora_" in name)
    assert trained == {"7b": 39_976_960, "13b": 62_586_880}[size]


# ------------------------------------------------------------------------------------------------------ pictures


def test_pixels_equal_transformers_for_every_size_mode_and_step(tmp_path):
    """CLIPImageProcessor as llava-hf uses it, and the original's padding to a square with the mean colour."""
    reference, steps = recorded("pixels")
    raw = random_config()
    raw["vision_config"] |= {"image_size": 28, "patch_size": 7}
    for name, value in reference.items():
        step, size, mode = name.split(".")
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(steps[step]))
        processor = data.ImageProcessor(
            tmp_path, parse_config(raw), "pad" if step == "pad" else "crop"
        )
        picture = Image.fromarray(drawn_picture(tuple(map(int, size.split("x"))))).convert(mode)
        torch.testing.assert_close(processor(data.open_image(picture)), value, atol=2e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------ Llama's tokenizer


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A random model with Llama's vocabulary of 32,064 rows and its tokenizer, as llava-hf has them."""
    raw = random_config(
        vocab_size=32064,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    folder = make_folder(tmp_path_factory.mktemp("llama"), raw | {"image_token_index": 32000})
    write_llama_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder):
    return VladVA.from_pretrained(llama_folder, settings=Settings(rank=2))


def test_golden_ids(llama):
    """One BOS; the blank that Llama's normaliser puts before each piece between special tokens is kept, as tokenizer.json says."""
    assert llama.tokenizer.encode("Hello world").ids == [1, 15043, 3186]
    answer = llama.sequence(vladva.GENERATE_TEMPLATE, "Describe the image in detail.")
    count = llama.lvlm.config.num_image_tokens
    asked = [13, 4002, 29581, 278, 1967, 297, 9493, 29889, 319, 1799, 9047, 13566, 29901]
    assert answer.ids == [1, 3148, 1001, 29901, 29871, *[32000] * count, 29871, *asked]
    assert answer.summary == len(answer.ids) - 1 and vladva.GENERATE_TEMPLATE.endswith("ASSISTANT:")


def test_the_parts_of_a_llama_sequence(llama):
    """The prompt's span by offsets, the ":" of ASSISTANT: as summary token, one </s> after the long caption."""
    words = lambda ids: [llama.tokenizer.inner.id_to_token(t) for t in ids]
    image = llama.image_sequence("A red circle.")
    span = slice(image.prompt_slot, image.prompt_slot + image.prompt_length)
    assert words(image.ids[span]) == [
        "▁Sum",
        "mar",
        "ize",
        "▁the",
        "▁provided",
        "▁image",
        "▁in",
        "▁one",
        "▁word",
        ":",
    ]
    assert words(image.ids[image.summary - 3 : image.summary + 3]) == [
        "ASS",
        "IST",
        "ANT",
        ":",
        "▁US",
        "ER",
    ]
    assert words(image.ids[image.loss_start :]) == ["▁A", "▁red", "▁circle", ".", "</s>"]
    assert (
        image.ids.count(1) == 1
        and image.ids.count(2) == 1
        and image.ids.count(32000) == llama.lvlm.config.num_image_tokens
    )
    text = llama.text_sequence("a red circle")
    assert words(text.ids[text.prompt_slot + text.prompt_length - 1 :]) == [
        ":",
        "▁a",
        "▁red",
        "▁circle",
        "<0x0A>",
        "ASS",
        "IST",
        "ANT",
        ":",
    ]


def test_the_end_of_a_long_caption_is_one_token_whatever_the_tokenizer_makes_of_its_text(
    llama_folder, tmp_path
):
    """Vicuna's tokenizer.json has "normalized": true on </s>, and then reads it after a word as three pieces."""
    shutil.copytree(llama_folder, tmp_path / "vicuna")
    path = tmp_path / "vicuna" / "tokenizer.json"
    raw = json.loads(path.read_text())
    for token in raw["added_tokens"][:3]:
        token["normalized"] = True
    path.write_text(json.dumps(raw))
    model = VladVA.from_pretrained(tmp_path / "vicuna")
    assert model.tokenizer.encode("a red circle.</s>").ids[-1] != 2
    assert model.image_sequence("A red circle.").ids[-2:] == [29889, 2]


@pytest.mark.parametrize("parts", [{}, {"soft_prompts": False}, {"lora": False}])
def test_a_merged_llama_folder_embeds_as_the_adapter_does(llama_folder, tmp_path, parts):
    """Read back as a plain model, with the written prompt strings tokenised by the written tokenizer."""
    torch.manual_seed(0)
    model = VladVA.from_pretrained(llama_folder, settings=Settings(rank=2, **parts))
    model.attach()
    with torch.no_grad():
        for _, p in model.trained():
            p.add_(0.1 * torch.randn_like(p))
    model.save_merged(tmp_path / "merged", shard_bytes=1_000_000)
    merged, prompts = (
        load_lvlm(tmp_path / "merged"),
        json.loads((tmp_path / "merged" / "vladva.json").read_text()),
    )
    assert merged.config.decoder.vocab_size == 32064  # the unused rows are enough
    tokenizer = data.Tokenizer(tmp_path / "merged", merged.config)
    picture, caption = Image.fromarray(drawn_picture((50, 40))), "a red circle above a blue square"
    image_ids = tokenizer.encode(prompts["image"]).ids
    slot = image_ids.index(32000)
    image_ids[slot:slot] = [32000] * (merged.config.num_image_tokens - 1)
    with torch.no_grad():
        features = merged.image_features(model.image_processor(picture)[None])
        hidden = merged.decoder(
            place(merged.embed(torch.tensor([image_ids])), features, torch.tensor([slot]))
        )
        close(vladva.summary_embedding(hidden[:, -1]), model.encode_image([picture]))
        text_ids = torch.tensor(
            [tokenizer.encode(prompts["text"].replace("{caption}", caption)).ids]
        )
        close(
            vladva.summary_embedding(merged.decoder(merged.embed(text_ids))[:, -1]),
            model.encode_text([caption]),
        )
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and all((tmp_path / "merged" / name).exists() for name in files)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in merged.parameters())


def test_a_merged_folder_is_not_written_over_a_model(llama_folder):
    model = VladVA.from_pretrained(llama_folder, settings=Settings(rank=2))
    model.attach()
    with pytest.raises(ValueError, match="holds a model already"):
        model.save_merged(llama_folder)


def test_the_original_layout_embeds_without_an_image_token_of_its_own(tmp_path):
    """Its table has 32,000 rows and its tokenizer no <image>: the token is added, and never looked up."""
    raw = random_config(
        vocab_size=32000,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
    ) | {"image_token_index": 32000}
    hub = make_folder(
        tmp_path / "hub", raw | {"text_config": raw["text_config"] | {"vocab_size": 32064}}
    )
    write_llama_tokenizer(hub)
    weights = load_file(hub / "model.safetensors")
    original = tmp_path / "original"
    original.mkdir()
    cut = {
        renamed(name, "original"): tensor[:32000].clone() if len(tensor) == 32064 else tensor
        for name, tensor in weights.items()
    }
    save_file(cut, original / "model.safetensors")
    (original / "config.json").write_text(json.dumps(original_config(raw)))
    tokenizer = json.loads((hub / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
    (original / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError,
        match="names the vision tower 'openai/clip-tower', which is not here.*as clip-tower",
    ):
        VladVA.from_pretrained(original)
    tower = tmp_path / "clip-tower"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps(raw["vision_config"]))
    shutil.copy(hub / "preprocessor_config.json", tower)
    picture = Image.fromarray(drawn_picture((50, 40)))
    models = [VladVA.from_pretrained(folder) for folder in (hub, original)]
    assert (
        models[1].image_sequence().ids != models[0].image_sequence().ids
    )  # the placeholder is another
    assert torch.equal(*(model.encode_image([picture]) for model in models))
    assert models[0].generate(picture, "where?", 8) == models[1].generate(picture, "where?", 8)
    models[1].attach()
    models[1].save_merged(tmp_path / "merged")
    assert torch.equal(
        load_lvlm(tmp_path / "merged").head.weight[:32000], models[0].lvlm.head.weight[:32000]
    )


# ------------------------------------------------------------------------------------------------------ sampling


def test_top_p_keeps_the_likeliest_tokens_and_the_temperature_scales_logits():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    logits, generator = p.log().expand(20000, -1), torch.Generator().manual_seed(0)
    share = lambda **kind: (
        torch.bincount(
            lvlm_module.next_token(logits, lvlm_module.Sampling(**kind), generator), minlength=4
        )
        / 20000
    )
    near = dict(atol=0.015, rtol=0)  # four standard deviations of 20,000 draws
    torch.testing.assert_close(share(temperature=1.0), p[0], **near)
    torch.testing.assert_close(share(temperature=0.5), p[0].square() / p.square().sum(), **near)
    torch.testing.assert_close(
        share(temperature=1.0, top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), **near
    )
    assert share(temperature=1.0, top_p=1e-6).tolist() == share().tolist() == [1, 0, 0, 0]
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_p=1.5)):
        with pytest.raises(ValueError, match="wanted"):
            lvlm_module.Sampling(**bad)


def test_the_same_seed_samples_the_same_text_and_adapters_off_is_the_original(
    random_folder, random_model
):
    """To the token: with a shaken adapter switched off, greedy and sampled text are those of the model without one."""
    untouched, picture = (
        VladVA.from_pretrained(random_folder),
        Image.new("RGB", (96, 96), (200, 30, 30)),
    )
    told = lambda model, **kind: model.generate(picture, "where?", 24, **kind)
    hot = dict(temperature=1.5, top_p=0.95)
    assert (
        told(untouched, **hot, seed=1)
        == told(untouched, **hot, seed=1)
        != told(untouched, **hot, seed=2)
    )
    assert told(random_model, **hot, seed=3) != told(untouched, **hot, seed=3)
    with random_model.adapter_disabled():
        assert told(random_model) == told(untouched) and told(random_model, **hot, seed=3) == told(
            untouched, **hot, seed=3
        )


# ------------------------------------------------------------------------------------------------------ names, the cache, the hub


def hub_cache(home, repo, source):
    """A model folder put into a Hugging Face cache as the hub's own client lays it out."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    for path in sorted(source.iterdir()):
        blob = root / "blobs" / f"blob-of-{path.name}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = root / "snapshots" / "0123abcd" / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../../blobs") / blob.name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abcd")
    return root


def command(home, *arguments, **environment):
    """Run a command line of this project in a process of its own with HF_HOME set."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))} | {
        "HF_HOME": str(home),
        **environment,
    }
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
    flags = [
        "--steps",
        "1",
        "--batch",
        "2",
        "--eval-gallery",
        "2",
        "--eval-items",
        "1",
        "--rank",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    done = command(
        tmp_path / "home", "train.py", "--model", "llava-1.5-7b", *flags, HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stderr
    assert (
        tmp_path / "run" / "adapter.safetensors"
    ).exists() and "rendered scenes of 96 x 96 pixels, a demonstration" in done.stdout


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_an_empty_cache_and_no_network_end_in_one_line(tmp_path, environment):
    start = time.time()
    done = command(
        tmp_path,
        "train.py",
        "--model",
        "llava-1.5-7b",
        "--out",
        str(tmp_path / "run"),
        **environment,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and time.time() - start < 15
    for part in ("llava-hf/llava-1.5-7b-hf", str(tmp_path / "hub"), "--model FOLDER"):
        assert part in done.stderr


def test_an_incomplete_cache_is_fetched_with_a_word_about_size_and_place(
    random_folder, tmp_path, monkeypatch, capsys
):
    """The hub's client is replaced: what is asked of it is what counts."""

    class Info:
        siblings = [
            type("File", (), {"rfilename": name, "size": 7_000_000_000})()
            for name in ("a.safetensors", "b.safetensors", "c.json", "d.bin")
        ]

    asked = []

    def snapshot_download(repo, allow_patterns, local_files_only=False):
        asked.append((repo, local_files_only))
        if local_files_only:
            raise data.LocalEntryNotFoundError("nothing")
        return str(random_folder)

    monkeypatch.setattr(
        data, "HfApi", lambda: type("Api", (), {"model_info": lambda self, repo, **_: Info})()
    )
    monkeypatch.setattr(data, "snapshot_download", snapshot_download)
    assert data.model_folder("someone/some-llava") == random_folder
    assert asked == [("someone/some-llava", True), ("someone/some-llava", False)]
    assert "fetching someone/some-llava: 3 files, 21.0 GB, into" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere", "./no/such", "/no/such", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused_at_once(name):
    with pytest.raises(
        ValueError,
        match=f"no model folder '{name}': give tiny, llava-1.5-7b, llava-1.5-13b, a hub id",
    ):
        data.model_folder(name)


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
    ],
)
def test_an_original_config_that_cannot_be_honoured_is_refused_by_name(change, message):
    raw = random_config()
    with pytest.raises(ValueError, match=message):
        parse_config(lvlm_module.hub_config(original_config(raw) | change, raw["vision_config"]))


def test_a_pickle_is_refused_by_name(random_folder, tmp_path):
    folder = shutil.copytree(random_folder, tmp_path / "pickled")
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match="pytorch_model.bin is a pickle, which could run any code: convert it to safetensors",
    ):
        load_lvlm(folder)
    torch.save({"a": torch.ones(2)}, folder / "model.safetensors")  # a pickle under the right name
    with pytest.raises(ValueError, match="model.safetensors cannot be read as safetensors"):
        load_lvlm(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update({"model.language_model.norm.weight": torch.ones(64)}),
            "is the same weight as",
        ),
        (
            lambda t: t.update(
                {"multi_modal_projector.linear_1.bias": torch.zeros(64, dtype=torch.int8)}
            ),
            "linear_1.bias is stored as I8",
        ),
    ],
)
def test_doubled_and_quantised_weights_are_refused(random_folder, tmp_path, change, message):
    folder = shutil.copytree(random_folder, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lvlm(folder)


def test_what_cannot_be_loaded_ends_in_one_line_before_any_training(random_folder, tmp_path):
    folder = shutil.copytree(random_folder, tmp_path / "cut")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    done = command(tmp_path, "train.py", "--model", str(folder), "--out", str(tmp_path / "run"))
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "cut/model.safetensors cannot be read" in done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_the_memory_are_refused_before_loading(random_folder, monkeypatch):
    count = sum(p.numel() for p in load_lvlm(random_folder).parameters())
    for free, name, expected in (
        (9 * count, None, torch.float32),
        (7 * count, None, torch.bfloat16),
        (5 * count, "float32", torch.float32),
    ):
        monkeypatch.setattr(vladva, "free_bytes", lambda device, free=free: free)
        assert vladva.pick_dtype(name, "cpu", random_folder) == expected
    with pytest.raises(
        ValueError, match="GB in float32, but cpu has .* GB free: try --dtype bfloat16"
    ):
        monkeypatch.setattr(vladva, "free_bytes", lambda device: 3 * count)
        vladva.pick_dtype("float32", "cpu", random_folder)
