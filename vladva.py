"""VladVA (arXiv 2412.04378): a generative LVLM becomes an embedding model. The method itself.

    from vladva import VladVA
    model = VladVA.from_pretrained("tiny", adapter="runs/tiny")
    model.encode_image(["a.jpg"]) @ model.encode_text(["a red circle"]).T

    python vladva.py a.jpg b.jpg "a red circle" "a blue square" --adapter runs/tiny

In the paper's order: summary token, embeddings, similarity (Sec. 3.1); Eq. 1, Eq. 2, and both in
one forward (Sec. 3.2); soft prompts that replace the hand prompt's tokens, LoRA (Sec. 3.3).

Not here: the network (model.py), files and images (data.py), the training loop (train.py),
benchmarks (eval.py).
"""

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import flag
from lora import attach_lora, lora_disabled
from model import DTYPES, LVLM, check_shapes, from_json, generate, load_lvlm, open_safetensors

# ------------------------------------------------------------------------ Sec. 3.1: embeddings


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is: losses and similarities are not taken in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summary_embedding(hidden_states: Tensor) -> Tensor:
    """f = Phi_l(...)[eos], L2-normalised (paper Sec. 3.1).

    hidden_states: (B, D), after the final norm, each at its sequence's summary token: the colon of
    `ASSISTANT:`, behind the image or the caption, before anything is generated. Returns (B, D).
    """
    return F.normalize(at_least_float32(hidden_states), dim=-1)


def similarity(image_emb: Tensor, text_emb: Tensor) -> Tensor:
    """s = cos_sim(f_v, f_t) (paper Sec. 3.1): (A, D), (B, D) -> (A, B), row i: image i."""
    return image_emb @ text_emb.T


# ---------------------------------------------------------------------------- Sec. 3.2: losses


def contrastive_loss(image_emb: Tensor, text_emb: Tensor, temperature) -> Tensor:
    """Symmetric image-text cross-entropy (paper, Eq. 1, divided by B; the temperature is ours).

    image_emb, text_emb: (B, D), L2-normalised, row i of each is a pair. Returns a 0-d loss in nats;
    2 log B when all rows coincide. Negatives are this batch only, so splitting B changes the loss.
    Raises ValueError on unequal shapes or B < 2.
    """
    if image_emb.shape != text_emb.shape or len(image_emb) < 2:
        shapes = f"{tuple(image_emb.shape)} and {tuple(text_emb.shape)}"
        raise ValueError(f"contrastive loss wants two equal (B, D) with B >= 2, got {shapes}")
    sim = similarity(image_emb, text_emb) / temperature  # (B, B)
    pairs = torch.arange(len(sim), device=sim.device)
    return F.cross_entropy(sim, pairs) + F.cross_entropy(sim.T, pairs)


def next_token_loss(
    hidden_states: Tensor, targets: Tensor, head_weight: Tensor, total: int | None = None
) -> Tensor:
    """-mean log p(u_i | x_v, x_p, u_<i) over caption tokens (paper, Eq. 2; the mean is ours).

    hidden_states: (M, D), those that predict; targets: (M,) token ids; head_weight: (V, D); total:
    the tokens of the whole batch, when this is a part of it. Only caption tokens come here, so no
    logits exist for image or prompt tokens. Returns a 0-d loss in nats per token.
    """
    total = len(targets) if total is None else total
    if total == 0:
        raise ValueError("next-token loss over no token: the batch holds no long caption")
    logits = F.linear(hidden_states, head_weight.to(hidden_states.dtype))  # (M, V)
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum") / total


@dataclass(frozen=True)
class Embeddings:
    """Summary embeddings of a batch, L2-normalised: what a loss of LOSSES takes."""

    image: Tensor  # (S, D), of the rows with an image and a short caption
    text: Tensor  # (S, D), row i belongs to row i of `image`
    texts: Tensor  # (E, D), of the rows' further texts, one after another


def image_text_loss(model: "VladVA", emb: Embeddings) -> Tensor:
    """Eq. 1 on all pairs of the batch; 0 where there are fewer than two."""
    if len(emb.image) < 2:
        return emb.image.new_zeros(())
    return contrastive_loss(emb.image, emb.text, model.temperature)


def learned_temperature(config: "VladVAConfig") -> dict[str, float]:
    """{"log_temperature": start value}, if the temperature is to be learned."""
    return {"log_temperature": math.log(config.temperature)} if config.learn_temperature else {}


@dataclass(frozen=True)
class EmbeddingLoss:
    """An entry of LOSSES: all that the project needs to know of a loss on embeddings.

    function: (VladVA, Embeddings of the whole batch) -> 0-d loss. inputs: the parts of the rows it
    takes, "pairs" (image and short caption) or "texts" (further texts). parameters: VladVAConfig ->
    {name: start value} of what it trains itself: `model.loss_parameters`, which the optimizer, the
    saved adapter and the sum over processes include.
    """

    function: Callable
    inputs: tuple[str, ...] = ("pairs",)
    parameters: Callable = lambda config: {}


LOSSES = {"vladva": EmbeddingLoss(image_text_loss, parameters=learned_temperature)}


@dataclass(frozen=True)
class VladVAConfig:
    """What the method depends on; stored in every adapter file. A field with a help text is a flag."""

    loss: str = flag("vladva", "an entry of vladva.LOSSES")
    image_prompt: str = "Summarize the provided image in one word:"  # paper Sec. 5.1
    text_prompt: str = "Summarize the provided text in one word:"  # paper Sec. 5.1
    image_template: str = "USER: {prompt} <image>\nASSISTANT:"  # paper Sec. 3.2.3
    text_template: str = "USER: {prompt} {caption}\nASSISTANT:"  # paper Sec. 3.2.3
    detail_prompt: str = "Describe the image in detail."  # paper Sec. 3.2.3
    soft_prompts: bool = flag(True, "train soft prompts for the hand prompts")  # paper Sec. 3.3
    lora: bool = flag(True, "train LoRA on the decoder's linear layers")  # paper Sec. 3.3
    lora_rank: int = flag(16, "rank of LoRA", low=1)  # second-hand notes on the paper
    lora_alpha: float = 16.0  # second-hand notes on the paper
    # ours: Eq. 1 prints no temperature; E5-V uses 0.05. A learned one is clamped to 0.01 .. 1
    temperature: float = flag(0.05, "tau of Eq. 1, 0.01 to 1", low=0.01, high=1.0)
    learn_temperature: bool = flag(False, "train tau as well")
    next_token_weight: float = flag(1.0, "weight of Eq. 2", low=0)  # the paper reads as a plain sum
    image_mode: str = flag("crop", "crop images, or pad them to a square")  # "pad": original LLaVA
    min_pixels: int | None = None  # of an image, Qwen2-VL only; None: as the model's folder says
    max_pixels: int | None = None

    def __post_init__(self):
        data.check_bounds(self)
        fields = {"image_template": "{prompt} <image>", "text_template": "{prompt} {caption}"}
        for name, parts in fields.items():
            template = getattr(self, name)
            if any(template.count(part) != 1 for part in parts.split()):
                raise ValueError(f"{name} is {template!r}: wanted {parts}, once each")
        if not (self.lora or self.soft_prompts):
            raise ValueError("neither LoRA nor soft prompts: there would be nothing to train")


# ------------------------------------------------------------------- Sec. 3.2.3: the templates

DETAIL_TEMPLATE = " USER: {prompt}\nASSISTANT: {caption}"  # follows the summary token in training
GENERATE_TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"  # LLaVA-1.5's own, for answers in words


def scatter_embeddings(inputs_embeds: Tensor, vectors: Tensor, rows: Tensor, columns: Tensor):
    """A copy of inputs_embeds (B, T, D) that holds `vectors` at [rows, columns], broadcast."""
    return inputs_embeds.index_put((rows, columns), vectors.to(inputs_embeds.dtype))


# ----------------------------------------------------------------------------------- the model


class VladVA(nn.Module):
    """An LVLM with LoRA and soft prompts that embeds images and texts.

    `adapter_disabled()` gives the original LVLM back, bit for bit.
    """

    def __init__(self, lvlm: LVLM, tokenizer, image_processor, config: VladVAConfig, name: str):
        super().__init__()
        self.lvlm = lvlm
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.name = name
        self.soft_prompts = nn.ParameterDict()
        self.loss_parameters = nn.ParameterDict()
        self.adapted = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        adapter: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        config: VladVAConfig | None = None,
    ) -> "VladVA":
        """A model by name, hub id or folder, with the adapter of a training run if one is named.

        dtype: as load_lvlm's. config: of an untouched model; an adapter brings its own. ValueError
        when folder, weights, tokenizer or adapter do not fit together.
        """
        folder = data.model_folder(name)
        if adapter is not None:
            tensors, config = read_adapter(adapter)
        config = config or VladVAConfig()
        lvlm = load_lvlm(folder, device, dtype)
        tokenizer = data.Tokenizer(folder, lvlm.config)
        image_processor_class = lvlm.config.image_processor or data.ImageProcessor
        image_processor = image_processor_class(folder, lvlm.config, config)
        model = cls(lvlm, tokenizer, image_processor, config, str(name))
        if adapter is not None:
            model.load_adapter_state(tensors, adapter)
        return model

    # --------------------------------------------------------------- Sec. 3.3: what is trained

    def attach(self, seed: int = 0) -> None:
        """Add LoRA, soft prompts that start as the hand prompts' embeddings, the loss's parameters.

        A fresh adapter changes no embedding: lora_b is zero, and each soft prompt holds the
        embeddings of the tokens it replaces.
        """
        if self.config.lora:
            attach_lora(self.lvlm.decoder, self.config.lora_rank, self.config.lora_alpha, seed)
        if self.config.soft_prompts:
            for modality in ("image", "text"):
                ids = torch.tensor(self.hand_prompt_ids(modality), device=self.lvlm.device)
                vectors = self.lvlm.embed(ids).detach().clone().float()  # (P, D)
                self.soft_prompts[modality] = nn.Parameter(vectors)
        if self.config.loss in LOSSES:  # who only encodes needs no loss
            for name, value in self.loss.parameters(self.config).items():
                value = torch.tensor(float(value), device=self.lvlm.device)
                self.loss_parameters[name] = nn.Parameter(value)
        self.adapted = True

    @property
    def loss(self) -> EmbeddingLoss:
        """The entry of LOSSES that the config names."""
        if self.config.loss not in LOSSES:
            raise ValueError(f"loss is {self.config.loss!r}, known are {', '.join(LOSSES)}")
        return LOSSES[self.config.loss]

    def hand_prompt_ids(self, modality: str) -> list[int]:
        """Token ids that the soft prompt of a modality replaces."""
        sequence = self.image_sequence() if modality == "image" else self.text_sequence("a")
        return sequence.input_ids[sequence.prompt_start :][: sequence.prompt_length]

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """{group: {name: parameter}} of all that is trained; a parameter of no group is an error.

        The optimizer, the saved adapter and the sum over processes take what stands here.
        """
        groups = {"lora": {}, "soft_prompts": {}, "loss_parameters": {}}
        for name, p in self.named_parameters():
            if p.requires_grad:
                group = "lora" if name.endswith(("lora_a", "lora_b")) else name.split(".")[0]
                if group not in groups:
                    raise ValueError(f"{name} is trained, but belongs to none of {list(groups)}")
                groups[group][name] = p
        return groups

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of all groups."""
        return {name: p for group in self.parameter_groups().values() for name, p in group.items()}

    @property
    def temperature(self):
        """tau of Eq. 1: a number, or a 0-d tensor where it is learned."""
        if "log_temperature" in self.loss_parameters:
            return self.loss_parameters["log_temperature"].exp().clamp(0.01, 1.0)
        return self.config.temperature

    @contextlib.contextmanager
    def adapter_disabled(self):
        """Inside the context this is the untouched LVLM with its hand prompts, bit for bit."""
        before = self.adapted
        self.adapted = False
        try:
            with lora_disabled(self.lvlm.decoder):
                yield
        finally:
            self.adapted = before

    # ------------------------------------------------------------------ templates and batches

    def sequence(self, template, prompt, caption="", long_caption=None, grid=None):
        """TokenSequence of a template; a long caption follows its summary token, behind its question.

        grid: (rows, columns) of image tokens; None: those of a square image.
        """
        lvlm_config = self.lvlm.config
        grid = grid or lvlm_config.image_grid()
        # the text: one image token for each of the image's, then prompt and captions filled in
        image_tokens = lvlm_config.image_token * math.prod(grid)
        template = lvlm_config.apply_chat_template(template)
        template = template.replace(lvlm_config.image_token, image_tokens)
        prefix, prompt_char = data.fill_template(template, prompt, caption)
        text = prefix
        if long_caption is not None:
            template = lvlm_config.apply_chat_template(DETAIL_TEMPLATE)
            text += data.fill_template(template, self.config.detail_prompt, long_caption)[0]
        # its tokens, and where the parts are among them
        encoding = self.tokenizer.encode(text)
        input_ids = list(encoding.ids)
        spans = data.find_spans(encoding.offsets, prefix, prompt, prompt_char)
        caption_start = None
        if long_caption is not None:
            question = text[: -len(long_caption)].rstrip(" ")
            caption_start = sum(end <= len(question) for _, end in encoding.offsets)
            input_ids.append(lvlm_config.eos_token_id)
        limit = lvlm_config.decoder.max_position_embeddings
        if len(input_ids) > limit:
            raise ValueError(
                f"{len(input_ids)} tokens exceed {limit}: {(caption or text)[:60]!r}..."
            )
        position_ids = None
        if lvlm_config.image_token in prefix:
            position_ids = lvlm_config.position_ids(input_ids, grid)
        return data.TokenSequence(input_ids, *spans, caption_start, position_ids)

    def image_sequence(self, long_caption: str | None = None, grid=None) -> data.TokenSequence:
        """Template for the image modality, with what Eq. 2 is computed on if there is a caption."""
        if long_caption is not None:
            long_caption = self.tokenizer.validate_text(long_caption)
        template, prompt = self.config.image_template, self.config.image_prompt
        return self.sequence(template, prompt, long_caption=long_caption, grid=grid)

    def text_sequence(self, caption: str) -> data.TokenSequence:
        """Template for the text modality."""
        caption = self.tokenizer.validate_text(caption)
        return self.sequence(self.config.text_template, self.config.text_prompt, caption)

    def image_batch(self, images: list, long_captions: list | None = None):
        """RGB images, each with its long caption or None -> (pixels, Batch)."""
        pixels = [self.image_processor(image) for image in images]
        grids = [self.lvlm.config.image_grid(p) for p in pixels]
        captions = long_captions or [None] * len(images)
        sequences = [self.image_sequence(*pair) for pair in zip(captions, grids)]
        return self.lvlm.config.stack_images(pixels), self.collate(sequences)

    def text_batch(self, texts: list[str]) -> data.Batch:
        """Strings -> Batch."""
        return self.collate([self.text_sequence(text) for text in texts])

    def collate(self, sequences: list[data.TokenSequence]) -> data.Batch:
        image_token_id = self.lvlm.config.image_token_id
        return data.collate(sequences, self.tokenizer.pad_token_id, image_token_id)

    def training_batch(self, rows: list[dict]) -> data.TrainingBatch:
        """Rows -> TrainingBatch on the host, with what the losses take of them.

        A row is {"image": RGB image or None, "short": caption or None, "long": caption or None} and
        possibly "texts": further texts, for losses that take them.
        """
        inputs = self.loss.inputs
        images, long_captions, short_captions, image_of_text, texts = [], [], [], [], []
        for row in rows:
            if "texts" in inputs:
                texts += row.get("texts", ())
            if row["image"] is None:
                continue
            if row["short"] and "pairs" in inputs:
                short_captions.append(row["short"])
                image_of_text.append(len(images))
            images.append(row["image"])
            long_captions.append(row["long"] if self.config.next_token_weight else None)
        pixels, image_batch = self.image_batch(images, long_captions) if images else (None, None)
        return data.TrainingBatch(
            pixels=pixels,
            images=image_batch,
            texts=self.text_batch(short_captions) if short_captions else None,
            image_of_text=torch.tensor(image_of_text, dtype=torch.long),
            further_texts=self.text_batch(texts) if texts else None,
        )

    # --------------------------------------------------------------------------------- forward

    def inputs_embeds(self, batch: data.Batch, modality: str, pixels=None) -> Tensor:
        """Decoder inputs (B, T, D): tokens, with soft prompts and image tokens in their places."""
        inputs_embeds = self.lvlm.embed(batch.input_ids)
        device = inputs_embeds.device
        if self.adapted and modality in self.soft_prompts:
            soft_prompt = self.soft_prompts[modality]  # (P, D)
            rows = torch.arange(len(inputs_embeds), device=device)[:, None]
            columns = batch.prompt_start[:, None] + torch.arange(len(soft_prompt), device=device)
            inputs_embeds = scatter_embeddings(inputs_embeds, soft_prompt, rows, columns)
        if pixels is not None:
            with torch.no_grad():  # vision tower and projector are frozen
                features = self.lvlm.image_features(pixels).flatten(0, -2)  # (B N, D)
            inputs_embeds = scatter_embeddings(inputs_embeds, features, *batch.image_token_index)
        return inputs_embeds

    def hidden_states(self, batch: data.Batch, modality: str, pixels=None) -> tuple[Tensor, Tensor]:
        """States of the summary tokens (B, D), and those that predict a caption token (M, D).

        The long caption follows the summary token, which causal attention keeps from seeing it: one
        forward serves Eq. 1 and Eq. 2 (paper Sec. 3.2.3).
        """
        inputs_embeds = self.inputs_embeds(batch, modality, pixels)  # (B, T, D)
        batch_size, width = batch.input_ids.shape
        first_of_row = torch.arange(batch_size, device=inputs_embeds.device) * width
        state_index = torch.cat([first_of_row + batch.summary_index, batch.caption_index])
        states = self.lvlm.decoder(inputs_embeds, batch.position_ids, state_index=state_index)
        return states[:batch_size], states[batch_size:]

    def embed_batch(self, batch: data.TrainingBatch) -> tuple[Embeddings, Tensor]:
        """Embeddings of a TrainingBatch, and the states (M, D) that predict its caption tokens."""
        nothing = torch.zeros(0, self.lvlm.config.decoder.hidden_size, device=self.lvlm.device)
        image_emb = text_emb = texts_emb = caption_states = nothing
        if batch.images:
            summary, caption_states = self.hidden_states(batch.images, "image", batch.pixels)
            image_emb = summary_embedding(summary)[batch.image_of_text]
        if batch.texts:
            text_emb = summary_embedding(self.hidden_states(batch.texts, "text")[0])
        if batch.further_texts:
            texts_emb = summary_embedding(self.hidden_states(batch.further_texts, "text")[0])
        return Embeddings(image_emb, text_emb, texts_emb), caption_states

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
    def encode_image(self, images, batch_size: int = 64) -> Tensor:
        """Images -> f_v, (B, D) float32, L2-normalised, on the model's device.

        images: a sequence of PIL images or paths; those of a batch are opened when it is its turn.
        """
        device = self.lvlm.device
        emb = torch.empty(len(images), self.lvlm.config.decoder.hidden_size, device=device)
        with ThreadPoolExecutor() as pool:
            for part in data.batches(range(len(images)), batch_size, "encoding images"):
                opened = list(pool.map(lambda i: data.open_image(images[i]), part))
                pixels, batch = self.image_batch(opened)
                summary, _ = self.hidden_states(batch.to(device), "image", pixels.to(device))
                emb[part] = summary_embedding(summary).to(emb.dtype)
        return emb

    @torch.no_grad()
    def encode_text(self, texts: list[str], batch_size: int = 128) -> Tensor:
        """Strings -> f_t, (B, D) float32, L2-normalised, on the model's device, in their order."""
        if isinstance(texts, str):
            raise ValueError("encode_text wants a list of strings, got one: put it in a list")
        device = self.lvlm.device
        emb = torch.empty(len(texts), self.lvlm.config.decoder.hidden_size, device=device)
        sequences = [self.text_sequence(text) for text in texts]
        # texts of similar length share a batch: little padding
        by_length = sorted(range(len(texts)), key=lambda i: len(sequences[i].input_ids))
        for part in data.batches(by_length, batch_size, "encoding texts"):
            batch = self.collate([sequences[i] for i in part]).to(device)
            summary, _ = self.hidden_states(batch, "text")
            emb[part] = summary_embedding(summary).to(emb.dtype)
        return emb

    @torch.no_grad()
    def generate_batch(self, images, prompts: list[str], max_new_tokens: int = 128) -> list[str]:
        """Greedy answers to one prompt per image, in the model's own template."""
        pixels = [self.image_processor(data.open_image(image)) for image in images]
        sequences = []
        for pixel, prompt in zip(pixels, prompts):
            grid = self.lvlm.config.image_grid(pixel)
            prompt = self.tokenizer.validate_text(prompt)
            sequences.append(self.sequence(GENERATE_TEMPLATE, prompt, grid=grid))
        batch = self.collate(sequences).to(self.lvlm.device)
        pixels = self.lvlm.config.stack_images(pixels).to(self.lvlm.device)
        embeds = self.inputs_embeds(batch, "generate", pixels)
        lengths = batch.summary_index + 1
        answers = generate(self.lvlm, embeds, lengths, max_new_tokens, batch.position_ids)
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def generate(self, image, prompt: str, max_new_tokens: int = 128) -> str:
        """The greedy answer to a prompt about an image (PIL or path), adapters as they are."""
        return self.generate_batch([image], [prompt], max_new_tokens)[0]

    # ---------------------------------------------------------------------------------- saving

    def save_adapter(self, folder: str | Path) -> None:
        """Write folder/adapter.safetensors: all that is trained, in float32, and the config."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, p in self.trained_parameters().items():
            tensors[name] = p.detach().to("cpu", torch.float32).contiguous()
        # one key: the order of several would change from process to process
        about = json.dumps({"base": self.name, "config": dataclasses.asdict(self.config)})
        data.write_tensors(Path(folder) / "adapter.safetensors", tensors, {"adapter": about})

    def load_adapter_state(self, tensors: dict[str, Tensor], source: str | Path) -> None:
        """Copy an adapter's tensors into this model, attached first if need be; strict on names."""
        if not self.adapted:
            self.attach()
        parameters = self.trained_parameters()
        if self.config.loss not in LOSSES:
            tensors = {name: t for name, t in tensors.items() if name in parameters}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        wanted = {name: p.shape for name, p in parameters.items()}
        check_shapes(shapes, wanted, f"{source} does not fit {self.name}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(tensor)


def read_adapter(folder: str | Path) -> tuple[dict[str, Tensor], VladVAConfig]:
    """Tensors and config of folder/adapter.safetensors; ValueError when there is no such thing."""
    path = Path(folder) / "adapter.safetensors"
    if not path.exists():
        raise ValueError(f"{path} not found: --adapter wants the folder of a training run")
    with open_safetensors(path) as file:
        about = (file.metadata() or {}).get("adapter")
        if about is None:
            raise ValueError(f"{path} carries no config: it was not written by this project")
        config = from_json(VladVAConfig, json.loads(about)["config"], str(path))
        return {name: file.get_tensor(name) for name in file.keys()}, config


# -------------------------------------------------------------------------------- command line


def load_model(args) -> VladVA:
    """The model that the flags of data.add_model_flags ask for."""
    device = data.init_distributed(data.pick_device(args.device))
    return VladVA.from_pretrained(args.model, args.adapter, device, DTYPES.get(args.dtype))


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="vladva.py", description="Similarity of images and texts."
    )
    parser.add_argument("inputs", nargs="+", metavar="IMAGE|TEXT", help="image files and texts")
    data.add_model_flags(parser)
    args = parser.parse_args(argv)
    images = [value for value in args.inputs if data.names_image(value)]
    texts = [value for value in args.inputs if not data.names_image(value)]
    if not images or not texts:
        raise ValueError(f"{len(images)} images and {len(texts)} texts: one of each is needed")
    model = load_model(args)
    sim = similarity(model.encode_image(images), model.encode_text(texts)).tolist()
    rows = [[image, *map("{:.3f}".format, values)] for image, values in zip(images, sim)]
    print(data.format_table(["", *texts], rows))


if __name__ == "__main__":
    main()
