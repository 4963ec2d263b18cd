"""What the paper looks into, on a random model."""

import json
import math
import random
import re
import sys

import pytest
import torch
from conftest import shaken
from PIL import Image
from test_eval import write

import data
import eval as benchmarks
from extras import scenes, studies
from extras.studies import attention_density
from model import read_config
from vladva import Settings, VladVA, output_entropy


@pytest.fixture(scope="module")
def adapter(random_folder, tmp_path_factory):
    """The folder of a shaken adapter of the random model."""
    folder = tmp_path_factory.mktemp("adapter")
    shaken(VladVA.from_pretrained(random_folder, settings=Settings(rank=4))).save_adapter(folder)
    return folder


def study(task, model, out, *flags):
    """The numbers that a study writes."""
    studies.main([task, "--model", str(model), "--items", "6", "--out", str(out), *map(str, flags)])
    return json.loads((out / f"{task}.json").read_text())


@pytest.mark.parametrize("task", ["tokens", "attention", "soft-prompts", "layers"])
def test_a_study_writes_numbers_before_and_after(
    task, random_folder, adapter, tmp_path, monkeypatch, capsys
):
    """With matplotlib out of the way: the numbers are written all the same, and one line says what is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = study(task, random_folder, tmp_path, "--adapter", adapter)
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))
    model = VladVA.from_pretrained(random_folder, adapter=adapter)
    pictures, captions = zip(*((scenes.render(s), str(scenes.short_caption(s, random.Random(f"captions 2000 {i}"))))
                               for i, s in enumerate(scenes.make_scene(2000, i) for i in range(6))))  # fmt: skip
    recall = lambda a, b: pytest.approx(
        benchmarks.recall_at(a, b, torch.arange(6))["image_to_text"]["R@1"]
    )
    if task == "tokens":
        logits = model.lvlm.head(model.text_states(list(captions)))
        assert found["measures"]["after"]["text entropy"] == pytest.approx(
            output_entropy(logits).mean().item(), rel=1e-5
        )
        best = model.tokenizer.decode([logits[1].argmax().item()])
        assert found["tokens"]["after"]["text"][1][0] == [
            best,
            pytest.approx(logits[1].softmax(-1).max().item(), rel=1e-4),
        ]
        assert found["measures"]["before"] != found["measures"]["after"]
    if task == "attention":
        after = [
            attention_density(model.summary_attention(picture))[0].mean().item()
            for picture in pictures
        ]
        assert found["density"]["after"]["entropy"] == pytest.approx(sum(after) / 6, rel=1e-5)
        assert (
            found["density"]["before"]["entropy"]
            != found["density"]["after"]["entropy"]
            < found["entropy when uniform"]
        )
    if task == "soft-prompts":
        hand = "".join(row[0] for row in found["image"]).strip()
        assert hand == Settings.image_prompt and all(
            -1 <= row[2] < 0.9999 for row in found["image"] + found["text"]
        )
    if task == "layers":
        assert found["layers"]["after"][-1]["image to text R@1"] == recall(
            model.encode_image(list(pictures)), model.encode_text(list(captions))
        )
        assert [len(rows) for rows in found["layers"].values()] == [2, 2] and {
            "Replace",
            "Swap",
            "Add",
        } < found["layers"]["before"][0].keys()


def test_prompts_are_measured_one_pair_at_a_time(random_folder, tmp_path):
    pairs = [
        {"image": f"{verb} the image.", "text": f"{verb} the text."}
        for verb in ("Describe", "Name", "Give", "Caption")
    ]
    write(tmp_path / "prompts.json", pairs)
    found = study("prompts", random_folder, tmp_path, "--prompts", tmp_path / "prompts.json")
    entropies = [row["entropy"] for row in found["prompts"]]
    assert entropies == sorted(entropies) and {row["image prompt"] for row in found["prompts"]} == {
        pair["image"] for pair in pairs
    }
    assert all(-1 <= c["rho"] <= 1 and 0 < c["p"] <= 1 for c in found["correlations"].values())


def test_the_committed_prompts_are_50_pairs_that_the_tiny_model_reads_word_by_word():
    pairs = json.loads(studies.PROMPTS.read_text())
    tokenizer = data.Tokenizer(data.TINY, read_config(data.TINY))
    assert (
        len({pair["image"] for pair in pairs})
        == len({pair["text"] for pair in pairs})
        == len(pairs)
        == 50
    )
    for prompt in (text for pair in pairs for text in pair.values()):
        assert len(tokenizer.encode(prompt).ids) - 1 == len(re.findall(r"\w+|[^\w\s]", prompt)), (
            prompt
        )


@pytest.mark.filterwarnings(
    "ignore:Glyph|constrained_layout"
)  # a random model says what no font has
def test_generation_shows_every_model_and_that_switched_off_is_the_base(
    random_folder, adapter, tmp_path, capsys
):
    found = study("generation", random_folder, tmp_path, "--adapter", adapter, "--rival", adapter)
    assert found["adapter off equals base"] and set(found["answers"]) == {
        "base",
        "adapter",
        "adapter off",
        "rival",
    }
    assert found["answers"]["rival"] == found["answers"]["adapter"] != found["answers"]["base"]
    assert "adapter off: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "task", ["prompts", "tokens", "attention", "soft-prompts", "layers", "generation"]
)
@pytest.mark.filterwarnings("ignore:Glyph|constrained_layout")
def test_studies_draw_their_pictures(task, random_folder, adapter, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is an extra")
    write(
        tmp_path / "prompts.json",
        [{"image": f"{verb} it.", "text": f"{verb} it."} for verb in ("Describe", "Name", "Give")],
    )
    adapted = [] if task == "prompts" else ["--adapter", adapter]
    study(task, random_folder, tmp_path, "--prompts", tmp_path / "prompts.json", *adapted)
    assert Image.open(tmp_path / f"{task}.png").width > 500


def test_studies_take_a_pairs_file_and_refuse_what_they_cannot_do(
    random_folder, adapter, tmp_path, capsys
):
    rows = []
    for i in range(4):
        scenes.render(scenes.make_scene(3, i)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "short": f"a red circle {i}"})
    write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
    assert (
        study("layers", random_folder, tmp_path, "--data", tmp_path / "pairs.jsonl")["pictures"]
        == 4
    )
    write(tmp_path / "prompts.json", [{"image": "Describe it."}] * 3)
    refused = {
        "no soft prompts to decode": ["soft-prompts"],
        "adapted model": ["prompts", "--adapter", str(adapter)],
        "wanted a list of two or more": [
            "prompts",
            "--prompts",
            str(tmp_path / "prompts.json"),
        ],
        "at least 2 are needed": [
            "tokens",
            "--data",
            str(tmp_path / "pairs.jsonl"),
            "--items",
            "1",
        ],
    }
    for message, flags in refused.items():
        with pytest.raises(SystemExit) as stopped:
            studies.main([*flags, "--model", str(random_folder), "--out", str(tmp_path)])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_rank_correlation_in_closed_form_and_against_pearson_on_ranks():
    x = torch.tensor([3.0, 1.0, 2.0, 10.0, 7.0, 8.0, 9.0])
    rho, p = studies.rank_correlation(x, x.exp())
    assert rho == pytest.approx(1) and 1 / 10_001 <= p < 0.01
    assert studies.rank_correlation(x, -x)[0] == pytest.approx(-1)
    tied = torch.tensor([1.0, 1.0, 2.0, 3.0])  # ranks .5 .5 2 3 (from 0), against 0 1 2 3
    assert studies.rank_correlation(tied, torch.arange(4.0))[0] == pytest.approx(
        4.5 / (4.5 * 5) ** 0.5
    )
    torch.manual_seed(0)
    apart = [
        studies.rank_correlation(torch.randn(12), torch.randn(12), permutations=500)[1]
        for _ in range(40)
    ]
    assert 0.3 < sum(apart) / 40 < 0.7  # p is uniform where there is no correlation
    with pytest.raises(ValueError, match="equal values"):
        studies.rank_correlation(torch.ones(3), torch.arange(3.0))


def test_attention_density_of_uniform_of_pointed_and_of_scaled_maps():
    uniform, pointed = torch.full((2, 20), 0.01), torch.eye(20)[:1]
    entropy, share = studies.attention_density(uniform)
    assert entropy.tolist() == pytest.approx([math.log(20)] * 2) and share.tolist() == [0.9, 0.9]
    entropy, share = studies.attention_density(pointed)
    assert (entropy.item(), share.item()) == (0, 1 / 20)
    assert studies.attention_density(torch.tensor([0.3, 0.15, 0.05]))[1].item() == pytest.approx(
        2 / 3
    )  # the two largest hold exactly 90 %


def test_nearest_tokens_go_by_angle_not_by_length():
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, 0.1]])
    ids, cosine = studies.nearest_tokens(torch.tensor([[0.1, 0.0], [3.0, 4.0], [-1.0, 0.0]]), table)
    assert ids.tolist() == [0, 1, 2] and cosine.tolist() == pytest.approx([1, 0.8, 1], abs=1e-4)
