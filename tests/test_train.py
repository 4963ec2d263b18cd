"""The loop: one batch overfits, frozen weights stay, the schedule's closed form, runs refused, the command line end to end."""

import dataclasses
import json
import math
import random

import pytest
import torch
from conftest import shaken
from PIL import Image

import data
import train as training
from train import TrainConfig
from vladva import Settings, VladVA

SMALL = ["--eval-gallery", "12", "--eval-items", "3", "--scenes", "40", "--batch", "6", "--rank", "4"]


def run(random_folder, out, *flags):
    return training.main(["--model", str(random_folder), "--out", str(out), *flags])


# ------------------------------------------------------------------------------------------------------ the step


def test_one_batch_overfits_and_frozen_weights_stay_bit_identical(random_folder, scene_rows):
    model = VladVA.from_pretrained(random_folder, settings=Settings(rank=8, temperature=0.1))
    model.attach()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name: p.clone() for name, p in model.trained()}
    optimizer = training.make_optimizer(model, TrainConfig(lr=1e-2, soft_prompt_lr=1e-2))
    batch = model.training_batch(scene_rows)
    losses = [training.optimisation_step(model, [batch], optimizer, clip=1.0) for _ in range(60)]
    assert losses[-1]["contrastive"] < 0.3 * losses[0]["contrastive"] and losses[-1]["next_token"] < losses[0]["next_token"] - 0.2
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    assert all(not torch.equal(p, trained[name]) for name, p in model.trained())


def gradients(model, rows, micro_batch):
    """{name: gradient} and the two losses of a batch in parts of some size."""
    model.zero_grad()
    losses = training.backward(model, [model.training_batch(rows[i : i + micro_batch]) for i in range(0, len(rows), micro_batch)])
    return {name: p.grad.clone() for name, p in model.trained()}, losses


def test_gradients_in_micro_batches_equal_those_in_one_piece(random_folder, scene_rows):
    """Gradient caching is exact: float64, captions of mixed length, a row without a long caption and one without a short one."""
    model = shaken(VladVA.from_pretrained(random_folder, settings=Settings(rank=4, learn_temperature=True, next_token_weight=0.7))).double()
    rows = [dict(row, image=row["image"].resize((96, 96))) for row in scene_rows]
    model.zero_grad()
    model(model.training_batch(rows)).backward()  # the definition of the loss, no caching
    wanted = {name: p.grad.clone() for name, p in model.trained()}
    assert {"log_temperature", "soft_prompts.image", "soft_prompts.text"} < wanted.keys() and all(g.abs().max() > 1e-6 for g in wanted.values())
    for micro_batch in (1, 2, 3, 8):
        found, losses = gradients(model, rows, micro_batch)
        assert model.overall_loss(*losses).item() == pytest.approx(model(model.training_batch(rows)).item(), abs=1e-9)
        for name, gradient in wanted.items():
            assert (found[name] - gradient).abs().max() < 1e-9, (micro_batch, name)


def test_checkpointing_and_micro_batches_together_change_no_gradient(random_folder, scene_rows):
    model = shaken(VladVA.from_pretrained(random_folder, settings=Settings(rank=4))).double()
    plain, _ = gradients(model, scene_rows, 3)
    model.lvlm.decoder.checkpointing = True
    recomputed, _ = gradients(model, scene_rows, 3)
    assert all((plain[name] - recomputed[name]).abs().max() < 1e-9 for name in plain)


@pytest.mark.parametrize("settings", [Settings(soft_prompts=False), Settings(lora=False), Settings(next_token_weight=0.0)])
def test_each_component_can_be_left_out(random_folder, scene_rows, settings):
    model = VladVA.from_pretrained(random_folder, settings=settings)
    model.attach()
    optimizer = training.make_optimizer(model, TrainConfig(lr=1e-2, soft_prompt_lr=1e-2))
    measured = training.optimisation_step(model, [model.training_batch(scene_rows)], optimizer, clip=1.0)
    assert any(name.startswith("soft") for name, _ in model.trained()) == settings.soft_prompts
    assert any("lora" in name for name, _ in model.trained()) == settings.lora
    assert (measured["next_token"] == 0) == (settings.next_token_weight == 0)


def test_a_non_finite_loss_stops_the_run_before_the_update(random_folder, scene_rows):
    model = VladVA.from_pretrained(random_folder, settings=Settings(rank=4))
    model.attach()
    with torch.no_grad():
        model.soft_prompts["text"].fill_(float("nan"))
    optimizer = training.make_optimizer(model, TrainConfig(lr=1e-2, soft_prompt_lr=1e-2))
    before = [p.clone() for name, p in model.trained() if "lora" in name]
    with pytest.raises(ValueError, match="not finite"):
        training.optimisation_step(model, [model.training_batch(scene_rows)], optimizer, clip=1.0)
    assert all(torch.equal(a, p) for a, (name, p) in zip(before, (t for t in model.trained() if "lora" in t[0])))


def test_the_schedule_warms_up_linearly_and_ends_at_zero():
    config = TrainConfig(steps=100, warmup=0.1)
    assert [training.schedule(step, config) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert training.schedule(55, config) == pytest.approx(0.5) and training.schedule(100, config) == pytest.approx(0)


def test_batches_are_a_function_of_the_seed_and_cover_an_epoch_once(random_folder):
    model = VladVA.from_pretrained(random_folder)

    class Rows(list):
        together = 1

        def row(self, index, rng):
            seen.append(index)
            return self[index]

    rows = Rows({"image": Image.new("RGB", (96, 96), (i, 0, 0)), "short": f"number {i}", "long": None} for i in range(10))
    orders = []
    for seed in (0, 0, 1):
        seen = []
        list(training.batches(model, rows, TrainConfig(steps=4, batch=5, seed=seed)))
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:10]) == sorted(orders[0][10:]) == list(range(10))


# ------------------------------------------------------------------------------------------------------ the command line


def test_a_run_on_scenes_writes_all_its_files_and_what_it_learned_reloads(random_folder, tmp_path, capsys):
    scores = run(random_folder, tmp_path / "run", "--steps", "3", *SMALL)
    out, printed = tmp_path / "run", capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["adapter.safetensors", "config.json", "metrics.jsonl", "report.png", "scores.json"]
    assert "Replace, mean" in printed and "before" in printed and "after" in printed
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert set(metrics[0]) == {"step", "loss", "contrastive", "next_token", "lr", "grad_norm", "step_s", "images_per_s", "tokens_per_s", "peak_bytes"}
    assert json.loads((out / "scores.json").read_text()) == scores
    assert json.loads((out / "config.json").read_text())["batch"] == 6
    assert Image.open(out / "report.png").width > 600
    model = VladVA.from_pretrained(random_folder, adapter=out)
    assert model.settings.rank == 4 and model.encode_text(["a red circle"]).isfinite().all()


def test_a_minute_of_adaptation_already_beats_the_untouched_tiny_model(tmp_path):
    scores = training.main(
        ["--out", str(tmp_path / "run"), "--steps", "25", "--batch", "32", "--eval-gallery", "100", "--eval-items", "20", "--seed", "3"]
    )
    for measure in (lambda r: r["retrieval"]["image_to_text"]["R@1"], lambda r: r["groups"]["Add"]):  # seen: 34 -> 76 and 57 -> 85
        assert measure(scores["after"]) > measure(scores["before"]) + 10


def test_the_same_seed_gives_the_same_run_and_another_another(random_folder, tmp_path):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(random_folder, tmp_path / name, "--steps", "2", "--seed", str(seed), *SMALL)
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] != losses[2]


def photographs(folder, rows=24):
    """JPEG and PNG files of several sizes and modes, with a pairs file; every third row lacks a caption."""
    rng, lines = random.Random(0), []
    for i in range(rows):
        mode, suffix = [("RGB", "jpg"), ("L", "jpg"), ("RGBA", "png"), ("P", "png")][i % 4]
        image = data.render(data.make_scene(0, i), 96).resize((rng.randint(40, 300), rng.randint(40, 300)))
        image.convert(mode).save(folder / f"{i}.{suffix}")
        row = data.scene_row(0, i)
        lines.append(
            {"image": f"{i}.{suffix}", "short": None if i % 3 == 1 else [row["short"], "a picture"], "long": None if i % 3 == 2 else row["long"]}
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_run_on_photographs(random_folder, tmp_path, capsys):
    path = photographs(tmp_path)
    scores = run(random_folder, tmp_path / "run", "--data", str(path), "--steps", "2", "--holdout", "6", "--image-mode", "pad")
    assert scores["after"]["gallery"] == 6 and "image to text R@1" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch"] == 18
    run(random_folder, tmp_path / "again", "--data", str(path), "--steps", "1")  # a tenth of 24 rows is 2
    assert (tmp_path / "again" / "report.png").exists()


def test_bad_rows_stop_the_run_or_are_counted(random_folder, tmp_path, capsys):
    path = photographs(tmp_path)
    lines = path.read_text().splitlines()
    (tmp_path / "0.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:400])
    with pytest.raises(SystemExit) as stopped:
        run(random_folder, tmp_path / "run", "--data", str(path), "--steps", "1")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and "pairs.jsonl:1: " in err and "0.jpg" in err and err.count("\n") == 1
    path.write_text("\n".join([*lines, "{"]) + "\n")
    run(random_folder, tmp_path / "skip", "--data", str(path), "--steps", "1", "--on-bad-data", "skip")
    assert "2 bad rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nowhere"], "no model folder 'nowhere'"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl not found"),
        (["--batch", "1"], "--batch 1"),
        (["--batch", "100", "--scenes", "50"], "--batch 100"),
        (["--steps", "0"], "--steps 0"),
        (["--rank", "0"], "rank is 0"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--image-mode", "squash"], "'crop' or 'pad'"),
        (["--temperature", "0"], "temperature is 0"),
    ],
)
def test_bad_requests_are_one_line_and_exit_code_2(random_folder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(random_folder, tmp_path / "run", *SMALL, "--steps", "1", *flags)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_folder_that_holds_another_run_is_refused_and_left_alone(random_folder, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious\n")
    with pytest.raises(SystemExit) as stopped:
        run(random_folder, out, "--steps", "1", *SMALL)
    assert stopped.value.code == 2 and "holds another run" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == "precious\n" and len(list(out.iterdir())) == 1


def test_every_flag_has_its_default_in_the_dataclass():
    """argparse reads defaults from there, so the two cannot differ; and None, not -1 or "", means unset."""
    for cls in (TrainConfig, Settings):
        assert all(f.default not in (-1, "") for f in dataclasses.fields(cls))
    assert math.isclose(training.resolve(TrainConfig(micro_batch=8), FakeModel(), range(100)).lr, 2e-4)


class FakeModel:
    """Of LLaVA-1.5-7B's width."""

    class lvlm:
        device, dtype = torch.device("cpu"), torch.float32

        class config:
            class decoder:
                hidden_size = 4096


def test_a_row_that_breaks_during_training_is_left_out_and_named(random_folder, capsys):
    """It used to vanish without a word when pictures are not decoded beforehand."""
    model = VladVA.from_pretrained(random_folder)

    class Rows(list):
        together = 1

        def row(self, index, rng):
            if index == 1:
                raise data.BadRow("pairs.jsonl:2: broken")
            return self[index]

    rows = Rows({"image": Image.new("RGB", (96, 96)), "short": f"number {i}", "long": None} for i in range(4))
    ((batch,),) = training.batches(model, rows, TrainConfig(steps=1, batch=4, on_bad_data="skip"))
    assert len(batch.pixels) == 3 and "pairs.jsonl:2: broken" in capsys.readouterr().out
    with pytest.raises(data.BadRow):
        list(training.batches(model, rows, TrainConfig(steps=1, batch=4)))
