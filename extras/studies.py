"""What the paper looks into, before and after: each study prints a table and writes its numbers and a picture into runs/analysis.

python -m extras.studies prompts                          # Figs. 2, 3 and 5: what a good prompt is
python -m extras.studies tokens --adapter runs/tiny       # Fig. 4
python -m extras.studies attention --adapter runs/tiny    # Fig. 6
python -m extras.studies soft-prompts --adapter runs/tiny # Sec. 5.1
python -m extras.studies layers --adapter runs/tiny       # Table 6
python -m extras.studies generation --adapter runs/tiny --rival runs/e5v     # Fig. 7
"""

import argparse
import functools
import itertools
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import add_model_flags, command, format_table, say
from eval import PAPER, TEST_SEED, recall_at
from extras import scenes
from extras.plots import save_picture
from extras.scenes import described_scene, embed, scene_benchmark, score
from model import read_json, write_json
from vladva import (
    components_for,
    cumulative_variance,
    load_model,
    output_entropy,
    summary_embedding,
)

# ------------------------------------------------------------------------------------------------------ measures


def rank_correlation(x, y, permutations=10_000, seed=0):
    """Spearman's rho of two (n,) tensors, ties sharing their mean rank, and its two-sided p-value, by permuting y (paper Fig. 5).

    Returns (rho, p); p is at least 1 / (permutations + 1). ValueError when a side has no two different values.
    """

    def centred(values):
        values = values.double()
        below, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
        ranks = below + (equal - 1) / 2
        if equal[0] == len(values):
            raise ValueError(f"rank correlation of {len(values)} equal values: they have no order")
        return F.normalize(ranks - ranks.mean(), dim=0)

    x, y, generator = centred(x), centred(y), torch.Generator().manual_seed(seed)
    shuffled = torch.stack(
        [y[torch.randperm(len(y), generator=generator)] for _ in range(permutations)]
    )  # (permutations, n)
    rho = (x @ y).item()
    return rho, (1 + int(((shuffled @ x).abs() >= abs(rho) - 1e-9).sum())) / (1 + permutations)


def attention_density(attention, mass=0.9):
    """How spread out the summary token's attention to the image tokens is (paper Sec. 3.4, Fig. 6; the two numbers are ours).

    attention: (..., N), not negative, summing to anything above 0. Returns (entropy in nats, log N when uniform; the smallest share of the
    N tokens that holds `mass` of it), (...) each.
    """
    p = attention.double() / attention.double().sum(-1, keepdim=True)
    held = p.sort(-1, descending=True).values.cumsum(-1)  # (..., N)
    return torch.special.entr(p).sum(-1), (1 + (held < mass - 1e-6).sum(-1)).double() / p.shape[-1]


def nearest_tokens(vectors, table):
    """The vocabulary embedding nearest to each vector (paper Sec. 5.1): (P, D), (V, D) -> (token ids (P,), cosines (P,))."""
    cosine = F.normalize(vectors.float(), dim=-1) @ F.normalize(table.float(), dim=-1).T  # (P, V)
    return cosine.max(-1).indices, cosine.max(-1).values


# ------------------------------------------------------------------------------------------------------ what the paper looks into


PROMPTS = (
    PAPER.parent / "prompts.json"
)  # 50 pairs of an image and a text prompt, in words that the tiny model can read


def testbed(model, args):
    """(pictures, captions): --items held-out scenes with a short caption each, or as many rows of a pairs file."""
    if args.data == "scenes":
        drawn, size = (
            [described_scene(args.seed, i) for i in range(args.items)],
            model.lvlm.config.vision.image_size,
        )
        return [scenes.render(scene, size) for scene, _ in drawn], [
            str(caption) for _, caption in drawn
        ]
    rows = data.Pairs(args.data, model.tokenizer).held_out(args.items)
    if len(rows) < 2:
        raise ValueError(
            f"{args.data} and --items {args.items} give {len(rows)} rows with a short caption: at least 2 are needed"
        )
    return [row["image"] for row in rows], [row["short"][0] for row in rows]


def before_and_after(model):
    """Yields "before", while the adapter is switched off, and then "after" when there is one."""
    with model.adapter_disabled():
        yield "before"
    if model.adapted:
        yield "after"


def recall_both(image_emb, text_emb):
    """R@1 of pictures and captions that belong together row by row: {"image to text R@1": percent, "text to image R@1": percent}."""
    found = recall_at(image_emb.cpu(), text_emb.cpu(), torch.arange(len(image_emb)), ks=(1,))
    return {
        f"{direction.replace('_', ' ')} R@1": values["R@1"] for direction, values in found.items()
    }


def summary_measures(model, pictures, captions):
    """The paper's measures of a prompt pair (Sec. 3.1), on the summary tokens of pictures and captions that belong together.

    Entropies in nats (means), the cumulative variance and how many principal components hold 90 % of it, and R@1 in percent.
    """
    states, measures = (
        {"image": model.image_states(pictures), "text": model.text_states(captions)},
        {},
    )
    for modality, state in states.items():
        entropy = torch.cat(
            [
                output_entropy(model.lvlm.head(part.to(model.lvlm.compute_dtype)))
                for part in state.split(256)
            ]
        )
        variance = cumulative_variance(summary_embedding(state))
        measures |= {
            f"{modality} entropy": entropy.mean().item(),
            f"{modality} components": components_for(variance),
        }
        measures[f"{modality} variance"] = [round(share, 4) for share in variance.tolist()]
    return measures | recall_both(*map(summary_embedding, states.values()))


def run_prompts(model, args):
    """Figs. 2, 3 and 5: what a good prompt is."""
    pictures, captions = testbed(model, args)
    pairs, rows = read_json(args.prompts), []
    if (
        not isinstance(pairs, list)
        or any(not isinstance(pair, dict) or set(pair) != {"image", "text"} for pair in pairs)
        or len(pairs) < 2
    ):
        raise ValueError(
            f'{args.prompts}: wanted a list of two or more {{"image": prompt, "text": prompt}}, as assets/prompts.json'
        )
    for pair in tqdm(pairs, desc="prompts", disable=None):
        measures = summary_measures(
            model.with_prompts(pair["image"], pair["text"]), pictures, captions
        )
        both = {
            name: (measures[f"image {name}"] + measures[f"text {name}"]) / 2
            for name in ("entropy", "components")
        }
        both["R@1"] = (measures["image to text R@1"] + measures["text to image R@1"]) / 2
        rows.append(
            {"image prompt": pair["image"], "text prompt": pair["text"], **both, **measures}
        )
    rows.sort(key=lambda row: row["entropy"])
    columns = {
        name: torch.tensor([float(row[name]) for row in rows])
        for name in ("entropy", "components", "R@1")
    }
    varied = [
        name for name, values in columns.items() if len(values.unique()) > 1
    ]  # a constant one has no order
    correlations = {
        f"{a} and {b}": rank_correlation(columns[a], columns[b])
        for a, b in itertools.combinations(varied, 2)
    }
    say(
        format_table(
            ["image prompt, by entropy", *columns],
            [[row["image prompt"], *(f"{row[name]:.2f}" for name in columns)] for row in rows],
        )
    )
    for names, (rho, p) in correlations.items():
        say(f"Spearman's rho of {names}: {rho:.2f} (p = {p:.4f}, {len(rows)} prompt pairs)")
    about = {
        "pictures": len(pictures),
        "correlations": {names: {"rho": rho, "p": p} for names, (rho, p) in correlations.items()},
    }
    return about | {"prompts": rows}, draw_prompts


def draw_prompts(plt, results):
    """Entropy a prompt pair, cumulative variance coloured by entropy, retrieval against entropy."""
    rows, colour = results["prompts"], plt.get_cmap("viridis")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
    top, places = max(row["entropy"] for row in rows), range(1, len(rows) + 1)
    for modality, marker in (("image", "o"), ("text", "^")):
        left.plot(
            places,
            [row[f"{modality} entropy"] for row in rows],
            marker,
            markersize=3,
            label=modality,
        )
        right.scatter([row["entropy"] for row in rows], [row[f"{modality} to {'text' if modality == 'image' else 'image'} R@1"] for row in rows],
                      marker=marker, s=12, label=f"{modality} query")  # fmt: skip
    left.set(
        title="entropy of the next token (Fig. 2)",
        xlabel="prompt pairs, by mean entropy",
        ylabel="nats",
    )
    for row in rows:
        middle.plot(
            *zip(*enumerate(row["image variance"][:40], start=1)),
            color=colour(row["entropy"] / top),
            linewidth=0.8,
        )
    middle.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    middle.set(
        title="cumulative variance, images (Fig. 3)",
        xlabel="principal components",
        ylabel="share of the variance",
    )
    figure.colorbar(
        plt.cm.ScalarMappable(plt.Normalize(0, top), colour), ax=middle, label="entropy (nats)"
    )
    rho = results["correlations"].get("entropy and R@1", {}).get("rho", math.nan)
    right.set(
        title=f"zero-shot retrieval (Fig. 5), rho = {rho:.2f}",
        xlabel="entropy (nats)",
        ylabel="R@1 (percent)",
    )
    left.legend()
    right.legend()
    return figure


def run_tokens(model, args, shown=3, top=6):
    """Fig. 4 and Sec. 3.4: the likeliest next tokens at the summary token, entropy, and spread of the embeddings, before and after."""
    pictures, captions = testbed(model, args)
    results = {
        "pictures": len(pictures),
        "captions": captions[:shown],
        "measures": {},
        "tokens": {},
    }
    for when in before_and_after(model):
        results["measures"][when] = summary_measures(model, pictures, captions)
        states = {
            "image": model.image_states(pictures[:shown]),
            "text": model.text_states(captions[:shown]),
        }
        likely = {
            name: model.lvlm.head(state.to(model.lvlm.compute_dtype)).float().softmax(-1).topk(top)
            for name, state in states.items()
        }
        results["tokens"][when] = {
            modality: [
                [[model.tokenizer.decode([t]), q] for t, q in zip(*row)]
                for row in zip(best.indices.tolist(), best.values.tolist())
            ]
            for modality, best in likely.items()
        }
    numbers = [
        name for name, value in results["measures"]["before"].items() if not isinstance(value, list)
    ]
    say(
        format_table(
            ["", *results["measures"]],
            [[n, *(f"{m[n]:.2f}" for m in results["measures"].values())] for n in numbers],
        )
    )
    for when, tokens in results["tokens"].items():
        for modality, rows in tokens.items():
            for number, row in enumerate(rows):
                say(
                    f"{when}, {modality} {number}: "
                    + "  ".join(f"{token} {100 * q:.1f}%" for token, q in row)
                )
    return results, functools.partial(draw_tokens, pictures=pictures[:shown])


def draw_tokens(plt, results, pictures):
    """A row a picture: the picture, and the likeliest tokens of it and of its caption, before and after."""
    columns = [(when, modality) for when in results["tokens"] for modality in ("image", "text")]
    figure, axes = plt.subplots(
        len(pictures), 1 + len(columns), figsize=(9.5, 1.8 * len(pictures)), layout="constrained"
    )
    for number, (line, picture, caption) in enumerate(
        zip(axes.reshape(len(pictures), -1), pictures, results["captions"])
    ):
        line[0].imshow(data.open_image(picture))
        line[0].set_title(textwrap.fill(caption, 22, break_on_hyphens=False), fontsize=7)
        line[0].axis("off")
        for axis, (when, modality) in zip(line[1:], columns):
            words, shares = zip(*results["tokens"][when][modality][number])
            axis.barh(
                range(len(words)),
                [100 * share for share in shares],
                color="C0" if when == "before" else "C1",
            )
            axis.set_yticks(range(len(words)), [word.strip() or repr(word) for word in words])
            axis.invert_yaxis()
            axis.set_title(f"{when}, {modality} (percent)")
    return figure


def run_attention(model, args):
    """Fig. 6: attention of the summary token to the image tokens, its density over all heads, before and after; drawn for the first picture."""
    pictures, _ = testbed(model, args)
    results, maps = {"pictures": len(pictures), "density": {}}, {}
    for when in before_and_after(model):
        every = [
            model.summary_attention(picture).cpu()
            for picture in tqdm(pictures, desc=f"attention {when}", leave=False, disable=None)
        ]
        given, (entropy, share) = (
            torch.stack([each.sum(-1).mean() for each in every]),
            zip(*map(attention_density, every)),
        )
        results["density"][when] = {
            "entropy": torch.stack([each.mean() for each in entropy]).mean().item(),
            "share of patches with 90 % of the mass": torch.stack([each.mean() for each in share])
            .mean()
            .item(),
            "mass on the picture": given.mean().item(),
        }
        maps[when] = every[0]
    results["entropy when uniform"] = math.log(maps["before"].shape[-1])
    names = list(results["density"]["before"])
    say(
        format_table(
            ["mean over heads and pictures", *maps],
            [[n, *(f"{d[n]:.3f}" for d in results["density"].values())] for n in names],
        )
    )
    say(f"entropy of a uniform map: {results['entropy when uniform']:.3f}")
    mass = maps["before"].sum(
        -1
    )  # (layers, H): the head of a layer that looks at the picture most before adaptation is drawn
    layers = torch.linspace(0, len(mass) - 1, min(4, len(mass))).round().long().tolist()
    chosen = [(layer, mass[layer].argmax().item()) for layer in layers]
    first = data.open_image(pictures[0])
    seen, grid = (
        np.asarray(model.image_processor.fitted(first)) / 255,
        model.prepared([first])[1][0],
    )
    return results, functools.partial(
        draw_attention, maps=maps, chosen=chosen, pixels=seen, grid=grid
    )


def draw_attention(plt, results, maps, chosen, pixels, grid):
    """A row before and one after, a column a head: its map over the greyed picture, with the share of patches that holds 90 % of the mass."""
    figure, axes = plt.subplots(
        len(maps),
        1 + len(chosen),
        figsize=(1.9 * (1 + len(chosen)), 2.3 * len(maps)),
        layout="constrained",
        squeeze=False,
    )
    gray = pixels.mean(-1)
    extent = (0, gray.shape[1], gray.shape[0], 0)
    for line, (when, weights) in zip(axes, maps.items()):
        line[0].imshow(pixels)
        line[0].set_title(when)
        for axis, (layer, head) in zip(line[1:], chosen):
            one = weights[layer, head]
            axis.imshow(gray, cmap="gray", vmin=0, vmax=1)
            axis.imshow(
                (one.view(grid) / one.max()).numpy(),
                cmap="inferno",
                alpha=0.65,
                extent=extent,
                vmin=0,
                vmax=1,
            )
            _, share = attention_density(one)
            axis.set_title(
                f"layer {layer + 1}, head {head + 1}\n90 % in {100 * share:.0f} % of patches"
            )
        for axis in line:
            axis.axis("off")
    return figure


def run_soft_prompts(model, args):
    """Sec. 5.1: each learned vector as the nearest token, with its cosine."""
    if not model.soft_prompts:
        raise ValueError(
            "no soft prompts to decode: --adapter names the folder of a run that trained them"
        )
    results = {}
    for modality, vectors in model.soft_prompts.items():
        sequence = model.image_sequence() if modality == "image" else model.text_sequence("a")
        hand = sequence.ids[sequence.prompt_slot : sequence.prompt_slot + sequence.prompt_length]
        ids, cosine = nearest_tokens(vectors.detach(), model.lvlm.decoder.embed_tokens.weight)
        word = model.tokenizer.inner.decode
        results[modality] = [
            [word([h]), word([i], skip_special_tokens=False), c]
            for h, i, c in zip(hand, ids.tolist(), cosine.tolist())
        ]
        say(
            format_table(
                [f"{modality} prompt", "nearest token", "cosine"],
                [[repr(a), repr(b), f"{c:.3f}"] for a, b, c in results[modality]],
            )
        )
    return results, draw_soft_prompts


def draw_soft_prompts(plt, results):
    """Cosine of each learned vector with its nearest token, which stands below; in orange where it is not the hand prompt's."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.7 * len(results), 2.6), layout="constrained", squeeze=False
    )
    for axis, (modality, rows) in zip(axes[0], results.items()):
        axis.bar(
            range(len(rows)),
            [c for _, _, c in rows],
            color=["C0" if hand == near else "C1" for hand, near, _ in rows],
        )
        axis.set_xticks(
            range(len(rows)),
            [near.strip() or repr(near) for _, near, _ in rows],
            rotation=45,
            ha="right",
        )
        axis.set(title=f"{modality} soft prompt", ylabel="cosine with its nearest token")
    return figure


def run_layers(model, args):
    """Supplement, Table 6: embeddings from every layer, before and after. States between layers have not met the final norm."""
    pictures, captions = testbed(model, args)
    benchmark = (
        scene_benchmark(args.seed, gallery=2, items=min(args.items, 200))
        if args.data == "scenes"
        else None
    )
    results = {"pictures": len(pictures), "layers": {}}
    for when in before_and_after(model):
        for depth in range(1, len(model.lvlm.decoder.layers) + 1):
            encode_image = lambda items, depth=depth, **more: summary_embedding(
                model.image_states(items, depth=depth, **more)
            )
            encode_text = lambda items, depth=depth: summary_embedding(
                model.text_states(items, depth=depth)
            )
            scores = recall_both(encode_image(pictures), encode_text(captions))
            if benchmark:
                scores |= score(benchmark, *embed(model, benchmark, encode_image, encode_text))[
                    "groups"
                ]
            results["layers"].setdefault(when, []).append(scores)
    for when, rows in results["layers"].items():
        say(
            format_table(
                [f"layer, {when}", *rows[0]],
                [
                    [str(n), *(f"{v:.1f}" for v in row.values())]
                    for n, row in enumerate(rows, start=1)
                ],
            )
        )
    return results, draw_layers


def draw_layers(plt, results):
    """A line a score over the layers, dashed before, solid after."""
    figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for when, rows in results["layers"].items():
        for n, name in enumerate(rows[0]):
            line = "--" if when == "before" else "-"
            axis.plot(
                range(1, len(rows) + 1),
                [row[name] for row in rows],
                line,
                color=f"C{n}",
                marker="o",
                markersize=3,
                label=f"{name}, {when}",
            )
    axis.set(
        xlabel="decoder layer that the embedding is taken from",
        ylabel="percent",
        xticks=range(1, len(rows) + 1),
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


ASKED = ("Describe the image in detail.", "Describe the image briefly.", "What is in the image?")


def run_generation(args):
    """Fig. 7: answers of the base, of --adapter on and off, and of --rival (an E5-V-style adapter), to the same prompts."""
    answers = {}
    for name, adapter in (("base", None), ("adapter", args.adapter), ("rival", args.rival)):
        if adapter or name == "base":
            model = load_model(argparse.Namespace(**vars(args) | {"adapter": adapter}))
            pictures = testbed(model, args)[0][: len(ASKED)]
            tell = lambda model=model, pictures=pictures: [
                model.generate_batch([p] * len(ASKED), ASKED, max_new_tokens=200) for p in pictures
            ]
            answers[name] = tell()
            if name == "adapter":
                with model.adapter_disabled():
                    answers["adapter off"] = tell()
    for picture in range(len(pictures)):
        for number, prompt in enumerate(ASKED):
            say(
                f"\npicture {picture}: {prompt}\n"
                + "\n".join(f"  {name}: {told[picture][number]}" for name, told in answers.items())
            )
    words = lambda told: (
        sum(len(answer.split()) for each in told for answer in each) / (len(ASKED) * len(told))
    )
    results = {
        "prompts": ASKED,
        "answers": answers,
        "words an answer": {name: words(told) for name, told in answers.items()},
    }
    if "adapter off" in answers:
        results["adapter off equals base"] = answers["adapter off"] == answers["base"]
        say(f"\nadapter off = base, to the letter: {results['adapter off equals base']}")
    return results, functools.partial(draw_generation, pictures=pictures)


def draw_generation(plt, results, pictures):
    """A row a picture with the answers to the first prompt."""
    figure, axes = plt.subplots(
        len(pictures),
        2,
        figsize=(9.5, 1.7 * len(pictures)),
        width_ratios=(1, 6),
        layout="constrained",
        squeeze=False,
    )
    for number, ((shown, told), picture) in enumerate(zip(axes, pictures)):
        shown.imshow(data.open_image(picture))
        text = "\n".join(
            textwrap.fill(
                f"{name}: {answers[number][0]}",
                122,
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
            for name, answers in results["answers"].items()
        )
        told.text(0, 1, f"{results['prompts'][0]}\n\n{text}", va="top")
        for axis in (shown, told):
            axis.axis("off")
    return figure


STUDIES = {
    "prompts": run_prompts,
    "tokens": run_tokens,
    "attention": run_attention,
    "soft-prompts": run_soft_prompts,
    "layers": run_layers,
}


def run_study(args):
    """One look into the model: a table, OUT/<task>.json and OUT/<task>.png."""
    if args.task == "generation":
        results, draw = run_generation(args)
    else:
        results, draw = STUDIES[args.task](load_model(args), args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "task": args.task,
        "model": args.model,
        "adapter": args.adapter,
        "data": args.data,
        "seed": args.seed,
    }
    write_json(out / f"{args.task}.json", about | results)
    say(f"written: {out / args.task}.json")
    save_picture(out / f"{args.task}.png", lambda plt: draw(plt, results))


# ------------------------------------------------------------------------------------------------------ command line


def command_line():
    """The parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.studies", description="What the paper looks into."
    )
    parser.add_argument("task", choices=[*STUDIES, "generation"], help="what is looked into")
    add_model_flags(parser)
    parser.add_argument(
        "--rival",
        metavar="DIR",
        help="a second adapter beside --adapter (generation), such as one trained with --loss text-text",
    )
    parser.add_argument(
        "--data",
        default="scenes",
        help="what the studies look at: scenes, or a pairs file (default: scenes)",
    )
    parser.add_argument(
        "--prompts",
        default=str(PROMPTS),
        metavar="FILE.json",
        help='list of {"image": ..., "text": ...} (prompts)',
    )
    parser.add_argument(
        "--out",
        default="runs/analysis",
        metavar="DIR",
        help="where a study writes its numbers and its picture",
    )
    parser.add_argument(
        "--seed", type=int, default=TEST_SEED, help=f"of the held-out scenes (default: {TEST_SEED})"
    )
    parser.add_argument(
        "--items",
        type=int,
        default=500,
        help="scenes or rows that are looked at (default: 500)",
    )
    return parser


@command
def main(argv=None):
    args = command_line().parse_args(argv)
    if args.items < 1:
        raise ValueError(f"--items {args.items}: at least 1")
    return run_study(args)


if __name__ == "__main__":
    main()
