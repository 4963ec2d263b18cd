"""Qwen2-VL exactly: recorded outputs of transformers and peft, both forms of its folders, and the whole method on a small random one."""

import json
import random
import signal

import pytest
import torch
from conftest import (
    QWEN_2B,
    QWEN_PICTURES,
    RECORDED,
    drawn,
    drawn_picture,
    drawn_weight,
    lora_weight,
    make_qwen_folder,
    qwen_config,
    qwen_rows,
    shaken,
    shapes_by_layer,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from test_eval import flickr
from test_llava import close, recorded
from test_train import finished, gradients, kill_and_resume, spawned, steps_written
from torch.utils.flop_counter import FlopCounterMode

import data
import eval as benchmarks
import lora
import train as training
import vladva
from extras import qwen2_vl, scenes, studies
from model import LVLM, generate, load_lvlm, parse_config, place_image, to_ours
from train import TrainConfig
from vladva import Settings, VladVA

# ------------------------------------------------------------------------------------------------------ as exact as transformers


def nested(raw):
    """The config.json that transformers 5 writes for the same model."""
    outside = (
        "model_type",
        "vision_config",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    )
    rope = {
        "rope_theta": raw["rope_theta"],
        "rope_type": "default",
        "type": "mrope",
        **raw["rope_scaling"],
    }
    text = {
        key: value
        for key, value in raw.items()
        if key not in (*outside, "rope_theta", "rope_scaling", "tie_word_embeddings")
    }
    vision = raw["vision_config"] | {
        "model_type": "qwen2_vl_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }
    return {key: raw[key] for key in outside} | {"tie_word_embeddings": True, "vision_config": vision,
                                                 "text_config": text | {"model_type": "qwen2_vl_text", "rope_parameters": rope}}  # fmt: skip


def drawn_folder(folder, raw, layout):
    """The drawn weights of a config, as the hub has them or as transformers 4.52 and later names them."""
    with torch.device("meta"):
        lvlm = LVLM(parse_config(raw))
    shapes = {lvlm.config.hub_name(name): p.shape for name, p in lvlm.named_parameters()}
    tensors = {name: drawn_weight(name, shape) for name, shape in shapes.items()}
    if layout != "hub":
        longer = {"visual.": "model.visual.", "model.": "model.language_model."}
        tensors = {
            next(
                new + name.removeprefix(old) for old, new in longer.items() if name.startswith(old)
            ): t
            for name, t in tensors.items()
        }
    (folder / "config.json").write_text(json.dumps(raw if layout == "hub" else nested(raw)))
    save_file(tensors, folder / "model.safetensors")
    return folder


def outputs(lvlm, process, which):
    """What record_qwen.py records, from this project's functions, for some of the pictures in one right-padded batch."""
    patches = [process(Image.fromarray(drawn_picture(QWEN_PICTURES[n]))) for n in which]
    grids, every = (
        [lvlm.config.grid(p) for p in patches],
        qwen_rows(qwen_config(first=80), [(3, 4), (4, 2)]),
    )
    rows, found = [every[n] for n in which], {}
    axes = [lvlm.config.positions(row, grid) for row, grid in zip(rows, grids)]
    slots = [
        (b, t)
        for b, row in enumerate(rows)
        for t, token in enumerate(row)
        if token == lvlm.config.image_token_id
    ]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    padded_axes = torch.nn.utils.rnn.pad_sequence(
        [each.T for each in axes], batch_first=True
    ).permute(2, 0, 1)
    features = lvlm.image_features(lvlm.config.stack(patches))
    embeds = place_image(lvlm.embed(padded), features, torch.tensor(slots).T)
    hidden, parts = (
        lvlm.decoder(embeds, axes=padded_axes),
        features.split([r * c for r, c in grids]),
    )
    greedy = generate(
        lvlm,
        embeds,
        torch.tensor([len(row) for row in rows]),
        eos_id=-1,
        max_new_tokens=16,
        axes=padded_axes,
    )
    for b, n in enumerate(which):
        states = hidden[b, : len(rows[b])]
        found |= {
            f"patches.{n}": patches[b].flatten(0, 2),
            f"features.{n}": parts[b],
            f"positions.{n}": axes[b],
            f"hidden.{n}": states,
        }
        found |= {f"logits.{n}": lvlm.head(states), f"greedy.{n}": torch.tensor(greedy[b])}
    return found


@pytest.mark.parametrize("layout", ["hub", "transformers 4.52"])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1), (1, 0)])
@torch.no_grad()
def test_outputs_equal_transformers_alone_and_in_one_batch(which, layout, tmp_path):
    """Patches of odd-sized pictures, features, three-axis positions, hidden states, logits and 16 greedy tokens, in both forms of a folder."""
    reference, about = recorded("qwen")
    lvlm = load_lvlm(drawn_folder(tmp_path, about["config"], layout))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about["processor"]))
    found = outputs(lvlm, qwen2_vl.PatchProcessor(tmp_path, lvlm.config, "crop"), which)
    assert found.keys() == {name for name in reference if int(name[-1]) in which}
    for name, value in found.items():
        exact = name.startswith(("positions", "greedy"))
        assert (
            torch.equal(value, reference[name]) if exact else close(value, reference[name]) is None
        ), name


def test_sizes_and_patches_equal_transformers(tmp_path):
    """smart_resize for three pixel budgets, from 1 x 1 to 5000 x 3000 and 200 times as long as wide; the hub's patches of 14 pixels."""
    reference, _ = recorded("qwen_sizes")
    config = parse_config(QWEN_2B)
    sized = lambda fewest, most: processor(tmp_path, config, min_pixels=fewest, max_pixels=most)
    found = [
        sized(*budget).target(FakePicture(w, h)) for w, h, *budget in reference["asked"].tolist()
    ]
    assert found == list(map(tuple, reference["given"].tolist()))
    patches = sized(3136, 4 * 784)(Image.fromarray(drawn_picture((75, 45))))
    torch.testing.assert_close(
        patches.flatten(0, 2), reference["patches"], atol=2e-6, rtol=0
    )  # float32 against float64 arithmetic


class FakePicture:
    """A size."""

    def __init__(self, width, height):
        self.size, self.width, self.height = (width, height), width, height


def processor(folder, config, budget=(None, None), mode="crop", **raw):
    (folder / "preprocessor_config.json").write_text(json.dumps(raw))
    return qwen2_vl.PatchProcessor(folder, config, mode, None, budget)


def test_lora_on_biased_linears_equals_peft_before_and_after_merging(tmp_path):
    reference, about = recorded("qwen_lora")
    decoder = load_lvlm(drawn_folder(tmp_path, about["config"], "hub")).decoder
    lora.attach(decoder, about["rank"], about["alpha"])
    embeds = drawn("embeds", (2, 7, about["config"]["hidden_size"]))
    with torch.no_grad():
        for name, layer in lora.lora_layers(decoder):
            for part in ("lora_a", "lora_b"):
                getattr(layer, part).copy_(lora_weight(name, part, getattr(layer, part).shape))
        close(decoder(embeds), reference["hidden"])
        lora.merge(decoder)
        close(decoder(embeds), reference["merged"])


@pytest.mark.parametrize("raw", [QWEN_2B, nested(QWEN_2B)], ids=["hub", "transformers 5"])
def test_the_full_size_model_has_every_key_and_shape_of_transformers(raw):
    """Qwen2-VL-2B on the meta device; tied, so without a head of its own."""
    with torch.device("meta"):
        lvlm = LVLM(parse_config(raw))
    theirs = json.loads((RECORDED / "qwen_shapes.json").read_text())["2b"]
    expected = {
        to_ours(name.replace("*", "7")).replace(".7.", ".*."): shape
        for name, shape in theirs.items()
    }
    assert shapes_by_layer(lvlm.named_parameters()) == expected
    assert (
        lvlm.head.weight is lvlm.decoder.embed_tokens.weight
        and sum(p.numel() for p in lvlm.parameters()) == 2_208_985_600
    )
    lora.attach(lvlm.decoder, rank=16, alpha=16)
    assert sum(p.numel() for name, p in lvlm.named_parameters() if "lora_" in name) == 18_464_768


# ------------------------------------------------------------------------------------------------------ sequences


def spelled(model, ids):
    """The text of ids, special tokens and all, with one image token where N stand."""
    text = model.tokenizer.inner.decode(ids, skip_special_tokens=False)
    many = text.count("<|image_pad|>")
    return text.replace("<|image_pad|>" * many, f"<{many}>") if many else text


def test_sequences_are_the_chat_template_around_the_papers_prompts(qwen_model):
    """The summary token is the line feed after "assistant"; the span of the prompt is the prompt; the long caption ends in one <|im_end|>."""
    image, text = (
        qwen_model.image_sequence("A red circle.", grid=(2, 3)),
        qwen_model.text_sequence("a red bus"),
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end, asked = (
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\nDescribe the image in detail.",
    )
    shown = f"Summarize the provided image in one word: <|vision_start|><6><|vision_end|>{end}"
    assert spelled(qwen_model, image.ids[: image.summary + 1]) == system + shown
    assert spelled(qwen_model, image.ids) == f"{system}{shown}{asked}{end}A red circle.<|im_end|>"
    assert (
        spelled(qwen_model, text.ids)
        == f"{system}Summarize the provided text in one word: a red bus{end}"
        and text.summary == len(text.ids) - 1
    )
    assert (
        spelled(qwen_model, image.ids[image.loss_start :]) == "A red circle.<|im_end|>"
        and image.image_tokens == 6
    )
    for sequence, prompt in ((image, Settings.image_prompt), (text, Settings.text_prompt)):
        assert (
            spelled(
                qwen_model,
                sequence.ids[sequence.prompt_slot : sequence.prompt_slot + sequence.prompt_length],
            )
            == prompt
        )
    answer = qwen_model.sequence(vladva.GENERATE_TEMPLATE, "Where?", grid=(1, 2))
    assert (
        spelled(qwen_model, answer.ids) == f"{system}<|vision_start|><2><|vision_end|>Where?{end}"
    )
    with pytest.raises(ValueError, match="special token"):
        qwen_model.text_sequence("a <|image_pad|> in it")


@torch.no_grad()
def test_an_embedding_depends_on_its_picture_alone(qwen_model):
    """Pictures of other sizes before and after it in the batch, and a long caption behind it, change nothing; breaking the grids does."""
    pictures = [Image.fromarray(drawn_picture(size)) for size in ((45, 83), (70, 30), (33, 33))]
    together, alone = (
        qwen_model.encode_image(pictures),
        [qwen_model.encode_image([picture])[0] for picture in pictures],
    )
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # float32 in another order of summation
    rows = [
        {"image": picture, "short": "a", "long": "Told at length." * n or None}
        for n, picture in enumerate(pictures)
    ]
    batch = qwen_model.training_batch(rows)
    torch.testing.assert_close(qwen_model.outputs(batch).image_emb, together, atol=1e-5, rtol=0)
    turned = torch.stack(
        [batch.images.axes[0], batch.images.axes[2], batch.images.axes[1]]
    )  # rows and columns exchanged
    hidden = qwen_model.lvlm.decoder(
        qwen_model.embeds(batch.images, "image", batch.pixels),
        rows=batch.images.states[:3],
        axes=turned,
    )
    assert (vladva.summary_embedding(hidden) - together)[:2].abs().max() > 1e-4


def test_a_fresh_adapter_changes_nothing_and_off_is_bit_for_bit(qwen_folder):
    """Soft prompts start as the hand prompts, with positions that come from the ids they replace."""
    picture, untouched = (
        Image.fromarray(drawn_picture((45, 83))),
        VladVA.from_pretrained(qwen_folder),
    )
    model = VladVA.from_pretrained(qwen_folder, settings=Settings(rank=4))
    wanted = [
        untouched.encode_image([picture]),
        untouched.encode_text(["a red circle"]),
        untouched.generate(picture, "Where?", 8),
    ]
    model.attach()
    torch.testing.assert_close(model.encode_image([picture]), wanted[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(["a red circle"]), wanted[1], atol=1e-6, rtol=0)
    with torch.no_grad():
        for _, p in model.trained():
            p.add_(0.1 * torch.randn_like(p))
    assert (model.encode_image([picture]) - wanted[0]).abs().max() > 0.01
    with model.adapter_disabled():
        assert torch.equal(model.encode_image([picture]), wanted[0]) and torch.equal(
            model.encode_text(["a red circle"]), wanted[1]
        )
        assert model.generate(picture, "Where?", 8) == wanted[2]


@torch.no_grad()
def test_texts_through_the_shared_prefix_embed_as_whole_sequences(qwen_model):
    texts = ["a red circle", "a blue square above a small green star", "2 dogs"]
    for text, found in zip(texts, qwen_model.encode_text(texts)):
        batch = vladva.collate([qwen_model.text_sequence(text)], qwen_model.tokenizer.pad_id)
        torch.testing.assert_close(
            vladva.summary_embedding(qwen_model.states(batch, "text"))[0], found, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("parts", [{}, {"soft_prompts": False}, {"lora": False}])
@torch.no_grad()
def test_a_merged_folder_embeds_as_the_adapter_does(qwen_folder, tmp_path, parts):
    """Read back as a plain model, with the written prompt strings tokenised by the written tokenizer and pictures by the written budget."""
    model = shaken(
        VladVA.from_pretrained(qwen_folder, settings=Settings(rank=2, max_pixels=8 * 144, **parts))
    )
    model.save_merged(tmp_path / "merged", shard_bytes=200_000)
    plain, prompts = (
        VladVA.from_pretrained(tmp_path / "merged"),
        json.loads((tmp_path / "merged" / "vladva.json").read_text()),
    )
    picture, caption = Image.fromarray(drawn_picture((50, 40))), "a red circle above a blue square"
    encoded, (pixels, (grid,)) = (
        plain.tokenizer.encode(prompts["image"]).ids,
        plain.prepared([picture]),
    )
    assert grid == (2, 3) and encoded.count(plain.tokenizer.image_id) == 1
    slot = encoded.index(plain.tokenizer.image_id)
    ids = encoded[:slot] + [plain.tokenizer.image_id] * 6 + encoded[slot + 1 :]
    assert (
        spelled(plain, ids[slot - 1 : slot]) == "<|vision_start|>"
    )  # older transformers find the picture by it
    places = torch.stack([torch.zeros(6, dtype=torch.long), torch.arange(slot, slot + 6)])
    embeds = place_image(
        plain.lvlm.embed(torch.tensor([ids])), plain.lvlm.image_features(pixels), places
    )
    hidden = plain.lvlm.decoder(embeds, axes=plain.lvlm.config.positions(ids, grid)[:, None])
    close(vladva.summary_embedding(hidden[:, -1]), model.encode_image([picture]))
    text_ids = torch.tensor(
        [plain.tokenizer.encode(prompts["text"].replace("{caption}", caption)).ids]
    )
    close(
        vladva.summary_embedding(plain.lvlm.decoder(plain.lvlm.embed(text_ids))[:, -1]),
        model.encode_text([caption]),
    )
    assert (
        prompts["image_mode"] == "576 to 1152 pixels"
        and (tmp_path / "merged" / "model.safetensors.index.json").exists()
    )


# ------------------------------------------------------------------------------------------------------ training and evaluation


def pictured(folder, count=24):
    """Scenes of many sizes with a pairs file; every fifth row lacks a long caption, every seventh a short one."""
    rng, lines = random.Random(0), []
    for i in range(count):
        row = scenes.scene_row(0, i)
        row["image"].resize((rng.randint(20, 90), rng.randint(20, 90))).save(folder / f"{i}.png")
        lines.append(
            {
                "image": f"{i}.png",
                "short": row["short"] if i % 7 != 1 else None,
                "long": row["long"] if i % 5 != 4 else None,
            }
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("grad_cache", [True, False])
def test_gradients_in_micro_batches_equal_those_in_one_piece(qwen_folder, scene_rows, grad_cache):
    """float64, pictures of four sizes, captions of mixed length, a row without a long caption and one without a short one."""
    model = shaken(
        VladVA.from_pretrained(
            qwen_folder, settings=Settings(rank=4, learn_temperature=True, next_token_weight=0.7)
        )
    ).double()
    rows = [
        dict(
            row,
            image=row["image"].resize([(45, 83), (30, 30), (90, 20), (45, 83), (60, 61)][i % 5]),
        )
        for i, row in enumerate(scene_rows)
    ]
    model.zero_grad()
    whole = model(model.training_batch(rows))
    whole.backward()
    wanted = {name: p.grad.clone() for name, p in model.trained()}
    assert {"log_temperature", "soft_prompts.image", "soft_prompts.text"} < wanted.keys() and all(
        g.abs().max() > 1e-6 for g in wanted.values()
    )
    for micro_batch in (1, 3):
        found, losses = gradients(model, rows, micro_batch, grad_cache)
        assert model.overall_loss(*losses).item() == pytest.approx(whole.item(), abs=1e-9)
        assert all((found[name] - gradient).abs().max() < 1e-9 for name, gradient in wanted.items())


def test_the_arithmetic_of_a_step_is_what_torch_counts(qwen_folder, scene_rows):
    """As in test_train.py, within 5 % for biases and small change."""
    model = VladVA.from_pretrained(qwen_folder, settings=Settings(rank=4))
    model.attach()
    parts = [model.training_batch(scene_rows[i : i + 2]) for i in range(0, 8, 2)]
    with FlopCounterMode(display=False) as counter:
        training.backward(model, parts, False)
    computed, _ = training.step_flops(
        model, parts, TrainConfig(grad_cache=False, checkpointing=False)
    )
    assert counter.get_total_flops() == pytest.approx(computed, rel=0.05)


def test_a_run_on_pictures_of_many_sizes_learns_and_resumes_to_the_byte(qwen_folder, tmp_path):
    """python train.py --model DIR for 20 steps in micro-batches; the same after SIGKILL and --resume."""
    flags = ["--model", qwen_folder, "--data", pictured(tmp_path), "--holdout", 4, "--steps", 20, "--batch", 8, "--micro-batch", 3, "--rank", 4,
             "--save-every", 4, "--lr", 0.01]  # fmt: skip
    whole = spawned(*flags, "--out", tmp_path / "whole")
    assert kill_and_resume(flags, tmp_path / "killed", after=9, number=signal.SIGKILL) == -9
    assert "image to text R@1" in finished(whole)
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "killed")]
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "killed")
    ]
    assert (
        files[0] == files[1]
        and losses[0] == losses[1]
        and steps_written(tmp_path / "killed") == list(range(1, 21))
    )
    assert sum(losses[0][-4:]) / 4 < sum(losses[0][:4]) / 4 - 0.5  # seen: 9.7 -> 8.1
    model = VladVA.from_pretrained(qwen_folder, adapter=tmp_path / "whole")
    assert model.settings.rank == 4 and model.encode_image([tmp_path / "3.png"]).isfinite().all()


def test_the_command_lines_run_on_it(qwen_folder, tmp_path, capsys):
    """Held-out scenes, captions told and questions answered, a published benchmark, a study of pictures that are not square, the rival's loss."""
    file = tmp_path / "scores.json"
    flickr(tmp_path)
    benchmarks.main(["--model", str(qwen_folder), "--task", "flickr30k", "--folder", str(tmp_path)])
    assert "3 pictures, 6 captions" in capsys.readouterr().out
    scenes.main(
        ["--model", str(qwen_folder), "--gallery", "6", "--items", "2", "--json", str(file)]
    )
    assert (
        "image to text R@10" in capsys.readouterr().out
        and json.loads(file.read_text())["image_mode"] == "576 to 1728 pixels"
    )
    scenes.main(
        ["--model", str(qwen_folder), "--task", "captions", "--items", "2", "--json", str(file)]
    )
    assert json.loads(file.read_text())["objects"] > 0
    studies.main(
        [
            "--model",
            str(qwen_folder),
            "attention",
            "--data",
            str(pictured(tmp_path)),
            "--items",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    assert json.loads((tmp_path / "attention.json").read_text())["pictures"] > 0
    flags = [
        "--steps",
        "2",
        "--eval-gallery",
        "4",
        "--eval-items",
        "1",
        "--batch",
        "4",
        "--rank",
        "2",
        "--max-pixels",
        "1152",
    ]
    training.main(
        [
            "--model",
            str(qwen_folder),
            "--out",
            str(tmp_path / "run"),
            "--loss",
            "vladva+text-text",
            *flags,
        ]
    )
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (
        about["settings"]["max_pixels"] == 1152
        and json.loads((tmp_path / "run" / "scores.json").read_text())["after"]["gallery"] == 4
    )


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary positions .'yarn'"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}},
            r"mrope_section is \(2, 2, 2\), but a head has 8",
        ),
        ({"use_sliding_window": True}, "qwen2_vl text_config.use_sliding_window is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"image_token_id": None}, "no image_token_id"),
        ({"vision_config": {"in_chans": 1}}, "qwen2_vl vision_config.in_chans is 1"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parse_config(qwen_config() | change)


def test_folders_and_requests_that_do_not_fit_are_refused(qwen_folder, random_folder, tmp_path):
    config = parse_config(QWEN_2B)
    good = {"min_pixels": 3136, "max_pixels": 10000}
    for kind, message in (({}, "pictures of None to None pixels"), (good | {"budget": (20000, None)}, "pictures of 20000 to 10000"),
                          (good | {"patch_size": 16}, "says {'patch_size': 16}"), (good | {"mode": "pad"}, "Qwen2-VL takes pictures whole"),
                          (good | {"budget": (None, 700)}, "at least 784")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            processor(tmp_path, config, **kind)
    with pytest.raises(ValueError, match="no side over 200 times the other"):
        processor(tmp_path, config, **good).target(FakePicture(2001, 10))
    with pytest.raises(ValueError, match="LLaVA-1.5 takes every picture at 96 x 96"):
        VladVA.from_pretrained(random_folder, settings=Settings(max_pixels=5000))
    moved = make_qwen_folder(tmp_path, qwen_config())
    weights = load_file(moved / "model.safetensors")
    weights["visual.merger.ln_k.weight"] = weights.pop("visual.merger.ln_q.weight")
    save_file(weights, moved / "model.safetensors")
    with pytest.raises(
        ValueError,
        match="1 missing: visual.merger.ln_q.weight; 1 unexpected: visual.merger.ln_k.weight",
    ):
        load_lvlm(moved)
    (moved / "tokenizer.json").write_bytes((random_folder / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="do not belong together"):
        data.Tokenizer(moved, parse_config(qwen_config()))
