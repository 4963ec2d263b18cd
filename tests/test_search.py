"""Asking a folder of images: the order, what is embedded again, principal components, refusals."""

import os
import shutil

import pytest
import torch
from conftest import shaken
from PIL import Image

from extras import search
from extras.scenes import make_scene, render
from vladva import VladVA

NAMES = ("a", "b", "c", "d", "e", "f", "g")
TEXT = "a red circle"


@pytest.fixture(scope="module")
def model():
    return VladVA.from_pretrained("tiny")


@pytest.fixture
def folder(tmp_path):
    """Seven scenes in two folders, and a file that is no image."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        place = folder / "more" if number % 2 else folder
        render(make_scene(7, number), 60 + 9 * number).save(place / f"{name}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def encoded(monkeypatch):
    """Names of the images that encode_image has embedded, in order."""
    names = []
    encode_image = VladVA.encode_image

    def recording(self, images, *args):
        image_emb = encode_image(self, images, *args)
        names.extend(path.name for path in images)
        return image_emb

    monkeypatch.setattr(VladVA, "encode_image", recording)
    return names


def ask(index, model, dim=None, top=12):
    """[(name, score)] of the answers to TEXT, best first."""
    rows, paths = index.update(model)
    scores, places = index.search(model.encode_text([TEXT]), rows, top, dim)
    return [(paths[i].name, score) for i, score in zip(places.tolist(), scores.tolist())]


def assert_plain(answers, model, folder, tolerance=1e-3):
    """Every image once, with its similarity by definition, best first.

    tolerance: a number has 11 bits in float16, and vectors of length 1 add up no more than that.
    """
    paths = sorted(folder.rglob("*.png"))
    sim = model.encode_image(paths) @ model.encode_text([TEXT]).T
    assert sorted(name for name, _ in answers) == sorted(path.name for path in paths)
    exact = dict(zip([path.name for path in paths], sim[:, 0].tolist()))
    for name, score in answers:
        assert score == pytest.approx(exact[name], abs=tolerance)
    scores = [score for _, score in answers]
    assert scores == sorted(scores, reverse=True)


def test_answers_are_the_similarities_of_encode_image_best_first(model, folder, monkeypatch):
    answers = ask(search.Index(folder, model), model)
    assert_plain(answers, model, folder)
    # in several blocks, and only the best
    monkeypatch.setattr(search, "BLOCK", 3)
    best = ask(search.Index(folder, model), model, top=4)
    assert [name for name, _ in best] == [name for name, _ in answers[:4]]


def test_only_new_and_changed_images_are_embedded_and_those_that_are_gone_are_passed_over(
    model, folder, encoded
):
    ask(search.Index(folder, model), model)
    assert sorted(encoded) == [f"{name}.png" for name in NAMES]
    encoded.clear()
    ask(search.Index(folder, model), model)
    assert encoded == []
    # one has another size at the old time, one another time, one comes, one goes
    time = (folder / "a.png").stat().st_mtime_ns
    render(make_scene(8, 0), 200).save(folder / "a.png")
    os.utime(folder / "a.png", ns=(time, time))
    os.utime(folder / "more" / "b.png", ns=(time, time + 10**9))
    render(make_scene(8, 1)).save(folder / "more" / "new.png")
    (folder / "c.png").unlink()
    answers = ask(search.Index(folder, model), model)
    assert sorted(encoded) == ["a.png", "b.png", "new.png"]
    assert_plain(answers, model, folder)


def test_another_adapter_has_an_index_of_its_own(model, folder, tmp_path, encoded, capsys):
    adapted = shaken(VladVA.from_pretrained("tiny"))
    adapted.save_adapter(tmp_path / "run")
    adapter = str(tmp_path / "run")
    flags = [str(folder), TEXT, "--sheet", str(tmp_path / "sheet.png")]
    search.main(flags)
    search.main([*flags, "--adapter", adapter])
    assert len(encoded) == 2 * len(NAMES)
    assert_plain(ask(search.Index(folder, adapted, adapter), adapted), adapted, folder)
    assert_plain(ask(search.Index(folder, model), model), model, folder)
    encoded.clear()
    # trained further, in the same folder
    with torch.no_grad():
        adapted.soft_prompts["image"].add_(1.0)
    adapted.save_adapter(tmp_path / "run")
    search.main([*flags, "--adapter", adapter])
    assert len(encoded) == len(NAMES)


def test_all_principal_components_change_nothing(model, folder):
    index = search.Index(folder, model)
    width = model.lvlm.config.decoder.hidden_size
    assert_plain(ask(index, model, dim=width), model, folder, tolerance=2e-3)


def test_principal_components_are_orthonormal_and_span_the_images(model, folder):
    """Seven images less their mean lie in six dimensions."""
    index = search.Index(folder, model)
    index.update(model)
    records = index.read()
    components, reduced = index.reduce(records, 6)
    image_emb = torch.from_numpy(records["embedding"]).float()
    centred = image_emb - image_emb.mean(0)
    torch.testing.assert_close(components.T @ components, torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(centred @ components @ components.T, centred, atol=1e-4, rtol=0)
    assert reduced.dtype == torch.float16
    assert reduced.shape == (7, 6)


def test_components_are_fitted_once_and_again_when_images_come(model, folder, monkeypatch):
    fits = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: fits.append(0) or eigh(x))
    first = ask(search.Index(folder, model), model, dim=4)
    assert ask(search.Index(folder, model), model, dim=4) == first
    assert len(fits) == 1
    render(make_scene(8, 2)).save(folder / "new.png")
    assert len(ask(search.Index(folder, model), model, dim=4)) == len(first) + 1
    assert len(fits) == 2


def test_bad_images_are_named_and_left_out(model, folder, monkeypatch, capsys):
    monkeypatch.setattr(search, "BATCH_SIZE", 4)
    shutil.copy(folder / "notes.txt", folder / "broken.jpg")
    answers = ask(search.Index(folder, model), model)
    assert len(answers) == len(NAMES)
    out = capsys.readouterr().out
    assert out.count("left out:") == 1
    assert "broken.jpg: cannot be decoded" in out
    (folder / "broken.jpg").unlink()
    assert_plain(answers, model, folder)


@pytest.mark.parametrize("torn", [0, 5])
def test_an_interrupted_indexing_goes_on_where_it_was(model, folder, monkeypatch, encoded, torn):
    """A kill while a record is written leaves a part of it, behind which nothing may be written."""
    monkeypatch.setattr(search, "BATCH_SIZE", 2)
    append = search.Index.append

    def killed_later(self, stamps, image_emb):
        if len(encoded) > 4:
            raise KeyboardInterrupt
        append(self, stamps, image_emb)

    monkeypatch.setattr(search.Index, "append", killed_later)
    with pytest.raises(KeyboardInterrupt):
        search.Index(folder, model).update(model)
    monkeypatch.setattr(search.Index, "append", append)
    index = search.Index(folder, model)
    with open(index.path, "ab") as file:
        file.write(b"x" * torn)
    encoded.clear()
    answers = ask(index, model)
    assert len(encoded) == len(NAMES) - 4
    assert_plain(answers, model, folder)


def test_the_command_prints_a_table_and_draws_a_sheet(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    search.main([str(folder), TEXT, "--top", "7", "--dim", "5", "--sheet", str(sheet)])
    out = capsys.readouterr().out
    assert "7 images, 7 of them embedded now" in out
    assert out.count(".png") == 7
    assert Image.open(sheet).size == (6 * 136, 2 * 148)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top", "0"], "--top 0, --dim None: wanted 1 or more, and 1 to 128"),
        (["--dim", "0"], "wanted 1 or more, and 1 to 128"),
        (["--dim", "129"], "wanted 1 or more, and 1 to 128"),
        (["--sheet", "nowhere/sheet.png"], "nowhere"),
    ],
)
def test_bad_flags_end_in_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        search.main([str(folder), TEXT, *flags])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "the </s> token", "red " * 2000])
def test_a_text_that_cannot_be_embedded_is_refused_before_any_image_is(folder, encoded, text):
    with pytest.raises(SystemExit):
        search.main([str(folder), text])
    assert encoded == []


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    for folder, number in ((tmp_path, 1), (tmp_path / "nowhere", 0)):
        with pytest.raises(SystemExit):
            search.main([str(folder), TEXT])
        assert f"{folder}: no image can be read, of {number}" in capsys.readouterr().err
