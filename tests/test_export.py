"""Exported folders: the weights' names, the embeddings after reading them again, the files beside.

Not here: what needs transformers or sentence-transformers (reference.py, export_check.py, by hand).
"""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import (
    TINY,
    make_folder,
    make_qwen_folder,
    qwen_config,
    random_config,
    shaken,
    write_llama_tokenizer,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from safetensors.torch import load_file, save_file

from data import write_json
from extras.export import (
    PEFT_LAYERS,
    PEFT_ROWS,
    export,
    hub_key,
    main,
    read_peft_adapter,
    save_lvlm,
    save_peft_adapter,
)
from lora import attach_lora
from model import LVLM, load_lvlm, open_safetensors, parse_config, read_json, rename_key
from vladva import VladVA, VladVAConfig

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture(scope="module", params=["llama", "qwen"])
def spare_folder(request, llama_folder, tmp_path_factory):
    """A model folder of each architecture with spare embedding rows for the soft prompts."""
    if request.param == "llama":
        return llama_folder
    return make_qwen_folder(tmp_path_factory.mktemp("qwen"), qwen_config(vocab_size=700))


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
    export(adapted(TINY, soft_prompts=False), tmp_path / "out" / "small", adapter_only=True)
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(paths) > 30
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 & ~umask == 0o444 & ~umask, path


# ----------------------------------------------------------------------------------- embeddings


def test_a_merged_folder_embeds_as_the_adapter_does(exported):
    model, out = exported
    assert (out / "model.safetensors.index.json").exists()
    assert_embeds_alike(model, VladVA.from_pretrained(out))


@pytest.mark.parametrize("part", ["lora", "soft_prompts"])
def test_half_an_adapter_is_exported_too(random_folder, tmp_path, part):
    model = adapted(random_folder, **{part: False})
    export(model, tmp_path / "out")
    assert_embeds_alike(model, VladVA.from_pretrained(tmp_path / "out"))


def test_a_padding_model_is_exported_as_one(llama_folder, tmp_path):
    """transformers and this project pad only when told to, each in its own words."""
    model = adapted(llama_folder, image_mode="pad")
    export(model, tmp_path / "out")
    assert_embeds_alike(model, VladVA.from_pretrained(tmp_path / "out"))
    settings = read_json(tmp_path / "out" / "preprocessor_config.json")
    assert settings["image_processor_type"] == "LlavaImageProcessor" and settings["do_pad"] is True


def test_a_pixel_budget_is_exported(qwen_folder, tmp_path):
    side = parse_config(qwen_config()).vision.image_size
    model = adapted(qwen_folder, min_pixels=side**2 // 2, max_pixels=side**2)
    export(model, tmp_path / "out")
    assert_embeds_alike(model, VladVA.from_pretrained(tmp_path / "out"))
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
    assert_embeds_alike(model, VladVA.from_pretrained(tmp_path / "out"))


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
    model = VladVA.from_pretrained(tmp_path / "random")
    added = len(model.hand_prompt_ids("image")) + len(model.hand_prompt_ids("text"))
    assert sizes == [random_config()["text_config"]["vocab_size"] + added, 32064]


def test_an_added_token_is_never_generated(random_model, tmp_path):
    export(random_model, tmp_path / "out")
    model = VladVA.from_pretrained(tmp_path / "out")
    head = model.lvlm.lm_head.weight
    ids = model.hand_prompt_ids("image") + model.hand_prompt_ids("text")
    assert (head[ids] == 0).all() and (head[: min(ids)] != 0).any(1).all()


def test_bfloat16_weights_stay_bfloat16(random_folder, tmp_path):
    export(adapted(random_folder, dtype=torch.bfloat16), tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "bfloat16"
    with open_safetensors(tmp_path / "out" / "model.safetensors") as shard:
        assert {shard.get_slice(key).get_dtype() for key in shard.keys()} == {"BF16"}


# -------------------------------------------------------------------------------- peft's format

LAYER = "layers.1.self_attn.q_proj"
PEFT_CONFIG = {  # what peft 0.21.2 writes of LoraConfig(r=4, target_modules=...), without its nulls
    "auto_mapping": {"base_model_class": "LlavaModel", "parent_library": "transformers"},
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "base_model_name_or_path": "llava",
    "inference_mode": True,
    "r": 4,
    "target_modules": ["q_proj", "up_proj"],
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_core": "megatron.core",
    "loftq_config": {},
    "use_dora": False,
    "qalora_group_size": 16,
}


def peft_folder(folder, base, prefix="base_model.model.model.language_model.", **changes):
    """(folder of a random adapter of a base as peft writes it, {name here: its tensors})."""
    model = adapted(base, soft_prompts=False)
    tensors = {}
    pairs = {}
    for name, p in model.parameter_groups()["lora"].items():
        layer, part = name.removeprefix("lvlm.decoder.").split(".lora_")
        tensors[f"{prefix}{layer}.lora_{part.upper()}.weight"] = p.detach()
        pairs[name] = p.detach()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", PEFT_CONFIG | changes)
    return folder, pairs


def test_an_adapter_only_folder_has_the_names_that_peft_reads(spare_folder, tmp_path):
    model = adapted(spare_folder)
    export(model, tmp_path / "out", adapter_only=True)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model."
    assert PEFT_ROWS == f"{prefix}embed_tokens.token_adapter.trainable_tokens_delta"
    layer = model.lvlm.decoder.get_submodule(LAYER)
    assert torch.equal(tensors[f"{prefix}{LAYER}.lora_A.weight"], layer.lora_a)
    assert torch.equal(tensors[f"{prefix}{LAYER}.lora_B.weight"], layer.lora_b)
    assert len(tensors) == len(model.parameter_groups()["lora"]) + 1
    about = read_json(tmp_path / "out" / "adapter_config.json")
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 4, 16.0)
    assert about["base_model_name_or_path"] == str(spare_folder.resolve())
    # the rows in the order of their ids, which the tokenizer beside them gives to the prompts
    ids = about["trainable_token_indices"]["embed_tokens"]
    prompts = read_json(tmp_path / "out" / "vladva.json")["config"]
    prompt = prompts["image_prompt"] + prompts["text_prompt"]
    shutil.copytree(spare_folder, tmp_path / "base")
    shutil.copy(tmp_path / "out" / "tokenizer.json", tmp_path / "base")
    tokenizer = VladVA.from_pretrained(tmp_path / "base").tokenizer
    assert tokenizer.encode(prompt, add_special_tokens=False).ids == ids
    assert torch.equal(tensors[PEFT_ROWS][0], model.soft_prompts["image"][0])
    assert torch.equal(tensors[PEFT_ROWS][-1], model.soft_prompts["text"][-1])


@pytest.mark.parametrize("part", ["both", "lora", "soft_prompts"])
def test_base_rows_and_lora_of_an_adapter_only_folder_embed_as_the_adapter(
    spare_folder, tmp_path, part
):
    """As peft does: the rows instead of the base's, W0 x + (alpha / R) B A x, plain prompts."""
    model = adapted(spare_folder, **({} if part == "both" else {part: False}))
    export(model, tmp_path / "out", adapter_only=True)
    shutil.copytree(spare_folder, tmp_path / "base")
    for name in ("tokenizer.json", "vladva.json"):
        shutil.copy(tmp_path / "out" / name, tmp_path / "base")
    plain = VladVA.from_pretrained(tmp_path / "base")
    about = read_json(tmp_path / "out" / "adapter_config.json")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    with torch.no_grad():
        if PEFT_ROWS in tensors:
            ids = about["trainable_token_indices"]["embed_tokens"]
            plain.lvlm.decoder.embed_tokens.weight[ids] = tensors.pop(PEFT_ROWS)
        if tensors:
            attach_lora(plain.lvlm.decoder, about["r"], about["lora_alpha"])
        for key, tensor in tensors.items():
            name = re.sub(r".*language_model\.(.*)\.weight", r"\1", key).lower()
            plain.lvlm.decoder.get_parameter(name).copy_(tensor)
    assert_embeds_alike(model, plain)


def test_an_adapter_only_folder_has_the_files_of_a_merged_one_but_no_weights(
    spare_folder, tmp_path
):
    model = adapted(spare_folder)
    export(model, tmp_path / "merged")
    export(model, tmp_path / "small", adapter_only=True)
    files = {}
    for kind in ("merged", "small"):
        paths = [path for path in (tmp_path / kind).rglob("*") if path.is_file()]
        files[kind] = {str(path.relative_to(tmp_path / kind)): path for path in paths}
    assert files["merged"].keys() - files["small"].keys() == {"config.json", "model.safetensors"}
    added = {"adapter_config.json", "adapter_model.safetensors"}
    assert files["small"].keys() - files["merged"].keys() == added
    for name in files["merged"].keys() & files["small"].keys():
        assert files["merged"][name].read_bytes() == files["small"][name].read_bytes(), name


def test_the_target_modules_are_the_decoders_linear_layers():
    for name in ("language_model.layers.0.mlp.gate_proj", f"model.language_model.{LAYER}"):
        assert re.fullmatch(PEFT_LAYERS, name)
    for name in (
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.visual.blocks.0.mlp.fc1",
        "model.language_model.layers.0.mlp",
        "lm_head",
    ):
        assert not re.fullmatch(PEFT_LAYERS, name), name


@pytest.mark.parametrize(
    "config", [{}, {"lora": False}, {"soft_prompts": False}, {"learn_temperature": True}]
)
def test_an_adapter_comes_back_from_pefts_format_bit_for_bit(llama_folder, tmp_path, config):
    model = adapted(llama_folder, **config)
    export(model, tmp_path / "small", adapter_only=True)
    again = VladVA.from_pretrained(llama_folder, adapter=tmp_path / "small")
    assert again.config == model.config
    before, after = model.trained_parameters(), again.trained_parameters()
    assert before.keys() == after.keys()
    for name, p in before.items():
        assert torch.equal(p, after[name]), name


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.model.language_model.",  # a class with a head
        "base_model.model.language_model.",  # AutoModel
        "base_model.model.language_model.model.",  # LLaVA before transformers 4.52
        "base_model.model.model.",  # Qwen2-VL before it
    ],
)
def test_an_adapter_that_peft_trained_elsewhere_is_read(random_folder, tmp_path, prefix):
    theirs, pairs = peft_folder(tmp_path / "theirs", random_folder, prefix)
    tensors, config = read_peft_adapter(theirs)
    assert config == VladVAConfig(soft_prompts=False, lora_rank=4, lora_alpha=6)
    assert tensors.keys() == pairs.keys()
    model = VladVA.from_pretrained(random_folder, adapter=theirs)
    for name, p in model.trained_parameters().items():
        assert torch.equal(p, pairs[name]), name


def test_every_command_takes_a_folder_in_pefts_format_as_the_adapter(llama_folder, tmp_path):
    """As programs, where vladva.py runs under another name than the one that export.py imports."""
    model = adapted(llama_folder)
    model.save_adapter(tmp_path / "run")
    export(model, tmp_path / "small", adapter_only=True)
    IMAGES[0].save(tmp_path / "a.png")
    flags = ["--model", str(llama_folder), "--adapter"]
    tables = []
    for name in ("run", "small"):
        command = [sys.executable, "vladva.py", str(tmp_path / "a.png"), "a red bus", *flags]
        done = subprocess.run([*command, str(tmp_path / name)], cwd=ROOT, capture_output=True)
        tables.append(done.stdout)
    assert tables[0].count(b"\n") == 3 and tables[0] == tables[1]
    main([*flags, str(tmp_path / "small"), "--out", str(tmp_path / "merged")])
    assert_embeds_alike(model, VladVA.from_pretrained(tmp_path / "merged"))
    # and a run's adapter.safetensors goes before peft's files beside it
    shutil.copytree(tmp_path / "small", tmp_path / "run", dirs_exist_ok=True)
    again = VladVA.from_pretrained(llama_folder, adapter=tmp_path / "run")
    assert again.config == model.config


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"use_rslora": True},
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 8}},
        {"modules_to_save": ["embed_tokens"]},
        {"init_lora_weights": "pissa"},
        {"a_field_of_tomorrow": True},
    ],
)
def test_what_is_not_plain_lora_is_refused_by_its_name(random_folder, tmp_path, changes):
    theirs, _ = peft_folder(tmp_path / "theirs", random_folder, **changes)
    with pytest.raises(ValueError, match=f"{list(changes)[0]} is .*; this code does plain LoRA"):
        read_peft_adapter(theirs)


def test_an_adapter_of_other_layers_is_refused(random_folder, tmp_path, capsys):
    theirs, _ = peft_folder(tmp_path / "theirs", random_folder)
    path = theirs / "adapter_model.safetensors"
    tensors = load_file(path)
    head = "base_model.model.lm_head.lora_A.weight"
    vision = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    more = {head: torch.zeros(4, 64), f"{vision}.lora_A.weight": torch.zeros(4, 32)}
    fewer = {key: tensor for key, tensor in tensors.items() if "gate_proj" not in key}
    for changed, message in ((tensors | more, f"{head} is unexpected"), (fewer, "is missing")):
        save_file(changed, path)
        with pytest.raises(SystemExit):
            out = str(tmp_path / "out")
            main(["--model", str(random_folder), "--adapter", str(theirs), "--out", out])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    path.unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        read_peft_adapter(theirs)
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        read_peft_adapter(tmp_path)


def test_a_base_without_spare_embeddings_takes_no_soft_prompts_along(tmp_path, capsys):
    adapted(TINY).save_adapter(tmp_path / "run")
    flags = ["--adapter", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--adapter-only"]
    with pytest.raises(SystemExit):
        main(flags)
    message = capsys.readouterr().err
    assert "tiny has 0 spare embeddings, the soft prompts need" in message
    assert "without --adapter-only" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
    # LoRA alone needs none
    adapted(TINY, soft_prompts=False).save_adapter(tmp_path / "run")
    main(flags)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_base_of_the_hub_is_named_by_its_id(llama_folder, tmp_path):
    model = adapted(llama_folder, soft_prompts=False)
    for name, repo in (("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"), ("me/mine", "me/mine")):
        model.name = name
        save_peft_adapter(model, {}, tmp_path / name)
        about = read_json(tmp_path / name / "adapter_config.json")
        assert about["base_model_name_or_path"] == repo


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
    merged = VladVA.from_pretrained(out)
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
    tokenizer = VladVA.from_pretrained(out).tokenizer
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
    assert_embeds_alike(model, VladVA.from_pretrained(tmp_path / "out"))


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
    assert_embeds_alike(model, VladVA.from_pretrained(tmp_path / "out"))


def test_what_cannot_be_exported_is_refused(random_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="no adapter to export"):
        export(VladVA.from_pretrained(random_folder), tmp_path / "out")
    with pytest.raises(ValueError, match="holds config.json already"):
        export(adapted(random_folder), random_folder)
    for flags, message in (
        (["--out", str(tmp_path / "out")], "no adapter to export"),
        # before any work: the adapter is not even looked for
        (["--adapter", "nowhere", "--out", str(random_folder)], "holds config.json already"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(flags)
        captured = capsys.readouterr()
        assert ended.value.code == 2 and message in captured.err
    assert not (tmp_path / "out").exists()
