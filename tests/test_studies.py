"""What the paper looks into: measures in closed form, and each study on a random model."""

import itertools
import json
import math
import random
import re
import sys

import pytest
import torch
from conftest import make_folder, random_config, shaken
from PIL import Image

import data
import eval as benchmarks
from extras import scenes, studies
from extras.studies import (
    QUERIES,
    attention_density,
    components_for,
    cumulative_variance,
    output_entropy,
)
from model import parse_config, read_json
from vladva import VladVA, VladVAConfig


@pytest.fixture(scope="module")
def adapter(random_folder, tmp_path_factory):
    """The folder of a shaken adapter of the random model."""
    folder = tmp_path_factory.mktemp("adapter")
    config = VladVAConfig(lora_rank=4)
    shaken(VladVA.from_pretrained(random_folder, config=config)).save_adapter(folder)
    return folder


def study(name, model, out, *flags):
    """The numbers that a study writes."""
    flags = ["--items", "6", "--out", str(out), *map(str, flags)]
    studies.main([name, "--model", str(model), *flags])
    return json.loads((out / f"{name}.json").read_text())


def images_and_captions(count):
    """The first held-out scenes, as the studies see them."""
    images, captions = [], []
    for i in range(count):
        scene = scenes.make_scene(2000, i)
        images.append(scenes.render(scene))
        captions.append(str(scenes.short_caption(scene, random.Random(f"captions 2000 {i}"))))
    return images, captions


# ------------------------------------------------------------------------------------ measures


def test_entropy_of_uniform_and_of_certain_distributions():
    uniform = output_entropy(torch.zeros(2, 50))
    assert uniform.tolist() == pytest.approx([math.log(50)] * 2, rel=1e-6)
    certain = output_entropy(torch.tensor([100.0, 0.0, 0.0]))
    assert certain.item() == pytest.approx(0, abs=1e-6)


def test_cumulative_variance_of_rank_one_and_of_isotropic_embeddings():
    rank_one = cumulative_variance(torch.outer(torch.arange(4.0), torch.ones(6)))
    assert rank_one[0].item() == pytest.approx(1, abs=1e-6)
    isotropic = cumulative_variance(torch.cat([torch.eye(3), -torch.eye(3)]))
    assert isotropic.tolist() == pytest.approx([1 / 3, 2 / 3, 1.0], abs=1e-6)
    for emb in (torch.ones(1, 3), torch.ones(4, 3)):
        with pytest.raises(ValueError, match="2 different ones are needed"):
            cumulative_variance(emb)


def test_components_for_a_share_of_the_variance_in_closed_form():
    """Rank one needs one; ten equal ones need nine for 90 %, on whichever side rounding falls."""
    rank_one = cumulative_variance(torch.outer(torch.arange(5.0), torch.ones(3)))
    assert components_for(rank_one) == 1
    equal = cumulative_variance(torch.cat([torch.eye(10), -torch.eye(10)]))
    assert [components_for(equal, share) for share in (0.05, 0.1, 0.9, 1.0)] == [1, 1, 9, 10]


def test_rank_correlation_in_closed_form():
    x = torch.tensor([3.0, 1.0, 2.0, 10.0, 7.0, 8.0, 9.0])
    assert studies.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert studies.rank_correlation(x, -x) == pytest.approx(-1)
    tied = torch.tensor([1.0, 1.0, 2.0, 3.0])  # ranks 0.5 0.5 2 3 (from 0), against 0 1 2 3
    rho = studies.rank_correlation(tied, torch.arange(4.0))
    assert rho == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert math.isnan(studies.rank_correlation(torch.ones(3), torch.arange(3.0)))


def test_attention_density_of_uniform_of_pointed_and_of_scaled_maps():
    entropy, share = attention_density(torch.full((2, 20), 0.01))
    assert entropy.tolist() == pytest.approx([math.log(20)] * 2)
    assert share.tolist() == [0.9, 0.9]
    entropy, share = attention_density(torch.eye(20)[:1])
    assert (entropy.item(), share.item()) == (0, 1 / 20)
    share = attention_density(torch.tensor([0.3, 0.15, 0.05]))[1]  # two hold exactly 90 %
    assert share.item() == pytest.approx(2 / 3)


def test_nearest_tokens_go_by_angle_not_by_length():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, 0.1]])
    ids, cosine = studies.nearest_tokens(torch.tensor([[0.1, 0.0], [3.0, 4.0], [-1.0, 0.0]]), table)
    assert ids.tolist() == [0, 1, 2]
    assert cosine.tolist() == pytest.approx([1, 0.8, 1], abs=1e-4)


# ------------------------------------------------------------------------------ into the decoder


def test_the_summary_tokens_attention_covers_the_image_and_no_later_token(random_model):
    """The weights are those of the forward pass: with the values they give its attention output."""
    (image,), _ = images_and_captions(1)
    maps = studies.summary_attention(random_model, image)
    config = random_model.lvlm.config
    num_image_tokens = math.prod(config.image_grid())
    shape = (config.decoder.num_hidden_layers, config.decoder.num_attention_heads)
    assert maps.shape == (*shape, num_image_tokens)
    assert (maps.sum(-1) < 1).all()
    assert maps.min() > 0

    # each head's values are replaced by "is an image token": the output is the mass on the image
    pixels, batch = random_model.image_batch([image])
    attend = torch.nn.functional.scaled_dot_product_attention
    masses = []

    def attend_and_note(q, k, v, **options):
        if options.get("is_causal"):  # of the decoder
            is_image = torch.zeros_like(v)
            is_image[:, :, batch.image_token_index[1]] = 1
            masses.append(attend(q, k, is_image, **options)[0, :, int(batch.summary_index), 0])
        return attend(q, k, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_and_note)
        with torch.no_grad():
            random_model.hidden_states(batch, "image", pixels)
    torch.testing.assert_close(maps.sum(-1), torch.stack(masses), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------- the studies

LAYERS = ["2before", "2after", "1before", "1after"]


def first_layer(model, modality, items):
    """The outputs of the first layer at the summary token, normalised: (B, D)."""
    outputs = []
    hook = model.lvlm.decoder.layers[0].register_forward_hook(lambda *args: outputs.append(args[2]))
    pixels, batch = model.image_batch(items) if modality == "image" else (None, None)
    batch = batch or model.text_batch(items)
    model.hidden_states(batch, modality, pixels)
    hook.remove()
    states = outputs[0][torch.arange(len(items)), batch.summary_index]
    return torch.nn.functional.normalize(states, dim=-1)


@pytest.mark.parametrize("name", ["tokens", "attention", "soft-prompts", "layers"])
def test_a_study_writes_numbers_before_and_after(
    name, random_folder, adapter, tmp_path, monkeypatch, capsys
):
    """Without matplotlib: the numbers are written all the same, one line says what is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = study(name, random_folder, tmp_path, "--adapter", adapter)
    assert ("pip install matplotlib" in capsys.readouterr().out) == (name == "attention")
    assert not list(tmp_path.glob("*.png"))
    model = VladVA.from_pretrained(random_folder, adapter=adapter)
    images, captions = images_and_captions(6)
    if name == "tokens":
        with torch.no_grad():
            states, _ = model.hidden_states(model.text_batch(captions), "text")
            logits = model.lvlm.lm_head(states)
        entropy = output_entropy(logits).mean().item()
        before, after = results["measures"]
        assert (before.pop(""), after.pop("")) == ("before", "after")
        assert after["text entropy"] == pytest.approx(entropy, rel=1e-5)
        best = model.tokenizer.decode([logits[1].argmax().item()])
        share = logits[1].softmax(-1).max().item()
        likeliest = results["tokens"]["after, text"][1][0]
        assert likeliest == [best, pytest.approx(share, rel=1e-4)]
        assert before != after
    if name == "attention":
        entropies = []
        for image in images:
            maps = studies.summary_attention(model, image)
            entropies.append(attention_density(maps)[0].mean().item())
        before, after = results["density"]
        assert after["entropy"] == pytest.approx(sum(entropies) / 6, rel=1e-5)
        assert before["entropy"] != after["entropy"]
        assert after["entropy"] < results["entropy when uniform"]
    if name == "soft-prompts":
        hand = "".join(row["prompt"] for row in results["image"]).strip()
        assert hand == VladVAConfig.image_prompt
        assert all(-1 <= row["cosine"] < 0.9999 for row in results["image"] + results["text"])
    if name == "layers":
        image_emb, text_emb = model.encode_image(images), model.encode_text(captions)
        recall = benchmarks.recall(image_emb, text_emb, torch.arange(6))["image_to_text R@1"]
        rows = results["layers"]
        assert [row["layer"] + row["adaptation"] for row in rows] == LAYERS
        assert {"Replace", "Swap", "Add"} < rows[0].keys()
        assert rows[1]["image_to_text R@1"] == pytest.approx(recall)
        # the first layer alone, without the final norm
        with torch.no_grad():
            emb = {"image": first_layer(model, "image", images)}
            emb["text"] = first_layer(model, "text", captions)
        recall = benchmarks.recall(emb["image"], emb["text"], torch.arange(6))
        for score in ("image_to_text R@1", "text_to_image R@1"):
            assert rows[3][score] == pytest.approx(recall[score])


def test_prompts_are_measured_one_pair_at_a_time(random_folder, tmp_path):
    verbs = ("Describe", "Name", "Give", "Caption")
    pairs = [{"image": f"{verb} the image.", "text": f"{verb} the text."} for verb in verbs]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    results = study("prompts", random_folder, tmp_path, "--prompts", tmp_path / "pairs.json")
    rows = results["prompts"]
    entropies = [row["entropy"] for row in rows]
    assert entropies == sorted(entropies)
    assert {row["image_prompt"] for row in rows} == {pair["image"] for pair in pairs}
    for row in rows:
        assert row["entropy"] == pytest.approx((row["image entropy"] + row["text entropy"]) / 2)
    # nothing is said of the order of a column of equal numbers, such as R@1 here
    varied = []
    for name in ("entropy", "components", "R@1"):
        if len({row[name] for row in rows}) > 1:
            varied.append(name)
    names = [f"{a} and {b}" for a, b in itertools.combinations(varied, 2)]
    assert list(results["correlations"]) == names
    assert all(-1 <= rho <= 1 for rho in results["correlations"].values())


def test_the_committed_prompts_are_50_pairs_that_the_tiny_model_reads_word_by_word():
    pairs = json.loads(studies.PROMPTS.read_text())
    tokenizer = data.Tokenizer(data.TINY, parse_config(read_json(data.TINY / "config.json")))
    for side in ("image", "text"):
        prompts = {pair[side] for pair in pairs}
        assert len(prompts) == len(pairs) == 50
        for prompt in prompts:
            num_words = len(re.findall(r"\w+|[^\w\s]", prompt))
            assert len(tokenizer.encode(prompt).ids) - 1 == num_words, prompt


def test_generation_shows_the_untouched_the_adapted_model_and_the_rival(
    tmp_path, monkeypatch, capsys
):
    """On weights whose likeliest words the adapter changes: not all random ones are like that."""
    monkeypatch.setattr(studies, "NUM_SHOWN", 2)
    monkeypatch.setattr(studies, "MAX_NEW_TOKENS", 20)
    folder = make_folder(tmp_path, random_config(), seed=1)
    config = VladVAConfig(lora_rank=4)
    adapter = tmp_path / "adapter"
    shaken(VladVA.from_pretrained(folder, config=config)).save_adapter(adapter)
    results = study("generation", folder, tmp_path, "--adapter", adapter, "--rival", adapter)
    answers = results["answers"]
    assert set(answers) == {"before", "after", "rival"}
    assert answers["rival"] == answers["after"] != answers["before"]
    assert "before: " in capsys.readouterr().out
    # image by image, question by question
    untouched = VladVA.from_pretrained(folder)
    images, _ = images_and_captions(2)
    by_hand = [untouched.generate(image, query, 20) for image in images for query in QUERIES]
    assert answers["before"] == by_hand


@pytest.mark.parametrize("name", ["prompts", "attention"])
@pytest.mark.filterwarnings("ignore:Glyph|constrained_layout")
def test_studies_draw_their_figures(name, random_folder, adapter, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, which is an extra")
    pairs = [{"image": f"{verb} it.", "text": f"{verb} it."} for verb in ("Describe", "Name")]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    flags = [] if name == "prompts" else ["--adapter", adapter]
    study(name, random_folder, tmp_path, "--prompts", tmp_path / "pairs.json", *flags)
    assert Image.open(tmp_path / f"{name}.png").width > 500


def test_studies_take_a_pairs_file_and_refuse_what_they_cannot_do(
    random_folder, adapter, tmp_path, capsys
):
    rows = []
    for i in range(4):
        scenes.render(scenes.make_scene(3, i)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "short": f"a red circle {i}"}))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(rows))
    results = study("layers", random_folder, tmp_path, "--data", pairs)
    recalls = {"image_to_text R@1", "text_to_image R@1"}
    assert results["layers"][0].keys() == {"layer", "adaptation"} | recalls
    (tmp_path / "prompts.json").write_text(json.dumps([{"image": "Describe it."}] * 3))
    (tmp_path / "empty.json").write_text(json.dumps([{"image": "Describe it.", "text": " "}] * 3))
    pairs.write_text(rows[0])
    refused = {
        "no soft prompts to decode": ["soft-prompts"],
        "adapted model": ["prompts", "--adapter", str(adapter)],
        "wanted two or more": ["prompts", "--prompts", str(tmp_path / "prompts.json")],
        "empty text ' '": ["prompts", "--prompts", str(tmp_path / "empty.json")],
        "gives 1 captioned rows": ["tokens", "--data", str(pairs)],
        "at least 2 are needed": ["tokens", "--items", "1"],
    }
    for message, flags in refused.items():
        with pytest.raises(SystemExit) as stopped:
            studies.main([*flags, "--model", str(random_folder), "--out", str(tmp_path)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_a_study_that_is_refused_names_what_was_wrong_and_leaves_no_folder(
    random_folder, tmp_path, capsys
):
    """A folder that cannot be made was noticed after the work."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"image": "a", "text": "b"}, {"image": "a </s>", "text": "b"}]))
    flags = ["--model", str(random_folder), "--items", "4", "--prompts", str(prompts)]
    for out in (tmp_path / "new" / "studied", prompts / "x"):
        with pytest.raises(SystemExit):
            studies.main(["prompts", *flags, "--out", str(out)])
        printed, err = capsys.readouterr()
        assert "prompts.json" in err and err.count("\n") == 1 and not printed
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.json"]
