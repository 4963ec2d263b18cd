"""VladVA (arXiv 2412.04378): a generative LVLM becomes an embedding model. The method itself.

    from vladva import VladVA
    model = VladVA.from_pretrained("tiny", adapter="runs/tiny")
    model.encode_image(["a.jpg"]) @ model.encode_text(["a red circle"]).T

    python vladva.py a.jpg b.jpg "a red circle" "a blue square" --adapter runs/tiny

Not here: the network (model.py), files (data.py), the loop (train.py), benchmarks (eval.py).
"""

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

import data
from data import flag
from lora import attach_lora, lora_disabled
from model import DTYPES, LVLM, KVCache, check_shapes, from_json, generate, load_lvlm

# ------------------------------------------------------------------------ Sec. 3.1: embeddings


# losses and similarities are not taken in bfloat16
def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summary_embedding(hidden_states: Tensor) -> Tensor:
    """f = Phi_l(...)[eos], L2-normalised (paper Sec. 3.1).

    hidden_states: (B, D), after the final norm, at the summary token, a colon in LLaVA.
    """
    return F.normalize(at_least_float32(hidden_states), dim=-1)


def similarity(image_emb: Tensor, text_emb: Tensor) -> Tensor:
    """s = cos_sim(f_v, f_t) (paper Sec. 3.1): (A, D), (B, D) -> (A, B), row i: image i."""
    return image_emb @ text_emb.T


# ---------------------------------------------------------------------------- Sec. 3.2: losses


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, temperature: float | Tensor) -> Tensor:
    """Symmetric image-text cross-entropy (paper, Eq. 1, divided by B; the temperature is ours).

    image_emb, text_emb: (B, D), L2-normalised, row i of each is a pair. Returns a 0-d loss in nats;
    2 log B when all rows coincide. ValueError on unequal shapes or B < 2.
    """
    if image_emb.shape != text_emb.shape or len(image_emb) < 2:
        shapes = f"{tuple(image_emb.shape)} and {tuple(text_emb.shape)}"
        raise ValueError(f"contrastive loss of {shapes}: wanted equal shapes, B >= 2")
    # the other rows of the batch are the negatives: two halves give another loss than the whole
    sim = similarity(image_emb, text_emb) / temperature  # (B, B)
    pairs = torch.arange(len(sim), device=sim.device)
    # image i among all texts, then text i among all images
    return F.cross_entropy(sim, pairs) + F.cross_entropy(sim.T, pairs)


def next_token_loss(
    hidden_states: Tensor, targets: Tensor, head_weight: Tensor, total: int | None = None
) -> Tensor:
    """-mean log p(u_i | x_v, x_p, u_<i) over caption tokens (paper, Eq. 2; the mean is ours), 0-d.

    hidden_states: (M, D), those that predict; targets: (M,) token ids; head_weight: (V, D); total:
    the tokens of the whole batch, when this is a part of it.
    """
    total = len(targets) if total is None else total
    if total == 0:
        raise ValueError("next-token loss over no token: the batch holds no long caption")
    # only caption tokens come here: no logits exist for image or prompt tokens
    logits = F.linear(hidden_states, head_weight.to(hidden_states.dtype))  # (M, V)
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum") / total


class Embeddings(NamedTuple):
    """Summary embeddings of a batch, L2-normalised: what a loss of LOSSES takes."""

    image: Tensor  # (S, D), of the rows with an image and a short caption
    text: Tensor  # (S, D), row i belongs to row i of `image`
    further_texts: Tensor  # (E, D), of the rows' further texts, one after another


# Eq. 1 on all pairs of the batch; a single one has no negative
def image_text_loss(model: "VladVA", emb: Embeddings) -> Tensor:
    if len(emb.image) < 2:
        return emb.image.new_zeros(())
    return contrastive_loss(emb.image, emb.text, model.temperature)


# a logarithm, so that no step makes the temperature negative
def learned_temperature(config: "VladVAConfig") -> dict[str, float]:
    return {"log_temperature": math.log(config.temperature)} if config.learn_temperature else {}


@dataclass(frozen=True)
class EmbeddingLoss:
    """An entry of LOSSES: all that the project needs to know of a loss on embeddings."""

    function: Callable  # (VladVA, Embeddings of the whole batch) -> 0-d loss
    inputs: tuple[str, ...] = ("pairs",)  # "pairs": image, short caption; "further_texts"
    parameters: Callable = lambda config: {}  # VladVAConfig -> {trained parameter: start value}


LOSSES = {"vladva": EmbeddingLoss(image_text_loss, parameters=learned_temperature)}

# Sec. 3.2.3: the templates beside VladVAConfig's
DETAIL_TEMPLATE = " USER: {prompt}\nASSISTANT: {caption}"  # follows the summary token in training
GENERATE_TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"  # LLaVA-1.5's own, for answers in words


@dataclass(frozen=True)
class VladVAConfig:
    """What the method depends on; stored in every adapter file. flag: also a command-line flag."""

    loss: str = flag("vladva", "an entry of vladva.LOSSES")
    image_prompt: str = "Summarize the provided image in one word:"  # paper Sec. 5.1
    text_prompt: str = "Summarize the provided text in one word:"  # paper Sec. 5.1
    image_template: str = "USER: {prompt} <image>\nASSISTANT:"  # paper Sec. 3.2.3
    text_template: str = "USER: {prompt} {caption}\nASSISTANT:"  # paper Sec. 3.2.3
    detail_prompt: str = "Describe the image in detail."  # paper Sec. 3.2.3
    soft_prompts: bool = flag(True, "train soft prompts for the hand prompts")  # paper Sec. 3.3
    lora: bool = flag(True, "train LoRA on the decoder's linear layers")  # paper Sec. 3.3
    lora_rank: int = flag(16, "rank of LoRA", low=1, high=1024)  # second-hand notes on the paper
    lora_alpha: float = 16.0  # second-hand notes on the paper
    # ours: Eq. 1 prints no temperature; E5-V uses 0.05. A learned one is clamped to 0.01 .. 1
    temperature: float = flag(0.05, "tau of Eq. 1, 0.01 to 1", low=0.01, high=1.0)
    learn_temperature: bool = flag(False, "train tau as well")
    next_token_weight: float = flag(1.0, "weight of Eq. 2", low=0)  # the paper reads as a plain sum
    image_mode: str = flag("crop", "crop or pad", choices=("crop", "pad"))  # pad: original LLaVA
    min_pixels: int | None = flag(None, help="", low=1)  # of an image, Qwen2-VL only
    max_pixels: int | None = flag(None, help="", low=1)

    def __post_init__(self):
        data.check_bounds(self)
        for name, content in (("image_template", "<image>"), ("text_template", "{caption}")):
            template = getattr(self, name)
            if not template.count("{prompt}") == template.count(content) == 1:
                raise ValueError(f"{name} is {template!r}: wanted {{prompt}} and {content} once")
            if not getattr(self, name.replace("template", "prompt")).strip():
                raise ValueError(f"the prompt of {name} is empty: wanted words")
        if not (self.lora or self.soft_prompts):
            raise ValueError("neither LoRA nor soft prompts: there would be nothing to train")


class VladVA(nn.Module):
    """An LVLM with LoRA and soft prompts that embeds images and texts."""

    def __init__(self, lvlm: LVLM, tokenizer: Any, processor: Any, config: VladVAConfig, name: str):
        super().__init__()
        self.lvlm = lvlm
        self.tokenizer = tokenizer
        self.image_processor = processor
        self.config = config
        self.name = name
        self.soft_prompts = nn.ParameterDict()
        self.loss_parameters = nn.ParameterDict()
        self.adapter_enabled = False
        self.next_token_loss = next_token_loss  # Eq. 2, as the training loop calls it

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        adapter: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        config: VladVAConfig | None = None,  # an adapter brings its own
        shard: bool = False,  # as load_lvlm's
    ) -> "VladVA":
        """A model by name, hub id or folder, with the adapter of a training run if one is named."""
        folder = data.model_folder(name)
        merged = folder / "vladva.json"  # of a folder that extras/export.py wrote
        if adapter is not None:
            tensors, raw = data.read_adapter(adapter)
            config = from_json(VladVAConfig, raw, f"{adapter}/adapter.safetensors")
        elif config is None and merged.exists():
            config = from_json(VladVAConfig, data.read_json(merged).get("config"), str(merged))
        config = config or VladVAConfig()
        lvlm = load_lvlm(folder, device, dtype, shard)
        tokenizer = data.Tokenizer(folder, lvlm.config)
        processor = lvlm.config.image_processor or data.ImageProcessor
        model = cls(lvlm, tokenizer, processor(folder, lvlm.config, config), config, str(name))
        if adapter is not None:
            model.load_adapter_state(tensors, adapter)
        return model

    # --------------------------------------------------------------- Sec. 3.3: what is trained

    def attach(self, seed: int = 0) -> None:
        """Add LoRA, soft prompts, the loss's parameters; a fresh adapter changes no embedding."""
        device = self.lvlm.device
        if self.config.lora:
            attach_lora(self.lvlm.decoder, self.config.lora_rank, self.config.lora_alpha, seed)
        # a soft prompt starts as the embeddings of the tokens that it replaces
        if self.config.soft_prompts:
            for modality in ("image", "text"):
                start = self.lvlm.decoder.embed_tokens.weight[self.hand_prompt_ids(modality)]
                self.soft_prompts[modality] = nn.Parameter(start.float())  # (P, D)
        if self.config.loss in LOSSES:
            for name, value in self.loss.parameters(self.config).items():
                self.loss_parameters[name] = nn.Parameter(torch.tensor(float(value), device=device))
        self.adapter_enabled = True

    @property
    def loss(self) -> EmbeddingLoss:
        if self.config.loss not in LOSSES:
            raise ValueError(f"loss is {self.config.loss!r}, known are {', '.join(LOSSES)}")
        return LOSSES[self.config.loss]

    # the tokens that the soft prompt of a modality replaces
    def hand_prompt_ids(self, modality: str) -> list[int]:
        sequence = self.image_sequence() if modality == "image" else self.text_sequence("a")
        return sequence.input_ids[sequence.prompt_start :][: sequence.prompt_length]

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """{group: {name: parameter}} of all that is trained, and so optimised."""
        groups = {"lora": {}, "soft_prompts": {}, "loss_parameters": {}}
        for name, p in self.trained_parameters().items():
            group = "lora" if name.endswith(("lora_a", "lora_b")) else name.split(".")[0]
            if group not in groups:
                raise ValueError(f"{name} is trained, but belongs to none of {list(groups)}")
            groups[group][name] = p
        return groups

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of all that is trained, and so saved."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def temperature(self) -> float | Tensor:
        """tau of Eq. 1: a number, or a 0-d tensor where it is learned."""
        if "log_temperature" in self.loss_parameters:
            return self.loss_parameters["log_temperature"].exp().clamp(0.01, 1.0)
        return self.config.temperature

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Inside the context this is the untouched LVLM with its hand prompts, bit for bit."""
        with lora_disabled(self.lvlm.decoder), contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "adapter_enabled", self.adapter_enabled)
            self.adapter_enabled = False
            yield

    # ------------------------------------------------------------------ templates and batches

    def sequence(
        self, template: str, prompt: str, caption: str = "", long_text: str = None, grid: Any = ()
    ) -> data.TokenSequence:
        """Tokens of a template, and of a long caption and its question if there is one."""
        lvlm_config = self.lvlm.config
        # an image token for each feature vector of the image, of a square one if no grid is named
        grid = grid or lvlm_config.image_grid()  # (rows, columns)
        image_token = lvlm_config.image_token
        template = lvlm_config.apply_chat_template(template)
        template = template.replace(image_token, image_token * math.prod(grid))
        # up to the summary token: all that an embedding depends on
        prefix, prompt_char = data.fill_template(template, prompt, caption)
        text = prefix
        # behind it, in training: the question, and u of Eq. 2
        if long_text is not None:
            long_text = self.tokenizer.validate_text(long_text)
            template = lvlm_config.apply_chat_template(DETAIL_TEMPLATE)
            text += data.fill_template(template, self.config.detail_prompt, long_text)[0]
        # one tokenisation of the whole, then where the parts are in it
        encoding = self.tokenizer.encode(text)
        input_ids = list(encoding.ids)
        spans = data.find_spans(encoding.offsets, prefix, prompt, prompt_char)
        caption_start = None
        if long_text is not None:
            # the space before the caption belongs to its first token
            question = text[: -len(long_text)].rstrip(" ")
            caption_start = sum(end <= len(question) for _, end in encoding.offsets)
            input_ids.append(lvlm_config.end_tokens[0])
        limit = lvlm_config.decoder.max_position_embeddings
        if len(input_ids) > limit:
            raise ValueError(f"{len(input_ids)} tokens exceed {limit}: {(caption or text)[:60]!r}")
        position_ids = lvlm_config.position_ids(input_ids, grid) if image_token in prefix else None
        return data.TokenSequence(input_ids, *spans, caption_start, position_ids)

    # with a long caption: what Eq. 2 is computed on as well
    def image_sequence(self, long_caption: str = None, grid: tuple = ()) -> data.TokenSequence:
        config = self.config
        return self.sequence(config.image_template, config.image_prompt, "", long_caption, grid)

    def text_sequence(self, caption: str) -> data.TokenSequence:
        caption = self.tokenizer.validate_text(caption)
        return self.sequence(self.config.text_template, self.config.text_prompt, caption)

    def image_batch(self, images: list[Image], long_captions: list | None = None) -> tuple:
        """RGB images, each with its long caption or None -> (stacked images, Batch)."""
        pixels = [self.image_processor(image) for image in images]
        sequences = []
        for image, long_caption in zip(pixels, long_captions or [None] * len(images)):
            grid = self.lvlm.config.image_grid(image)
            sequences.append(self.image_sequence(long_caption, grid))
        return self.lvlm.config.stack_images(pixels), data.collate(sequences, self.tokenizer)

    def text_batch(self, texts: list[str]) -> data.Batch:
        return data.collate([self.text_sequence(text) for text in texts], self.tokenizer)

    def training_batch(self, rows: list[dict]) -> data.TrainingBatch:
        """Rows of image, short, long (or None) and texts -> what the losses take, on the host."""
        image_rows = [row for row in rows if row["image"] is not None]
        images = [row["image"] for row in image_rows]
        # Eq. 1 is on the images that have a short caption
        wanted = "pairs" in self.loss.inputs
        image_of_text = [i for i, row in enumerate(image_rows) if wanted and row["short"]]
        short_captions = [image_rows[index]["short"] for index in image_of_text]
        # Eq. 2 is on the long captions; at weight 0 none is read
        captions = [row["long"] if self.config.next_token_weight else None for row in image_rows]
        # a loss may ask for further texts, with or without an image
        texts = []
        for row in rows if "further_texts" in self.loss.inputs else []:
            texts += row.get("further_texts", ())
        pixels, image_batch = self.image_batch(images, captions) if images else (None, None)
        text_batch = self.text_batch(short_captions) if short_captions else None
        further_texts = self.text_batch(texts) if texts else None
        image_of_text = torch.tensor(image_of_text, dtype=torch.long)  # (S,)
        return data.TrainingBatch(pixels, image_batch, text_batch, image_of_text, further_texts)

    # --------------------------------------------------------------------------------- forward

    def inputs_embeds(self, batch: data.Batch, modality: str | None, pixels: Any = None) -> Tensor:
        """Decoder inputs (B, T, D): tokens, with soft prompts and image tokens in their places."""
        embeds = self.lvlm.decoder.embed_tokens(batch.input_ids)
        # Sec. 3.3: v^m instead of the hand prompt's tokens; there is none where modality is None
        if self.adapter_enabled and modality in self.soft_prompts:
            soft_prompt = self.soft_prompts[modality].to(embeds.dtype)  # (P, D)
            rows = torch.arange(len(embeds), device=embeds.device)[:, None]
            offsets = torch.arange(len(soft_prompt), device=embeds.device)
            embeds = embeds.index_put((rows, batch.prompt_start[:, None] + offsets), soft_prompt)
        # g(Phi_v(image)) at the image tokens; vision tower and projector are frozen
        if pixels is not None:
            with torch.no_grad():
                features = self.lvlm.image_features(pixels).flatten(0, -2)  # (B N, D)
            embeds = embeds.index_put(tuple(batch.image_token_index), features.to(embeds.dtype))
        return embeds

    def hidden_states(self, batch: data.Batch, modality: str, pixels: Any = None) -> tuple:
        """States of the summary tokens (B, D), and those that predict a caption token (M, D)."""
        inputs_embeds = self.inputs_embeds(batch, modality, pixels)  # (B, T, D)
        batch_size, width = batch.input_ids.shape
        first_of_row = torch.arange(batch_size, device=inputs_embeds.device) * width
        state_index = torch.cat([first_of_row + batch.summary_index, batch.caption_index])  # of B T
        # causal attention hides the long caption from the summary token: one forward, both losses
        states = self.lvlm.decoder(inputs_embeds, batch.position_ids, state_index=state_index)
        return states[:batch_size], states[batch_size:]

    def embed_batch(self, batch: data.TrainingBatch) -> tuple[Embeddings, Tensor]:
        """Embeddings of a TrainingBatch, and the states (M, D) that predict its caption tokens."""
        nothing = torch.zeros(0, self.lvlm.config.decoder.hidden_size, device=self.lvlm.device)
        image_emb = text_emb = further_emb = caption_states = nothing
        if batch.images:
            summary, caption_states = self.hidden_states(batch.images, "image", batch.pixels)
            image_emb = summary_embedding(summary)[batch.image_of_text]
        if batch.texts:
            text_emb = summary_embedding(self.hidden_states(batch.texts, "text")[0])
        if batch.further_texts:
            further_emb = summary_embedding(self.hidden_states(batch.further_texts, "text")[0])
        return Embeddings(image_emb, text_emb, further_emb), caption_states

    def forward(self, batch: data.TrainingBatch) -> Tensor:
        """L = L_con + weight L_CE of a batch in one piece (paper Sec. 3.2.3), 0-d."""
        emb, caption_states = self.embed_batch(batch)
        loss = self.loss.function(self, emb)
        targets = batch.caption_targets
        if len(targets):
            next_token = next_token_loss(caption_states, targets, self.lvlm.lm_head.weight)
            loss = loss + self.config.next_token_weight * next_token
        return loss

    @torch.no_grad()
    def encode_image(self, images: Sequence, batch_size: int = 64) -> Tensor:
        """PIL images or paths -> f_v, (B, D) float32, L2-normalised, on the model's device."""
        device = self.lvlm.device
        emb = torch.empty(len(images), self.lvlm.config.decoder.hidden_size, device=device)
        with ThreadPoolExecutor() as pool:
            for part in data.batches(range(len(images)), batch_size, "encoding images"):
                opened = list(pool.map(lambda i: data.open_image(images[i]), part))
                for few in self.image_processor.split(opened):
                    pixels, batch = self.image_batch(opened[few])
                    states, _ = self.hidden_states(batch.to(device), "image", pixels.to(device))
                    emb[part[few]] = summary_embedding(states).float()
        return emb

    @torch.no_grad()
    def encode_text(self, texts: list[str], batch_size: int = 128) -> Tensor:
        """Strings -> f_t, (B, D) float32, L2-normalised, on the model's device, in their order."""
        if isinstance(texts, str):
            raise ValueError("encode_text wants a list of strings, got one: put it in a list")
        decoder = self.lvlm.decoder
        device = self.lvlm.device
        emb = torch.empty(len(texts), decoder.config.hidden_size, device=device)
        sequences = [self.text_sequence(text) for text in texts]
        # what all texts begin with goes through the decoder once
        shared = len(commonprefix([s.input_ids[: s.summary_index] for s in sequences]))
        prefix = None
        # texts of similar length share a batch: little padding
        by_length = sorted(range(len(texts)), key=lambda i: len(sequences[i].input_ids))
        for part in data.batches(by_length, batch_size, "encoding texts"):
            batch = data.collate([sequences[i] for i in part], self.tokenizer).to(device)
            embeds = self.inputs_embeds(batch, "text")  # (B, T, D)
            if prefix is None:
                prefix = KVCache(decoder.config, embeds[:1, :shared])
                decoder(embeds[:1, :shared], cache=prefix)
            cache = KVCache(decoder.config, embeds, prefix)
            first_of_row = torch.arange(len(part), device=device) * cache.position.shape[1]
            state_index = first_of_row + batch.summary_index - shared
            states = decoder(embeds[:, shared:], cache.position[:1], cache, state_index)
            emb[part] = summary_embedding(states).float()
        return emb

    @torch.no_grad()
    def generate_batch(self, images: list, prompts: list, max_new_tokens: int = 128) -> list[str]:
        """Greedy answers to one prompt per image, in the model's own template."""
        pixels = []
        sequences = []
        for image, prompt in zip(images, prompts, strict=True):
            pixels.append(self.image_processor(data.open_image(image)))
            grid = self.lvlm.config.image_grid(pixels[-1])
            prompt = self.tokenizer.validate_text(prompt)
            sequences.append(self.sequence(GENERATE_TEMPLATE, prompt, grid=grid))
        batch = data.collate(sequences, self.tokenizer).to(self.lvlm.device)
        pixels = self.lvlm.config.stack_images(pixels).to(self.lvlm.device)
        embeds = self.inputs_embeds(batch, None, pixels)
        lengths = batch.summary_index + 1
        answers = generate(self.lvlm, embeds, lengths, max_new_tokens, batch.position_ids)
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def generate(self, image: Image | str | Path, prompt: str, max_new_tokens: int = 128) -> str:
        """The greedy answer to a prompt about an image; the adapter is on, the soft prompts not."""
        return self.generate_batch([image], [prompt], max_new_tokens)[0]

    def save_adapter(self, folder: str | Path) -> None:
        """Write folder/adapter.safetensors: all that is trained, in float32, and the config."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().float() for name, p in self.trained_parameters().items()}
        # one key: the order of several would change from process to process
        about = json.dumps({"base": self.name, "config": asdict(self.config)})
        data.write_tensors(Path(folder) / "adapter.safetensors", tensors, {"adapter": about})

    def load_adapter_state(self, tensors: dict[str, Tensor], source: str | Path) -> None:
        """Attach an adapter and copy its tensors into it; strict on names and shapes."""
        self.attach()
        parameters = self.trained_parameters()
        # encoding needs nothing of a loss that is not registered here
        if self.config.loss not in LOSSES:
            tensors = {k: t for k, t in tensors.items() if not k.startswith("loss_parameters.")}
        check_shapes(tensors, parameters, f"{source} does not fit {self.name}")
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)


def load_model(args: argparse.Namespace) -> VladVA:
    """The model that the flags of data.add_model_flags name."""
    device = data.init_distributed(args.device)
    return VladVA.from_pretrained(args.model, args.adapter, device, DTYPES.get(args.dtype))


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = data.Parser("vladva.py", description="Similarity of images and texts.")
    parser.add_argument("inputs", nargs="+", metavar="IMAGE|TEXT", help="image files and texts")
    data.add_model_flags(parser)
    args = parser.parse_args(argv)
    images = [value for value in args.inputs if data.names_image(value)]
    texts = [value for value in args.inputs if value not in images]
    if not images or not texts:
        raise ValueError(f"{len(images)} images and {len(texts)} texts: one of each is needed")
    model = load_model(args)
    sim = similarity(model.encode_image(images), model.encode_text(texts)).tolist()
    rows = [[image, *map("{:.3f}".format, values)] for image, values in zip(images, sim)]
    print(data.format_table(["", *texts], rows))


if __name__ == "__main__":
    main()
