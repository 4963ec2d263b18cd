"""The paper's Table 4: which part of the method adds what.

    python -m extras.ablation --seeds 3 --jobs 2              # and any flags of train.py

Writes OUT/ablation.json, ablation.md and ablation.png, and a folder a run.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from data import command
from extras import plots
from extras.plots import read_metrics
from model import pick_device, read_json, write_json
from train import TrainConfig, add_fields, picked, stored_run, train
from vladva import Settings

# ------------------------------------------------------------------------------------------------------ ablation


ABLATION = {  # row of the paper's Table 4: what differs from the defaults; the last one is Sec. 3.2.2's warning
    "soft prompts": ({}, {"lora": False, "next_token_weight": 0.0}),
    "LoRA": ({}, {"soft_prompts": False, "next_token_weight": 0.0}),
    "LoRA, soft prompts": ({}, {"next_token_weight": 0.0}),
    "LoRA, soft prompts, next-token loss": ({}, {}),
    "Eq. 1 on long captions": ({"contrast": "long"}, {"next_token_weight": 0.0}),
}


UNTOUCHED = "untouched"


ABLATED = {  # column: where a run's results hold it, and how it is written
    "text to image R@1": (("retrieval", "text_to_image", "R@1"), ".1f"),
    "image to text R@1": (("retrieval", "image_to_text", "R@1"), ".1f"),
    "Replace": (("groups", "Replace"), ".1f"),
    "Swap": (("groups", "Swap"), ".1f"),
    "Add": (("groups", "Add"), ".1f"),
    "long captions, nats a token": (("long_captions", "loss"), ".3f"),
}


def ablation(config, settings, seeds, jobs, resume):
    """The paper's Table 4: every row with the same data, steps and seeds. Writes OUT/ablation.json, .md and .png, and a folder a run."""
    out = Path(config.out or Path("runs") / "ablation")
    planned = {
        (row, seed): (dataclasses.replace(config, **ours, seed=seed, out=str(out / f"{number}-seed-{seed}")), dataclasses.replace(settings, **theirs))
        for number, (row, (ours, theirs)) in enumerate(ABLATION.items(), start=1) for seed in range(config.seed, config.seed + seeds)
    }  # fmt: skip
    if (config.eval_gallery if config.data == "scenes" else config.holdout) in (
        0,
        1,
    ) or settings.loss != "vladva":
        raise ValueError(
            "the ablation compares the parts of --loss vladva on what is held out: give --eval-gallery or --holdout a number above 1"
        )
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(
            f"{out} holds another ablation: go on with --resume, choose another --out, or delete it first"
        )
    scores = dict(zip(planned, run_all(list(planned.values()), jobs)))
    if not all(scores.values()):
        raise ValueError(
            f"{config.data} is too small to hold rows out, so there is nothing to compare: give --holdout a number above 1"
        )
    table = {UNTOUCHED: ablated([scores[key]["before"] for key in planned][:1])}
    table |= {
        row: ablated([scores[row, seed]["after"] for r, seed in planned if r == row])
        for row in ABLATION
    }
    write_json(
        out / "ablation.json",
        {"steps": config.steps, "seeds": seeds, "eval_seed": config.eval_seed, "rows": table},
    )
    (out / "ablation.md").write_text(ablation_table(table), encoding="utf-8")
    print(f"{ablation_table(table)}\nwritten: {out}/ablation.json, ablation.md")
    curves = {row: read_metrics(planned[row, config.seed][0].out) for row in ABLATION}
    plots.save_picture(out / "ablation.png", lambda plt: draw_ablation(plt, table, curves))
    return table


def run_all(runs, jobs):
    """The scores of every (TrainConfig, Settings), `jobs` processes at a time; what a run says goes to its OUT/log.txt."""
    if jobs == 1:
        return [run_one(*run) for run in runs]
    threads = max(1, torch.get_num_threads() // jobs)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        waiting = [pool.submit(run_one, *run) for run in runs]
        for _ in tqdm(as_completed(waiting), total=len(waiting), desc="ablation", disable=None):
            pass
        return [each.result() for each in waiting]


def run_one(config, settings):
    """The scores of one run, which is begun, gone on with or, if it is done, read."""
    out = Path(config.out)
    begun, done = (out / "config.json").exists(), (out / "scores.json").exists()
    if begun:
        given = dataclasses.asdict(config) | dataclasses.asdict(settings)
        config, settings = stored_run(
            {name: value for name, value in given.items() if value is not None}
        )
    if done:
        return read_json(out / "scores.json")
    out.mkdir(parents=True, exist_ok=True)
    with (
        open(out / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        return train(config, settings, resume=begun)


def ablated(results):
    """{column: [value of each run]} of ABLATED, the columns that these results have."""

    def value(result, path):
        return functools.reduce(lambda inside, key: inside.get(key, {}), path, result)

    return {
        name: [value(r, path) for r in results]
        for name, (path, _) in ABLATED.items()
        if all(value(r, path) != {} for r in results)
    }


def ablation_table(table):
    """Markdown: a row each, mean and, for several runs, lowest to highest."""
    columns = list(table[UNTOUCHED])

    def cell(values, form):
        mean = f"{sum(values) / len(values):{form}}"
        return (
            mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"
        )

    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [
        [row, *(cell(values[c], ABLATED[c][1]) for c in columns)] for row, values in table.items()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_ablation(plt, table, curves):
    """Bars a column with every run as a dot, and the contrastive loss of the first seed's runs."""
    columns, colours = list(table[UNTOUCHED]), [f"C{n}" for n in range(len(table))]
    half = -(-len(columns) // 2)
    rows = [
        [*columns[:half], "curves"],
        [*columns[half:], *["."] * (2 * half - len(columns)), "curves"],
    ]
    figure, axes = plt.subplot_mosaic(
        rows, figsize=(9.5, 4.4), width_ratios=[1] * half + [1.5], layout="constrained"
    )
    for column in columns:
        for place, (row, values) in enumerate(table.items()):
            axes[column].bar(
                place,
                sum(values[column]) / len(values[column]),
                color=colours[place],
                alpha=0.6,
                label=row,
            )
            axes[column].plot([place] * len(values[column]), values[column], "k.", markersize=3)
        axes[column].set(title=column, ylabel="nats" if "nats" in column else "percent", xticks=[])
    for colour, metrics in zip(colours[1:], curves.values()):
        axes["curves"].plot(
            [m["step"] for m in metrics], [m["contrastive"] for m in metrics], color=colour
        )
    axes["curves"].set(title="contrastive loss, first seed (nats)", xlabel="step", ylim=(0, None))
    figure.legend(
        *axes[columns[0]].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    return figure


def default_jobs(device):
    """Runs at a time: on the CPU one a core, as a second core helps a small model little, but at most 4; elsewhere one."""
    return min(4, torch.get_num_threads()) if torch.device(pick_device(device)).type == "cpu" else 1


# ------------------------------------------------------------------------------------------------------ command line


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.ablation",
        description="Train every row of the paper's Table 4 and compare.",
        argument_default=argparse.SUPPRESS,
    )
    add_fields(parser, TrainConfig)
    add_fields(parser, Settings)
    parser.add_argument(
        "--resume",
        action="store_true",
        default=False,
        help="go on with the ablation in OUT",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs a row (default: 3)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        help="runs at a time (default: one a core on the cpu, at most 4)",
    )
    given = vars(parser.parse_args(argv))
    resume, seeds, jobs = (given.pop(name) for name in ("resume", "seeds", "jobs"))
    if "LOCAL_RANK" in os.environ or seeds < 1:
        raise ValueError(
            f"--seeds {seeds}: wanted 1 seed or more, and no torchrun, which is for a single run"
        )
    return ablation(*picked(given), seeds, jobs or default_jobs(given.get("device")), resume)


if __name__ == "__main__":
    main()
