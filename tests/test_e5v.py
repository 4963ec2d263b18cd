"""E5-V's loss alone and added to VladVA's: closed forms, exact gradients, the command line."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import shaken

import train as training
from extras import e5v, scenes
from vladva import VladVA, VladVAConfig

BOTH = pytest.mark.parametrize("loss", ["text-text", "vladva+text-text"])
FEW = ["--steps", "6", "--batch-size", "4", "--holdout", "4", "--lora-rank", "4"]
HEADER = "sent0,sent1,hard_neg"
FIRST_TRIPLE = (
    "an image of a small orange ring top-right and a large plain purple circle center",
    "there is a small orange ring top-right and a large plain purple circle center",
    "an image of a small orange ring center and a large plain purple circle top-right",
)


def run(random_folder, out, *flags):
    return e5v.main(["--model", str(random_folder), "--out", str(out), *FEW, *flags])


def test_text_text_loss_against_a_loop_and_closed_forms():
    """Each sentence among all paraphrases and hard negatives, one way; log 2 B when all agree."""
    torch.manual_seed(0)
    triples = F.normalize(torch.randn(4, 3, 8, dtype=torch.float64), dim=-1)
    others = [*triples[:, 1], *triples[:, 2]]
    naive = 0
    for i in range(4):
        scores = [math.exp((triples[i, 0] @ other).item() / 0.2) for other in others]
        naive -= math.log(scores[i] / sum(scores)) / 4
    assert e5v.text_text_loss(triples, 0.2).item() == pytest.approx(naive, rel=1e-9)
    coinciding = F.normalize(torch.ones(5, 3, 4), dim=-1)
    assert e5v.text_text_loss(coinciding, 0.05).item() == pytest.approx(math.log(10), rel=1e-6)
    apart = torch.eye(4)[:2, None].expand(2, 3, 4).clone()
    apart[:, 2] = torch.eye(4)[2:]
    assert e5v.text_text_loss(apart, 0.01).item() < 1e-9


@BOTH
def test_gradients_with_triples_equal_the_definition(random_folder, scene_rows, loss):
    """Through gradient caching, in micro-batches that mix rows with and without a triple."""
    config = VladVAConfig(lora_rank=4, learn_temperature=True, loss=loss)
    model = shaken(VladVA.from_pretrained(random_folder, config=config)).double()
    rows = []
    for i, row in enumerate(scene_rows):
        if loss == "text-text":
            row = {"image": None, "short": None, "long": None}
        if i != 1:
            row = row | {"further_texts": scenes.caption_triple(5, i, "swap_att")[1]}
        if i != 1 or loss != "text-text":
            rows.append(row)
    whole = model(model.training_batch(rows))
    whole.backward()
    parameters = model.trained_parameters()
    wanted = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert len(wanted) > 20
    assert any(name.endswith(".text") for name in wanted)
    for gradient_caching in (True, False):
        model.zero_grad()
        parts = [model.training_batch(rows[i : i + 3]) for i in range(0, len(rows), 3)]
        contrastive, next_token = training.backward(model, parts, gradient_caching)
        assert (contrastive + next_token).item() == pytest.approx(whole.item(), abs=1e-9)
        for name, gradient in wanted.items():
            assert (parameters[name].grad - gradient).abs().max() < 1e-9, name


def test_the_triples_of_the_scenes_are_those_they_always_were():
    """The text stream is part of the data: a caption, the same in other words, a false one."""
    assert e5v.scene_triple(0, 0) == ("triple 0", FIRST_TRIPLE)


@BOTH
def test_the_rival_trains_from_the_command_line(random_folder, tmp_path, loss):
    """On a CSV file as E5-V's, with E5-V's prompts when it is alone; on the scenes without one."""
    file = tmp_path / "nli.csv"
    lines = [f'"{i} red circles, large","circles {i}","{i} blue circles"' for i in range(9)]
    file.write_text("\n".join([HEADER, *lines]) + "\n")
    for number, source in enumerate((str(file), "scenes")):
        out = tmp_path / f"run{number}"
        run(random_folder, out, "--loss", loss, "--text-data", source)
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert len(metrics) == 6
        assert all(line["contrastive"] > 0 for line in metrics)
        method = json.loads((out / "config.json").read_text())
        assert method["loss"] == loss
        start = "Summary above" if loss == "text-text" else "Summarize"
        assert method["text_prompt"].startswith(start)
        assert method["soft_prompts"] == (loss != "text-text")
        assert (metrics[0]["next_token"] == 0) == (loss == "text-text")
        assert VladVA.from_pretrained(random_folder, adapter=out).config.loss == loss


def test_a_run_goes_on_from_its_last_checkpoint(random_folder, tmp_path):
    whole = run(random_folder, tmp_path / "run")
    for name in ("adapter.safetensors", "scores.json"):
        (tmp_path / "run" / name).unlink()
    flags = ["--out", str(tmp_path / "run"), "--resume"]
    assert e5v.main(flags) == whole


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "not found"),
        ("a,b\nx,y\n", f"wanted the columns {HEADER.replace(',', ', ')}"),
        (f"{HEADER}\na,b,c\na,,c\n", "csv:3: empty text"),
        (f"{HEADER}\na,b,c\n", "1 rows"),
    ],
)
def test_triples_that_cannot_be_read_are_named(random_folder, tmp_path, capsys, text, message):
    file = tmp_path / "nli.csv"
    if text:
        file.write_text(text)
    with pytest.raises(SystemExit):
        run(random_folder, tmp_path / "run", "--text-data", str(file))
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_images_of_ones_own_want_texts_of_ones_own(random_folder, tmp_path, capsys):
    rows = []
    for i in range(6):
        scenes.render(scenes.make_scene(3, i)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "short": f"a red circle {i}"}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    flags = ["--data", str(tmp_path / "pairs.jsonl"), "--loss", "vladva+text-text"]
    with pytest.raises(SystemExit):
        run(random_folder, tmp_path / "run", *flags)
    assert "--text-data FILE.csv" in capsys.readouterr().err
