"""The paper's rival E5-V (arXiv 2407.12580), trained on texts alone; or its loss added to VladVA's.

    python -m extras.e5v --lr 4e-4 --out runs/e5v  # on the scenes' captions, with E5-V's prompts
    python -m extras.e5v --loss vladva+text-text --data pairs.jsonl --text-data nli.csv

--text-data is a CSV file with the columns sent0, sent1 (a paraphrase) and hard_neg, as E5-V's NLI
data. --data is what is measured on, and what Eq. 1 is trained on.
"""

import csv
import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import train
from eval import BadRows, open_data
from extras import scenes
from vladva import LOSSES, Embeddings, VladVA, image_text_loss, similarity

COLUMNS = ("sent0", "sent1", "hard_neg")
E5V = {  # E5-V's prompts in the form that LLaVA-1.5 takes; its authors published none for LLaVA-1.5
    "image_prompt": "Summary above image in one word:",
    "text_prompt": "Summary above sentence in one word:",
    "image_template": "USER: <image>\n{prompt} ASSISTANT:",
    "text_template": "USER: {caption}\n{prompt} ASSISTANT:",
    "soft_prompts": False,
}


def text_text_loss(triples: Tensor, temperature) -> Tensor:
    """E5-V's loss: each sentence among all paraphrases and all hard negatives, one way.

    triples: (B, 3, D), L2-normalised: sentence, paraphrase, hard negative. Returns a 0-d loss in
    nats; log 2 B when all coincide.
    """
    sentence, paraphrase, negative = triples.unbind(1)
    sim = similarity(sentence, torch.cat([paraphrase, negative])) / temperature  # (B, 2 B)
    return F.cross_entropy(sim, torch.arange(len(sim), device=sim.device))


def triples_loss(model: VladVA, emb: Embeddings) -> Tensor:
    """text_text_loss of the batch's texts, three a row."""
    return text_text_loss(emb.further_texts.unflatten(0, (-1, 3)), model.temperature)


def sum_loss(model: VladVA, emb: Embeddings) -> Tensor:
    """Eq. 1 and E5-V's loss on one batch."""
    return image_text_loss(model, emb) + triples_loss(model, emb)


# with a temperature as VladVA's, learned or not
VLADVA = LOSSES["vladva"]
LOSSES["text-text"] = replace(VLADVA, function=triples_loss, inputs=("further_texts",))
LOSSES["vladva+text-text"] = replace(VLADVA, function=sum_loss, inputs=("pairs", "further_texts"))


def scene_triple(seed: int, index: int) -> tuple[str, tuple]:
    """(where, (caption, paraphrase, hard negative)) from the grammar of the scenes."""
    category = random.Random(f"category {seed} {index}").choice(sorted(scenes.CATEGORIES))
    return f"triple {index}", scenes.caption_triple(seed, index, category)[1]


def read_triples(path: str, tokenizer: data.Tokenizer) -> list[tuple[str, tuple]]:
    """[(where, (sentence, paraphrase, hard negative)), ...] of a CSV file, or a ValueError."""
    wanted = f"wanted the columns {', '.join(COLUMNS)}"
    if not Path(path).is_file():
        raise ValueError(f"{path} not found: --text-data wants scenes, or a CSV file; {wanted}")
    triples = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                texts = tuple(tokenizer.validate_text(row.get(name)) for name in COLUMNS)
                triples.append((f"{path}:{reader.line_num}", texts))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}; {wanted}") from None
    if len(triples) < 2:
        raise ValueError(f"{path}: {len(triples)} rows; at least 2 are needed")
    return triples


class TextRows:
    """Training rows with a triple of texts each: `count` of texts alone, or beside pairs."""

    def __init__(self, triple: Callable, count: int, pairs=None):
        self.triple = triple  # index -> (where, texts)
        self.count = count
        self.pairs = pairs
        self.group_size = pairs.group_size if pairs else 1

    def __len__(self) -> int:
        return len(self.pairs) if self.pairs else self.count

    def row(self, index: int, rng: random.Random) -> dict:
        where, texts = self.triple(index % self.count)
        if self.pairs:
            return self.pairs.row(index, rng) | {"further_texts": texts}
        return {"image": None, "short": None, "long": None, "where": where, "further_texts": texts}


def open_rows(config: train.TrainConfig, model: VladVA, bad_rows: BadRows, text_data: str):
    """(rows to train on, what is held out); text_data: scenes, or a CSV file."""
    pairs, held_out = open_data(config, model, bad_rows)
    pairs = None if model.config.loss == "text-text" else pairs
    if text_data != "scenes":
        triples = read_triples(text_data, model.tokenizer)
        return TextRows(triples.__getitem__, len(triples), pairs), held_out
    if config.data != "scenes":
        raise ValueError(f"--data {config.data} wants texts of its own: --text-data FILE.csv")
    triple = functools.partial(scene_triple, config.seed)
    return TextRows(triple, config.num_scenes, pairs), held_out


@data.command
def main(argv: list[str] | None = None) -> dict:
    parser = train.build_parser()
    parser.prog = "python -m extras.e5v"
    parser.description = "Train with E5-V's loss on texts, alone or added to VladVA's."
    text_help = "scenes, or a file; --resume wants it again (default: scenes)"
    parser.add_argument("--text-data", default="scenes", metavar="FILE.csv", help=text_help)
    flags = vars(parser.parse_args(argv))
    resume, text_data = flags.pop("resume"), flags.pop("text_data")
    if not resume and flags.setdefault("loss", "text-text") == "text-text":
        flags = E5V | flags
    config, method = train.read_run(flags) if resume else train.configs_from_flags(flags)
    return train.train(config, method, resume, functools.partial(open_rows, text_data=text_data))


if __name__ == "__main__":
    main()
