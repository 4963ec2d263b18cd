"""The method: closed forms of the losses, invariances of the embeddings, soft prompts, adapters.

Not here: measures of the paper's figures (test_studies.py), E5-V (test_e5v.py), merged folders
(test_export.py).
"""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import seeded_image
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import data
import train
import vladva
from vladva import LOSSES, EmbeddingLoss, VladVA, VladVAConfig

ROUNDING = {"atol": 2e-5, "rtol": 2e-5}  # float32 sums in another order, embeddings of length 1


# --------------------------------------------------------------------------------------- Eq. 1


@pytest.mark.parametrize("batch_size", [2, 7, 64])
def test_contrastive_loss_is_2_log_b_when_all_rows_coincide(batch_size):
    emb = F.normalize(torch.ones(batch_size, 5), dim=-1)
    loss = vladva.contrastive_loss(emb, emb, 0.05).item()
    assert loss == pytest.approx(2 * math.log(batch_size), rel=1e-6)  # float32


def test_contrastive_loss_of_perfect_pairs_goes_to_zero_with_the_temperature():
    emb = torch.eye(6)
    losses = [vladva.contrastive_loss(emb, emb, t).item() for t in (1.0, 0.3, 0.05)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-6
    one_among_five = 2 * math.log(1 + 5 * math.exp(-1))  # a cosine of 1 among five of 0
    assert losses[0] == pytest.approx(one_among_five, rel=1e-6)  # float32


def test_contrastive_loss_equals_the_printed_sum_over_k():
    torch.manual_seed(0)
    v = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    t = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)

    def s(k, j):
        return math.exp((v[k] @ t[j]).item() / 0.2)

    printed = 0.0
    for k in range(5):
        printed -= math.log(s(k, k) / sum(s(k, j) for j in range(5)))
        printed -= math.log(s(k, k) / sum(s(j, k) for j in range(5)))
    loss = vladva.contrastive_loss(v, t, 0.2).item()
    assert loss == pytest.approx(printed / 5, rel=1e-9)  # float64


@pytest.mark.parametrize("a, b", [((3, 4), (2, 4)), ((1, 4), (1, 4))])
def test_contrastive_loss_refuses_unequal_or_single_rows(a, b):
    with pytest.raises(ValueError, match="B >= 2"):
        vladva.contrastive_loss(torch.ones(a), torch.ones(b), 1.0)


def test_the_similarity_is_the_cosine(random_model, scene_rows):
    image_emb = random_model.encode_image([scene_rows[0]["image"]])
    text_emb = random_model.encode_text(["a red circle", "a blue ring"])
    lengths = torch.cat([image_emb, text_emb]).norm(dim=-1)
    assert lengths.tolist() == pytest.approx([1, 1, 1], abs=1e-5)  # float32
    cosine = F.cosine_similarity(image_emb[0], text_emb[1], dim=0).item()
    sim = vladva.similarity(image_emb, text_emb)
    assert sim[0, 1].item() == pytest.approx(cosine, abs=1e-6)  # float32
    assert image_emb.dtype == torch.float32


# --------------------------------------------------------------------------------------- Eq. 2


def test_next_token_loss_is_log_v_under_a_uniform_head():
    targets = torch.tensor([0, 3, 9, 1])
    loss = vladva.next_token_loss(torch.randn(4, 6), targets, torch.zeros(10, 6)).item()
    assert loss == pytest.approx(math.log(10), rel=1e-6)  # float32


def test_next_token_loss_equals_a_naive_loop():
    torch.manual_seed(0)
    hidden_states, head = torch.randn(5, 6), torch.randn(10, 6)
    targets = [3, 1, 4, 1, 5]
    naive = 0.0
    for state, target in zip(hidden_states, targets):
        naive -= math.log(torch.softmax(head @ state, 0)[target].item()) / 5
    loss = vladva.next_token_loss(hidden_states, torch.tensor(targets), head).item()
    assert loss == pytest.approx(naive, rel=1e-5)  # float32 in another order


def test_next_token_losses_of_the_parts_of_a_batch_sum_to_that_of_the_whole():
    """Values and gradients, when each part is told how many tokens the whole batch holds."""
    torch.manual_seed(0)
    hidden_states = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 10, (8,))
    whole = vladva.next_token_loss(hidden_states, targets, head)
    first = vladva.next_token_loss(hidden_states[:3], targets[:3], head, total=8)
    parts = first + vladva.next_token_loss(hidden_states[3:], targets[3:], head, total=8)
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)  # float64
    wanted = torch.autograd.grad(whole, (hidden_states, head))
    gradients = torch.autograd.grad(parts, (hidden_states, head))
    torch.testing.assert_close(gradients, wanted, atol=1e-12, rtol=0)  # float64


def test_next_token_loss_refuses_no_token():
    no_targets = torch.tensor([], dtype=torch.long)
    with pytest.raises(ValueError, match="no long caption"):
        vladva.next_token_loss(torch.randn(0, 6), no_targets, torch.zeros(10, 6))


def test_the_loss_counts_the_long_captions_tokens_and_the_end_and_nothing_else(
    random_model, scene_rows
):
    batch = random_model.training_batch(scene_rows).images
    wanted = []
    for row in scene_rows:
        if row["long"]:
            encoding = random_model.tokenizer.inner.encode(
                " " + row["long"], add_special_tokens=False
            )
            wanted += [*encoding.ids, *random_model.lvlm.config.end_tokens]
    assert batch.caption_targets.tolist() == wanted
    next_ids = batch.input_ids.flatten()[batch.caption_index + 1]
    assert torch.equal(next_ids, batch.caption_targets)


def test_the_overall_loss_is_eq_1_plus_weighted_eq_2_from_separate_forwards(
    random_folder, scene_rows
):
    """One forward of the image sequence gives both losses: the same as embedding without the long
    caption, and captioning apart."""
    model = VladVA.from_pretrained(random_folder, config=VladVAConfig(next_token_weight=0.5))
    with torch.no_grad():
        together = model(model.training_batch(scene_rows))
        pairs = [row for row in scene_rows if row["short"]]
        image_emb = model.encode_image([row["image"] for row in pairs])
        text_emb = model.encode_text([row["short"] for row in pairs])
        contrastive = vladva.contrastive_loss(image_emb, text_emb, model.temperature)
        long_rows = [row | {"short": None} for row in scene_rows if row["long"]]
        batch = model.training_batch(long_rows)
        _, caption_states = model.embed_batch(batch)
        next_token = vladva.next_token_loss(
            caption_states, batch.caption_targets, model.lvlm.lm_head.weight
        )
    # cosines in float32 are divided by a temperature of 0.05
    torch.testing.assert_close(together, contrastive + 0.5 * next_token, atol=1e-4, rtol=1e-4)


def test_a_batch_without_pairs_or_without_captions_has_the_other_loss_alone(
    random_model, scene_rows
):
    with torch.no_grad():
        no_pairs = random_model.training_batch([row | {"short": None} for row in scene_rows])
        _, caption_states = random_model.embed_batch(no_pairs)
        head = random_model.lvlm.lm_head.weight
        wanted = vladva.next_token_loss(caption_states, no_pairs.caption_targets, head)
        assert random_model(no_pairs).item() == pytest.approx(wanted.item())
        no_captions = random_model.training_batch([row | {"long": None} for row in scene_rows])
        emb, _ = random_model.embed_batch(no_captions)
        wanted = vladva.contrastive_loss(emb.image, emb.text, random_model.temperature)
        assert random_model(no_captions).item() == pytest.approx(wanted.item())


# -------------------------------------------------------------------------------- the templates


@pytest.mark.parametrize(
    "config, message",
    [
        ({"text_template": "no caption {prompt}"}, "text_template"),
        ({"image_template": "{prompt} {prompt} <image>"}, "image_template"),
        ({"temperature": 0.001}, "temperature is 0.001"),
        ({"temperature": 2.0}, "temperature is 2.0"),
        ({"lora_rank": 0}, "is 0: wanted 1|is 0: at least 1"),
        ({"next_token_weight": -1.0}, "is -1.0: wanted 0"),
        ({"lora": False, "soft_prompts": False}, "nothing to train"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        VladVAConfig(**config)


def test_an_unknown_loss_is_refused_when_training_begins(random_folder):
    model = VladVA.from_pretrained(random_folder, config=VladVAConfig(loss="clip"))
    with pytest.raises(ValueError, match="loss is 'clip', known are vladva"):
        model.training_batch([])


def test_templates_of_any_order_embed_at_their_last_token(random_folder, scene_rows):
    """With the prompt behind, as E5-V's: soft prompts still take the hand prompt's place, and
    change nothing at first."""
    config = VladVAConfig(text_template="{caption} {prompt}", image_template="<image> {prompt}")
    model = VladVA.from_pretrained(random_folder, config=config)
    sequence = model.text_sequence("a red circle")
    assert sequence.summary_index == len(sequence.input_ids) - 1
    assert model.tokenizer.decode(prompt_ids(sequence)).strip() == config.text_prompt
    texts, images = ["a red circle", "two"], [scene_rows[0]["image"]]
    before = model.encode_text(texts), model.encode_image(images)
    model.attach()
    after = model.encode_text(texts), model.encode_image(images)
    torch.testing.assert_close(after, before, **ROUNDING)


def prompt_ids(sequence):
    """The tokens of a sequence that its soft prompt replaces."""
    return sequence.input_ids[sequence.prompt_start :][: sequence.prompt_length]


def test_the_summary_token_ends_the_template_and_the_prompt_span_is_the_prompt(random_model):
    tokenizer, config = random_model.tokenizer, random_model.config
    bos = random_model.lvlm.config.bos_token_id
    for sequence, prompt in (
        (random_model.image_sequence(), config.image_prompt),
        (random_model.text_sequence("a red circle"), config.text_prompt),
    ):
        ids = sequence.input_ids
        assert ids[0] == bos and ids.count(bos) == 1
        assert sequence.summary_index == len(ids) - 1
        assert tokenizer.decode(ids[-2:]) == "ASSISTANT:"
        assert tokenizer.decode(prompt_ids(sequence)).strip() == prompt


def test_the_image_tokens_stand_together_where_the_template_has_the_image(random_model):
    sequence = random_model.image_sequence("a long caption")
    config = random_model.lvlm.config
    image_id = config.image_token_id
    rows, columns = config.image_grid()
    assert sequence.input_ids.count(image_id) == rows * columns
    start = sequence.input_ids.index(image_id)
    image_tokens = sequence.input_ids[start : start + rows * columns]
    assert image_tokens == [image_id] * (rows * columns)
    caption = random_model.tokenizer.decode(sequence.input_ids[sequence.caption_start :])
    assert caption.strip() == "a long caption"
    assert sequence.summary_index == random_model.image_sequence().summary_index


# ------------------------------------------------------------------------------------ invariance


def image_embeddings(model, rows):
    with torch.no_grad():
        return model.embed_batch(model.training_batch(rows))[0].image


def test_the_long_caption_does_not_change_f_v(random_model, scene_rows):
    first = scene_rows[0] | {"short": "a"}  # rows without a short caption have no embedding
    rows = [first, first | {"long": None}, first | {"long": "entirely other words"}]
    emb = image_embeddings(random_model, rows)
    torch.testing.assert_close(emb[1:], emb[:1].expand(2, -1), **ROUNDING)


def test_without_the_causal_mask_the_long_caption_would_change_f_v(
    random_model, scene_rows, monkeypatch
):
    """The guard of the test above: it fails as soon as attention sees what comes after."""
    attend = F.scaled_dot_product_attention

    def attend_to_all(q, k, v, is_causal=False, **rest):
        return attend(q, k, v, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_to_all)
    first = scene_rows[0] | {"short": "a"}
    emb = image_embeddings(random_model, [first, first | {"long": "entirely other words"}])
    assert (emb[0] - emb[1]).abs().max() > 1e-3


def test_padding_order_and_other_rows_do_not_change_an_embedding(random_model, scene_rows):
    texts = [
        "a red circle",
        "a much longer caption with a blue square and a green star on a gray background",
        "a ring",
    ]
    together = random_model.encode_text(texts)
    alone = torch.cat([random_model.encode_text([text]) for text in texts])
    torch.testing.assert_close(together, alone, **ROUNDING)
    torch.testing.assert_close(random_model.encode_text(texts[::-1]), together.flip(0), **ROUNDING)
    torch.testing.assert_close(random_model.encode_text(texts, batch_size=2), alone, **ROUNDING)
    images = [row["image"] for row in scene_rows[:3]]
    alone = torch.cat([random_model.encode_image([image]) for image in images])
    torch.testing.assert_close(random_model.encode_image(images, batch_size=2), alone, **ROUNDING)


def test_nothing_to_encode_gives_no_rows(random_model):
    width = random_model.lvlm.config.decoder.hidden_size
    assert random_model.encode_text([]).shape == random_model.encode_image([]).shape == (0, width)


def test_an_image_may_be_a_path(random_model, scene_rows, tmp_path):
    path = tmp_path / "scene.png"
    scene_rows[0]["image"].save(path)
    wanted = random_model.encode_image([scene_rows[0]["image"]])
    assert torch.equal(random_model.encode_image([path]), wanted)
    assert torch.equal(random_model.encode_image([str(path)]), wanted)


def test_any_text_encodes_and_decodes_without_loss(random_model):
    for text in ("a red circle", "Ein Würfel – größer als 3 Äpfel!", "日本語 and {braces} \t tabs"):
        assert random_model.tokenizer.decode(random_model.tokenizer.encode(text).ids) == text
        assert random_model.encode_text([text]).isfinite().all()


def test_a_caption_that_holds_a_field_of_the_template_stays_as_it_is(random_model):
    sequence = random_model.text_sequence("{prompt} and {caption}")
    decoded = random_model.tokenizer.decode(sequence.input_ids)
    prompt = random_model.config.text_prompt
    assert decoded.strip() == f"USER: {prompt} {{prompt}} and {{caption}}\nASSISTANT:"
    assert random_model.tokenizer.decode(prompt_ids(sequence)).strip() == prompt


@pytest.mark.parametrize(
    "text, message",
    [("  ", "empty text"), ("a <image> here", "special token"), ("word " * 3000, "tokens exceed")],
)
def test_refused_texts(random_model, text, message):
    with pytest.raises(ValueError, match=message):
        random_model.encode_text([text])


def test_one_string_instead_of_a_list_is_refused(random_model):
    with pytest.raises(ValueError, match="list of strings"):
        random_model.encode_text("a red circle")


# ------------------------------------------------------------------------------------- Sec. 3.3


def test_a_fresh_adapter_changes_no_embedding(random_folder, scene_rows):
    model = VladVA.from_pretrained(random_folder)
    images, texts = [scene_rows[0]["image"]], ["a red circle"]
    before = model.encode_image(images), model.encode_text(texts)
    model.attach()
    assert torch.equal(model.encode_image(images), before[0])
    assert torch.equal(model.encode_text(texts), before[1])


def test_soft_prompts_replace_the_hand_prompts_tokens_and_start_as_their_embeddings(random_folder):
    model = VladVA.from_pretrained(random_folder)
    model.attach()
    for modality, sequence in (
        ("image", model.image_sequence()),
        ("text", model.text_sequence("a red circle")),
    ):
        embeddings = model.lvlm.decoder.embed_tokens(torch.tensor(prompt_ids(sequence)))
        assert torch.equal(model.soft_prompts[modality], embeddings)
    before = model.encode_text(["a red circle"])
    with torch.no_grad():
        model.soft_prompts["image"].add_(1)
    assert torch.equal(model.encode_text(["a red circle"]), before)  # each modality has its own
    with torch.no_grad():
        model.soft_prompts["text"].add_(1)
    assert not torch.allclose(model.encode_text(["a red circle"]), before)


def image_logits(model, batch):
    """(B, T, V) of a TrainingBatch's image sequences."""
    with torch.no_grad():
        embeds = model.inputs_embeds(batch.images, "image", batch.pixels)
        return model.lvlm.lm_head(model.lvlm.decoder(embeds))


def test_disabled_adapters_are_the_untouched_lvlm_to_the_bit(
    random_folder, random_model, scene_rows
):
    untouched = VladVA.from_pretrained(random_folder)
    image, prompt = scene_rows[0]["image"], "Describe the image."
    batch = untouched.training_batch(scene_rows)
    wanted = image_logits(untouched, batch)
    answer = untouched.generate(image, prompt, 24)
    assert not torch.allclose(image_logits(random_model, batch), wanted)
    with random_model.adapter_disabled():
        assert torch.equal(image_logits(random_model, batch), wanted)
        assert random_model.generate(image, prompt, 24) == answer
    assert not torch.allclose(image_logits(random_model, batch), wanted)


def test_answers_in_a_batch_are_those_of_one_image_at_a_time(random_model, scene_rows):
    """Prompts of different lengths, so that one of them is padded."""
    images = [row["image"] for row in scene_rows[:2]]
    prompts = ["Where?", "Describe the image in detail."]
    answers = random_model.generate_batch(images, prompts, 12)
    for image, prompt, answer in zip(images, prompts, answers, strict=True):
        assert random_model.generate(image, prompt, 12) == answer


def parts(names):
    """Last part of each name in an adapter file."""
    return {name.rsplit(".", 1)[-1] for name in names}


def test_every_trained_tensor_gets_a_gradient_and_no_frozen_one(random_folder, scene_rows):
    config = VladVAConfig(lora_rank=4, learn_temperature=True)
    model = VladVA.from_pretrained(random_folder, config=config)
    model.attach()
    model(model.training_batch(scene_rows)).backward()
    trained = model.trained_parameters()
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert parts(trained) == {"lora_a", "lora_b", "image", "text", "log_temperature"}
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_trained == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize(
    "config, wanted",
    [({"soft_prompts": False}, {"lora_a", "lora_b"}), ({"lora": False}, {"image", "text"})],
)
def test_each_part_can_be_trained_alone(random_folder, scene_rows, config, wanted):
    model = VladVA.from_pretrained(random_folder, config=VladVAConfig(**config))
    model.attach()
    assert parts(model.trained_parameters()) == wanted
    model(model.training_batch(scene_rows)).backward()
    assert all(p.grad is not None for p in model.trained_parameters().values())


def test_the_learned_temperature_starts_as_the_configs_and_stays_within_its_bounds(random_folder):
    config = VladVAConfig(temperature=0.2, learn_temperature=True)
    model = VladVA.from_pretrained(random_folder, config=config)
    assert model.temperature == 0.2
    model.attach()
    assert model.temperature.item() == pytest.approx(0.2, rel=1e-6)  # float32
    for log_temperature, temperature in ((-9.0, 0.01), (3.0, 1.0)):
        with torch.no_grad():
            model.loss_parameters["log_temperature"].fill_(log_temperature)
        assert model.temperature.item() == pytest.approx(temperature)


def test_a_trained_parameter_that_no_group_takes_is_an_error(random_model):
    """No optimizer would take it, and the run would say nothing."""
    random_model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="extra is trained, but"):
        random_model.parameter_groups()
    assert "extra" in random_model.trained_parameters()


# --------------------------------------------------------------------------- a loss of one's own


def margin_loss(model, emb):
    """A loss with a parameter: how far pairs are from a learned margin, and Eq. 1's scale."""
    margin = model.loss_parameters["margin"]
    return ((emb.image * emb.text).sum(-1) - margin).square().mean()


@pytest.fixture
def margin_model(random_folder, monkeypatch):
    """A model that trains with an entry of LOSSES that a user added."""
    entry = EmbeddingLoss(margin_loss, parameters=lambda config: {"margin": 0.25})
    monkeypatch.setitem(LOSSES, "margin", entry)
    config = VladVAConfig(loss="margin", lora_rank=2)
    model = VladVA.from_pretrained(random_folder, config=config)
    model.attach()
    return model


RATES = train.TrainConfig(lr=1e-3, soft_prompt_lr=1e-3)


def test_one_entry_of_losses_is_trained_saved_and_reloaded(
    margin_model, random_folder, scene_rows, tmp_path
):
    """Its parameter lands in the groups, the optimizer and the adapter file, with no other line."""
    margin = margin_model.loss_parameters["margin"]
    *_, loss_group = margin_model.parameter_groups().values()
    (margin_name,) = loss_group
    assert loss_group[margin_name] is margin
    optimizer = train.make_optimizer(margin_model, RATES)
    optimized = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(optimized) == sorted(map(id, margin_model.trained_parameters().values()))
    loss = margin_model(margin_model.training_batch(scene_rows))
    loss.backward()
    optimizer.step()
    assert margin.item() != 0.25
    margin_model.save_adapter(tmp_path)
    assert load_file(tmp_path / "adapter.safetensors")[margin_name] == margin
    again = VladVA.from_pretrained(random_folder, adapter=tmp_path)
    assert again.config == margin_model.config
    assert torch.equal(again.loss_parameters["margin"], margin)
    texts = ["a red circle"]
    assert torch.equal(again.encode_text(texts), margin_model.encode_text(texts))


def test_an_adapter_of_an_unregistered_loss_still_encodes(
    margin_model, random_folder, tmp_path, monkeypatch
):
    """Who uses an adapter need not have the loss that it was trained with."""
    margin_model.save_adapter(tmp_path)
    wanted = margin_model.encode_text(["a red circle"])
    monkeypatch.delitem(LOSSES, "margin")
    again = VladVA.from_pretrained(random_folder, adapter=tmp_path)
    assert torch.equal(again.encode_text(["a red circle"]), wanted)


def further_texts_loss(model, emb):
    return emb.further_texts.square().sum()


def test_a_loss_takes_the_parts_of_the_rows_that_it_names(random_folder, scene_rows, monkeypatch):
    """Further texts alone: no short caption is embedded, and Eq. 2 stays beside it."""
    monkeypatch.setitem(
        LOSSES, "further", EmbeddingLoss(further_texts_loss, inputs=("further_texts",))
    )
    rows = [
        scene_rows[0] | {"further_texts": ["a", "a b"]},
        scene_rows[1] | {"further_texts": ["c"]},
    ]
    rows.append({"image": None, "short": None, "long": None, "further_texts": ["d e", "f"]})
    model = VladVA.from_pretrained(random_folder, config=VladVAConfig(loss="further"))
    batch = model.training_batch(rows)
    emb, caption_states = model.embed_batch(batch)
    assert (len(emb.image), len(emb.text), len(emb.further_texts)) == (0, 0, 5)
    wanted = model.encode_text(["a", "a b", "c", "d e", "f"])
    torch.testing.assert_close(emb.further_texts, wanted, **ROUNDING)
    next_token = vladva.next_token_loss(
        caption_states, batch.caption_targets, model.lvlm.lm_head.weight
    )
    # five vectors of length 1, in float32
    assert model(batch).item() == pytest.approx(5 + next_token.item(), rel=1e-5)
    plain = VladVA.from_pretrained(random_folder).training_batch(rows)
    assert plain.further_texts is None and len(plain.image_of_text) == 2


# --------------------------------------------------------------------------------------- saving


def test_a_new_process_with_the_saved_adapter_gives_identical_embeddings(
    random_folder, random_model, tmp_path
):
    random_model.save_adapter(tmp_path)
    image = str(tmp_path / "image.png")
    Image.fromarray(seeded_image((50, 40))).save(image)
    here = random_model.encode_image([image]), random_model.encode_text(["a red circle"])
    script = f"""
import torch, vladva
torch.set_num_threads(2)
model = vladva.VladVA.from_pretrained({str(random_folder)!r}, adapter={str(tmp_path)!r})
emb = model.encode_image([{image!r}]), model.encode_text(["a red circle"])
torch.save(emb, {str(tmp_path / "there.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=data.TINY.parents[1])
    there = torch.load(tmp_path / "there.pt", weights_only=True)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])


def test_an_adapter_file_holds_float32_tensors_by_name_and_the_config(random_model, tmp_path):
    random_model.save_adapter(tmp_path)
    tensors, config = data.read_adapter(tmp_path)
    assert VladVAConfig(**config) == random_model.config
    assert tensors.keys() == random_model.trained_parameters().keys()
    for name, p in random_model.trained_parameters().items():
        assert torch.equal(tensors[name], p) and tensors[name].dtype == torch.float32


def test_an_adapter_of_another_model_is_refused(random_model, tmp_path):
    random_model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="does not fit tiny"):
        VladVA.from_pretrained("tiny", adapter=tmp_path)


def test_adapter_files_are_strict_on_names(random_model, random_folder, tmp_path):
    """One name changed: both what is missing and what nobody knows are named."""
    random_model.save_adapter(tmp_path)
    path = tmp_path / "adapter.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors["more"] = tensors.pop(name)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="does not fit") as error:
        VladVA.from_pretrained(random_folder, adapter=tmp_path)
    assert f"{name} is missing" in str(error.value)
    assert "more is unexpected" in str(error.value)


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "carries no config"),
        ({"adapter": json.dumps({"config": {"rank": 4}})}, r"unknown fields \['rank'\]"),
        ({"adapter": json.dumps({"config": {"lora_rank": "4"}})}, "lora_rank is '4', wanted .*int"),
    ],
)
def test_an_adapter_file_with_another_config_is_refused(random_folder, tmp_path, metadata, message):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter.safetensors", metadata)
    with pytest.raises(ValueError, match=f"adapter.safetensors.*{message}"):
        VladVA.from_pretrained(random_folder, adapter=tmp_path)


def test_missing_and_broken_adapters_are_refused(random_folder, tmp_path):
    with pytest.raises(ValueError, match="adapter.safetensors not found"):
        VladVA.from_pretrained(random_folder, adapter=tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        VladVA.from_pretrained(random_folder, adapter=tmp_path)


# --------------------------------------------------------------------------------- command line


def test_the_command_prints_the_similarity_table(random_folder, tmp_path, capsys):
    files = []
    for size in ((50, 40), (40, 60)):
        files.append(str(tmp_path / f"{size[0]}.png"))
        Image.fromarray(seeded_image(size)).save(files[-1])
    texts = ["a red circle", "a blue ring"]
    vladva.main([*files, *texts, "--model", str(random_folder)])
    lines = capsys.readouterr().out.splitlines()
    model = VladVA.from_pretrained(random_folder)
    sim = vladva.similarity(model.encode_image(files), model.encode_text(texts))
    assert lines[0].split() == " ".join(texts).split()
    for line, file, values in zip(lines[2:], files, sim.tolist(), strict=True):
        assert line.split() == [file, *(f"{value:.3f}" for value in values)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no.jpg", "a cat"], "no.jpg: no such image file"),
        (["a cat", "a dog"], "one of each is needed"),
        (["x.png", "a", "--model", "nowhere"], "'nowhere': give tiny"),
        (["x.png", "a", "--device", "cuda:99"], "--device cuda:99"),
        (["x.png", "a", "--adapter", "nowhere"], "adapter.safetensors not found"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, random_folder, capsys):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(random_folder)]
    with pytest.raises(SystemExit) as stopped:
        vladva.main(arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in err and err.count("\n") == 1


FOLDER_FILES = ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors")


@pytest.mark.parametrize("name", [*FOLDER_FILES, "adapter.safetensors"])
def test_a_pipe_is_no_file_of_a_model_nor_of_an_adapter(random_folder, tmp_path, name):
    """Whoever opens one to read waits for a writer."""
    folder = tmp_path / "model"
    shutil.copytree(random_folder, folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name}.* (is missing|not found)"):
        VladVA.from_pretrained(folder, folder if name.startswith("adapter") else None)


@pytest.mark.parametrize(
    "field, value", [("image_prompt", "\ud800"), ("image_prompt", " "), ("text_prompt", "")]
)
def test_an_adapter_without_a_prompt_or_with_half_a_character_is_refused(
    random_folder, tmp_path, field, value
):
    """The tokenizer raised TypeError, and the search for the prompt's tokens IndexError."""
    about = json.dumps({"config": {field: value}})
    save_file({}, tmp_path / "adapter.safetensors", {"adapter": about})
    with pytest.raises(ValueError, match="image_prompt is|the prompt of .*_template is empty"):
        VladVA.from_pretrained(random_folder, adapter=tmp_path)
