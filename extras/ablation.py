"""The paper's Table 4: which part of the method adds what.

    python -m extras.ablation --seeds 3 --jobs 2  # and any flags of train.py

Each row is an ordinary run of train.py in a folder of its own, with the same data and steps. Writes
OUT/ablation.json, ablation.md and ablation.png. --resume reads what is done and goes on from there.
"""

import contextlib
import dataclasses
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import data
import train
from eval import BadRows, open_data
from extras.plots import save_figure
from model import read_json
from vladva import VladVA, VladVAConfig

UNTOUCHED = "untouched"
ON_LONG = "Eq. 1 on long captions"  # what paper Sec. 3.2.2 warns of
ROWS = {  # row of Table 4: how its VladVAConfig differs from the full method's
    "soft prompts": {"lora": False, "next_token_weight": 0.0},
    "LoRA": {"soft_prompts": False, "next_token_weight": 0.0},
    "LoRA, soft prompts": {"next_token_weight": 0.0},
    "LoRA, soft prompts, next-token loss": {},
    ON_LONG: {"next_token_weight": 0.0},
}
CAPTION_LOSS = "long captions, nats a token"
COLUMNS = ("text_to_image R@1", "image_to_text R@1", "Replace", "Swap", "Add", CAPTION_LOSS)


class LongInPlaceOfShort:
    """Training rows whose long caption stands where the short one stood, for Eq. 1."""

    def __init__(self, rows):
        self.rows = rows
        self.group_size = rows.group_size

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int, rng) -> dict:
        row = self.rows.row(index, rng)
        return row | {"short": row["long"]}


def open_long_rows(config: train.TrainConfig, model, bad_rows):
    """As open_data, with the long captions in the place of the short ones."""
    rows, held_out = open_data(config, model, bad_rows)
    return LongInPlaceOfShort(rows), held_out


def run_one(row: str, config: train.TrainConfig, method: VladVAConfig) -> dict:
    """The scores of one run, which is started, gone on with or, if it is done, read."""
    out = Path(config.out)
    if (out / "scores.json").exists():
        return read_json(out / "scores.json")
    resume = (out / "config.json").exists()
    if resume:
        config, method = train.read_run({"out": config.out, "device": config.device})
    out.mkdir(parents=True, exist_ok=True)
    open_rows = open_long_rows if row == ON_LONG else None
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return train.train(config, method, resume, open_rows)


def run_all(runs: list[tuple], jobs: int) -> list[dict]:
    """The scores of all (row, TrainConfig, VladVAConfig), `jobs` processes at a time."""
    if jobs == 1:
        return [run_one(*run) for run in runs]
    threads = max(1, torch.get_num_threads() // jobs)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        results = pool.map(run_one, *zip(*runs))
        return list(tqdm(results, "ablation", total=len(runs), disable=None))


def ablate(config: train.TrainConfig, method: VladVAConfig, seeds: int, jobs: int) -> dict:
    """Train every row with every seed; returns {row: {column: [value of each seed]}}."""
    out = Path(config.out)
    runs = []
    for number, (row, changes) in enumerate(ROWS.items(), start=1):
        for seed in range(config.seed, config.seed + seeds):
            run_config = dataclasses.replace(config, seed=seed, out=f"{out}/{number}-seed-{seed}")
            runs.append((row, run_config, dataclasses.replace(method, **changes)))
    results = run_all(runs, jobs)
    if not all(results):
        raise ValueError(f"{config.data} is too small to hold rows out: give --holdout a number")
    # before adaptation the model is the same in all runs
    table = {UNTOUCHED: collect([results[0]["before"]])}
    for row in ROWS:
        table[row] = collect([r["after"] for run, r in zip(runs, results) if run[0] == row])
    data.write_json(out / "ablation.json", {"seeds": seeds, "rows": table})
    data.write_text(out / "ablation.md", markdown_table(table))
    data.say(f"{markdown_table(table)}\nwritten: {out}/ablation.json, ablation.md")
    save_figure(out / "ablation.png", draw_ablation, table)
    return table


def collect(results: list[dict]) -> dict[str, list[float]]:
    """{column: [value of each run]} of the COLUMNS that the results have."""
    columns = {}
    for name in COLUMNS:
        key = "caption_loss" if name == CAPTION_LOSS else name
        values = [(result | result["scores"]).get(key) for result in results]
        if None not in values:
            columns[name] = values
    return columns


def markdown_table(table: dict) -> str:
    """A line a row: the mean and, for several seeds, lowest to highest."""
    lines = [["", *table[UNTOUCHED]], ["---"] * (1 + len(table[UNTOUCHED]))]
    for row, values_of in table.items():
        cells = [row]
        for values in values_of.values():
            cell = f"{sum(values) / len(values):.3g}"
            if len(values) > 1:
                cell += f" ({min(values):.3g} to {max(values):.3g})"
            cells.append(cell)
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("_", " ")


def draw_ablation(plt, table: dict):
    """Bars of each column, one a row of the table, with a dot a seed."""
    figure, axes = plt.subplots(2, 3, figsize=(8, 4.2), layout="constrained")
    for column, axis in zip(table[UNTOUCHED], axes.flatten()):
        for number, (row, values_of) in enumerate(table.items()):
            values = values_of[column]
            axis.bar(number, sum(values) / len(values), color=f"C{number}", alpha=0.6, label=row)
            axis.plot([number] * len(values), values, "k.", markersize=3)
        unit = "nats" if column == CAPTION_LOSS else "percent"
        axis.set(title=column.replace("_", " "), ylabel=unit, xticks=[])
    for axis in axes.flatten()[len(table[UNTOUCHED]) :]:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@data.command
def main(argv: list[str] | None = None) -> dict:
    parser = train.build_parser()
    parser.prog = "python -m extras.ablation"
    parser.description = "Train every row of the paper's Table 4 and compare."
    parser.add_argument("--seeds", type=int, default=3, help="runs a row (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    flags = {"out": "runs/ablation"} | vars(parser.parse_args(argv))
    resume, seeds, jobs = flags.pop("resume"), flags.pop("seeds"), flags.pop("jobs")
    config, method = train.read_run(flags) if resume else train.configs_from_flags(flags)
    if min(seeds, jobs) < 1 or "LOCAL_RANK" in os.environ:
        raise ValueError(f"--seeds {seeds} --jobs {jobs}: 1 or more, and not under torchrun")
    if config.holdout in (0, 1) or method.loss != "vladva":
        raise ValueError("wanted --loss vladva, to compare its parts, and --holdout 2 or more")
    # what cannot be trained on is refused before anything is written
    model = VladVA.from_pretrained(config.model, config=method)
    open_data(config, model, BadRows())
    with train.run_folder(config, method, resume):
        return ablate(config, method, seeds, jobs)


if __name__ == "__main__":
    main()
