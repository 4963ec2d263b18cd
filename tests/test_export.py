"""Exported folders: the weights' names, the embeddings after reading them again, the files beside.

Not here: what needs transformers or sentence-transformers (reference.py, export_check.py, by hand).
"""

import os
import stat

import jinja2
import pytest
import torch
from conftest import (
    TINY,
    make_folder,
    qwen_config,
    random_config,
    shaken,
    write_llama_tokenizer,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from extras.export import export, hub_key, main, read_config, save_lvlm
from model import LVLM, load_lvlm, open_safetensors, parse_config, read_json, rename_key, write_json
from vladva import VladVA, VladVAConfig

TEXTS = ["a red bus", " 2 dogs, and a cat.\n", "“Ä” 犬 {caption} {{ x }}", 'it\'s\na "quote"']
IMAGES = [
    Image.new("RGB", (50, 90), (200, 10, 30)),
    Image.linear_gradient("L").crop((0, 0, 99, 60)),
]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A random LLaVA with Llama's vocabulary and its 62 spare rows."""
    raw = random_config(vocab_size=32064) | {"image_token_index": 32000, "pad_token_id": 32001}
    folder = make_folder(tmp_path_factory.mktemp("llama"), raw)
    write_llama_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=["random", "llama", "qwen"])
def folder(request, random_folder, llama_folder, qwen_folder):
    """A model folder of each kind: tokenizers and architectures differ."""
    return {"random": random_folder, "llama": llama_folder, "qwen": qwen_folder}[request.param]


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """(an adapted model of each kind, the folder that it was exported to in shards)."""
    model = adapted(folder)
    out = tmp_path_factory.mktemp("exported")
    export(model, out, max_shard_size=200_000)
    return model, out


def adapted(folder, dtype=None, **config) -> VladVA:
    """A model with an adapter that matters."""
    config = VladVAConfig(lora_rank=4, **config)
    return shaken(VladVA.from_pretrained(folder, dtype=dtype, config=config))


def read_again(folder) -> VladVA:
    return VladVA.from_pretrained(folder, config=read_config(folder))


def assert_embeds_alike(before: VladVA, after: VladVA, atol=2e-6):
    """Rounding of merged float32 weights: about 5e-7 was seen."""
    torch.testing.assert_close(
        after.encode_image(IMAGES), before.encode_image(IMAGES), atol=atol, rtol=0
    )
    torch.testing.assert_close(
        after.encode_text(TEXTS), before.encode_text(TEXTS), atol=atol, rtol=0
    )


# ---------------------------------------------------------------------------- names and weights


@pytest.mark.parametrize("raw", [random_config(), qwen_config()], ids=["llava", "qwen2_vl"])
def test_hub_key_undoes_rename_key(raw):
    config = parse_config(raw)
    with torch.device("meta"):
        names = [name for name, _ in LVLM(config).named_parameters()]
    for name in names:
        assert rename_key(hub_key(name, config), config.key_patterns) == name
    assert len({hub_key(name, config) for name in names}) == len(names)


def test_a_saved_lvlm_has_the_names_of_the_hub_and_loads_back(tmp_path):
    lvlm = load_lvlm(TINY)
    save_lvlm(lvlm, tmp_path / "saved", torch.float16)
    with open_safetensors(TINY / "model.safetensors") as shard:
        names = sorted(shard.keys())
    with open_safetensors(tmp_path / "saved" / "model.safetensors") as shard:
        assert sorted(shard.keys()) == names  # the tied head is stored once
        assert shard.get_slice(names[0]).get_dtype() == "F16"
        assert shard.metadata()["format"] == "pt"  # transformers refuses a file without it
    for name, p in load_lvlm(tmp_path / "saved", dtype=torch.float32).named_parameters():
        assert torch.equal(p, lvlm.get_parameter(name).half().float()), name


def test_others_can_read_the_files(tmp_path):
    """safetensors 0.8 wrote weights that only their owner could read, and no server could load."""
    export(adapted(TINY), tmp_path / "out", max_shard_size=1_000_000)
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(paths) > 15
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 & ~umask == 0o444 & ~umask, path


# ----------------------------------------------------------------------------------- embeddings


def test_a_merged_folder_embeds_as_the_adapter_does(exported):
    model, out = exported
    assert (out / "model.safetensors.index.json").exists()
    assert_embeds_alike(model, read_again(out))


@pytest.mark.parametrize("part", ["lora", "soft_prompts"])
def test_half_an_adapter_is_exported_too(random_folder, tmp_path, part):
    model = adapted(random_folder, **{part: False})
    export(model, tmp_path / "out")
    assert_embeds_alike(model, read_again(tmp_path / "out"))


def test_a_padding_model_is_exported_as_one(llama_folder, tmp_path):
    """transformers and this project pad only when told to, each in its own words."""
    model = adapted(llama_folder, image_mode="pad")
    export(model, tmp_path / "out")
    assert_embeds_alike(model, read_again(tmp_path / "out"))
    settings = read_json(tmp_path / "out" / "preprocessor_config.json")
    assert settings["image_processor_type"] == "LlavaImageProcessor" and settings["do_pad"] is True


def test_a_pixel_budget_is_exported(qwen_folder, tmp_path):
    side = parse_config(qwen_config()).vision.image_size
    model = adapted(qwen_folder, min_pixels=side**2 // 2, max_pixels=side**2)
    export(model, tmp_path / "out")
    assert_embeds_alike(model, read_again(tmp_path / "out"))
    settings = read_json(tmp_path / "out" / "preprocessor_config.json")
    assert (settings["min_pixels"], settings["max_pixels"]) == (side**2 // 2, side**2)


def test_a_template_that_added_tokens_cannot_give_is_refused(llama_folder, tmp_path):
    """Llama's tokenizer puts a space after an added token: a line break is not the trained one."""
    model = adapted(llama_folder, image_template="USER: {prompt}\n<image>\nASSISTANT:")
    with pytest.raises(ValueError, match="as other tokens"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model = adapted(llama_folder, text_template='USER: "{caption}" {prompt} ASSISTANT:')
    export(model, tmp_path / "out")
    assert_embeds_alike(model, read_again(tmp_path / "out"))


def test_exporting_leaves_the_model_as_it_is(random_model, tmp_path):
    before = {name: p.clone() for name, p in random_model.named_parameters()}
    export(random_model, tmp_path / "out")
    after = dict(random_model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_spare_rows_are_used_and_missing_ones_added(random_folder, llama_folder, tmp_path):
    sizes = []
    for name, folder in (("random", random_folder), ("llama", llama_folder)):
        export(adapted(folder), tmp_path / name)
        sizes.append(read_json(tmp_path / name / "config.json")["text_config"]["vocab_size"])
    model = read_again(tmp_path / "random")
    added = len(model.hand_prompt_ids("image")) + len(model.hand_prompt_ids("text"))
    assert sizes == [random_config()["text_config"]["vocab_size"] + added, 32064]


def test_an_added_token_is_never_generated(random_model, tmp_path):
    export(random_model, tmp_path / "out")
    model = read_again(tmp_path / "out")
    head = model.lvlm.lm_head.weight
    ids = model.hand_prompt_ids("image") + model.hand_prompt_ids("text")
    assert (head[ids] == 0).all() and (head[: min(ids)] != 0).any(1).all()


def test_bfloat16_weights_stay_bfloat16(random_folder, tmp_path):
    export(adapted(random_folder, dtype=torch.bfloat16), tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"
    with open_safetensors(tmp_path / "out" / "model.safetensors") as shard:
        assert {shard.get_slice(key).get_dtype() for key in shard.keys()} == {"BF16"}


# ---------------------------------------------------------------------------- the files beside


def render(folder, part: dict) -> str:
    """The chat template as transformers renders it."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string((folder / "chat_template.jinja").read_text("utf-8"))
    parts = part if isinstance(part, list) else [part]
    return template.render(messages=[{"role": "user", "content": parts}])


def test_the_chat_template_gives_the_prompt_strings(exported):
    _, out = exported
    prompts = read_json(out / "vladva.json")
    assert render(out, {"type": "image", "image": "a.jpg"}) == prompts["image"]
    for text in TEXTS:
        wanted = prompts["text"].replace("{caption}", text.strip())
        assert render(out, {"type": "text", "text": text}) == wanted
    both = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "a"}]
    with pytest.raises(jinja2.TemplateError, match="one at a time"):
        render(out, both)


def test_the_prompt_strings_are_read_as_the_trained_tokens(exported):
    """Only the soft prompts' ids differ, and one token more where a space stood before <image>."""
    model, out = exported
    merged = read_again(out)
    prompts = read_json(out / "vladva.json")
    for caption in ("a", "2 dogs", "The red bus."):
        ids = merged.tokenizer.encode(prompts["text"].replace("{caption}", caption)).ids
        trained = model.text_sequence(caption)
        end = trained.prompt_start + trained.prompt_length
        assert ids[: trained.prompt_start] == trained.input_ids[: trained.prompt_start]
        assert ids[end:] == trained.input_ids[end:]
    ids = merged.tokenizer.encode(prompts["image"]).ids
    assert len(ids) == len(model.image_sequence(grid=(1, 1)).input_ids)
    assert ids.count(model.lvlm.config.image_token_id) == 1


def test_the_files_of_sentence_transformers(exported):
    model, out = exported
    modules = read_json(out / "modules.json", list)
    assert [module["type"].split(".")[-1] for module in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    for module in modules[1:]:
        assert (out / module["path"] / "config.json").is_file()
    pooling = read_json(out / modules[1]["path"] / "config.json")
    width = model.lvlm.config.decoder.hidden_size
    assert pooling == {"embedding_dimension": width, "pooling_mode": "lasttoken"}
    described = read_json(out / "tokenizer_config.json")
    tokenizer = read_again(out).tokenizer
    assert described["tokenizer_class"] == "PreTrainedTokenizerFast"
    for name in ("eos_token", "pad_token"):
        assert tokenizer.inner.token_to_id(described[name]) is not None
    if model.lvlm.config.raw["model_type"] == "llava":
        processor = read_json(out / "processor_config.json")
        assert processor["patch_size"] == model.lvlm.config.vision.patch_size


def test_a_chat_template_of_the_base_is_not_taken_along(random_folder, tmp_path):
    """A legacy chat_template.json went before the written one: every image failed elsewhere."""
    base = make_folder(tmp_path / "base", random_config())
    write_json(base / "chat_template.json", {"chat_template": "{{ messages }}"})
    write_json(base / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    export(adapted(base), tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.json").exists()
    assert "chat_template" not in read_json(tmp_path / "out" / "tokenizer_config.json")


def test_a_base_that_transformers_5_wrote_is_exported(tmp_path):
    """It keeps the image settings in processor_config.json alone."""
    base = make_folder(tmp_path / "base", random_config())
    settings = read_json(base / "preprocessor_config.json")
    write_json(base / "processor_config.json", {"image_processor": settings})
    (base / "preprocessor_config.json").unlink()
    model = adapted(base)
    export(model, tmp_path / "out")
    assert read_json(tmp_path / "out" / "preprocessor_config.json") == settings
    assert_embeds_alike(model, read_again(tmp_path / "out"))


def test_the_model_card_names_base_and_scores_but_no_folder_of_this_machine(tmp_path):
    scores = {}
    for when, value in (("before", 1.25), ("after", 62.5)):
        scores[when] = {"scores": {"text_to_image R@1": value}}
    export(adapted(TINY), tmp_path / "out", scores)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert "| text_to_image R@1 | 1.2 | 62.5 |" in card
    assert str(TINY) not in card and str(tmp_path) not in card


# -------------------------------------------------------------------------------- command line


def test_the_command_exports_the_adapter_of_a_run(tmp_path, capsys):
    model = adapted(TINY)
    model.save_adapter(tmp_path / "run")
    write_json(
        tmp_path / "run" / "scores.json", {"before": {"scores": {}}, "after": {"scores": {}}}
    )
    adapter = str(tmp_path / "run")
    main(["--model", "tiny", "--adapter", adapter, "--out", str(tmp_path / "out")])
    assert "written" in capsys.readouterr().out
    assert_embeds_alike(model, read_again(tmp_path / "out"))


def test_what_cannot_be_exported_is_refused(random_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="no adapter to merge"):
        export(VladVA.from_pretrained(random_folder), tmp_path / "out")
    with pytest.raises(ValueError, match="holds config.json already"):
        export(adapted(random_folder), random_folder)
    for flags, message in (
        (["--out", str(tmp_path / "out")], "no adapter to merge"),
        # before any work: the adapter is not even looked for
        (["--adapter", "nowhere", "--out", str(random_folder)], "holds config.json already"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        captured = capsys.readouterr()
        assert ended.value.code == 2 and message in captured.err
    assert not (tmp_path / "out").exists()
