"""VladVA (arXiv 2412.04378): a generative LVLM becomes an embedding model. The method, in the paper's order.

    from vladva import VladVA
    model = VladVA.from_pretrained("tiny", adapter="runs/tiny")
    model.encode_image(["a.jpg"]) @ model.encode_text(["a red circle"]).T

    python vladva.py a.jpg b.jpg "a red circle" "a blue square" --adapter runs/tiny     # prints the similarity table

Sec. 3.1   templates, summary token, embeddings, similarity; entropy and cumulative variance of prompts
Sec. 3.2   Eq. 1 (contrastive), Eq. 2 (next token), the overall loss in one forward of the image sequence
Sec. 3.3   soft prompts that replace the hand prompt's tokens; LoRA (lora.py)
Sec. 3.4   the summary token's attention

Not here: the network (model.py), files and pictures (data.py), the training loop (train.py), benchmarks (eval.py).
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import lora
import model as lvlm_module
from data import add_model_flags, command, format_table
from model import DTYPES, free_bytes, join_ranks, pick_device

# ------------------------------------------------------------------------------------------------------ Sec. 3.1: embeddings


@dataclass(frozen=True)
class Settings:
    """What the method needs to know; stored in every adapter file."""

    loss: str = "vladva"  # or "text-text" (E5-V's, on texts alone), or "vladva+text-text" (their sum: the paper's future work)
    image_prompt: str = "Summarize the provided image in one word:"  # paper Sec. 5.1
    text_prompt: str = "Summarize the provided text in one word:"  # paper Sec. 5.1
    image_template: str = (
        "USER: {prompt} <image>\nASSISTANT:"  # paper Sec. 3.2.3; <image> stands for N image tokens
    )
    text_template: str = "USER: {prompt} {caption}\nASSISTANT:"  # paper Sec. 3.2.3
    detail_prompt: str = "Describe the image in detail."  # paper Sec. 3.2.3
    soft_prompts: bool = True  # paper Sec. 3.3
    lora: bool = True  # paper Sec. 3.3
    rank: int = 16  # second-hand notes on the paper
    alpha: float = 16.0  # second-hand notes on the paper
    temperature: float = 0.05  # ours: Eq. 1 prints none; E5-V uses .05
    learn_temperature: bool = False  # ours; clamped to [.01, 1]
    next_token_weight: float = 1.0  # ours: the paper's text reads as a plain sum
    image_mode: str = (
        "crop"  # ours: "crop" as llava-hf's processor does, "pad" as the original LLaVA
    )
    min_pixels: int | None = (
        None  # of a picture, for Qwen2-VL; None: as the model's folder says (the paper states no pixel budget)
    )
    max_pixels: int | None = None

    def __post_init__(self):
        if self.loss not in ("vladva", "text-text", "vladva+text-text"):
            raise ValueError(f"loss is {self.loss!r}: vladva, text-text or vladva+text-text")
        for name, parts in (
            ("image_template", ("{prompt}", "<image>")),
            ("text_template", ("{prompt}", "{caption}")),
        ):
            if any(getattr(self, name).count(part) != 1 for part in parts):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: wanted {' and '.join(parts)} in it, once each"
                )
        if not 0.01 <= self.temperature <= 1:
            raise ValueError(f"temperature is {self.temperature}: wanted .01 to 1")
        if self.rank < 1:
            raise ValueError(
                f"LoRA rank is {self.rank}: at least 1 is needed (--no-lora trains without adapters)"
            )
        if self.next_token_weight < 0:
            raise ValueError(f"next-token weight is {self.next_token_weight}: 0 or more is needed")
        if not (self.lora or self.soft_prompts):
            raise ValueError("neither LoRA nor soft prompts: there would be nothing to train")


# E5-V's prompts (arXiv 2407.12580), in the form LLaVA-1.5 takes; its authors published none for LLaVA-1.5
E5V = {"image_prompt": "Summary above image in one word:", "text_prompt": "Summary above sentence in one word:",
       "image_template": "USER: <image>\n{prompt} ASSISTANT:", "text_template": "USER: {caption}\n{prompt} ASSISTANT:",
       "soft_prompts": False}  # fmt: skip
DETAIL_TEMPLATE = " USER: {prompt}\nASSISTANT:"  # then a blank, the long caption and </s>
GENERATE_TEMPLATE = (
    "USER: <image>\n{prompt} ASSISTANT:"  # LLaVA-1.5's own, for answers rather than embeddings
)


def summary_embedding(hidden):
    """f = Phi_l(...)[eos], L2-normalised (paper Sec. 3.1): the final hidden state of the last prompt token, before anything is generated.

    hidden: (B, D), the states of the summary tokens after the final norm. Returns (B, D) in float32, or float64 if hidden is.
    """
    return F.normalize(hidden if hidden.dtype == torch.float64 else hidden.float(), dim=-1)


def similarity(image_emb, text_emb):
    """s = cos_sim(f_v, f_t) (paper Sec. 3.1): (A, D) and (B, D), L2-normalised -> (A, B), row i: image i against every text."""
    return image_emb @ text_emb.T


def output_entropy(logits):
    """Entropy in nats of the next-token distribution (paper Sec. 3.1, Fig. 2). logits: (..., V) -> (...); log V when uniform."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def cumulative_variance(emb):
    """Share of the variance that the first k principal components hold, for k = 1, 2, ... (paper Sec. 3.1, Fig. 3).

    emb: (B, D) with B >= 2, not all rows equal. Returns (min(B, D),) rising to 1; a slow rise is a spread-out embedding.
    """
    if len(emb) < 2:
        raise ValueError(f"cumulative variance of {len(emb)} embedding: at least 2 are needed")
    variance = torch.linalg.svdvals((emb - emb.mean(0)).double()).square()
    if variance.sum() == 0:
        raise ValueError(
            "cumulative variance of embeddings that are all equal: there is no variance to share out"
        )
    return (variance.cumsum(0) / variance.sum()).to(emb.dtype)


def components_for(cumulative, share=0.9):
    """How many principal components hold `share` of the variance (paper Sec. 3.1). cumulative: (k,), as cumulative_variance gives it."""
    return int((cumulative < share - 1e-6).sum()) + 1


# ------------------------------------------------------------------------------------------------------ Sec. 3.2: losses


def contrastive_loss(image_emb, text_emb, temperature):
    """Symmetric image-text cross-entropy (paper, Eq. 1, divided by B; the temperature is ours).

    image_emb, text_emb: (B, D), L2-normalised, row i of each is a pair; temperature: a positive number or 0-d tensor. Returns a 0-d
    loss in nats; 2 log B when all rows coincide. Negatives are this batch only, so splitting B changes the loss. Raises ValueError on
    unequal shapes or B < 2.
    """
    if image_emb.shape != text_emb.shape or len(image_emb) < 2:
        raise ValueError(
            f"contrastive loss wants two equal (B, D) with B >= 2, got {tuple(image_emb.shape)} and {tuple(text_emb.shape)}"
        )
    sim = similarity(image_emb, text_emb) / temperature  # (B, B)
    pairs = torch.arange(len(sim), device=sim.device)
    return F.cross_entropy(sim, pairs) + F.cross_entropy(sim.T, pairs)


def text_text_loss(triples, temperature):
    """E5-V's loss (arXiv 2407.12580), the paper's rival: each sentence among all paraphrases and all hard negatives, one way.

    triples: (B, 3, D), L2-normalised: sentence, paraphrase, hard negative. Returns a 0-d loss in nats; log 2 B when all coincide.
    """
    sentence, paraphrase, negative = triples.unbind(1)
    sim = similarity(sentence, torch.cat([paraphrase, negative])) / temperature  # (B, 2 B)
    return F.cross_entropy(sim, torch.arange(len(sim), device=sim.device))


def next_token_loss(hidden, targets, head_weight, total=None):
    """-mean log p(u_i | x_v, x_p, u_<i) over caption tokens (paper, Eq. 2; the mean per token instead of the sum is ours).

    hidden: (M, D), the states that predict; targets: (M,) token ids; head_weight: (V, D); total: the tokens of the whole batch when this
    is a part of it. Only caption tokens come here, so no logits exist for image or prompt tokens. Returns a 0-d loss in nats per token.
    Raises ValueError when there is no token.
    """
    total = len(targets) if total is None else total
    if total == 0:
        raise ValueError("next-token loss over no token: the batch holds no long caption")
    return ChunkedCrossEntropy.apply(hidden, targets, head_weight) / total


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over M tokens of the cross-entropy of hidden @ head_weight.T, a chunk of rows at a time.

    No logits are kept: each chunk's gradient, (softmax - one-hot) @ head_weight, is taken while its logits are there.
    """

    CHUNK = 1024  # rows of logits that exist at a time

    @staticmethod
    def forward(ctx, hidden, targets, head_weight):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss, head = torch.zeros((), dtype=wide, device=hidden.device), head_weight.to(hidden.dtype)
        hidden_grad, head_grad = (
            torch.zeros_like(x) if needed else None
            for x, needed in zip((hidden, head_weight), ctx.needs_input_grad[::2])
        )
        for start in range(0, len(targets), ChunkedCrossEntropy.CHUNK):
            rows = slice(start, start + ChunkedCrossEntropy.CHUNK)
            log_p, target = (
                F.linear(hidden[rows], head).to(wide).log_softmax(-1),
                targets[rows, None],
            )  # (chunk, V), (chunk, 1)
            loss -= log_p.gather(1, target).sum()
            if hidden_grad is None and head_grad is None:
                continue
            logit_grad = (
                log_p.exp_()
                .scatter_add_(1, target, -torch.ones_like(target, dtype=wide))
                .to(hidden.dtype)
            )
            if hidden_grad is not None:
                hidden_grad[rows] = logit_grad @ head
            if head_grad is not None:  # pre-training only: adaptation leaves the head frozen
                head_grad += logit_grad.T @ hidden[rows]
        ctx.save_for_backward(hidden_grad, head_grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        hidden_grad, head_grad = (
            None if grad is None else (grad * upstream).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden_grad, None, head_grad


@dataclass(frozen=True)
class Sequence:
    """One tokenised template. `ids` holds N image tokens where <image> stands; slots index into ids."""

    ids: list
    prompt_slot: int  # first token of the hand prompt
    prompt_length: int  # tokens of the hand prompt: what the soft prompt replaces
    summary: int  # the last token of the template, whose hidden state is the embedding
    image_slot: int | None = None  # first image token
    loss_start: int | None = None  # first token of the long caption
    image_tokens: int = 0  # N
    axes: torch.Tensor | None = None  # (3, T) rotary positions, when they are not 0 .. T - 1


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences as tensors, all made on the host: nothing below asks the device for a size."""

    ids: torch.Tensor  # (B, T)
    prompt_slots: torch.Tensor  # (B,)
    summary: torch.Tensor  # (B,)
    image_places: torch.Tensor  # (2, n) row and slot of every image token, in order
    loss_index: (
        torch.Tensor
    )  # (M,) flat index b * T + t of every state that predicts a long-caption token
    targets: torch.Tensor  # (M,) those tokens
    prompt_width: int  # tokens up to the last summary token
    axes: torch.Tensor | None = None  # (3, B, T) rotary positions, when they are not 0 .. T - 1

    def to(self, device):
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(
            **{
                name: value.to(device) if torch.is_tensor(value) else value
                for name, value in moved.items()
            }
        )

    @property
    def states(self):
        """(B + M,) flat index b * T + t of the states that are used: those of the summary tokens, then those that predict a caption token."""
        count, width = self.ids.shape
        return torch.cat(
            [torch.arange(count, device=self.ids.device) * width + self.summary, self.loss_index]
        )

    def prompts(self):
        """The same sequences cut after their summary tokens: all that the embeddings depend on."""
        width, axes = self.prompt_width, self.axes
        cut = {"ids": self.ids[:, :width], "axes": None if axes is None else axes[..., :width]}
        return dataclasses.replace(
            self, **cut, loss_index=self.loss_index[:0], targets=self.targets[:0]
        )


def collate(sequences, pad_id):
    """Sequences -> Batch. Padding stands right of the last real token, where causal attention never lets it be seen."""
    width = max(len(s.ids) for s in sequences)
    columns = [(s.image_slot or 0) + torch.arange(s.image_tokens) for s in sequences]
    predicting = [
        (b, t - 1)
        for b, s in enumerate(sequences)
        if s.loss_start
        for t in range(s.loss_start, len(s.ids))
    ]
    return Batch(
        ids=torch.tensor([s.ids + [pad_id] * (width - len(s.ids)) for s in sequences]),
        prompt_slots=torch.tensor([s.prompt_slot for s in sequences]),
        summary=torch.tensor([s.summary for s in sequences]),
        image_places=torch.stack(
            [
                torch.repeat_interleave(torch.tensor([s.image_tokens for s in sequences])),
                torch.cat(columns),
            ]
        ),
        loss_index=torch.tensor([b * width + t for b, t in predicting], dtype=torch.long),
        targets=torch.tensor([sequences[b].ids[t + 1] for b, t in predicting], dtype=torch.long),
        prompt_width=max(s.summary for s in sequences) + 1,
        axes=None
        if sequences[0].axes is None
        else torch.stack([F.pad(s.axes, (0, width - len(s.ids))) for s in sequences], dim=1),
    )


@dataclass(frozen=True)
class TrainingBatch:
    """Rows, tokenised: every picture with its long caption if it has one, every short caption with the row of its picture, triples of texts."""

    pixels: (
        torch.Tensor | None
    )  # of B pictures, as the image processor stacks them: (B, 3, height, width) in LLaVA
    images: Batch | None  # B rows
    texts: Batch | None  # as many rows as there are short captions
    with_short: torch.Tensor  # row in `images` of each row of `texts`
    triples: Batch | None = None  # 3 rows a triple: sentence, paraphrase, hard negative

    @property
    def batches(self):
        """The parts that there are."""
        return [batch for batch in (self.images, self.texts, self.triples) if batch]

    @property
    def targets(self):
        """(M,) every token of the long captions."""
        return self.images.targets if self.images else self.with_short[:0]

    def to(self, device):
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return TrainingBatch(
            **{name: value if value is None else value.to(device) for name, value in moved.items()}
        )

    def prompts(self):
        """The same rows without their long captions."""
        return dataclasses.replace(self, images=self.images and self.images.prompts())


@dataclass(frozen=True)
class Outputs:
    """What the losses need of a forward: embeddings, and the states that predict caption tokens."""

    image_emb: torch.Tensor  # (S, D), L2-normalised, of the rows with a short caption
    text_emb: torch.Tensor  # (S, D), L2-normalised, row i belongs to row i of image_emb
    triple_emb: torch.Tensor  # (n, 3, D), L2-normalised
    caption_states: torch.Tensor  # (M, D), row m predicts token m of `targets`


# ------------------------------------------------------------------------------------------------------ the model


class VladVA(nn.Module):
    """An LVLM with LoRA and soft prompts that embeds images and texts. `adapter_disabled()` gives the original LVLM back."""

    def __init__(self, lvlm, tokenizer, image_processor, settings, name):
        super().__init__()
        self.lvlm, self.tokenizer, self.image_processor, self.settings, self.name = (
            lvlm,
            tokenizer,
            image_processor,
            settings,
            name,
        )
        self.soft_prompts = nn.ParameterDict()
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(settings.temperature), device=lvlm.device),
            requires_grad=settings.learn_temperature,
        )
        self.adapted = False

    @classmethod
    def from_pretrained(cls, name, adapter=None, device="cpu", dtype=torch.float32, settings=None):
        """The model in a folder (or "tiny"), with the adapter of a training run when one is named, otherwise the untouched LVLM.

        settings: for an untouched model, Settings() when None; an adapter brings its own. Raises ValueError when folder, weights,
        tokenizer or adapter do not fit together.
        """
        folder = data.model_folder(name)
        tower = data.tower_folder(folder)
        state, stored = read_adapter(adapter) if adapter else ({}, settings or Settings())
        if adapter and settings and settings != stored:
            raise ValueError(
                f"{adapter} was trained with other settings than those asked for: {stored}"
            )
        config = lvlm_module.read_config(folder, tower)
        tokenizer = data.Tokenizer(folder, config)
        image_processor = data.image_processor(
            folder, config, stored.image_mode, tower, (stored.min_pixels, stored.max_pixels)
        )
        model = cls(
            lvlm_module.load_lvlm(folder, device, dtype, tower),
            tokenizer,
            image_processor,
            stored,
            str(name),
        )
        if adapter:
            model.attach()
            model.load_adapter_state(state, adapter)
        return model

    def with_prompts(self, image_prompt, text_prompt):
        """The same untouched LVLM under other hand prompts; the weights are shared."""
        if self.adapted:
            raise ValueError(
                "other hand prompts for an adapted model: its soft prompts have replaced them; take the untouched model"
            )
        settings = dataclasses.replace(
            self.settings, image_prompt=image_prompt, text_prompt=text_prompt
        )
        return VladVA(self.lvlm, self.tokenizer, self.image_processor, settings, self.name)

    # -------------------------------------------------------------------------------------------------- Sec. 3.3: adaptation

    def attach(self):
        """Add what is trained: LoRA on the decoder's linears and soft prompts that start as the hand prompts' embeddings.

        A fresh adapter changes no embedding: lora_b is zero, and the soft prompts are the embeddings they replace.
        """
        if self.settings.lora:
            lora.attach(self.lvlm.decoder, self.settings.rank, self.settings.alpha)
        if self.settings.soft_prompts:
            for modality, sequence in (
                ("image", self.image_sequence()),
                ("text", self.text_sequence("a")),
            ):
                span = sequence.ids[
                    sequence.prompt_slot : sequence.prompt_slot + sequence.prompt_length
                ]
                hand_prompt = self.lvlm.embed(torch.tensor(span, device=self.lvlm.device))  # (P, D)
                self.soft_prompts[modality] = nn.Parameter(hand_prompt.detach().clone().float())
        self.adapted = True

    @property
    def temperature(self):
        """tau of Eq. 1, 0-d."""
        return self.log_temperature.exp().clamp(0.01, 1.0)

    @contextlib.contextmanager
    def adapter_disabled(self):
        """Inside the context this is the untouched LVLM with its hand prompts, bit for bit."""
        before, self.adapted = self.adapted, False
        try:
            with lora.disabled(self.lvlm.decoder):
                yield
        finally:
            self.adapted = before

    # -------------------------------------------------------------------------------------------------- Sec. 3.2.3: templates

    def sequence(self, template, prompt, caption="", more="", end=(), grid=None):
        """Tokenise a filled template once and find its parts by their characters; `more` continues it after the summary token, ids `end` close it.

        grid: (rows, columns) of image tokens of the picture, None: a rendered scene's. Tokenising the parts apart would give other
        ids: a tokenizer may join characters across their borders.
        """
        template = self.tokenizer.spelled(template)
        head = template.format(prompt=prompt, caption=caption)
        encoding = self.tokenizer.encode(head + more)
        ids, offsets = [*encoding.ids, *end], encoding.offsets
        first_char = len(template[: template.index("{prompt}")].format(caption=caption))
        inside = [
            t for t, (a, b) in enumerate(offsets) if a < first_char + len(prompt) and b > first_char
        ]
        summary = max(t for t, (a, b) in enumerate(offsets) if a < b <= len(head))
        picture, count, axes = (
            [t for t, token in enumerate(ids) if token == self.tokenizer.image_id],
            0,
            None,
        )
        if picture:  # one image token becomes N
            grid = grid or self.lvlm.config.grid()
            count = math.prod(grid)
            ids = (
                ids[: picture[0]] + [self.tokenizer.placeholder_id] * count + ids[picture[0] + 1 :]
            )
            axes = self.lvlm.config.positions(ids, grid)
        shift = lambda t: t + count - 1 if picture and t > picture[0] else t
        limit = self.lvlm.config.decoder.max_position_embeddings
        if len(ids) > limit:
            raise ValueError(
                f"{len(ids)} tokens, but the model has {limit} positions: shorten {(caption or more)[:60]!r}..."
            )
        loss_start = shift(summary) + 1 if more else None
        return Sequence(
            ids,
            shift(inside[0]),
            len(inside),
            shift(summary),
            picture[0] if picture else None,
            loss_start,
            count,
            axes,
        )

    def detail_turn(self, long=None):
        """The turn that asks for the long caption, with it or up to it."""
        template = self.tokenizer.spelled(DETAIL_TEMPLATE + ("" if long is None else " {caption}"))
        return template.format(prompt=self.settings.detail_prompt, caption=long)

    @property
    def templates(self):
        """{modality: (template, hand prompt)}."""
        return {
            modality: tuple(
                getattr(self.settings, f"{modality}_{part}") for part in ("template", "prompt")
            )
            for modality in ("image", "text")
        }

    def image_sequence(self, long=None, grid=None):
        """Template for the image modality; with a long caption, the second turn that Eq. 2 is computed on follows the summary token."""
        alone = self.sequence(*self.templates["image"], grid=grid)
        if long is None:
            return alone
        asked = self.sequence(*self.templates["image"], more=self.detail_turn(), grid=grid)
        told = self.detail_turn(self.tokenizer.checked(long))
        whole = self.sequence(
            *self.templates["image"], more=told, end=[self.tokenizer.eos_id], grid=grid
        )
        assert (
            whole.ids[: len(asked.ids)] == asked.ids and asked.ids[: len(alone.ids)] == alone.ids
        ), "a long caption changed the tokens before it"
        return dataclasses.replace(whole, loss_start=len(asked.ids))

    def text_sequence(self, caption):
        """Template for the text modality."""
        return self.sequence(*self.templates["text"], caption=self.tokenizer.checked(caption))

    def prepared(self, pictures):
        """RGB pictures -> (their pixels, stacked; (rows, columns) of image tokens of each)."""
        each = [self.image_processor(picture) for picture in pictures]
        return self.lvlm.config.stack(each), [self.lvlm.config.grid(pixels) for pixels in each]

    def training_batch(self, rows):
        """Rows ({"image": PIL picture or None, "short": str or None, "long": str or None, "triple": 3 texts if any}) -> TrainingBatch on the host."""
        pictured = [row for row in rows if row["image"] is not None]
        with_short = [i for i, row in enumerate(pictured) if row["short"]]
        together = lambda sequences: (
            collate(sequences, self.tokenizer.pad_id) if sequences else None
        )
        pixels, grids = (
            self.prepared([row["image"] for row in pictured]) if pictured else (None, ())
        )
        return TrainingBatch(
            pixels=pixels,
            images=together(
                [self.image_sequence(row["long"], grid) for row, grid in zip(pictured, grids)]
            ),
            texts=together([self.text_sequence(pictured[i]["short"]) for i in with_short]),
            with_short=torch.tensor(with_short, dtype=torch.long),
            triples=together(
                [self.text_sequence(text) for row in rows for text in row.get("triple", ())]
            ),
        )

    # -------------------------------------------------------------------------------------------------- forward

    def embeds(self, batch, modality, pixels=None):
        """Decoder inputs of a Batch, (B, T, D): its tokens, the soft prompts of its modality ("image" or "text") and its image tokens."""
        embeds = self.lvlm.embed(batch.ids)
        if self.adapted and modality in self.soft_prompts:
            embeds = lvlm_module.place(embeds, self.soft_prompts[modality], batch.prompt_slots)
        if pixels is not None:
            with torch.no_grad():  # vision tower and projector are frozen
                features = self.lvlm.image_features(pixels)
            embeds = lvlm_module.place_image(embeds, features, batch.image_places)
        return embeds

    def states(self, batch, modality, pixels=None, depth=None):
        """(B + M, D), hidden states of a Batch: those of the summary tokens, then those that predict a caption token. depth: as the decoder's."""
        return self.lvlm.decoder(
            self.embeds(batch, modality, pixels), rows=batch.states, depth=depth, axes=batch.axes
        )

    def outputs(self, batch):
        """Outputs of a TrainingBatch from one forward of its image sequences and one of its texts.

        The long caption follows the summary token, which causal attention keeps from seeing it, so both losses share the forward
        (Sec. 3.2.3).
        """
        nothing = torch.zeros(0, self.lvlm.config.decoder.hidden_size, device=self.lvlm.device)
        image_emb, text_emb, triple_emb, caption_states = nothing, nothing, nothing, nothing
        if batch.images:
            hidden = self.states(batch.images, "image", batch.pixels)  # (B + M, D)
            image_emb, caption_states = (
                summary_embedding(hidden[: len(batch.pixels)])[batch.with_short],
                hidden[len(batch.pixels) :],
            )
        if batch.texts:
            text_emb = summary_embedding(self.states(batch.texts, "text"))
        if batch.triples:
            triple_emb = summary_embedding(self.states(batch.triples, "text"))
        return Outputs(
            image_emb, text_emb, triple_emb.unflatten(0, (len(triple_emb) // 3, 3)), caption_states
        )

    def losses(self, outputs, targets, total=None):
        """(contrastive, next-token): Eq. 1, and E5-V's loss if there are triples, and Eq. 2; a term that no row can feed is 0.

        total: the caption tokens of the whole batch when the targets are a part of it.
        """
        contrastive = next_token = torch.zeros((), device=outputs.image_emb.device)
        if len(outputs.image_emb) >= 2:
            contrastive = contrastive_loss(outputs.image_emb, outputs.text_emb, self.temperature)
        if len(outputs.triple_emb):
            contrastive = contrastive + text_text_loss(outputs.triple_emb, self.temperature)
        if len(targets) and self.settings.next_token_weight:
            next_token = next_token_loss(
                outputs.caption_states, targets, self.lvlm.head.weight, total
            )
        return contrastive, next_token

    def forward(self, batch):
        """The overall loss of a TrainingBatch (paper Sec. 3.2.3), 0-d."""
        return self.overall_loss(*self.losses(self.outputs(batch), batch.targets))

    def overall_loss(self, contrastive, next_token):
        """L = L_con + weight * L_CE of the two terms that `losses` gives."""
        return contrastive + self.settings.next_token_weight * next_token

    def encode_image(self, images, batch_size=64, workers=0, read=data.open_image):
        """PIL pictures or paths -> f_v, (B, D) float32, L2-normalised, on the model's device. Arguments as image_states'."""
        return summary_embedding(self.image_states(images, batch_size, workers, read))

    def encode_text(self, texts, batch_size=128):
        """Strings -> f_t, (B, D) float32, L2-normalised, on the model's device, in the order given."""
        return summary_embedding(self.text_states(texts, batch_size))

    @torch.no_grad()
    def image_states(self, images, batch_size=64, workers=0, read=data.open_image, depth=None):
        """PIL pictures or paths -> the states of their summary tokens, (B, D), which `lvlm.head` turns into next-token logits.

        workers: processes that read and preprocess ahead. read: what makes a picture of an item of `images`. depth: as the decoder's.
        """
        parts = []

        def batch_of(items):
            try:
                pixels, grids = self.prepared([read(item) for item in items])
                return pixels, collate(
                    [self.image_sequence(grid=grid) for grid in grids], self.tokenizer.pad_id
                )
            except ValueError as error:  # a broken picture; raised below, where it is not buried in a worker's traceback
                return error

        ahead = {"multiprocessing_context": "fork"} if workers else {}
        loader = DataLoader(images, batch_size, collate_fn=batch_of, num_workers=workers, **ahead)
        for read_ahead in tqdm(
            loader, desc="encoding pictures", leave=False, disable=None if len(loader) > 1 else True
        ):
            if isinstance(read_ahead, ValueError):
                raise read_ahead
            pixels, batch = (part.to(self.lvlm.device) for part in read_ahead)
            parts.append(self.states(batch, "image", pixels, depth))
        return (
            torch.cat(parts)
            if parts
            else torch.empty(0, self.lvlm.config.decoder.hidden_size, device=self.lvlm.device)
        )

    @torch.no_grad()
    def text_states(self, texts, batch_size=128, depth=None):
        """Strings -> the states of their summary tokens, (B, D), in the order given. depth: as the decoder's.

        Batches hold similar lengths, and the tokens that all texts begin with (the template's) go through the decoder once.
        """
        if isinstance(texts, str):
            raise ValueError(
                "encode_text wants a list of strings, got one string: put it in a list"
            )
        sequences = [self.text_sequence(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(sequences[i].ids))
        out, prefix = (
            torch.empty(len(texts), self.lvlm.config.decoder.hidden_size, device=self.lvlm.device),
            None,
        )
        shared = len(os.path.commonprefix([s.ids[: s.summary] for s in sequences]))
        starts = range(0, len(order), batch_size)
        for start in tqdm(
            starts, desc="encoding texts", leave=False, disable=None if len(starts) > 1 else True
        ):
            chosen = order[start : start + batch_size]
            batch = collate([sequences[i] for i in chosen], self.tokenizer.pad_id).to(
                self.lvlm.device
            )
            embeds, width = self.embeds(batch, "text"), batch.ids.shape[1]
            prefix = prefix or lvlm_module.Prefix(self.lvlm.decoder, embeds[:1, :shared])
            rows = (
                torch.arange(len(chosen), device=self.lvlm.device) * (width - shared)
                + batch.summary
                - shared
            )
            positions = torch.arange(shared, width, device=self.lvlm.device)[None]
            out[chosen] = self.lvlm.decoder(embeds[:, shared:], prefix, positions, rows, depth).to(
                out.dtype
            )
        return out

    @torch.no_grad()
    def summary_attention(self, image):
        """Attention of the summary token to the image tokens (paper Sec. 3.4, Fig. 6): a PIL picture or path -> (layers, H, N).

        Each (N,) sums to what the head gives to the picture; the rest of its 1 goes to the other tokens.
        """
        pixels, (grid,) = self.prepared([data.open_image(image)])
        batch = collate([self.image_sequence(grid=grid)], self.tokenizer.pad_id).to(
            self.lvlm.device
        )
        maps = self.lvlm.decoder.attention_maps(
            self.embeds(batch, "image", pixels.to(self.lvlm.device)), batch.axes
        )
        return torch.stack(
            [weights[0, :, batch.summary[0]][:, batch.image_places[1]] for weights in maps]
        )

    @torch.no_grad()
    def generate_batch(self, images, prompts, max_new_tokens=128, sampling=lvlm_module.GREEDY):
        """Answers to one prompt per picture, in the model's own template; adapters as they are (`adapter_disabled()` for the original)."""
        pixels, grids = self.prepared([data.open_image(image) for image in images])
        sequences = [
            self.sequence(GENERATE_TEMPLATE, self.tokenizer.checked(prompt), grid=grid)
            for prompt, grid in zip(prompts, grids)
        ]
        batch, features = (
            collate(sequences, self.tokenizer.pad_id).to(self.lvlm.device),
            self.lvlm.image_features(pixels.to(self.lvlm.device)),
        )
        embeds = lvlm_module.place_image(self.lvlm.embed(batch.ids), features, batch.image_places)
        answers = lvlm_module.generate(
            self.lvlm,
            embeds,
            batch.summary + 1,
            self.tokenizer.eos_id,
            max_new_tokens,
            sampling,
            batch.axes,
        )
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def generate(self, image, prompt, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=0):
        """The answer to one prompt about one picture (PIL or path): greedy at temperature 0, otherwise sampled."""
        return self.generate_batch(
            [image], [prompt], max_new_tokens, lvlm_module.Sampling(temperature, top_p, seed)
        )[0]

    # -------------------------------------------------------------------------------------------------- saving

    def trained(self):
        """[(name, parameter)] of everything that is trained; all else is frozen."""
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def adapter_state(self):
        """All that an adapter is: {"lora.<layer>.lora_a": ..., "soft_prompt.image": ..., "log_temperature": ...} in float32 on the host."""
        state = {
            f"lora.{name}": tensor for name, tensor in lora.lora_state(self.lvlm.decoder).items()
        }
        state |= {
            f"soft_prompt.{modality}": vectors for modality, vectors in self.soft_prompts.items()
        }
        return {
            name: t.detach().to("cpu").contiguous()
            for name, t in {**state, "log_temperature": self.log_temperature}.items()
        }

    def save_adapter(self, folder):
        """Write folder/adapter.safetensors: LoRA, soft prompts, temperature, and the settings they were trained with."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "base": self.name,
            "settings": dataclasses.asdict(self.settings),
        }  # under one key: the order of several is not fixed in the file
        lvlm_module.write_tensors(
            folder / "adapter.safetensors", self.adapter_state(), {"adapter": json.dumps(about)}
        )

    def save_merged(self, folder, shard_bytes=5_000_000_000):
        """Write an adapted model as a plain folder of its architecture: LoRA folded in, soft prompts as added tokens with their own embeddings.

        folder/vladva.json holds the two prompt strings whose last token is the embedding, for transformers or any other reader:
        {"image": "USER:<image_prompt_0>...<image>...", "text": "...{caption}...", "image_mode": "crop"}. Raises ValueError when there is no
        adapter, or a model lies there already.
        """
        folder = Path(folder)
        if not self.adapted:
            raise ValueError("there is no adapter to merge: load one, or train one with train.py")
        if (folder / "config.json").exists():
            raise ValueError(
                f"{folder} holds a model already: choose another folder, or delete it first"
            )
        added = {
            name: vector
            for modality in self.soft_prompts
            for name, vector in self.prompt_tokens(modality)
        }
        tokenizer = self.tokenizer.with_tokens(list(added))
        prompts = {
            modality: self.merged_prompt(modality, tokenizer) for modality in ("image", "text")
        }
        ids = [tokenizer.token_to_id(name) for name in added]
        raw = json.loads(json.dumps(self.lvlm.config.raw)) | {
            "torch_dtype": str(self.lvlm.dtype)[6:]
        }
        raw["image_token_id" if "image_token_id" in raw else "image_token_index"] = (
            self.tokenizer.image_id
        )
        raw.pop("dtype", None)
        raw["text_config"]["vocab_size"] = max(
            self.lvlm.config.decoder.vocab_size, self.tokenizer.image_id + 1, *(i + 1 for i in ids)
        )
        lvlm_module.save_weights(
            self.merged_weights(ids, list(added.values()), raw["text_config"]["vocab_size"]),
            raw,
            folder,
            self.lvlm.dtype,
            shard_bytes,
        )
        data.copy_companions(data.model_folder(self.name), folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        lvlm_module.write_json(folder / "preprocessor_config.json", self.image_processor.raw)
        lvlm_module.write_json(
            folder / "vladva.json", prompts | {"image_mode": self.image_processor.mode}
        )

    def merged_weights(self, ids, vectors, rows):
        """(name, tensor) of every weight with LoRA folded in; the embedding holds `vectors` at `ids`, it and the head have `rows` rows."""
        folded = {
            f"decoder.{name}.weight": layer for name, layer in lora.lora_layers(self.lvlm.decoder)
        }
        for name, p in self.lvlm.named_parameters():
            if name in ("decoder.embed_tokens.weight", "head.weight"):
                p = torch.cat([p, p.new_zeros(rows - len(p), p.shape[1])])
                if ids:
                    p[ids] = (
                        torch.stack(vectors).to(p)
                        if name.startswith("decoder")
                        else torch.zeros_like(p[ids])
                    )
            if "lora_" not in name:
                yield name, folded[name].folded() if name in folded else p

    def prompt_tokens(self, modality):
        """[(added token, its embedding), ...] that stand for a soft prompt in a merged folder.

        The blanks between prompt and <image> come with them: Llama's tokenizer would read a blank between two added tokens as two.
        """
        vectors = self.soft_prompts[modality].detach()
        if modality == "image":
            blanks = self.blanks_before_image(self.image_sequence())
            vectors = torch.cat(
                [
                    vectors,
                    self.lvlm.embed(
                        torch.tensor(blanks, dtype=torch.long, device=vectors.device)
                    ).to(vectors),
                ]
            )
        return [(f"<{modality}_prompt_{i}>", vector) for i, vector in enumerate(vectors)]

    def blanks_before_image(self, sequence):
        """Ids between the prompt and what introduces the picture (a special token)."""
        between = sequence.ids[sequence.prompt_slot + sequence.prompt_length : sequence.image_slot]
        return list(
            itertools.takewhile(
                lambda t: self.tokenizer.inner.id_to_token(t) not in self.tokenizer.special, between
            )
        )

    def merged_prompt(self, modality, tokenizer):
        """The prompt string of a modality for a merged folder's tokenizer; ValueError unless it gives the trained prompt's ids."""
        template, hand_prompt = self.templates[modality]
        template = self.tokenizer.spelled(template)
        if modality not in self.soft_prompts:
            return template.replace("{prompt}", hand_prompt)
        names = [name for name, _ in self.prompt_tokens(modality)]
        captions = ("a", "The red bus.", "2 dogs") if modality == "text" else ("",)

        def wanted(caption):
            sequence = self.sequence(template, hand_prompt, caption)
            before, after = (
                sequence.ids[: sequence.prompt_slot],
                sequence.ids[sequence.prompt_slot + sequence.prompt_length :],
            )
            if modality == "image":
                opening = sequence.ids[
                    sequence.prompt_slot + len(names) : sequence.image_slot
                ]  # special tokens before the picture
                after = [
                    *opening,
                    self.tokenizer.image_id,
                    *sequence.ids[sequence.image_slot + sequence.image_tokens :],
                ]
            return before + [tokenizer.token_to_id(name) for name in names] + after

        for place, blank in itertools.product(
            (" {prompt} ", "{prompt} "), ("", " ")
        ):  # some tokenizers put a blank before a text by themselves
            prompt = template.replace(place, "".join(names) + blank)
            if all(
                tokenizer.encode(prompt.replace("{caption}", caption)).ids == wanted(caption)
                for caption in captions
            ):
                return prompt
        raise ValueError(
            f"this tokenizer reads {prompt!r} as other tokens than the trained prompt: it would embed differently"
        )

    def load_adapter_state(self, state, source):
        """Copy an adapter's tensors into this model's; strict on names and shapes."""
        own = self.adapter_state()
        try:
            lvlm_module.check_keys(
                {name: t.shape for name, t in state.items()},
                {name: t.shape for name, t in own.items()},
            )
        except ValueError as error:
            raise ValueError(
                f"{source} does not fit {self.name} (was it trained on another model?): {error}"
            ) from None
        places = dict(self.named_parameters())
        with torch.no_grad():
            for name, tensor in state.items():
                ours = (
                    name.replace("lora.", "lvlm.decoder.", 1)
                    if name.startswith("lora.")
                    else name.replace("soft_prompt.", "soft_prompts.", 1)
                )
                places[ours].copy_(tensor)


def read_adapter(folder):
    """(tensors, Settings) of folder/adapter.safetensors; ValueError when there is none or it is something else."""
    path = Path(folder) / "adapter.safetensors"
    if not path.exists():
        raise ValueError(
            f"{path} not found: --adapter wants the folder of a training run (python train.py --out FOLDER writes one)"
        )
    shard = lvlm_module.open_shard(path)
    about = (shard.metadata() or {}).get("adapter")
    if about is None:
        raise ValueError(f"{path} carries no settings: it was not written by this project")
    return {name: shard.get_tensor(name) for name in shard.keys()}, Settings(
        **json.loads(about)["settings"]
    )


# ------------------------------------------------------------------------------------------------------ command line


def pick_dtype(name, device, model):
    """The torch dtype asked for; otherwise bfloat16 on CUDA, and on the CPU float32 unless that would take over half of the free memory.

    ValueError when the weights of the model do not fit.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype is {name!r}: one of {', '.join(DTYPES)}")
    folder = data.model_folder(model)
    with torch.device("meta"):
        count = sum(
            p.numel()
            for p in lvlm_module.LVLM(
                lvlm_module.read_config(folder, data.tower_folder(folder))
            ).parameters()
        )
    free = free_bytes(device)
    if name is None:
        name = (
            "float32" if torch.device(device).type == "cpu" and 4 * count < free / 2 else "bfloat16"
        )
    needed = count * DTYPES[name].itemsize
    if needed > free:
        hint = (
            "try --dtype bfloat16"
            if name == "float32"
            else "a smaller model or a larger machine is needed"
        )
        raise ValueError(
            f"{model} takes {needed / 1e9:.1f} GB in {name}, but {device} has {free / 1e9:.1f} GB free: {hint}"
        )
    return DTYPES[name]


def load_model(args):
    """The model that the flags of add_model_flags ask for."""
    device = join_ranks(pick_device(args.device))
    return VladVA.from_pretrained(
        args.model, args.adapter, device, pick_dtype(args.dtype, device, args.model)
    )


def is_picture(argument):
    """Does a command-line argument name a picture rather than say a text?"""
    return Path(argument).is_file() or Path(argument).suffix.lower() in data.PICTURES


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="vladva.py", description="Similarity of pictures and texts."
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IMAGE|TEXT", help="picture files and texts, in any order"
    )
    add_model_flags(parser)
    args = parser.parse_args(argv)
    images, texts = (
        [x for x in args.inputs if is_picture(x)],
        [x for x in args.inputs if not is_picture(x)],
    )
    if not images or not texts:
        raise ValueError(
            f"{len(images)} pictures and {len(texts)} texts: at least one of each is needed"
        )
    model = load_model(args)
    sim = similarity(model.encode_image(images), model.encode_text(texts))  # (images, texts)
    print(
        format_table(
            ["", *texts],
            [[image, *(f"{s:.3f}" for s in row)] for image, row in zip(images, sim.tolist())],
        )
    )


if __name__ == "__main__":
    main()
