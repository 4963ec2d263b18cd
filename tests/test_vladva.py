"""The method: closed forms of the losses and measures, invariances of the embeddings, soft prompts, saving and loading."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import make_folder, random_config, shaken

import data
import lora
import model as lvlm_module
import vladva
from extras import scenes
from vladva import Settings, VladVA

ROUNDING = dict(atol=2e-5, rtol=2e-5)  # float32 sums in another order, on embeddings of length 1


# ------------------------------------------------------------------------------------------------------ Eq. 1


@pytest.mark.parametrize("batch", [2, 7, 64])
def test_contrastive_loss_is_2_log_b_when_all_rows_coincide(batch):
    emb = F.normalize(torch.ones(batch, 5), dim=-1)
    assert vladva.contrastive_loss(emb, emb, 0.05).item() == pytest.approx(
        2 * math.log(batch), rel=1e-6
    )


def test_contrastive_loss_of_perfect_pairs_goes_to_zero_with_the_temperature():
    emb = torch.eye(6)
    losses = [vladva.contrastive_loss(emb, emb, t).item() for t in (1.0, 0.3, 0.05)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1e-6
    assert losses[0] == pytest.approx(
        2 * math.log(1 + 5 * math.exp(-1)), rel=1e-6
    )  # one cosine of 1 among five of 0


def test_contrastive_loss_equals_the_printed_sum_over_k():
    torch.manual_seed(0)
    v, t = (F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    s = lambda k, j: math.exp((v[k] @ t[j]).item() / 0.2)
    printed = sum(
        -math.log(s(k, k) / sum(s(k, j) for j in range(5)))
        - math.log(s(k, k) / sum(s(j, k) for j in range(5)))
        for k in range(5)
    )
    assert vladva.contrastive_loss(v, t, 0.2).item() == pytest.approx(printed / 5, rel=1e-9)


@pytest.mark.parametrize("a, b", [((3, 4), (2, 4)), ((1, 4), (1, 4))])
def test_contrastive_loss_refuses_unequal_or_single_rows(a, b):
    with pytest.raises(ValueError, match="B >= 2"):
        vladva.contrastive_loss(torch.ones(a), torch.ones(b), 1.0)


# ------------------------------------------------------------------------------------------------------ E5-V's loss


def test_text_text_loss_against_a_loop_and_closed_forms():
    """Each sentence among all paraphrases and all hard negatives, one way; log 2 B when all coincide, 0 when all are apart."""
    torch.manual_seed(0)
    triples = F.normalize(torch.randn(4, 3, 8, dtype=torch.float64), dim=-1)
    others = [*triples[:, 1], *triples[:, 2]]
    scores = [
        [math.exp((triples[i, 0] @ other).item() / 0.2) for other in others] for i in range(4)
    ]
    naive = -sum(math.log(row[i] / sum(row)) for i, row in enumerate(scores)) / 4
    assert vladva.text_text_loss(triples, 0.2).item() == pytest.approx(naive, rel=1e-9)
    assert vladva.text_text_loss(
        F.normalize(torch.ones(5, 3, 4), dim=-1), 0.05
    ).item() == pytest.approx(math.log(10), rel=1e-6)
    apart = torch.eye(4)[:2, None].expand(2, 3, 4).clone()
    apart[:, 2] = torch.eye(4)[2:]
    assert vladva.text_text_loss(apart, 0.01).item() < 1e-9


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "clip"},
        {"text_template": "no caption {prompt}"},
        {"image_template": "{prompt} {prompt} <image>"},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Settings(**settings)


@pytest.mark.parametrize(
    "settings",
    [vladva.E5V, {"text_template": "{caption} {prompt}", "image_template": "<image> {prompt}"}],
)
def test_templates_of_any_order_embed_at_their_last_token(random_folder, scene_rows, settings):
    """E5-V's stand with the prompt behind; soft prompts still take the hand prompt's place, and change nothing at first."""
    model = VladVA.from_pretrained(
        random_folder, settings=Settings(**{**settings, "soft_prompts": True})
    )
    sequence = model.text_sequence("a red circle")
    assert sequence.summary == len(sequence.ids) - 1
    span = sequence.ids[sequence.prompt_slot : sequence.prompt_slot + sequence.prompt_length]
    assert model.tokenizer.decode(span).strip() == model.settings.text_prompt
    before = (
        model.encode_text(["a red circle", "two"]),
        model.encode_image([scene_rows[0]["image"]]),
    )
    model.attach()
    torch.testing.assert_close(
        (model.encode_text(["a red circle", "two"]), model.encode_image([scene_rows[0]["image"]])),
        before,
        **ROUNDING,
    )


# ------------------------------------------------------------------------------------------------------ Eq. 2


def test_next_token_loss_is_log_v_under_a_uniform_head():
    assert vladva.next_token_loss(
        torch.randn(4, 6), torch.tensor([0, 3, 9, 1]), torch.zeros(10, 6)
    ).item() == pytest.approx(math.log(10), rel=1e-6)


def test_next_token_loss_equals_a_naive_loop():
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(5, 6), torch.randn(10, 6), [3, 1, 4, 1, 5]
    naive = (
        -sum(math.log(torch.softmax(head @ h, 0)[u].item()) for h, u in zip(hidden, targets)) / 5
    )
    assert vladva.next_token_loss(hidden, torch.tensor(targets), head).item() == pytest.approx(
        naive, rel=1e-5
    )


def test_next_token_loss_in_chunks_has_the_value_and_gradients_of_plain_cross_entropy(monkeypatch):
    """Chunks of 3 rows of 8, as a part of a batch of 20 tokens; for the states, and for the head as in pre-training."""
    monkeypatch.setattr(vladva.ChunkedCrossEntropy, "CHUNK", 3)
    hidden, head = (
        torch.randn(8, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(10, 6, dtype=torch.float64, requires_grad=True),
    )
    targets = torch.randint(0, 10, (8,))
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum") / 20
    chunked = vladva.next_token_loss(hidden, targets, head, total=20)
    assert chunked.item() == pytest.approx(plain.item(), abs=1e-12)
    for a, b in zip(
        torch.autograd.grad(2 * chunked, (hidden, head)),
        torch.autograd.grad(2 * plain, (hidden, head)),
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_next_token_loss_refuses_no_token():
    with pytest.raises(ValueError, match="no long caption"):
        vladva.next_token_loss(
            torch.randn(0, 6), torch.tensor([], dtype=torch.long), torch.zeros(10, 6)
        )


def test_loss_counts_the_long_captions_tokens_and_the_end_and_nothing_else(
    random_model, scene_rows
):
    batch = random_model.training_batch(scene_rows)
    texts = [
        random_model.tokenizer.inner.encode(" " + row["long"], add_special_tokens=False).ids
        + [random_model.tokenizer.eos_id]
        for row in scene_rows
        if row["long"]
    ]
    assert batch.images.targets.tolist() == [token for ids in texts for token in ids]
    following = batch.images.ids.flatten()[batch.images.loss_index + 1]
    assert torch.equal(following, batch.images.targets)


def test_the_overall_loss_is_eq_1_plus_weighted_eq_2_from_separate_forwards(
    random_model, scene_rows
):
    """One forward of the image sequence gives both losses: the same as embedding without the long caption, and captioning apart."""
    with torch.no_grad():
        together = random_model(random_model.training_batch(scene_rows))
        shorts = [row for row in scene_rows if row["short"]]
        image_emb = random_model.encode_image([row["image"] for row in shorts])
        text_emb = random_model.encode_text([row["short"] for row in shorts])
        longs = random_model.training_batch(
            [dict(row, short=None) for row in scene_rows if row["long"]]
        )
        _, next_token = random_model.losses(random_model.outputs(longs), longs.images.targets)
    apart = (
        vladva.contrastive_loss(image_emb, text_emb, random_model.temperature)
        + random_model.settings.next_token_weight * next_token
    )
    torch.testing.assert_close(
        together, apart, atol=1e-4, rtol=1e-4
    )  # cosines are divided by a temperature of .05


# ------------------------------------------------------------------------------------------------------ Sec. 3.1 measures


def test_entropy_of_uniform_and_of_certain_distributions():
    assert vladva.output_entropy(torch.zeros(2, 50)).tolist() == pytest.approx(
        [math.log(50)] * 2, rel=1e-6
    )
    assert vladva.output_entropy(torch.tensor([100.0, 0.0, 0.0])).item() == pytest.approx(
        0, abs=1e-6
    )


def test_cumulative_variance_of_rank_one_and_of_isotropic_embeddings():
    assert vladva.cumulative_variance(torch.outer(torch.arange(4.0), torch.ones(6)))[
        0
    ].item() == pytest.approx(1, abs=1e-6)
    isotropic = torch.cat([torch.eye(3), -torch.eye(3)])
    assert vladva.cumulative_variance(isotropic).tolist() == pytest.approx(
        [1 / 3, 2 / 3, 1.0], abs=1e-6
    )
    with pytest.raises(ValueError, match="at least 2"):
        vladva.cumulative_variance(torch.ones(1, 3))
    with pytest.raises(ValueError, match="all equal"):
        vladva.cumulative_variance(torch.ones(4, 3))


def test_components_for_a_share_of_the_variance_in_closed_form():
    """Rank one needs one component; ten equal ones need nine for 90 %, on whichever side rounding falls."""
    assert (
        vladva.components_for(
            vladva.cumulative_variance(torch.outer(torch.arange(5.0), torch.ones(3)))
        )
        == 1
    )
    equal = torch.cat([torch.eye(10), -torch.eye(10)])
    assert [
        vladva.components_for(vladva.cumulative_variance(equal), share)
        for share in (0.05, 0.1, 0.9, 1.0)
    ] == [1, 1, 9, 10]


def test_embeddings_have_length_one_and_similarity_is_the_cosine(random_model, scene_rows):
    image_emb, text_emb = (
        random_model.encode_image([scene_rows[0]["image"]]),
        random_model.encode_text(["a red circle", "a blue ring"]),
    )
    assert torch.cat([image_emb, text_emb]).norm(dim=-1).tolist() == pytest.approx(
        [1, 1, 1], abs=1e-5
    )
    assert vladva.similarity(image_emb, text_emb)[0, 1].item() == pytest.approx(
        F.cosine_similarity(image_emb[0], text_emb[1], dim=0).item(), abs=1e-6
    )
    assert image_emb.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ Sec. 3.2.3 templates


def test_the_summary_token_ends_the_template_and_the_prompt_span_is_the_prompt(random_model):
    tokenizer, settings = random_model.tokenizer, random_model.settings
    for sequence, prompt in (
        (random_model.image_sequence(), settings.image_prompt),
        (random_model.text_sequence("a red circle"), settings.text_prompt),
    ):
        assert sequence.ids[0] == tokenizer.bos_id and sequence.ids.count(tokenizer.bos_id) == 1
        assert sequence.summary == len(sequence.ids) - 1
        assert tokenizer.decode(sequence.ids[-2:]) == "ASSISTANT:"
        span = sequence.ids[sequence.prompt_slot : sequence.prompt_slot + sequence.prompt_length]
        assert tokenizer.decode(span).strip() == prompt


def test_image_tokens_stand_where_image_stands(random_model):
    sequence = random_model.image_sequence("a long caption")
    image_id, count = random_model.tokenizer.image_id, random_model.lvlm.config.num_image_tokens
    assert sequence.ids.count(image_id) == count
    assert sequence.ids[sequence.image_slot : sequence.image_slot + count] == [image_id] * count
    assert (
        random_model.tokenizer.decode(sequence.ids[sequence.loss_start :]).strip()
        == "a long caption"
    )
    assert sequence.summary == random_model.image_sequence().summary


def test_the_long_caption_does_not_change_f_v(random_model, scene_rows):
    first = dict(scene_rows[0], short="a")  # rows without a short caption have no embedding
    batch = random_model.training_batch(
        [first, dict(first, long=None), dict(first, long="entirely other words")]
    )
    with torch.no_grad():
        emb = random_model.outputs(batch).image_emb
    torch.testing.assert_close(emb[1:], emb[:1].expand(2, -1), **ROUNDING)


def test_without_the_causal_mask_the_long_caption_would_change_f_v(
    random_model, scene_rows, monkeypatch
):
    """The guard of the test above: it fails as soon as attention sees what comes after."""
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, is_causal=False, **rest: attend(q, k, v, **rest),
    )
    first = dict(scene_rows[0], short="a")
    batch = random_model.training_batch([first, dict(first, long="entirely other words")])
    with torch.no_grad():
        emb = random_model.outputs(batch).image_emb
    assert (emb[0] - emb[1]).abs().max() > 1e-3


def test_padding_order_and_other_rows_do_not_change_an_embedding(random_model, scene_rows):
    texts = [
        "a red circle",
        "a much longer caption with a blue square and a green star on a gray background",
        "a ring",
    ]
    together, alone = (
        random_model.encode_text(texts),
        torch.cat([random_model.encode_text([text]) for text in texts]),
    )
    torch.testing.assert_close(together, alone, **ROUNDING)
    torch.testing.assert_close(random_model.encode_text(texts[::-1]), together.flip(0), **ROUNDING)
    pictures = [row["image"] for row in scene_rows[:3]]
    torch.testing.assert_close(
        random_model.encode_image(pictures, batch_size=2),
        torch.cat([random_model.encode_image([p]) for p in pictures]),
        **ROUNDING,
    )


def test_any_text_encodes_and_decodes_without_loss(random_model):
    for text in ("a red circle", "Ein Würfel – größer als 3 Äpfel!", "日本語 and {braces} \t tabs"):
        assert random_model.tokenizer.decode(random_model.tokenizer.encode(text).ids) == text
        assert random_model.encode_text([text]).isfinite().all()


@pytest.mark.parametrize(
    "text, message",
    [("  ", "empty text"), ("a <image> here", "special token"), ("word " * 3000, "positions")],
)
def test_refused_texts(random_model, text, message):
    with pytest.raises(ValueError, match=message):
        random_model.encode_text([text])


def test_one_string_instead_of_a_list_is_refused(random_model):
    with pytest.raises(ValueError, match="list of strings"):
        random_model.encode_text("a red circle")


def test_embeddings_of_a_layer_are_the_states_behind_it(random_model, scene_rows):
    """Up to the last layer without the final norm; the last with it, as the embeddings themselves."""
    pictures, texts = (
        [row["image"] for row in scene_rows[:2]],
        ["a red circle", "a blue square left of a star"],
    )
    layers = random_model.lvlm.decoder.layers
    states = []
    handle = layers[0].register_forward_hook(lambda block, inputs, out: states.append(out))
    random_model.encode_image(pictures)
    handle.remove()
    summary = random_model.image_sequence().summary
    torch.testing.assert_close(
        random_model.image_states(pictures, depth=1), states[0][:, summary], **ROUNDING
    )
    for one, other in (
        (random_model.image_states, random_model.encode_image),
        (random_model.text_states, random_model.encode_text),
    ):
        items = pictures if one == random_model.image_states else texts
        assert torch.equal(vladva.summary_embedding(one(items, depth=len(layers))), other(items))
    alone = torch.cat([random_model.text_states([text], depth=1) for text in texts])
    torch.testing.assert_close(random_model.text_states(texts, depth=1), alone, **ROUNDING)


def test_other_hand_prompts_are_those_of_a_model_made_with_them(
    random_folder, random_model, scene_rows
):
    prompts = {
        "image_prompt": "Name one thing in the image.",
        "text_prompt": "The text in one word:",
    }
    asked = VladVA.from_pretrained(random_folder).with_prompts(**prompts)
    made = VladVA.from_pretrained(random_folder, settings=Settings(**prompts))
    assert torch.equal(asked.encode_text(["a red circle"]), made.encode_text(["a red circle"]))
    assert torch.equal(
        asked.encode_image([scene_rows[0]["image"]]), made.encode_image([scene_rows[0]["image"]])
    )
    with pytest.raises(ValueError, match="soft prompts have replaced"):
        random_model.with_prompts(**prompts)


def test_the_summary_tokens_attention_covers_the_picture_and_no_later_token(
    random_model, scene_rows
):
    """A map per layer and head over the image tokens alone; what it lacks to 1 goes to the other tokens up to the summary token."""
    picture, config = scene_rows[0]["image"], random_model.lvlm.config
    maps = random_model.summary_attention(picture)
    assert maps.shape == (
        config.decoder.num_hidden_layers,
        config.decoder.num_attention_heads,
        config.num_image_tokens,
    )
    batch = vladva.collate([random_model.image_sequence()], 0)
    embeds = random_model.embeds(batch, "image", random_model.image_processor(picture)[None])
    whole = torch.stack(
        [weights[0, :, -1] for weights in random_model.lvlm.decoder.attention_maps(embeds)]
    )  # (layers, H, T)
    slot = random_model.image_sequence().image_slot
    torch.testing.assert_close(maps, whole[..., slot : slot + config.num_image_tokens])
    torch.testing.assert_close(whole.sum(-1), torch.ones(whole.shape[:2]))
    assert (maps.sum(-1) < 1).all() and maps.min() > 0


# ------------------------------------------------------------------------------------------------------ Sec. 3.3


def test_a_fresh_adapter_changes_no_embedding(random_folder, scene_rows):
    model = VladVA.from_pretrained(random_folder)
    before = model.encode_image([scene_rows[0]["image"]]), model.encode_text(["a red circle"])
    model.attach()
    assert torch.equal(model.encode_image([scene_rows[0]["image"]]), before[0]) and torch.equal(
        model.encode_text(["a red circle"]), before[1]
    )


def test_soft_prompts_replace_the_hand_prompts_tokens_and_start_as_their_embeddings(random_folder):
    model = VladVA.from_pretrained(random_folder)
    model.attach()
    sequence = model.text_sequence("a red circle")
    ids = torch.tensor(
        sequence.ids[sequence.prompt_slot : sequence.prompt_slot + sequence.prompt_length]
    )
    assert torch.equal(model.soft_prompts["text"], model.lvlm.embed(ids))
    before = model.encode_text(["a red circle"])
    with torch.no_grad():
        model.soft_prompts["image"].add_(1)
    assert torch.equal(model.encode_text(["a red circle"]), before)  # each modality has its own
    with torch.no_grad():
        model.soft_prompts["text"].add_(1)
    assert not torch.allclose(model.encode_text(["a red circle"]), before)


def every_logit(model, batch):
    """(B, T, V) of a TrainingBatch's image sequences."""
    return model.lvlm.head(model.lvlm.decoder(model.embeds(batch.images, "image", batch.pixels)))


def test_disabled_adapters_are_the_untouched_lvlm_to_the_bit(
    random_folder, random_model, scene_rows
):
    untouched, picture = VladVA.from_pretrained(random_folder), scene_rows[0]["image"]
    batch = untouched.training_batch(scene_rows)
    with torch.no_grad():
        wanted = every_logit(untouched, batch)
        adapted = every_logit(random_model, batch)
        with random_model.adapter_disabled():
            found = every_logit(random_model, batch)
            assert random_model.generate(picture, "Describe the image.", 8) == untouched.generate(
                picture, "Describe the image.", 8
            )
    assert torch.equal(found, wanted) and not torch.allclose(adapted, wanted)


def test_every_trained_tensor_gets_a_gradient_and_no_frozen_one(random_folder, scene_rows):
    model = VladVA.from_pretrained(random_folder, settings=Settings(rank=4, learn_temperature=True))
    model.attach()
    model(model.training_batch(scene_rows)).backward()
    assert all(p.grad is not None for _, p in model.trained())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert {name.split(".")[0] for name, _ in model.trained()} == {
        "lvlm",
        "soft_prompts",
        "log_temperature",
    }


# ------------------------------------------------------------------------------------------------------ saving


def test_save_load_in_a_new_process_gives_identical_embeddings(
    random_folder, random_model, tmp_path
):
    random_model.save_adapter(tmp_path)
    scenes.render(scenes.make_scene(0, 0)).save(tmp_path / "scene.png")
    here = (
        random_model.encode_image([tmp_path / "scene.png"]),
        random_model.encode_text(["a red circle"]),
    )
    script = f"""
import torch, vladva
torch.set_num_threads(2)
model = vladva.VladVA.from_pretrained({str(random_folder)!r}, adapter={str(tmp_path)!r})
torch.save((model.encode_image([{str(tmp_path / "scene.png")!r}]), model.encode_text(["a red circle"])), {str(tmp_path / "there.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=data.NAMES["tiny"].parent.parent)
    there = torch.load(tmp_path / "there.pt", weights_only=True)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


def test_an_adapter_of_another_model_is_refused(random_model, tmp_path):
    random_model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="does not fit tiny"):
        VladVA.from_pretrained("tiny", adapter=tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_folder_embeds_the_same_from_its_documented_prompts(tied, tmp_path, scene_rows):
    """Plain decoder, no LoRA, no soft prompts: the strings of vladva.json alone."""
    model = shaken(
        VladVA.from_pretrained(
            make_folder(tmp_path, random_config(tie_word_embeddings=tied)),
            settings=Settings(rank=4),
        )
    )
    model.save_merged(tmp_path / "merged")
    plain, prompts = (
        VladVA.from_pretrained(tmp_path / "merged"),
        json.loads((tmp_path / "merged" / "vladva.json").read_text()),
    )
    assert not lora.lora_layers(plain.lvlm)
    ids = plain.tokenizer.encode(prompts["text"].format(caption="a red circle")).ids
    with torch.no_grad():
        text_emb = F.normalize(
            plain.lvlm.decoder(plain.lvlm.embed(torch.tensor([ids])))[:, -1], dim=-1
        )
        ids = plain.tokenizer.encode(prompts["image"]).ids
        slot = ids.index(plain.tokenizer.image_id)
        ids[slot : slot + 1] = [plain.tokenizer.image_id] * plain.lvlm.config.num_image_tokens
        features = plain.lvlm.image_features(plain.image_processor(scene_rows[0]["image"])[None])
        image_emb = F.normalize(
            plain.lvlm.decoder(
                lvlm_module.place(
                    plain.lvlm.embed(torch.tensor([ids])), features, torch.tensor([slot])
                )
            )[:, -1],
            dim=-1,
        )
    torch.testing.assert_close(text_emb, model.encode_text(["a red circle"]), **ROUNDING)
    torch.testing.assert_close(image_emb, model.encode_image([scene_rows[0]["image"]]), **ROUNDING)


def test_nothing_to_merge_is_refused(random_folder, tmp_path):
    with pytest.raises(ValueError, match="no adapter to merge"):
        VladVA.from_pretrained(random_folder).save_merged(tmp_path)


def test_missing_and_foreign_adapters_are_refused(random_folder, tmp_path):
    with pytest.raises(ValueError, match="adapter.safetensors not found"):
        VladVA.from_pretrained(random_folder, adapter=tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        VladVA.from_pretrained(random_folder, adapter=tmp_path)


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_prints_the_similarity_table(random_folder, tmp_path, capsys):
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, file in enumerate(files):
        scenes.render(scenes.make_scene(0, i)).save(file)
    vladva.main([*files, "a red circle", "a blue ring", "--model", str(random_folder)])
    out = capsys.readouterr().out
    sim = vladva.similarity(
        (model := VladVA.from_pretrained(random_folder)).encode_image(files),
        model.encode_text(["a red circle", "a blue ring"]),
    )
    assert all(f"{value:.3f}" in out for value in sim.flatten().tolist()) and "a blue ring" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no.jpg", "a cat"], "no.jpg: no such picture file"),
        (["a cat", "a dog"], "at least one of each"),
        (["x.png", "a", "--model", "nowhere"], "no model folder 'nowhere'"),
        (["x.png", "a", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, random_folder, capsys):
    model = [] if "--model" in arguments else ["--model", str(random_folder)]
    with pytest.raises(SystemExit) as stopped:
        vladva.main(arguments + model)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
