"""Makes assets/tiny: a LLaVA-shaped LVLM of about two million parameters, pre-trained generatively on rendered scenes.

    python assets/make_tiny.py --out /tmp/tiny     # about half an hour on 2 CPU cores

After LLaVA's stages: (1) a warm-up of the vision tower and projector, standing in for CLIP's pre-training and LLaVA's feature alignment:
every patch names its object's colour, shape, size, texture, cell and background *through the projector, against the decoder's own word
embeddings*, so that image tokens start as visual words; (2) the paper's Eq. 2 on conversations about scenes and about captions, all weights
but the vision tower's; it starts on crowded scenes, whose five to nine look-ups a picture teach looking up within 400 steps.

Held out of stage 2: sizes, textures, and how objects lie to each other. No answer and no caption speaks of them, so that the long captions
of the adaptation have something to teach.

Not here: anything discriminative. The result has never seen a contrastive loss.
"""

import argparse
import copy
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch is imported: one process a core is twice as fast as one process with two threads
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

import data
from extras import scenes
from model import LVLM, parse_config, place, save_lvlm
from vladva import next_token_loss

PRETRAIN_SEED = 3000  # its scenes are nobody else's: train.py and eval.py use other seeds
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")

# How a family of answers is asked for: the wordings that the method uses come often, the others teach what "in one word" means.
VERBS = ("Summarize", "Describe", "Express", "Caption")
NOUNS = {
    "image": (
        "the provided image",
        "the image",
        "this image",
        "the picture",
        "this picture",
        "the scene",
        "what is in the image",
    ),
    "text": (
        "the provided text",
        "the text",
        "this text",
        "the caption",
        "this caption",
        "the sentence",
        "what is in the text",
    ),
}
MANNERS = {
    "one": (
        "in one word:",
        "in one word.",
        "in a single word:",
        "with one word.",
        "using only one word:",
    ),
    "few": (
        "in a few words:",
        "in a few words.",
        "in two or three words.",
        "with a few key words.",
    ),
    "brief": ("briefly.", "in one sentence.", "in a short sentence.", "in brief."),
    "detail": ("in detail.", "in full detail.", "with all details.", "at length."),
}
OWN = {  # wordings of their own, {noun} without its article's variants
    "one": (
        "Summarize the provided {noun} in one word:",
        "Name one thing in the {noun}.",
        "What is in the {noun}? Answer in one word.",
        "The {noun} in one word:",
        "Give one word about the {noun}.",
    ),
    "few": (
        "What is in the {noun}?",
        "Name two things in the {noun}.",
        "Give the main objects of the {noun}.",
    ),
    "brief": (
        "Describe the {noun}.",
        "Provide a brief description of the {noun}.",
        "Give a short description of the {noun}.",
        "Describe what is happening in the {noun}.",
        "Say it in other words.",
    ),
    "detail": (
        "Describe the {noun} in detail.",
        "Describe the {noun} in detail.",
        "Give a detailed description of the {noun}.",
        "Provide a long and detailed description of the {noun}.",
        "Tell me everything about the {noun}.",
    ),
    "list": (
        "List the objects of the {noun} and their places.",
        "Where are the objects of the {noun}?",
    ),
    "colour": ("List the colors of the {noun} and their places.",),
    "shape": ("List the shapes of the {noun} and their places.",),
}


def ask_for(family, modality, rng):
    """A prompt of a family ("one" word, "few" words, "brief", "detail", "list", ...) about an "image" or a "text"."""
    if family in MANNERS and rng.random() < 0.5:
        return f"{rng.choice(VERBS)} {rng.choice(NOUNS[modality])} {rng.choice(MANNERS[family])}"
    return rng.choice(OWN[family]).format(noun=modality)


# ------------------------------------------------------------------------------------------------------ tokenizer


def vocabulary_words():
    """Every word and mark that captions, questions and prompts use, without and with the blank before it."""
    rng = random.Random(0)
    texts = [
        ask_for(family, modality, rng) for family in OWN for modality in NOUNS for _ in range(200)
    ] + ["USER: ASSISTANT:\n"]
    for index in range(400):
        scene, rng = scenes.make_scene(PRETRAIN_SEED - 1, index), random.Random(index)
        texts += [
            str(scenes.short_caption(scene, rng)),
            scenes.long_caption(scene, rng),
            *scenes.question(scene, rng),
        ]
    pieces = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    words = {piece.strip(" ") for text in texts for piece, _ in pieces.pre_tokenize_str(text)} - {
        ""
    }
    return sorted(words)


WORD_PATTERN = r" ?[A-Za-z]+(?:-[A-Za-z]+)*| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+?"


def make_tokenizer():
    """Byte-level BPE with the scene words whole: any text encodes without loss, other words byte by byte."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    spelled = [
        spell.pre_tokenize_str(blank + word)[0][0]
        for word in vocabulary_words()
        for blank in ("", " ")
    ]
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()) + spelled:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"), spell]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def save_folder(lvlm, tokenizer, out):
    """The folder, file by file as llava-hf/llava-1.5-7b-hf has them."""
    save_lvlm(lvlm, out, torch.float16)
    tokenizer.save(f"{out}/tokenizer.json")
    side, patch = lvlm.config.vision.image_size, lvlm.config.vision.patch_size
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": data.CLIP_MEAN, "image_std": data.CLIP_STD,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": patch, "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": names
        | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024, "clean_up_tokenization_spaces": False},
        "special_tokens_map.json": names,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4},
    }  # fmt: skip
    for name, content in files.items():
        Path(out, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ initial weights


def tiny_config(vocab_size):
    """config.json of the tiny model."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4,
              "image_size": 96, "patch_size": 16, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
            "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4}  # fmt: skip
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": SPECIAL.index("<image>"),
            "pad_token_id": 4, "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "image_seq_length": 36, "tie_word_embeddings": True, "torch_dtype": "float16", "vision_config": vision, "text_config": text}  # fmt: skip


def sine_cosine(count, width):
    """Sine-cosine features of a square grid, (count, width), std about .55: with the usual .02 they drown beside the patches."""
    side = math.isqrt(count)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequencies = 2 * torch.exp(-torch.arange(width // 4) * math.log(20.0) / (width // 4))
    return 0.78 * torch.cat(
        [
            f(axis.flatten()[:, None] * frequencies)
            for axis in (y, x)
            for f in (torch.sin, torch.cos)
        ],
        dim=1,
    )


@torch.no_grad()
def initialise(lvlm):
    """Small normal weights, and "mimetic" attention in the decoder: W_q = W_k orthogonal, W_o = W_v^T, which starts it as a look-up."""
    for module in lvlm.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(std=fan_in**-0.5)
            if module.bias is not None:
                module.bias.zero_()
    width = lvlm.config.decoder.hidden_size
    lvlm.decoder.embed_tokens.weight.normal_(std=0.3)
    lvlm.vision.class_embedding.normal_(std=0.02)
    lvlm.vision.position_embedding.weight.normal_(std=0.02)
    lvlm.vision.position_embedding.weight[1:] = sine_cosine(
        lvlm.config.num_image_tokens, lvlm.config.vision.hidden_size
    )
    depth = 2 * len(lvlm.decoder.layers)
    for block in lvlm.decoder.layers:
        attention = block.self_attn
        attention.q_proj.weight.copy_(0.7 * torch.nn.init.orthogonal_(torch.empty(width, width)))
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        value = torch.nn.init.orthogonal_(torch.empty(width, width))
        attention.v_proj.weight.copy_(0.5 * value)
        attention.o_proj.weight.copy_(0.5 * value.T)
        block.mlp.down_proj.weight.mul_(depth**-0.5)
    for block in lvlm.vision.layers:
        block.self_attn["out_proj"].weight.mul_(0.3)
        block.mlp["fc2"].weight.mul_(0.3)


# ------------------------------------------------------------------------------------------------------ stage 1: visual words

FAMILIES = {
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "size": tuple(scenes.SIZES),
    "texture": scenes.TEXTURES,
    "place": scenes.POSITIONS,
    "background": tuple(scenes.BACKGROUNDS),
}


def patch_labels(scene, side):
    """{family: (side * side,) index of the right word, -100 where the patch's cell is empty}."""
    by_cell = {thing.cell: thing for thing in scene.things}
    labels = {family: [] for family in FAMILIES}
    for patch in range(side * side):
        cell = (patch // side) * scenes.GRID // side * scenes.GRID + (
            patch % side
        ) * scenes.GRID // side
        thing = by_cell.get(cell)
        for family, words in FAMILIES.items():
            word = (
                scenes.POSITIONS[cell]
                if family == "place"
                else scene.background
                if family == "background"
                else thing and getattr(thing, family)
            )
            labels[family].append(words.index(word) if word else -100)
    return {family: torch.tensor(values) for family, values in labels.items()}


def normalise(pictures):
    """uint8 (B, height, width, 3) -> (B, 3, height, width) with CLIP's mean and deviation."""
    mean, std = torch.tensor(data.CLIP_MEAN), torch.tensor(data.CLIP_STD)
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def warm_up(lvlm, tokenizer, pictures, labels, args):
    """Teach vision tower and projector to say, in every patch, the decoder's words for what is there."""
    words = {
        family: torch.tensor([tokenizer.token_to_id("Ġ" + word) for word in names])
        for family, names in FAMILIES.items()
    }
    parameters = [
        *lvlm.vision.parameters(),
        *lvlm.projector.parameters(),
        lvlm.decoder.embed_tokens.weight,
    ]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.warm_up_steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                1e-3
                * min(1, (step + 1) / 100)
                * max(0.02, math.cos(step / args.warm_up_steps * math.pi / 2))
            )
        rows = torch.randint(len(pictures), (64,), generator=generator)
        tokens = lvlm.image_features(normalise(pictures[rows]))  # (B, N, D)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        loss, right = 0, {}
        for family in FAMILIES:
            logits = tokens @ lvlm.decoder.embed_tokens.weight[words[family]].T  # (B, N, words)
            target = labels[family][rows]
            loss = loss + (0.25 if family == "background" else 1.0) * F.cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=-100
            )
            right[family] = (logits.argmax(-1) == target)[target != -100].float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            log(
                f"warm-up step {step + 1} loss {loss.item():.3f} patches right: "
                + " ".join(f"{family} {value:.3f}" for family, value in right.items())
            )


# ------------------------------------------------------------------------------------------------------ stage 2: conversations


def image_turns(scene, rng):
    """[(ask, answer), ...] about a picture."""
    if (
        len(scene.things) > 4
    ):  # a crowded scene is there for its look-ups: as many as a picture can hold
        name = rng.choice(("colour", "shape", "kind", "kind", "kind"))
        values = [getattr(thing, name) for thing in scene.things]
        things = [
            thing
            for thing in rng.sample(scene.things, len(scene.things))
            if values.count(getattr(thing, name)) == 1
        ]
        if name != "kind" and things:
            return [
                (
                    ask_for(name, "image", rng),
                    ", ".join(
                        f"{getattr(thing, name)} {scenes.POSITIONS[thing.cell]}" for thing in things
                    ),
                )
            ]
        shuffled = tuple((thing, ()) for thing in rng.sample(scene.things, len(scene.things)))
        return [
            (
                ask_for("list", "image", rng),
                str(scenes.Caption(rng.choice(scenes.OPENINGS), shuffled, None, True, None)),
            )
        ]
    kind = rng.choices(
        ("list", "detail", "brief", "few", "questions", "one", "second"), (16, 26, 18, 3, 24, 10, 3)
    )[0]
    if kind == "list":
        return [
            (
                ask_for("list", "image", rng),
                str(brief_caption(scene, rng, "position", len(scene.things))),
            )
        ]
    if kind == "detail":
        return [(ask_for("detail", "image", rng), full_caption(scene, rng))]
    if kind == "brief":
        return [(ask_for("brief", "image", rng), str(brief_caption(scene, rng)))]
    if kind == "few":
        return [(ask_for("few", "image", rng), scenes.few_words(scene, rng)), question(scene, rng)]
    if kind == "questions":
        return [question(scene, rng) for _ in range(4)]
    if kind == "one":
        return [
            (ask_for("one", "image", rng), scenes.one_word(scene, rng)),
            question(scene, rng),
            question(scene, rng),
        ]
    return [
        (ask_for("one", "image", rng), ""),
        ("Describe the image in detail.", full_caption(scene, rng)),
    ]


def brief_caption(scene, rng, style=None, mentions=None):
    """A short caption without what is held out."""
    return scenes.short_caption(
        scene, rng, style or rng.choice(("position", "list")), mentions, attributes=()
    )


def full_caption(scene, rng):
    """A long caption without what is held out."""
    return scenes.long_caption(scene, rng, attributes=(), related=False)


def question(scene, rng):
    """A question whose answer says nothing that is held out."""
    return scenes.question(scene, rng, attributes=())


def text_turns(scene, rng):
    """[(ask with its text, answer), ...] about a caption."""
    caption = brief_caption(scene, rng, rng.choices(("position", "list"), (2, 1))[0])
    told = scenes.Scene(tuple(thing for thing, _ in caption.mentions), scene.background)
    family = rng.choices(("one", "few", "brief", "list"), (30, 15, 30, 25))[0]
    ask = ask_for(
        family if family != "brief" else rng.choice(("brief", "brief", "detail")), "text", rng
    )
    answer = {
        "one": lambda: caption_word(caption, rng),
        "few": lambda: scenes.few_words(told, rng),
        "brief": lambda: str(scenes.paraphrase(caption, rng)),
        "list": lambda: ", ".join(" ".join(t.kind) for t in told.things),
    }[family]()
    return [(f"{ask} {caption}", answer)] + ([question(told, rng)] if caption.positions else [])


def caption_word(caption, rng):
    """One content word of the caption."""
    thing, _ = rng.choice(caption.mentions)
    words = [thing.colour, thing.colour, thing.shape, thing.shape]
    words += [scenes.POSITIONS[thing.cell]] * 2 if caption.positions else []
    words += [caption.background] if caption.background else []
    return rng.choice(words)


class Encoder:
    """Turns -> (ids, flat list of "predict the next token here" flags, slot of the first image token)."""

    def __init__(self, tokenizer, num_image_tokens):
        self.tokenizer, self.num_image_tokens = tokenizer, num_image_tokens
        self.bos, self.eos, self.image = (
            tokenizer.token_to_id(t) for t in ("<s>", "</s>", "<image>")
        )
        self.cache = {}

    def ids(self, text):
        if text not in self.cache:
            if len(self.cache) > 20000:
                self.cache.clear()
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def encode(self, turns, with_image, native):
        """native: LLaVA's order, "<image>\\n{ask} ASSISTANT:"; otherwise the paper's template, "{ask} <image>\\nASSISTANT:"."""
        ids, asked, image_slot = [self.bos], [False], 0
        picture = [self.image] * self.num_image_tokens
        for number, (ask, answer) in enumerate(turns):
            ids += self.ids(f"{' ' if number else ''}USER:")
            if with_image and number == 0 and native:
                ids += self.ids(" ")
                image_slot = len(ids)
                ids += picture + self.ids(f"\n{ask}")
            elif with_image and number == 0:
                ids += self.ids(f" {ask} ")
                image_slot = len(ids)
                ids += picture
            else:
                ids += self.ids(f" {ask}")
            ids += self.ids(" ASSISTANT:" if native else "\nASSISTANT:")
            said = self.ids(f" {answer}") + [self.eos] if answer else []
            asked += [False] * (len(ids) - len(asked) - 1) + [True] * len(said) + [False]
            ids += said
        return ids, asked, image_slot


def collate(rows, pad):
    """Right-padded ids (B, T), flat indices of the predicting tokens, their targets, image slots (B,)."""
    width = max(len(ids) for ids, _, _ in rows)
    table = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _, _ in rows])
    index = [
        b * width + t
        for b, (ids, asked, _) in enumerate(rows)
        for t, flag in enumerate(asked)
        if flag and t + 1 < len(ids)
    ]
    targets = [rows[i // width][0][i % width + 1] for i in index]
    return (
        table,
        torch.tensor(index),
        torch.tensor(targets),
        torch.tensor([slot for _, _, slot in rows]),
    )


def sequence_loss(lvlm, batch, features):
    """Eq. 2 on a batch of conversations, about pictures when their vision features come with it."""
    ids, index, targets, slots = batch
    embeds = lvlm.embed(ids)
    if features is not None:
        embeds = place(embeds, lvlm.projector(features), slots)
    hidden = lvlm.decoder(embeds).flatten(0, 1)[index]  # (M, D)
    return next_token_loss(hidden, targets, lvlm.head.weight)


@torch.no_grad()
def probe(lvlm, encoder, shown, features):
    """Share right, one question a scene: "where is the ...?", and the first place of a shuffled list of objects or colours."""
    result = {}
    for kind in ("where", "listed", "colour"):
        rows, wanted = [], []
        for i, scene in enumerate(shown):
            rng = random.Random(i)
            a = rng.choice(scene.things)
            turn = {
                "where": (f"where is the {' '.join(a.kind)}?", ""),
                "listed": (OWN["list"][0].format(noun="image"), a.phrase()),
                "colour": (OWN["colour"][0].format(noun="image"), a.colour),
            }[kind]
            rows.append(encoder.encode([turn], True, i % 2 == 0))
            if turn[1]:
                rows[-1][0].pop()  # the end of sequence: the place comes here
            wanted.append(encoder.ids(" " + scenes.POSITIONS[a.cell])[0])
        ids, _, _, slots = collate(rows, 4)
        hidden = lvlm.decoder(place(lvlm.embed(ids), lvlm.projector(features), slots))
        last = torch.tensor([len(row[0]) - 1 for row in rows])
        guess = lvlm.head(hidden[torch.arange(len(rows)), last]).argmax(-1).tolist()
        result[kind] = sum(g == w for g, w in zip(guess, wanted)) / len(rows)
    return result


def draw_batches(encoder, scenes, crowd, share, args, rng):
    """Eight batches of conversations, rows of similar length together: [([(conversation, picture row), ...], [conversation, ...]), ...]."""
    rows = [
        rng.randrange(crowd, len(scenes)) if rng.random() < share else rng.randrange(crowd)
        for _ in range(8 * args.batch)
    ]
    told = [
        (encoder.encode(image_turns(scenes[row], rng), True, rng.random() < 0.5), row)
        for row in rows
    ]
    said = [
        encoder.encode(text_turns(scenes[rng.randrange(crowd)], rng), False, rng.random() < 0.2)
        for _ in range(4 * args.batch)
    ]
    told.sort(key=lambda pair: len(pair[0][0]))
    said.sort(key=lambda row: len(row[0]))
    half = args.batch // 2
    batches = [
        (told[i * args.batch : (i + 1) * args.batch], said[i * half : (i + 1) * half])
        for i in range(8)
    ]
    return rng.sample(batches, 8)


def average_gradients(parameters):
    """Mean of the gradients over the processes, in place."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p) / torch.distributed.get_world_size())


def generative_stage(rank, lvlm, tokenizer, features, scenes, crowd, args):
    """Eq. 2 on conversations, one process a core, each on its own rows; the gradients are averaged every step."""
    lvlm = copy.deepcopy(
        lvlm
    )  # what spawn passes on lies in shared memory, where the processes would update each other's weights
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{args.meeting_place}", rank=rank, world_size=args.workers
    )
    encoder, rng, waiting = (
        Encoder(tokenizer, lvlm.config.num_image_tokens),
        random.Random(f"{args.seed} {rank}"),
        [],
    )
    lvlm.requires_grad_(True).vision.requires_grad_(False)
    parameters = [p for p in lvlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98))
    start, sums, looks_up = time.time(), [0.0, 0.0], torch.tensor(0.0)
    for step in range(args.steps):
        factor = min(1, (step + 1) / 300) * max(
            0.01, 0.5 * (1 + math.cos(step / args.steps * math.pi))
        )
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor
        if not waiting:
            waiting = draw_batches(encoder, scenes, crowd, 0.1 if looks_up else 0.9, args, rng)
        told, said = waiting.pop()
        image_loss = sequence_loss(
            lvlm,
            collate([row for row, _ in told], 4),
            features[torch.tensor([row for _, row in told])].float(),
        )
        text_loss = sequence_loss(lvlm, collate(said, 4), None)
        optimizer.zero_grad()
        (image_loss + 0.5 * text_loss).backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        sums = [sums[0] + image_loss.item(), sums[1] + text_loss.item()]
        if rank == 0 and (step + 1) % 100 == 0:
            log(
                f"step {step + 1} {(time.time() - start) / (step + 1):.3f} s/step image {sums[0] / 100:.3f} text {sums[1] / 100:.3f}"
            )
            sums = [0.0, 0.0]
        if rank == 0 and (step + 1) % 200 == 0:
            for name, first in (("usual", 0), ("crowded", crowd)):
                answers = probe(
                    lvlm,
                    encoder,
                    scenes[first : first + 200],
                    features[first : first + 200].float(),
                )
                log(
                    f"    {name} scenes: "
                    + " ".join(f"{kind} {share:.3f}" for kind, share in answers.items())
                )
            looks_up += answers["listed"] >= args.look_up_until
        torch.distributed.broadcast(looks_up, 0)
        if rank == 0 and ((step + 1) % 400 == 0 or step + 1 == args.steps):
            save_folder(lvlm, tokenizer, args.out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def log(line):
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="assets/tiny")
    parser.add_argument(
        "--look-up-until",
        type=float,
        default=0.85,
        help="crowded scenes mostly, until so many of their look-ups are right",
    )
    parser.add_argument(
        "--warm-up-steps", type=int, default=1000, help="of the warm-up of the vision tower"
    )
    parser.add_argument("--scenes", type=int, default=20000)
    parser.add_argument("--steps", type=int, default=3600, help="of the conversations")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak, of the conversations")
    parser.add_argument(
        "--batch", type=int, default=16, help="pictures a process; half as many texts"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one a core")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.meeting_place = tempfile.mktemp()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    lvlm = LVLM(parse_config(tiny_config(tokenizer.get_vocab_size())))
    initialise(lvlm)
    log(
        f"vocabulary {tokenizer.get_vocab_size()}, {sum(p.numel() for p in lvlm.parameters()) / 1e6:.2f} M parameters"
    )
    every = [scenes.make_scene(PRETRAIN_SEED, i) for i in range(args.scenes)]
    every += [
        scenes.make_scene(PRETRAIN_SEED + 1, i, counts=(5, 6, 7, 8, 9))
        for i in range(args.scenes // 2)
    ]
    pictures = torch.stack(
        [
            torch.frombuffer(bytearray(scenes.render(s).tobytes()), dtype=torch.uint8).view(
                96, 96, 3
            )
            for s in every
        ]
    )
    labels = [patch_labels(s, 6) for s in every]
    labels = {family: torch.stack([l[family] for l in labels]) for family in FAMILIES}
    log("rendered")
    torch.set_num_threads(2)
    warm_up(lvlm, tokenizer, pictures, labels, args)
    with torch.no_grad():
        features = torch.cat(
            [lvlm.vision(normalise(chunk)).half() for chunk in pictures.split(512)]
        )
    log(f"features {tuple(features.shape)}")
    del pictures, labels
    torch.multiprocessing.spawn(
        generative_stage,
        (lvlm, tokenizer, features, every, args.scenes, args),
        nprocs=args.workers,
    )


if __name__ == "__main__":
    main()
