"""What the paper looks into, before and after adaptation: the numbers and figures of its analyses.

    python -m extras.studies prompts  # Figs. 2, 3 and 5: what makes a good prompt
    python -m extras.studies tokens --adapter runs/tiny  # Fig. 4
    python -m extras.studies attention --adapter runs/tiny  # Fig. 6
    python -m extras.studies soft-prompts --adapter runs/tiny  # Sec. 5.1
    python -m extras.studies layers --adapter runs/tiny  # Table 6
    python -m extras.studies generation --adapter runs/tiny --rival runs/e5v  # Fig. 7

A study prints a table and writes OUT/<study>.json and, with matplotlib, OUT/<study>.png.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import eval as benchmarks
from data import format_table, say
from extras import e5v, scenes  # noqa: F401 - e5v knows the losses of a rival's adapter
from extras.plots import save_figure
from model import Decoder, read_json, write_json
from vladva import VladVA, at_least_float32, load_model, summary_embedding

PROMPTS = benchmarks.ASSETS / "prompts.json"  # 50 pairs in words that the tiny model can read
NUM_SHOWN = 3  # images in a figure
MAX_NEW_TOKENS = 200  # of an answer

# ------------------------------------------------------------------------------------ measures


def output_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next token (paper Sec. 3.1, Fig. 2): (..., V) -> (...) nats, log V at most."""
    log_p = at_least_float32(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def cumulative_variance(emb: Tensor) -> Tensor:
    """Share of the variance that the first k principal components hold (paper Sec. 3.1, Fig. 3).

    emb: (B, D). Returns (min(B, D),), rising to 1; a slow rise is a spread-out embedding.
    """
    variance = torch.linalg.svdvals((emb - emb.mean(0)).double()).square()
    if len(emb) < 2 or variance.sum() == 0:
        raise ValueError(f"no variance in {len(emb)} embeddings: 2 different ones are needed")
    return (variance.cumsum(0) / variance.sum()).to(emb.dtype)


def components_for(cumulative: Tensor, share: float = 0.9) -> int:
    """How many principal components hold `share` of the variance; of cumulative_variance."""
    return int((cumulative < share - 1e-6).sum()) + 1


def rank_correlation(x: Tensor, y: Tensor, permutations: int = 10_000) -> tuple[float, float]:
    """Spearman's rho of two (n,) tensors and its two-sided p-value, by permuting y (paper Fig. 5).

    Ties share their mean rank. ValueError when a side has no two different values.
    """
    centred = []
    for values in (x, y):
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            raise ValueError(f"rank correlation of {len(values)} equal values: they have no order")
        ranks = (counts.cumsum(0) - counts / 2).double()[inverse]
        centred.append(F.normalize(ranks - ranks.mean(), dim=0))
    rho = centred[0] @ centred[1]
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(permutations, len(y), generator=generator).argsort(1)
    as_extreme = (centred[1][order] @ centred[0]).abs() >= rho.abs() - 1e-9
    return rho.item(), (1 + as_extreme.sum().item()) / (1 + permutations)


def attention_density(attention: Tensor, mass: float = 0.9) -> tuple[Tensor, Tensor]:
    """How spread out attention (..., N) to the image tokens is (paper Sec. 3.4; the numbers, ours).

    Returns (...) each: the entropy in nats, and the smallest share of the N that holds `mass`.
    """
    p = attention.double() / attention.double().sum(-1, keepdim=True)
    largest_first = p.sort(-1, descending=True).values
    needed = 1 + (largest_first.cumsum(-1) < mass - 1e-6).sum(-1)
    return torch.special.entr(p).sum(-1), needed.double() / p.shape[-1]


def nearest_tokens(vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Of each vector (P, D) the nearest row of table (V, D) by angle: ids (P,), cosines (P,)."""
    cosine = F.normalize(vectors.float(), dim=-1) @ F.normalize(table.float(), dim=-1).T  # (P, V)
    return cosine.argmax(-1), cosine.amax(-1)


# --------------------------------------------------------------------------- what is looked at


def testbed(model: VladVA, args) -> tuple[list, list[str]]:
    """--items images with a short caption each: held-out scenes, or rows of a pairs file."""
    if args.data == "scenes":
        described = [scenes.described_scene(args.seed, i) for i in range(args.items)]
        size = model.lvlm.config.vision.image_size
        images = [scenes.render(scene, size) for scene, _ in described]
        return images, [str(caption) for _, caption in described]
    rows = data.Pairs(args.data, model.tokenizer).hold_out(args.items, data.BadRows())
    if len(rows) < 2:
        raise ValueError(f"{args.data} gives {len(rows)} captioned rows: at least 2 are needed")
    return [row["image"] for row in rows], [row["short"][0] for row in rows]


def before_and_after(model: VladVA):
    """Yields "before", while the adapter is switched off, and then "after" if there is one."""
    with model.adapter_disabled():
        yield "before"
    if model.adapted:
        yield "after"


@torch.no_grad()
def summary_states(model: VladVA, images: list, captions: list[str]) -> dict[str, Tensor]:
    """{"image": (B, D), "text": (B, D)}: states of the summary tokens of pairs, not normalised."""
    device = model.lvlm.device
    image_states, text_states = [], []
    for start in range(0, len(images), 64):
        opened = [data.open_image(image) for image in images[start : start + 64]]
        pixels, batch = model.image_batch(opened)
        states, _ = model.hidden_states(batch.to(device), "image", pixels.to(device))
        image_states.append(states)
        batch = model.text_batch(captions[start : start + 64])
        text_states.append(model.hidden_states(batch.to(device), "text")[0])
    return {"image": torch.cat(image_states), "text": torch.cat(text_states)}


def summary_measures(model: VladVA, images: list, captions: list[str]) -> dict:
    """The paper's measures of a prompt (Sec. 3.1), on pairs of an image and a caption.

    Mean entropy in nats, cumulative variance, how many principal components hold 90 % of it, and
    R@1 in percent.
    """
    measures, emb = {}, {}
    for modality, states in summary_states(model, images, captions).items():
        entropy = [output_entropy(model.lvlm.lm_head(part)) for part in states.split(256)]
        emb[modality] = summary_embedding(states).cpu()
        variance = cumulative_variance(emb[modality])
        measures[f"{modality} entropy"] = torch.cat(entropy).mean().item()
        measures[f"{modality} components"] = components_for(variance)
        measures[f"{modality} variance"] = [round(share, 4) for share in variance.tolist()]
    pairs = torch.arange(len(images))
    return measures | benchmarks.recall(emb["image"], emb["text"], pairs, ks=(1,))


def say_table(rows: list[dict]) -> None:
    """Print rows that have the same columns; numbers with two decimals, lists not at all."""
    lines = []
    for row in rows:
        row = {name: value for name, value in row.items() if not isinstance(value, list)}
        lines.append([cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row.values()])
    say(format_table([name.replace("_", " ") for name in row], lines))


def study_prompts(args) -> tuple[dict, list]:
    """Entropy, spread and retrieval of many pairs of hand prompts, and how they go together."""
    model = load_model(args)
    if model.adapted:
        raise ValueError("prompts: the soft prompts of an adapted model have replaced them")
    pairs = read_json(args.prompts, list)
    wrong = [p for p in pairs if not isinstance(p, dict) or p.keys() != {"image", "text"}]
    if wrong or len(pairs) < 2:
        raise ValueError(f'{args.prompts}: wanted two or more {{"image": ..., "text": ...}}')
    images, captions = testbed(model, args)
    rows = []
    for pair in tqdm(pairs, "prompts", disable=None):
        prompts = {"image_prompt": pair["image"], "text_prompt": pair["text"]}
        config = dataclasses.replace(model.config, **prompts)
        variant = VladVA(model.lvlm, model.tokenizer, model.image_processor, config, model.name)
        row = prompts | summary_measures(variant, images, captions)
        for name in ("entropy", "components"):
            row[name] = (row[f"image {name}"] + row[f"text {name}"]) / 2
        row["R@1"] = (row["image_to_text R@1"] + row["text_to_image R@1"]) / 2
        rows.append(row)
    rows.sort(key=lambda row: row["entropy"])
    columns = {}
    for name in ("entropy", "components", "R@1"):
        columns[name] = torch.tensor([float(row[name]) for row in rows])
    say_table([{name: row[name] for name in ("image_prompt", *columns)} for row in rows])
    correlations = {}
    varied = [name for name, values in columns.items() if len(values.unique()) > 1]
    for a, b in itertools.combinations(varied, 2):
        rho, p = rank_correlation(columns[a], columns[b])
        correlations[f"{a} and {b}"] = {"rho": rho, "p": p}
        say(f"Spearman's rho of {a} and {b}: {rho:.2f} (p = {p:.4f}, {len(rows)} prompt pairs)")
    return {"correlations": correlations, "prompts": rows}, []


def draw_prompts(plt, results: dict, images: list):
    """Entropy of each pair, cumulative variance coloured by entropy, retrieval against entropy."""
    rows = results["prompts"]
    entropies = [row["entropy"] for row in rows]
    colours = plt.cm.ScalarMappable(plt.Normalize(min(entropies), max(entropies)), "viridis")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
    for query, target, marker in (("image", "text", "o"), ("text", "image", "^")):
        left.plot([row[f"{query} entropy"] for row in rows], marker, markersize=3, label=query)
        recalls = [row[f"{query}_to_{target} R@1"] for row in rows]
        right.scatter(entropies, recalls, marker=marker, s=12, label=f"{query} query")
    for row in rows:
        colour = colours.to_rgba(row["entropy"])
        middle.plot(row["image variance"][:40], color=colour, linewidth=0.8)
    middle.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    figure.colorbar(colours, ax=middle, label="entropy (nats)")
    rho = results["correlations"].get("entropy and R@1", {}).get("rho", math.nan)
    left.set(title="entropy of the next token (Fig. 2)", xlabel="prompt pairs", ylabel="nats")
    middle.set(title="cumulative variance, images (Fig. 3)", xlabel="principal component")
    right.set(title=f"retrieval (Fig. 5), rho = {rho:.2f}", xlabel="nats", ylabel="R@1 (percent)")
    left.legend()
    right.legend()
    return figure


def study_tokens(args) -> tuple[dict, list]:
    """The likeliest next tokens at the summary token, and the measures, before and after."""
    model = load_model(args)
    images, captions = testbed(model, args)
    results = {"captions": captions[:NUM_SHOWN], "measures": {}, "tokens": {}}
    for when in before_and_after(model):
        results["measures"][when] = summary_measures(model, images, captions)
        states = summary_states(model, images[:NUM_SHOWN], captions[:NUM_SHOWN])
        for modality, state in states.items():
            top = model.lvlm.lm_head(state).float().softmax(-1).topk(6)
            tokens = []
            for ids, shares in zip(top.indices.tolist(), top.values.tolist()):
                tokens.append([(model.tokenizer.decode([i]), p) for i, p in zip(ids, shares)])
                words = "  ".join(f"{word} {100 * p:.1f}%" for word, p in tokens[-1])
                say(f"{when}, {modality} {len(tokens)}: {words}")
            results["tokens"][f"{when}, {modality}"] = tokens
    say_table([{"": when} | row for when, row in results["measures"].items()])
    return results, images


def draw_tokens(plt, results: dict, images: list):
    """A row an image: the image, and the likeliest tokens of it and of its caption."""
    tokens = results["tokens"]
    size = {"figsize": (9.5, 1.8 * len(images)), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(len(images), 1 + len(tokens), **size)
    for number, (row, image) in enumerate(zip(axes, images)):
        row[0].imshow(image)
        row[0].set_title(textwrap.fill(results["captions"][number], 22), fontsize=7)
        row[0].axis("off")
        for axis, (name, tokens_of) in zip(row[1:], tokens.items()):
            words, shares = zip(*tokens_of[number])
            colour = "C0" if name.startswith("before") else "C1"
            axis.barh(range(len(words)), [100 * p for p in shares], color=colour)
            axis.set_yticks(range(len(words)), [word.strip() or repr(word) for word in words])
            axis.invert_yaxis()
            axis.set_title(f"{name} (percent)")
    return figure


@torch.no_grad()
def summary_attention(model: VladVA, image) -> Tensor:
    """Attention of the summary token to the image tokens (paper Sec. 3.4): (layers, H, N), float32.

    What the N weights of a head lack to 1 goes to the other tokens. The kernel of the forward pass
    never shows them: they are computed here from the same queries and keys.
    """
    device = model.lvlm.device
    pixels, batch = model.image_batch([data.open_image(image)])
    batch = batch.to(device)
    x = model.inputs_embeds(batch, "image", pixels.to(device))  # (1, T, D)
    last = int(batch.summary_index)
    position_ids = batch.position_ids
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=device)[None]
    rotary = model.lvlm.decoder.rotary(position_ids, x.dtype)
    maps = []
    for block in model.lvlm.decoder.layers:
        q, k, _ = block.self_attn.project(block.input_layernorm(x), rotary)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[0, :, : last + 1]  # (H, T, K)
        scores = (k @ q[0, :, last, :, None])[..., 0] / math.sqrt(k.shape[-1])  # (H, T)
        maps.append(scores.float().softmax(-1)[:, batch.image_token_index[1]].cpu())
        x = block(x, rotary)
    return torch.stack(maps)


def study_attention(args) -> tuple[dict, list]:
    """How dense the summary token's attention to the image tokens is, and maps of some heads."""
    model = load_model(args)
    images, _ = testbed(model, args)
    names = ("entropy", "share of patches with 90 %", "mass on the image")
    density, first = {}, {}
    for when in before_and_after(model):
        total = torch.zeros(3, dtype=torch.double)
        for image in tqdm(images, f"attention {when}", leave=False, disable=None):
            weights = summary_attention(model, image)
            measures = (*attention_density(weights), weights.sum(-1).double())
            total += torch.stack([measure.mean() for measure in measures])
            first.setdefault(when, weights)
        density[when] = dict(zip(names, (total / len(images)).tolist()))
    say_table([{"mean over heads": when} | row for when, row in density.items()])

    # of four layers, the head that looks at the first image most before adaptation
    mass = first["before"].sum(-1)  # (layers, H)
    image = data.open_image(images[0])
    grid = model.lvlm.config.image_grid(model.image_processor(image))
    maps = {}
    for when, weights in first.items():
        for layer in sorted({round(i * (len(mass) - 1) / 3) for i in range(4)}):
            head = int(mass[layer].argmax())
            name = f"{when}: layer {layer + 1}, head {head + 1}"
            maps[name] = weights[layer, head].unflatten(0, grid).tolist()
    uniform = math.log(math.prod(grid))
    say(f"entropy of a uniform map: {uniform:.2f}")
    results = {"entropy when uniform": uniform, "density": density, "maps": maps}
    return results, [model.image_processor.fit(image)]


def draw_attention(plt, results: dict, images: list):
    """A row before and one after, a column a head: its map over the greyed image."""
    size = {"figsize": (9.5, 2.5 * len(results["density"])), "layout": "constrained"}
    num_columns = len(results["maps"]) // len(results["density"])
    figure, axes = plt.subplots(len(results["density"]), num_columns, squeeze=False, **size)
    extent = (0, images[0].width, images[0].height, 0)
    for axis, (name, weights) in zip(axes.flatten(), results["maps"].items()):
        axis.imshow(images[0].convert("L"), cmap="gray", vmin=0, vmax=255)
        axis.imshow(weights, cmap="inferno", alpha=0.65, extent=extent, vmin=0)
        share = attention_density(torch.tensor(weights).flatten())[1].item()
        axis.set_title(f"{name}\n90 % in {100 * share:.0f} % of patches")
        axis.axis("off")
    return figure


def study_soft_prompts(args) -> tuple[dict, list]:
    """Each learned vector as the nearest token, with its cosine."""
    model = load_model(args)
    if not model.soft_prompts:
        raise ValueError("no soft prompts to decode: --adapter wants a run that trained them")
    table = model.lvlm.decoder.embed_tokens.weight
    word = functools.partial(model.tokenizer.inner.decode, skip_special_tokens=False)
    results = {}
    for modality, vectors in model.soft_prompts.items():
        ids, cosines = nearest_tokens(vectors.detach(), table)
        rows = []
        for hand, near, cosine in zip(model.hand_prompt_ids(modality), ids, cosines):
            row = {f"{modality} prompt": word([hand]), "nearest token": word([int(near)])}
            rows.append(row | {"cosine": cosine.item()})
        say_table(rows)
        results[modality] = [list(row.values()) for row in rows]
    return results, []


@contextlib.contextmanager
def cut_decoder(decoder: Decoder, num_layers: int):
    """Inside, the decoder ends after num_layers layers; before the final norm, if not after all."""
    layers, norm = decoder.layers, decoder.norm
    decoder.layers = layers[:num_layers]
    decoder.norm = norm if num_layers == len(layers) else nn.Identity()
    try:
        yield
    finally:
        decoder.layers = layers
        decoder.norm = norm


def study_layers(args) -> tuple[dict, list]:
    """Scores of embeddings from every layer, before and after."""
    model = load_model(args)
    if args.data == "scenes":
        size = model.lvlm.config.vision.image_size
        num_items = min(args.items, 200)
        benchmark = scenes.scene_benchmark(args.seed, args.items, num_items, size)
    else:
        images, captions = testbed(model, args)
        benchmark = benchmarks.retrieval(images, [[caption] for caption in captions])
    names = ("image_to_text R@1", "text_to_image R@1", *benchmarks.GROUPS)
    results, rows = {"layers": {}}, []
    for when in before_and_after(model):
        results["layers"][when] = []
        for number in range(1, len(model.lvlm.decoder.layers) + 1):
            with cut_decoder(model.lvlm.decoder, number):
                scores = benchmark.score(*benchmarks.embed_benchmark(model, benchmark))
            scores = {name: scores[name] for name in names if name in scores}
            results["layers"][when].append(scores)
            rows.append({"layer": f"{number}, {when}"} | scores)
    say_table(rows)
    return results, []


def draw_layers(plt, results: dict, images: list):
    """A line a score over the layers, dashed before, solid after."""
    figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for when, rows in results["layers"].items():
        style = {"linestyle": "--" if when == "before" else "-", "marker": "o", "markersize": 3}
        for number, name in enumerate(rows[0]):
            label = f"{name.replace('_', ' ')}, {when}"
            values = [row[name] for row in rows]
            axis.plot(range(1, len(rows) + 1), values, color=f"C{number}", label=label, **style)
    axis.set(xlabel="decoder layer", ylabel="percent", xticks=range(1, len(rows) + 1))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


QUESTIONS = [
    "Describe the image in detail.",
    "Describe the image briefly.",
    "What is in the image?",
]


def study_generation(args) -> tuple[dict, list]:
    """Answers of the untouched model, of --adapter on and off, and of --rival."""
    answers = {}
    for name, adapter in (("base", None), ("adapter", args.adapter), ("rival", args.rival)):
        if adapter is None and name != "base":
            continue
        model = load_model(argparse.Namespace(**vars(args) | {"adapter": adapter}))
        images = testbed(model, args)[0][:NUM_SHOWN]
        answers[name] = [answer(model, image) for image in images]
        if name == "adapter":
            with model.adapter_disabled():
                answers["adapter off"] = [answer(model, image) for image in images]
    for number, question in itertools.product(range(len(images)), range(len(QUESTIONS))):
        say(f"\nimage {number}: {QUESTIONS[question]}")
        for name, answers_of in answers.items():
            say(f"  {name}: {answers_of[number][question]}")
    results = {"prompts": QUESTIONS, "answers": answers}
    if "adapter off" in answers:
        results["adapter off equals base"] = answers["adapter off"] == answers["base"]
        say(f"\nadapter off = base, to the letter: {results['adapter off equals base']}")
    return results, images


def answer(model: VladVA, image) -> list[str]:
    """What a model says of an image to each of QUESTIONS."""
    return model.generate_batch([image] * len(QUESTIONS), QUESTIONS, MAX_NEW_TOKENS)


# -------------------------------------------------------------------------------- command line

STUDIES = {  # name: (what measures, what draws, or None where the printed table shows it all)
    "prompts": (study_prompts, draw_prompts),
    "tokens": (study_tokens, draw_tokens),
    "attention": (study_attention, draw_attention),
    "soft-prompts": (study_soft_prompts, None),
    "layers": (study_layers, draw_layers),
    "generation": (study_generation, None),
}


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.studies", description="Analyses.")
    parser.add_argument("study", choices=list(STUDIES), help="what is looked into")
    data.add_model_flags(parser)
    for flag, default, text in (
        ("--rival", None, "generation: the folder of a second run (default: none)"),
        ("--data", "scenes", "images and captions: scenes, or a pairs file (default: scenes)"),
        ("--prompts", str(PROMPTS), "prompts: a JSON file of pairs (default: 50 of ours)"),
        ("--out", "runs/analysis", "folder that is written (default: runs/analysis)"),
        ("--seed", scenes.TEST_SEED, f"of the scenes (default: {scenes.TEST_SEED})"),
        ("--items", 500, "images that are looked at (default: 500)"),
    ):
        kind = int if isinstance(default, int) else str
        parser.add_argument(flag, type=kind, default=default, help=text)
    args = parser.parse_args(argv)
    if args.items < 2:
        raise ValueError(f"--items {args.items}: at least 2 are needed")
    study, draw = STUDIES[args.study]
    results, images = study(args)
    images = [data.open_image(image) for image in images[:NUM_SHOWN]]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{args.study}.json", vars(args) | results)
    say(f"written: {out / args.study}.json")
    if draw is not None:
        save_figure(out / f"{args.study}.png", draw, results, images)


if __name__ == "__main__":
    main()
