"""The by-hand measures of looking: what they count, on cases that are known."""

import looking
import pytest
import torch
from conftest import shaken

from extras import scenes
from vladva import VladVA


def test_a_read_out_finds_what_is_there_and_nothing_else():
    labels = torch.randint(3, (800,), generator=torch.Generator().manual_seed(0))
    noise = torch.randn(800, 20, generator=torch.Generator().manual_seed(1))
    assert 20 < looking.accuracy(noise, labels, 3) < 50
    noise[:, 7] += 5.0 * labels
    noise[:, 2] += 5.0 * (labels == 1)
    assert looking.accuracy(noise, labels, 3) > 95


def test_features_of_an_object_are_those_of_its_cell():
    scene = scenes.make_scene(1, 0)
    features = torch.arange(36.0)[None, :, None]  # of a 6 x 6 grid: each patch its number
    means = looking.object_features(features, [scene])[:, 0]
    for thing, mean in zip(scene.things, means.tolist(), strict=True):
        row, column = divmod(thing.cell, 3)
        assert mean == 12 * row + 2 * column + 3.5  # of n, n + 1, n + 6, n + 7


@torch.no_grad()
def test_states_before_the_words_are_the_decoders(random_folder):
    model = shaken(VladVA.from_pretrained(random_folder))
    (_, captions, pixels, batch), *_ = looking.described_batches(model, 5, 4)
    states = looking.layer_states(model, batch, pixels)
    assert len(states) == 1 + len(model.lvlm.decoder.layers)
    wanted = model.hidden_states(batch, "image", pixels)[1]
    torch.testing.assert_close(model.lvlm.decoder.norm(states[-1]), wanted)
    features, labels = looking.collect(model, 5, 4)
    words = " ".join(captions).replace(".", "").replace(":", "").split()
    sizes = [scenes.VALUES["size"].index(word) for word in words if word in scenes.SIZES]
    assert labels["before the word, layer 0"]["size"][0].tolist() == sizes
    assert len(features["tower"]["texture"][0]) == len(sizes)  # one of each object


def test_word_scores_of_a_model_that_knows_are_100(random_folder, monkeypatch):
    """Of one that gives the words no score, they are not."""
    model = VladVA.from_pretrained(random_folder)
    vocab_size = model.lvlm.config.decoder.vocab_size

    def oracle(batch, modality, pixels):
        return None, torch.nn.functional.one_hot(batch.caption_targets, vocab_size).float()

    model.lvlm.lm_head.weight = torch.nn.Parameter(20 * torch.eye(vocab_size))
    monkeypatch.setattr(model, "hidden_states", oracle)
    scores = looking.word_scores(model, 5, 6)
    assert scores["size right"] == scores["texture right"] == 100
    for name in scenes.ATTRIBUTES:
        model.lvlm.lm_head.weight.data[looking.word_ids(model, name)] = 0
    scores = looking.word_scores(model, 5, 6)
    assert scores["size right"] < 100 and scores["size nats"] > 1


def test_the_curve_is_printed_from_an_ordinary_run(random_folder, tmp_path, capsys):
    flags = ["--model", str(random_folder), "--out", str(tmp_path / "run"), "--steps", "2"]
    looking.curve([*flags, "--eval-every", "1", "--batch-size", "4"])
    *_, header, _, first, second, third = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["step", "size", "right"]
    assert [line.split()[0] for line in (first, second, third)] == ["0", "1", "2"]
    looking.readouts(["--model", str(random_folder), "--scenes", "20"])
    assert "behind the projector" in capsys.readouterr().out
    with pytest.raises(ValueError, match="runs/nowhere"):
        looking.readouts(["--model", str(random_folder), "--adapter", "runs/nowhere"])
