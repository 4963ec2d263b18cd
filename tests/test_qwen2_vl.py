"""Qwen2-VL exactly: recorded outputs of transformers and peft, both forms of its folders.

And the whole method on a small random one: sequences, adapters, gradients, a run that is killed and
resumed, the command lines.
"""

import json
import math
import random
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    QWEN_2B,
    QWEN_IMAGE_SIZES,
    QWEN_SPECIAL,
    RECORDED,
    make_qwen_folder,
    qwen_config,
    qwen_sequences,
    seeded_image,
    seeded_lora_weight,
    seeded_tensor,
    seeded_weight,
    shaken,
    shapes_by_layer,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_llava import assert_close, recorded
from test_train import gradients, kill_and_resume, read_lines, start_training

import data
import train as training
import vladva
from eval import mean_caption_loss
from extras import export, qwen2_vl, scenes
from extras.qwen2_vl import PatchProcessor
from extras.shard import shard_blocks
from lora import attach_lora, lora_layers, merge_lora
from model import LVLM, generate, load_lvlm, parse_config, rename_key
from vladva import VladVA, VladVAConfig, summary_embedding

# ------------------------------------------------------------------- as exact as transformers


def nested(raw: dict) -> dict:
    """The config.json that transformers 5 writes for the same model."""
    top = {"model_type": "qwen2_vl", "tie_word_embeddings": True}
    for name in ("image", "video", "vision_start", "vision_end"):
        top[f"{name}_token_id"] = raw[f"{name}_token_id"]
    moved = (*top, "vision_config", "rope_theta", "rope_scaling")
    text = {key: value for key, value in raw.items() if key not in moved}
    rope = {"rope_theta": raw["rope_theta"], "rope_type": "default", "type": "mrope"}
    rope |= raw["rope_scaling"]
    text |= {"model_type": "qwen2_vl_text", "rope_parameters": rope}
    vision_rope = {"rope_theta": 10000.0, "rope_type": "axial"}
    vision = {"model_type": "qwen2_vl_vision", "rope_parameters": vision_rope}
    return top | {"vision_config": raw["vision_config"] | vision, "text_config": text}


def seeded_folder(folder: Path, raw: dict, layout: str) -> Path:
    """The seeded weights of a config, named as on the hub or as by transformers 4.52 and later."""
    with torch.device("meta"):
        lvlm = LVLM(parse_config(raw))
    tensors = {}
    for name, p in lvlm.named_parameters():
        key = lvlm.config.hub_key(name)
        value = seeded_weight(key, p.shape)
        if layout != "hub":
            key = f"model.{key}" if key.startswith("visual.") else f"model.language_{key}"
        tensors[key] = value
    (folder / "config.json").write_text(json.dumps(raw if layout == "hub" else nested(raw)))
    save_file(tensors, folder / "model.safetensors")
    return folder


def outputs(lvlm, processor, which: tuple[int, ...]) -> dict:
    """What record_qwen.py records, of some of the images in one right-padded batch."""
    config = lvlm.config
    patches = [processor(Image.fromarray(seeded_image(QWEN_IMAGE_SIZES[n]))) for n in which]
    grids = [config.image_grid(p) for p in patches]
    all_input_ids = qwen_sequences(qwen_config(first=80), [(3, 4), (4, 2)])
    sequences = []
    for n, grid in zip(which, grids):
        input_ids = all_input_ids[n]
        position_ids = config.position_ids(input_ids, grid)
        sequences.append(data.TokenSequence(input_ids, 0, 1, 0, position_ids=position_ids))
    batch = data.collate(
        sequences, SimpleNamespace(pad_token_id=0, image_token_id=config.image_token_id)
    )
    features = lvlm.image_features(config.stack_images(patches))
    embeds = lvlm.decoder.embed_tokens(batch.input_ids)
    embeds = embeds.index_put(tuple(batch.image_token_index), features)
    hidden_states = lvlm.decoder(embeds, batch.position_ids)
    lengths = torch.tensor([len(sequence.input_ids) for sequence in sequences])
    answers = generate(lvlm, embeds, lengths, 16, batch.position_ids)
    parts = features.split([rows * columns for rows, columns in grids])
    values = {}
    for b, n in enumerate(which):
        states = hidden_states[b, : lengths[b]]
        values[f"patches.{n}"] = patches[b].flatten(0, 2)
        values[f"features.{n}"] = parts[b]
        values[f"positions.{n}"] = sequences[b].position_ids
        values[f"hidden.{n}"] = states
        values[f"logits.{n}"] = lvlm.lm_head(states)
        values[f"greedy.{n}"] = torch.tensor(answers[b])
    return values


@pytest.mark.parametrize("layout", ["hub", "transformers 4.52"])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1), (1, 0)])
@torch.no_grad()
def test_outputs_equal_transformers_alone_and_in_one_batch(which, layout, tmp_path):
    """Patches of odd-sized images, features, positions, hidden states, logits, 16 greedy tokens."""
    reference, about = recorded("qwen")
    lvlm = load_lvlm(seeded_folder(tmp_path, about["config"], layout))
    object.__setattr__(lvlm.config, "end_tokens", [-1])  # recorded without an end
    write_special_tokens(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about["processor"]))
    values = outputs(lvlm, PatchProcessor(tmp_path, lvlm.config, VladVAConfig()), which)
    assert values.keys() == {name for name in reference if int(name[-1]) in which}
    for name, value in values.items():
        if name.startswith(("positions", "greedy")):
            assert torch.equal(value, reference[name]), name
        else:
            assert_close(value, reference[name])


def test_sizes_and_patches_equal_transformers(tmp_path):
    """smart_resize under three pixel budgets, from 1 x 1 to 5000 x 3000; patches of 14 pixels."""
    reference, _ = recorded("qwen_sizes")
    for asked, given in zip(reference["asked"].tolist(), reference["given"].tolist()):
        processor = open_processor(tmp_path, {"min_pixels": asked[2], "max_pixels": asked[3]})
        assert processor.target_size((asked[0], asked[1])) == tuple(given), asked
    processor = open_processor(tmp_path, {"min_pixels": 3136, "max_pixels": 4 * 784})
    patches = processor(Image.fromarray(seeded_image((75, 45)))).flatten(0, 2)
    # float32 against float64 arithmetic
    torch.testing.assert_close(patches, reference["patches"], atol=2e-6, rtol=0)


def write_special_tokens(folder: Path, tokens=QWEN_SPECIAL) -> None:
    """As much of a tokenizer.json as the image processor looks at."""
    added = [{"content": token} for token in tokens]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))


def open_processor(folder: Path, settings: dict, **config) -> PatchProcessor:
    """Of the 2B model, with a preprocessor_config.json and fields of VladVAConfig."""
    write_special_tokens(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return PatchProcessor(folder, parse_config(QWEN_2B), VladVAConfig(**config))


def test_an_image_processor_that_transformers_5_saved_is_found(tmp_path):
    """It keeps the settings in processor_config.json, and the budget as a size."""
    settings = {"size": {"shortest_edge": 3136, "longest_edge": 4 * 784}, "patch_size": 14}
    raw = {"image_processor": settings, "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(raw))
    write_special_tokens(tmp_path)
    processor = PatchProcessor(tmp_path, parse_config(QWEN_2B), VladVAConfig())
    assert (processor.min_pixels, processor.max_pixels) == (3136, 3136)


def test_lora_on_biased_linears_equals_peft_before_and_after_merging(tmp_path):
    reference, about = recorded("qwen_lora")
    decoder = load_lvlm(seeded_folder(tmp_path, about["config"], "hub")).decoder
    attach_lora(decoder, about["rank"], about["alpha"])
    embeds = seeded_tensor("embeds", (2, 7, about["config"]["hidden_size"]))
    with torch.no_grad():
        for name, layer in lora_layers(decoder).items():
            layer.lora_a.copy_(seeded_lora_weight(name, "lora_a", layer.lora_a.shape))
            layer.lora_b.copy_(seeded_lora_weight(name, "lora_b", layer.lora_b.shape))
        assert_close(decoder(embeds), reference["hidden"])
        merge_lora(decoder)
        assert_close(decoder(embeds), reference["merged"])


@pytest.mark.parametrize("raw", [QWEN_2B, nested(QWEN_2B)], ids=["hub", "transformers 5"])
def test_the_full_size_model_has_every_key_and_shape_of_transformers(raw):
    """Qwen2-VL-2B on the meta device; tied, so without a head of its own."""
    with torch.device("meta"):
        lvlm = LVLM(parse_config(raw))
    reference = json.loads((RECORDED / "qwen_shapes.json").read_text())["2b"]
    shapes = {}
    for name, shape in reference.items():
        ours = rename_key(name.replace("*", "7"), lvlm.config.key_patterns)
        shapes[ours.replace(".7.", ".*.")] = shape
    assert shapes_by_layer(lvlm.named_parameters()) == shapes
    assert lvlm.lm_head.weight is lvlm.decoder.embed_tokens.weight
    assert sum(p.numel() for p in lvlm.parameters()) == 2_208_985_600
    for name, _ in lvlm.named_parameters():
        assert rename_key(lvlm.config.hub_key(name), lvlm.config.key_patterns) == name
    attach_lora(lvlm.decoder, rank=16, alpha=16)
    assert sum(p.numel() for n, p in lvlm.named_parameters() if "lora_" in n) == 18_464_768


SECTION = {"mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    "text, theta",
    [
        ({}, 1e6),
        ({"rope_theta": 111.0}, 111.0),
        ({"rope_theta": 111.0, "rope_scaling": {"rope_theta": 222.0}}, 222.0),
        ({"rope_theta": 111.0, "rope_parameters": {"rope_theta": 333.0}}, 333.0),
        ({"rope_scaling": {"rope_theta": 222.0}, "rope_parameters": {"rope_theta": 333.0}}, 222.0),
        ({"rope_theta": 111.0, "rope_scaling": {}, "rope_parameters": {}}, 111.0),
        ({"rope_scaling": {"rope_type": "mrope"}, "rope_parameters": {"rope_theta": 3.0}}, 1e6),
    ],
)
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_one_of_several_rope_thetas_counts_as_in_transformers(text, theta, form):
    """Read off transformers 5.24, which was run on each: the one inside goes first."""
    raw = qwen_config()
    text = dict(text)
    for name in ("rope_scaling", "rope_parameters"):
        if text.get(name):
            text[name] = SECTION | text[name]
    if not text.get("rope_scaling") and not text.get("rope_parameters"):
        text["head_dim"] = 128  # what the default sections fit
    rest = {key: value for key, value in raw.items() if not key.startswith("rope_")}
    if form == "flat":
        config = parse_config(rest | text)
    else:
        vision = rest.pop("vision_config")
        top = {"model_type": "qwen2_vl", "vision_config": vision, "rope_theta": 999.0}
        config = parse_config(top | {"image_token_id": 600, "text_config": rest | text})
    assert config.decoder.rope_theta == theta


def test_the_tower_holds_the_patches_of_one_image_at_a_time(qwen_model):
    """64 images of 16,000 patches went through at once: 10 GB for a layer's MLP alone.

    Every block sees the patches of one image, in the order of the batch.
    """
    counts = []
    for block in qwen_model.lvlm.vision.blocks:
        block.register_forward_hook(lambda block, inputs, output: counts.append(len(output)))
    images = [Image.fromarray(seeded_image(size)) for size in ((45, 83), (20, 20), (60, 30))]
    pixels = [qwen_model.image_processor(image) for image in images]
    qwen_model.encode_image(images)
    wanted = []
    for patches in pixels:
        wanted += [patches.shape[:3].numel()] * len(qwen_model.lvlm.vision.blocks)
    assert counts == wanted and len(set(counts)) > 1


@pytest.mark.parametrize("limit", [1, 16, 10**6])
def test_a_batch_of_images_is_bounded_in_tokens(qwen_model, monkeypatch, limit):
    """64 of the largest images padded to one length would be a million tokens in the decoder."""
    images = [Image.fromarray(seeded_image(s)) for s in ((45, 83), (20, 20), (60, 30), (24, 24))]
    counts = [math.prod(qwen_model.image_processor(image).shape[:2]) for image in images]
    whole = qwen_model.encode_image(images)
    loss = mean_caption_loss(qwen_model, images, ["a red circle"] * 4)
    monkeypatch.setattr(qwen2_vl, "MAX_BATCH_TOKENS", limit)
    parts = qwen_model.image_processor.split(images)
    assert [i for few in parts for i in range(4)[few]] == [0, 1, 2, 3]
    assert all(len(counts[few]) * max(counts[few]) <= max(limit, *counts[few]) for few in parts)
    assert {1: 4, 16: 3, 10**6: 1}[limit] == len(parts)
    forwards = []
    qwen_model.lvlm.decoder.register_forward_hook(lambda *args: forwards.append(args))
    assert_close(qwen_model.encode_image(images), whole)
    assert mean_caption_loss(qwen_model, images, ["a red circle"] * 4) == pytest.approx(loss)
    assert len(forwards) == 2 * len(parts)


def test_shard_is_refused_by_name(qwen_model):
    """Its batches split by the sizes of images; processes must run equally many forwards."""
    with pytest.raises(ValueError, match="--shard: .* takes images of any size, wanted a LLaVA"):
        shard_blocks(qwen_model)


# ----------------------------------------------------------------------------------- sequences


def spell(model, ids) -> str:
    """The text of ids, special tokens and all, with the number of image tokens where N stand."""
    text = model.tokenizer.inner.decode(list(ids), skip_special_tokens=False)
    count = text.count("<|image_pad|>")
    return text.replace("<|image_pad|>" * count, f"<{count}>") if count else text


def test_sequences_are_the_chat_template_around_the_papers_prompts(qwen_model):
    """The summary token is the line feed after "assistant"; the caption ends in one <|im_end|>."""
    image = qwen_model.image_sequence("A red circle.", grid=(2, 3))
    text = qwen_model.text_sequence("a red bus")
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    question = f"<|im_end|>\n<|im_start|>user\nDescribe the image in detail.{end}"
    vision = "<|vision_start|><6><|vision_end|>"
    prefix = f"{system}Summarize the provided image in one word: {vision}{end}"
    assert spell(qwen_model, image.input_ids[: image.summary_index + 1]) == prefix
    assert spell(qwen_model, image.input_ids) == f"{prefix}{question}A red circle.<|im_end|>"
    assert spell(qwen_model, image.input_ids[image.caption_start :]) == "A red circle.<|im_end|>"
    assert image.input_ids.count(qwen_model.lvlm.config.image_token_id) == 6

    text_prefix = f"{system}Summarize the provided text in one word: a red bus{end}"
    assert spell(qwen_model, text.input_ids) == text_prefix
    assert text.summary_index == len(text.input_ids) - 1
    prompts = ((image, VladVAConfig.image_prompt), (text, VladVAConfig.text_prompt))
    for sequence, prompt in prompts:
        ids = sequence.input_ids[sequence.prompt_start :][: sequence.prompt_length]
        assert spell(qwen_model, ids) == prompt

    answer = qwen_model.sequence(vladva.GENERATE_TEMPLATE, "Where?", grid=(1, 2))
    vision = "<|vision_start|><2><|vision_end|>"
    assert spell(qwen_model, answer.input_ids) == f"{system}{vision}Where?{end}"
    with pytest.raises(ValueError, match="special token"):
        qwen_model.text_sequence("a <|image_pad|> in it")


@torch.no_grad()
def test_an_embedding_depends_on_its_image_alone(qwen_model):
    """Other images in the batch and a long caption change nothing; breaking the grids does."""
    images = [Image.fromarray(seeded_image(size)) for size in ((45, 83), (70, 30), (33, 33))]
    together = qwen_model.encode_image(images)
    for image, embedding in zip(images, together):
        alone = qwen_model.encode_image([image])[0]
        # float32 in another order of summation
        torch.testing.assert_close(embedding, alone, atol=1e-5, rtol=0)
    rows = []
    for n, image in enumerate(images):
        rows.append({"image": image, "short": "a", "long": "Said at length." * n or None})
    batch = qwen_model.training_batch(rows)
    emb = qwen_model.embed_batch(batch)[0]
    torch.testing.assert_close(emb.image, together, atol=1e-5, rtol=0)

    # rows and columns exchanged
    swapped = batch.images.position_ids[[0, 2, 1]]
    embeds = qwen_model.inputs_embeds(batch.images, "image", batch.pixels)
    hidden_states = qwen_model.lvlm.decoder(embeds, swapped)
    summary = hidden_states[torch.arange(3), batch.images.summary_index]
    assert (summary_embedding(summary) - together)[:2].abs().max() > 1e-4


def test_a_fresh_adapter_changes_nothing_and_disabled_is_bit_for_bit(qwen_folder):
    """Soft prompts start as the hand prompts; positions come from the ids they replace."""
    image = Image.fromarray(seeded_image((45, 83)))
    untouched = VladVA.from_pretrained(qwen_folder)
    image_emb = untouched.encode_image([image])
    text_emb = untouched.encode_text(["a red circle"])
    answer = untouched.generate(image, "Where?", 8)
    model = VladVA.from_pretrained(qwen_folder, config=VladVAConfig(lora_rank=4))
    model.attach()
    torch.testing.assert_close(model.encode_image([image]), image_emb, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(["a red circle"]), text_emb, atol=1e-6, rtol=0)
    with torch.no_grad():
        for p in model.trained_parameters().values():
            p.add_(0.1 * torch.randn_like(p))
    assert (model.encode_image([image]) - image_emb).abs().max() > 0.01
    with model.adapter_disabled():
        assert torch.equal(model.encode_image([image]), image_emb)
        assert torch.equal(model.encode_text(["a red circle"]), text_emb)
        assert model.generate(image, "Where?", 8) == answer


@torch.no_grad()
def test_texts_of_several_lengths_embed_as_each_alone(qwen_model):
    texts = ["a red circle", "a blue square above a small green star", "2 dogs"]
    for text, embedding in zip(texts, qwen_model.encode_text(texts)):
        states, _ = qwen_model.hidden_states(qwen_model.text_batch([text]), "text")
        torch.testing.assert_close(summary_embedding(states)[0], embedding, atol=1e-5, rtol=0)


@pytest.mark.parametrize("parts", [{}, {"soft_prompts": False}, {"lora": False}])
@torch.no_grad()
def test_a_merged_folder_embeds_as_the_adapter_does(qwen_folder, tmp_path, parts):
    """Read back as a plain model, with the written prompts, tokenizer and pixel budget."""
    config = VladVAConfig(lora_rank=2, max_pixels=8 * 144, **parts)
    model = shaken(VladVA.from_pretrained(qwen_folder, config=config))
    merged = tmp_path / "merged"
    export.export(model, merged, max_shard_size="200KB")
    assert (merged / "model.safetensors.index.json").exists()
    plain = VladVA.from_pretrained(merged)
    assert (plain.image_processor.min_pixels, plain.image_processor.max_pixels) == (576, 1152)
    image = Image.fromarray(seeded_image((50, 40)))
    assert_close(plain.encode_image([image]), model.encode_image([image]))
    caption = "a red circle above a blue square"
    assert_close(plain.encode_text([caption]), model.encode_text([caption]))
    # older transformers find the image by the token before it
    ids = plain.image_sequence(grid=(2, 3)).input_ids
    start = ids.index(plain.lvlm.config.image_token_id)
    assert spell(plain, ids[start - 1 : start]) == "<|vision_start|>"


# --------------------------------------------------------------------- training and evaluation


def write_pairs(folder: Path, count: int = 24) -> Path:
    """Scenes of many sizes with a pairs file.

    Every fifth row lacks a long caption, every seventh a short one.
    """
    rng = random.Random(0)
    lines = []
    for i in range(count):
        row = scenes.scene_row(0, i)
        size = (rng.randint(20, 90), rng.randint(20, 90))
        row["image"].resize(size).save(folder / f"{i}.png")
        short = row["short"] if i % 7 != 1 else None
        long = row["long"] if i % 5 != 4 else None
        lines.append(json.dumps({"image": f"{i}.png", "short": short, "long": long}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("gradient_caching", [True, False])
def test_gradients_in_micro_batches_equal_those_in_one_piece(
    qwen_folder, scene_rows, gradient_caching
):
    """float64, images of four sizes, a row without a long caption and one without a short one."""
    config = VladVAConfig(lora_rank=4, learn_temperature=True, next_token_weight=0.7)
    model = shaken(VladVA.from_pretrained(qwen_folder, config=config)).double()
    sizes = [(45, 83), (30, 30), (90, 20), (45, 83), (60, 61)]
    rows = []
    for i, row in enumerate(scene_rows):
        rows.append(row | {"image": row["image"].resize(sizes[i % 5])})
    whole = model(model.training_batch(rows))
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in model.trained_parameters().items()}
    special = {"loss_parameters.log_temperature", "soft_prompts.image", "soft_prompts.text"}
    assert special < wanted.keys()
    assert all(gradient.abs().max() > 1e-6 for gradient in wanted.values())
    for micro_batch_size in (1, 3):
        measured, losses = gradients(model, rows, micro_batch_size, gradient_caching)
        total = losses[0] + config.next_token_weight * losses[1]
        assert total.item() == pytest.approx(whole.item(), abs=1e-9)
        for name, gradient in wanted.items():
            assert (measured[name] - gradient).abs().max() < 1e-9, name


def test_a_run_on_images_of_many_sizes_learns_and_resumes_to_the_byte(qwen_folder, tmp_path):
    """python train.py --model DIR for 20 steps; the same after SIGKILL and --resume."""
    flags = ["--model", qwen_folder, "--data", write_pairs(tmp_path), "--holdout", 4]
    flags += ["--steps", 20, "--batch-size", 8, "--micro-batch-size", 3, "--lora-rank", 4]
    flags += ["--save-every", 4, "--lr", 0.01]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    process = start_training(*flags, "--out", whole)
    code = kill_and_resume(flags, killed, after=9, number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "image to text R@1" in process.finish()[0]
    adapter = (whole / "adapter.safetensors").read_bytes()
    assert adapter == (killed / "adapter.safetensors").read_bytes()
    losses = [line["loss"] for line in read_lines(whole)]
    assert losses == [line["loss"] for line in read_lines(killed)]
    assert [line["step"] for line in read_lines(killed)] == list(range(1, 21))
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.5  # seen: 9.7 -> 8.1
    model = VladVA.from_pretrained(qwen_folder, adapter=whole)
    assert model.config.lora_rank == 4
    assert model.encode_image([tmp_path / "3.png"]).isfinite().all()


def test_the_command_lines_run_on_it(qwen_folder, tmp_path, capsys):
    """Held-out scenes, the model's own captions, and a run from the command line."""
    file = tmp_path / "scores.json"
    model = ["--model", str(qwen_folder), "--json", str(file)]
    scenes.main([*model, "--holdout", "6"])
    assert "R@10" in capsys.readouterr().out
    assert "image_to_text R@1" in json.loads(file.read_text())["scores"]
    scenes.main([*model, "--task", "captions", "--holdout", "2"])
    assert json.loads(file.read_text())["objects"] > 0
    out = tmp_path / "run"
    flags = ["--steps", "2", "--holdout", "4", "--batch-size", "4", "--lora-rank", "2"]
    training.main(["--model", str(qwen_folder), "--out", str(out), *flags])
    scores = json.loads((out / "scores.json").read_text())
    assert "text_to_image R@1" in scores["after"]["scores"]


# ------------------------------------------------------------------------------------ refusals

YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
SECTIONS = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}


@pytest.mark.parametrize(
    "change, message",
    [
        (YARN, "rotary positions: type is 'yarn'"),
        (SECTIONS, r"mrope_section is \[2, 2, 2\], wanted 3, in sum 8"),
        ({"rope_scaling": {"mrope_section": 8}}, "mrope_section is 8"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"use_sliding_window": True}, "text_config: use_sliding_window is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"image_token_id": None}, "image_token_id is None"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5"),
        ({"vision_config": None}, "vision_config is None, wanted a JSON object"),
        ({"vision_config": {"in_chans": 1}}, "vision_config: in_chans is 1"),
        ({"vision_config": {"patch_size": [14, 14]}}, r"patch_size is \[14, 14\]"),
        ({"vision_config": {"depth": 0}}, "vision: depth is 0, wanted 1 to 1000"),
        ({"vision_config": {"embed_dim": 50}}, "embed_dim 50, no multiple of 4 num_heads"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parse_config(qwen_config() | change)


BUDGET = {"min_pixels": 3136, "max_pixels": 10000}


@pytest.mark.parametrize(
    "settings, config, message",
    [
        ({}, {}, "images of None to None pixels"),
        ({"min_pixels": 3136.0, "max_pixels": 10000}, {}, "images of 3136.0 to 10000 pixels"),
        (BUDGET, {"min_pixels": 20000}, "images of 20000 to 10000 pixels"),
        (BUDGET, {"max_pixels": 700}, "at least 784"),
        (BUDGET | {"patch_size": 16}, {}, "patch_size is 16"),
        (BUDGET | {"do_resize": False}, {}, "do_resize is False"),
        (BUDGET, {"image_mode": "pad"}, "image_mode is 'pad'"),
    ],
)
def test_an_image_processor_that_cannot_be_honoured_is_refused(tmp_path, settings, config, message):
    with pytest.raises(ValueError, match=message):
        open_processor(tmp_path, settings, **config)


def test_folders_and_images_that_do_not_fit_are_refused(qwen_folder, random_folder, tmp_path):
    with pytest.raises(ValueError, match="no pixel budget to set"):
        VladVA.from_pretrained(random_folder, config=VladVAConfig(max_pixels=5000))
    folder = make_qwen_folder(tmp_path, qwen_config())
    weights = load_file(folder / "model.safetensors")
    weights["visual.merger.ln_k.weight"] = weights.pop("visual.merger.ln_q.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="projector.ln_k.weight is unexpected; projector.ln_q"):
        load_lvlm(folder)
    for token in ("<|im_start|>", "<|vision_end|>"):
        write_special_tokens(folder, [name for name in QWEN_SPECIAL if name != token])
        with pytest.raises(
            ValueError, match=f"lacks .*{re.escape(token)}.*the chat template needs"
        ):
            PatchProcessor(folder, parse_config(QWEN_2B), VladVAConfig())
    (folder / "tokenizer.json").write_bytes((random_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="wanted '<|image_pad|>' and an end token"):
        data.Tokenizer(folder, parse_config(qwen_config()))
