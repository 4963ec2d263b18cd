"""The paper's Table 4 in small."""

import json
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train as training
from extras import ablation

LITTLE = ["--steps", "2", "--holdout", "6", "--batch-size", "4"]


def run(random_folder, out, *flags):
    return ablation.main(["--model", str(random_folder), "--out", str(out), *flags])


def test_the_ablation_trains_every_row_and_goes_on_where_it_stopped(
    random_folder, tmp_path, monkeypatch, capsys
):
    """Runs that are done are read, not trained again; each row is an ordinary run."""
    names = list(ablation.ROWS)
    two_rows = {name: ablation.ROWS[name] for name in (names[0], names[3])}
    monkeypatch.setattr(ablation, "ROWS", two_rows)
    out = tmp_path / "a"
    first = run(random_folder, out, "--seeds", "2", *LITTLE)
    rows = [ablation.UNTOUCHED, *ablation.ROWS]
    assert list(first) == rows
    for row, values in first.items():
        assert len(values["Swap"]) == (1 if row == rows[0] else 2)
    table = (out / "ablation.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == rows
    assert json.loads((out / "ablation.json").read_text())["rows"] == first

    # a row is what train.py gives
    flags = ["--model", str(random_folder), "--out", str(tmp_path / "alone"), *LITTLE]
    alone = training.main([*flags, "--seed", "1"])
    wanted = {name: values[1] for name, values in first[names[3]].items()}
    columns = ablation.collect([alone["after"]])
    assert {name: values[0] for name, values in columns.items()} == wanted
    weights = load_file(out / "1-seed-0" / "adapter.safetensors")
    assert not any("lora" in name for name in weights)
    assert any(name.endswith(".image") for name in weights)

    # two runs are taken away: these alone are trained again
    for name in ("1-seed-1/scores.json", "2-seed-0/scores.json"):
        (out / name).unlink()
    trained = []
    train = training.train

    def noting_train(config, *args):
        trained.append(Path(config.out).name)
        return train(config, *args)

    monkeypatch.setattr(training, "train", noting_train)
    assert run(random_folder, out, "--seeds", "2", "--resume", *LITTLE) == first
    assert sorted(trained) == ["1-seed-1", "2-seed-0"]


def test_an_ablation_that_makes_no_sense_is_refused_before_it_starts(
    random_folder, tmp_path, capsys
):
    (tmp_path / "config.json").write_text("{}")
    for flags, message in (
        ([], "another run"),
        (["--holdout", "0"], "--holdout 2 or more"),
        (["--loss", "text-text"], "--loss vladva"),
        (["--seeds", "0"], "1 or more"),
    ):
        with pytest.raises(SystemExit):
            run(random_folder, tmp_path if not flags else tmp_path / "b", *LITTLE, *flags)
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_going_on_with_other_flags_is_refused(random_folder, tmp_path, monkeypatch, capsys):
    """Rows with different learning rates used to end in one table."""
    monkeypatch.setattr(ablation, "ROWS", {})
    monkeypatch.setattr(ablation, "ablate", lambda *args: {})
    run(random_folder, tmp_path / "a", *LITTLE, "--lr", "1e-3")
    with pytest.raises(SystemExit):
        run(random_folder, tmp_path / "a", "--resume", "--lr", "2e-3")
    assert "lr was 0.001, not 0.002" in capsys.readouterr().err


def test_two_runs_of_the_ablation_at_a_time_give_what_one_gives(
    random_folder, tmp_path, monkeypatch
):
    rows = dict(list(ablation.ROWS.items())[3:])
    monkeypatch.setattr(ablation, "ROWS", rows)
    one = run(random_folder, tmp_path / "1", "--seeds", "1", "--jobs", "1", *LITTLE)
    two = run(random_folder, tmp_path / "2", "--seeds", "1", "--jobs", "2", *LITTLE)
    for row, values in one.items():
        for name, value in values.items():
            # another number of threads adds up in another order
            assert two[row][name] == pytest.approx(value, rel=1e-4), (row, name)


def test_the_long_caption_stands_where_the_short_one_stood():
    class Rows:
        group_size = 2

        def __len__(self):
            return 1

        def row(self, index, rng):
            return {"image": index, "short": "a", "long": "a b c", "where": "1"}

    rows = ablation.LongInPlaceOfShort(Rows())
    assert rows.row(7, random.Random(0))["short"] == "a b c"
    assert (len(rows), rows.group_size) == (1, 2)
