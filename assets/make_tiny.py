"""Makes assets/tiny: a LLaVA-shaped LVLM of two million parameters, pre-trained on rendered scenes.

    python assets/make_tiny.py --out /tmp/tiny  # about half an hour on 2 CPU cores

After LLaVA's stages: (1) a warm-up of the vision tower and projector, standing in for CLIP's
pre-training and LLaVA's feature alignment: every patch names its object's colour, shape, size,
texture, cell and background through the projector, against the decoder's own word embeddings, so
that image tokens start as visual words; (2) the paper's Eq. 2 on conversations about scenes and
about captions, all weights but the vision tower's; it starts on crowded scenes, whose five to nine
look-ups an image teach looking up within 400 steps.

Held out of stage 2: sizes, textures, and how objects lie to each other. No answer and no caption
speaks of them, so that the long captions of the adaptation have something to teach.

    python assets/make_tiny.py --teach-sizes --freeze-projector --steps 2400 --out /tmp/looks

makes one whose adapted captions look at textures, which no conversation about an image names
(docs/results.md); there answers about images say sizes, those about texts everything.

Not here: anything discriminative. The result has never seen a contrastive loss.
"""

import argparse
import copy
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

# before torch is imported: one process a core is twice as fast as one process with two threads
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

import data
from data import write_json
from extras import scenes
from extras.export import save_lvlm
from model import LVLM, parse_config
from vladva import next_token_loss

PRETRAIN_SEED = 3000  # its scenes are nobody else's: train.py and eval.py use other seeds
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")

# How a family of answers is asked for: the wordings that the method uses come often, the others
# teach what "in one word" means.
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
    """A prompt of a family ("one" word, "few" words, "brief", ...) about an "image" or a "text"."""
    if family in MANNERS and rng.random() < 0.5:
        return f"{rng.choice(VERBS)} {rng.choice(NOUNS[modality])} {rng.choice(MANNERS[family])}"
    return rng.choice(OWN[family]).format(noun=modality)


# --------------------------------------------------------------------------------------- tokenizer


def vocabulary_words(taught):
    """Every word and mark of captions, questions and prompts."""
    rng = random.Random(0)
    texts = [f"what {name} is the" for name in taught] + [EACH_PLACE] * len(taught)
    for family in OWN:
        for modality in NOUNS:
            texts += [ask_for(family, modality, rng) for _ in range(200)]
    texts.append("USER: ASSISTANT:\n")
    for index in range(400):
        scene = scenes.make_scene(PRETRAIN_SEED - 1, index)
        rng = random.Random(index)
        texts += [str(scenes.short_caption(scene, rng)), scenes.long_caption(scene, rng)]
        texts += question(scene, rng, scenes.ATTRIBUTES)
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    words = set()
    for text in texts:
        words |= {piece.strip(" ") for piece, _ in split.pre_tokenize_str(text)}
    return sorted(words - {""})


WORD_PATTERN = r" ?[A-Za-z]+(?:-[A-Za-z]+)*| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+?"


def make_tokenizer(taught=()):
    """Byte-level BPE with the scene words whole; other words are spelled byte by byte."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    for word in vocabulary_words(taught):
        for space in ("", " "):
            tokens.append(spell.pre_tokenize_str(space + word)[0][0])
    for token in tokens:
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
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
            "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": side, "width": side},
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": data.CLIP_MEAN, "image_std": data.CLIP_STD,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": patch,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
        },
        "tokenizer_config.json": names
        | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024,
           "clean_up_tokenization_spaces": False},
        "special_tokens_map.json": names,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4},
    }  # fmt: skip
    for name, content in files.items():
        write_json(Path(out, name), content)


# --------------------------------------------------------------------------------- initial weights


def tiny_config(vocab_size):
    """config.json of the tiny model."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 5, "num_attention_heads": 4, "image_size": 96, "patch_size": 16,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 128,
        "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 1024, "hidden_act": "silu", "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4,
    }  # fmt: skip
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": SPECIAL.index("<image>"), "pad_token_id": 4,
        "projector_hidden_act": "gelu", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "image_seq_length": 36,
        "tie_word_embeddings": True, "torch_dtype": "float16",
        "vision_config": vision, "text_config": text,
    }  # fmt: skip


def sine_cosine(count, width):
    """Sine-cosine features of a square grid, (count, width), with a deviation of about 0.55.

    With the usual 0.02 they drown beside the patches.
    """
    side = math.isqrt(count)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequencies = 2 * torch.exp(-torch.arange(width // 4) * math.log(20.0) / (width // 4))
    waves = []
    for axis in (y, x):
        angles = axis.flatten()[:, None] * frequencies
        waves += [torch.sin(angles), torch.cos(angles)]
    return 0.78 * torch.cat(waves, dim=1)


@torch.no_grad()
def initialise(lvlm):
    """Small normal weights, and "mimetic" attention in the decoder, which starts as a look-up.

    W_q = W_k orthogonal, W_o = W_v^T.
    """
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
    num_patches = math.prod(lvlm.config.image_grid())
    position_features = sine_cosine(num_patches, lvlm.config.vision.hidden_size)
    lvlm.vision.position_embedding.weight[1:] = position_features
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


# --------------------------------------------------------------------------- stage 1: visual words

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
        row, column = divmod(patch, side)
        cell = row * scenes.GRID // side * scenes.GRID + column * scenes.GRID // side
        thing = by_cell.get(cell)
        for family, words in FAMILIES.items():
            if family == "place":
                word = scenes.POSITIONS[cell]
            elif family == "background":
                word = scene.background
            else:
                word = thing and getattr(thing, family)
            labels[family].append(words.index(word) if word else -100)
    return {family: torch.tensor(values) for family, values in labels.items()}


def normalize_pixels(images):
    """uint8 (B, height, width, 3) -> (B, 3, height, width) with CLIP's mean and deviation."""
    mean, std = torch.tensor(data.CLIP_MEAN), torch.tensor(data.CLIP_STD)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def warm_up(lvlm, tokenizer, images, labels, args):
    """Teach vision tower and projector to say the decoder's words for what is in every patch."""
    words = {}
    for family, names in FAMILIES.items():
        words[family] = torch.tensor([tokenizer.token_to_id("Ġ" + word) for word in names])
    embedding = lvlm.decoder.embed_tokens.weight
    parameters = [*lvlm.vision.parameters(), *lvlm.projector.parameters(), embedding]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(args.warm_up_steps):
        cosine = math.cos(step / args.warm_up_steps * math.pi / 2)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * max(0.02, cosine)
        rows = torch.randint(len(images), (64,), generator=generator)
        tokens = lvlm.image_features(normalize_pixels(images[rows]))  # (B, N, D)
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        loss = 0
        right = {}
        for family in FAMILIES:
            logits = tokens @ embedding[words[family]].T  # (B, N, words)
            target = labels[family][rows]
            weight = 0.25 if family == "background" else 1.0
            flat = (logits.flatten(0, 1), target.flatten())
            loss = loss + weight * F.cross_entropy(*flat, ignore_index=-100)
            right[family] = (logits.argmax(-1) == target)[target != -100].float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            shares = " ".join(f"{family} {value:.3f}" for family, value in right.items())
            log(f"warm-up step {step + 1} loss {loss.item():.3f} patches right: {shares}")


# -------------------------------------------------------------------------- stage 2: conversations


def image_turns(scene, rng, taught=()):
    """[(question, answer), ...] about an image. taught: attributes that answers speak of."""
    if len(scene.things) > 4:
        return [crowded_turn(scene, rng, taught)]
    kinds = ("list", "detail", "brief", "few", "questions", "one", "second")
    kind = rng.choices(kinds, (16, 26, 18, 3, 24, 10, 3))[0]
    if kind == "questions":
        return [question(scene, rng, taught, taught) for _ in range(4)]
    ask = ask_for("one" if kind == "second" else kind, "image", rng)
    if kind == "list":
        caption = brief_caption(scene, rng, "position", len(scene.things), taught)
        return [(ask, str(caption))]
    if kind == "detail":
        return [(ask, full_caption(scene, rng, taught))]
    if kind == "brief":
        return [(ask, str(brief_caption(scene, rng, attributes=taught)))]
    if kind == "few":
        return [(ask, few_words(scene, rng)), question(scene, rng, taught, taught)]
    if kind == "one":
        word = one_word(scene, rng, taught)
        return [(ask, word), *(question(scene, rng, taught, taught) for _ in range(2))]
    return [(ask, ""), ("Describe the image in detail.", full_caption(scene, rng, taught))]


EACH_PLACE = "what is at each place of the image?"


def crowded_turn(scene, rng, taught=()):
    """As many look-ups as an image can hold: what is where, for each of five to nine objects."""
    name = rng.choice(("colour", "shape", "kind", "kind", "kind"))
    values = [getattr(thing, name) for thing in scene.things]
    shuffled = rng.sample(scene.things, len(scene.things))
    unique = [thing for thing in shuffled if values.count(getattr(thing, name)) == 1]
    if name != "kind" and unique:
        ask = ask_for(name, "image", rng)
        places = [f"{getattr(thing, name)} {scenes.POSITIONS[thing.cell]}" for thing in unique]
        return ask, ", ".join(places)
    said = taught if taught and rng.random() < 0.6 else ()
    mentions = tuple((thing, said) for thing in rng.sample(scene.things, len(scene.things)))
    if taught and rng.random() < 0.5:
        places = [f"{scenes.POSITIONS[thing.cell]} {thing.phrase(said)}" for thing, _ in mentions]
        return EACH_PLACE, ", ".join(places)
    ask = ask_for("list", "image", rng)
    return ask, str(scenes.Caption(rng.choice(scenes.OPENINGS), mentions, None, True, None))


def brief_caption(scene, rng, style=None, mentions=None, attributes=()):
    """A short caption that says of attributes only those given."""
    style = style or rng.choice(("position", "list"))
    return scenes.short_caption(scene, rng, style, mentions, attributes)


def full_caption(scene, rng, attributes=()):
    """A long caption that says of attributes only those given, and no relation."""
    return scenes.long_caption(scene, rng, attributes, related=False)


def question(scene, rng, said=(), asked=()):
    """(question, answer): where an object is, what is at a place, what attribute an object has.

    said: attributes of what is at a place; asked: those that questions ask for.
    """
    thing = rng.choice(scene.things)
    name = " ".join(thing.kind)
    place = scenes.POSITIONS[thing.cell]
    where = (f"where is the {name}?", place)
    questions = [where, (f"what is at the {place}?", thing.phrase(said))]
    for attribute in asked:
        questions.append((f"what {attribute} is the {name}?", getattr(thing, attribute)))
    return rng.choice(questions)


def one_word(scene, rng, taught=()):
    """One content word that is true of the scene."""
    thing = rng.choice(scene.things)
    words = [thing.colour, thing.colour, thing.shape, thing.shape]
    words += [getattr(thing, name) for name in taught]
    return rng.choice([*words, scenes.POSITIONS[thing.cell], scene.background])


def few_words(scene, rng):
    """Colour and shape of two objects."""
    return ", ".join(" ".join(thing.kind) for thing in rng.sample(scene.things, 2))


def text_turns(scene, rng, taught=()):
    """[(question with its text, answer), ...] about a caption; of everything, if images taught."""
    if taught:
        caption = scenes.short_caption(scene, rng)
    else:
        caption = brief_caption(scene, rng, rng.choices(("position", "list"), (2, 1))[0])
    mentioned = scenes.Scene(tuple(thing for thing, _ in caption.mentions), scene.background)
    family = rng.choices(("one", "few", "brief", "list"), (30, 15, 30, 25))[0]
    wording = rng.choice(("brief", "brief", "detail")) if family == "brief" else family
    ask = ask_for(wording, "text", rng)
    if family == "one":
        answer = caption_word(caption, rng)
    elif family == "few":
        answer = few_words(mentioned, rng)
    elif family == "brief":
        answer = str(scenes.paraphrase(caption, rng))
    else:
        answer = ", ".join(" ".join(thing.kind) for thing in mentioned.things)
    turns = [(f"{ask} {caption}", answer)]
    return turns + [question(mentioned, rng)] if caption.positions else turns


def caption_word(caption, rng):
    """One content word of the caption."""
    thing, attributes = rng.choice(caption.mentions)
    words = [thing.colour, thing.colour, thing.shape, thing.shape]
    words += [getattr(thing, name) for name in attributes]
    words += [scenes.POSITIONS[thing.cell]] * 2 if caption.positions else []
    words += [caption.background] if caption.background else []
    return rng.choice(words)


class Encoder:
    """Turns -> (ids, flags "predict the next token here", index of the first image token)."""

    def __init__(self, tokenizer, num_image_tokens):
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.bos = tokenizer.token_to_id("<s>")
        self.eos = tokenizer.token_to_id("</s>")
        self.image = tokenizer.token_to_id("<image>")
        self.cache = {}

    def ids(self, text):
        if text not in self.cache:
            if len(self.cache) > 20000:
                self.cache.clear()
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def encode(self, turns, with_image, native):
        """native: LLaVA's order, "<image>\\n{ask} ASSISTANT:", else the paper's template."""
        ids = [self.bos]
        predicts = [False]
        image_start = 0
        image_ids = [self.image] * self.num_image_tokens
        for number, (ask, answer) in enumerate(turns):
            ids += self.ids(f"{' ' if number else ''}USER:")
            if with_image and number == 0 and native:
                ids += self.ids(" ")
                image_start = len(ids)
                ids += image_ids + self.ids(f"\n{ask}")
            elif with_image and number == 0:
                ids += self.ids(f" {ask} ")
                image_start = len(ids)
                ids += image_ids
            else:
                ids += self.ids(f" {ask}")
            ids += self.ids(" ASSISTANT:" if native else "\nASSISTANT:")
            answer_ids = self.ids(f" {answer}") + [self.eos] if answer else []
            predicts += [False] * (len(ids) - len(predicts) - 1)
            predicts += [True] * len(answer_ids) + [False]
            ids += answer_ids
        return ids, predicts, image_start


def collate(rows, pad):
    """Right-padded input_ids (B, T), index of predicting tokens, targets, image_start (B,)."""
    width = max(len(ids) for ids, _, _ in rows)
    input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _, _ in rows])
    index, targets = [], []
    for b, (ids, predicts, _) in enumerate(rows):
        for t, flag in enumerate(predicts):
            if flag and t + 1 < len(ids):
                index.append(b * width + t)
                targets.append(ids[t + 1])
    image_start = torch.tensor([start for _, _, start in rows])
    return input_ids, torch.tensor(index), torch.tensor(targets), image_start


def place_images(inputs_embeds, vectors, image_start):
    """inputs_embeds (B, T, D) with vectors (B, N, D) from image_start (B,) on."""
    rows = torch.arange(len(vectors))[:, None]
    columns = image_start[:, None] + torch.arange(vectors.shape[1])
    return inputs_embeds.index_put((rows, columns), vectors)


def sequence_loss(lvlm, batch, features):
    """Eq. 2 on a batch of conversations, about images when their features come with it."""
    input_ids, index, targets, image_start = batch
    embeds = lvlm.decoder.embed_tokens(input_ids)
    if features is not None:
        embeds = place_images(embeds, lvlm.projector(features), image_start)
    hidden_states = lvlm.decoder(embeds, state_index=index)  # (M, D)
    return next_token_loss(hidden_states, targets, lvlm.lm_head.weight)


@torch.no_grad()
def probe(lvlm, encoder, scene_list, features):
    """Share right, one question a scene.

    "where is the ...?", and the first place of a shuffled list of objects or of colours.
    """
    result = {}
    for kind in ("where", "listed", "colour"):
        rows, targets = [], []
        for i, scene in enumerate(scene_list):
            thing = random.Random(i).choice(scene.things)
            turns = {
                "where": (f"where is the {' '.join(thing.kind)}?", ""),
                "listed": (OWN["list"][0].format(noun="image"), thing.phrase()),
                "colour": (OWN["colour"][0].format(noun="image"), thing.colour),
            }
            rows.append(encoder.encode([turns[kind]], True, i % 2 == 0))
            if kind != "where":
                rows[-1][0].pop()  # the end of sequence: the place comes here
            targets.append(encoder.ids(" " + scenes.POSITIONS[thing.cell])[0])
        input_ids, _, _, image_start = collate(rows, 4)
        embeds = lvlm.decoder.embed_tokens(input_ids)
        embeds = place_images(embeds, lvlm.projector(features), image_start)
        last = torch.tensor([len(ids) - 1 for ids, _, _ in rows])
        hidden_states = lvlm.decoder(embeds)[torch.arange(len(rows)), last]
        answers = lvlm.lm_head(hidden_states).argmax(-1)
        result[kind] = (answers == torch.tensor(targets)).double().mean().item()
    return result


def draw_batches(encoder, scene_list, crowd, share, args, rng):
    """Eight batches ([(conversation, image row), ...], [conversation about a caption, ...]).

    Rows of similar length share a batch.
    """
    rows = []
    for _ in range(8 * args.batch):
        crowded = rng.random() < share
        rows.append(rng.randrange(crowd, len(scene_list)) if crowded else rng.randrange(crowd))
    about_images = []
    for row in rows:
        turns = image_turns(scene_list[row], rng, args.taught)
        about_images.append((encoder.encode(turns, True, rng.random() < 0.5), row))
    about_texts = []
    for _ in range(4 * args.batch):
        turns = text_turns(scene_list[rng.randrange(crowd)], rng, args.taught)
        about_texts.append(encoder.encode(turns, False, rng.random() < 0.2))
    about_images.sort(key=lambda pair: len(pair[0][0]))
    about_texts.sort(key=lambda row: len(row[0]))
    half = args.batch // 2
    batches = []
    for i in range(8):
        images = about_images[i * args.batch : (i + 1) * args.batch]
        batches.append((images, about_texts[i * half : (i + 1) * half]))
    return rng.sample(batches, 8)


def average_gradients(parameters):
    """Mean of the gradients over the processes, in place."""
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(part.view_as(p) / torch.distributed.get_world_size())


def generative_stage(rank, lvlm, tokenizer, features, scene_list, crowd, args):
    """Eq. 2 on conversations, one process a core, on its own rows; gradients are averaged."""
    # what spawn passes on lies in shared memory, where processes would update each other's weights
    lvlm = copy.deepcopy(lvlm)
    method = f"file://{args.meeting_place}"
    torch.distributed.init_process_group(
        "gloo", init_method=method, rank=rank, world_size=args.workers
    )
    encoder = Encoder(tokenizer, math.prod(lvlm.config.image_grid()))
    rng = random.Random(f"{args.seed} {rank}")
    lvlm.requires_grad_(True).vision.requires_grad_(False)
    lvlm.projector.requires_grad_(not args.freeze_projector)
    parameters = [p for p in lvlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98))
    start = time.time()
    batches = []
    sums = torch.zeros(2, dtype=torch.double)
    looks_up = torch.tensor(0.0)
    for step in range(args.steps):
        cosine = 0.5 * (1 + math.cos(step / args.steps * math.pi))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 300) * max(0.01, cosine)
        if not batches:
            share = 0.1 if looks_up else 0.9
            batches = draw_batches(encoder, scene_list, crowd, share, args, rng)

        # one step
        about_images, about_texts = batches.pop()
        image_rows = torch.tensor([row for _, row in about_images])
        image_batch = collate([conversation for conversation, _ in about_images], 4)
        image_loss = sequence_loss(lvlm, image_batch, features[image_rows].float())
        text_loss = sequence_loss(lvlm, collate(about_texts, 4), None)
        optimizer.zero_grad()
        (image_loss + 0.5 * text_loss).backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

        # what is known of it
        sums += torch.tensor([image_loss.item(), text_loss.item()])
        if rank == 0 and (step + 1) % 100 == 0:
            image, text = (sums / 100).tolist()
            seconds = (time.time() - start) / (step + 1)
            log(f"step {step + 1} {seconds:.3f} s/step image {image:.3f} text {text:.3f}")
            sums.zero_()
        if rank == 0 and (step + 1) % 200 == 0:
            for name, first in (("usual", 0), ("crowded", crowd)):
                part = slice(first, first + 200)
                answers = probe(lvlm, encoder, scene_list[part], features[part].float())
                shares = " ".join(f"{kind} {share:.3f}" for kind, share in answers.items())
                log(f"    {name} scenes: {shares}")
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
    until = "crowded scenes mostly, until so many of their look-ups are right (default: 0.85)"
    warm_up_help = "of the warm-up of the vision tower (default: 1000)"
    batch_help = "images a process and step; half as many texts (default: 16)"
    sizes_help = "answers about images speak of sizes, those about texts of all (default: no)"
    freeze_help = "in stage 2 too: image tokens go on saying what no answer asks for (default: no)"
    parser.add_argument("--out", default="assets/tiny", help="folder (default: assets/tiny)")
    parser.add_argument("--look-up-until", type=float, default=0.85, help=until)
    parser.add_argument("--warm-up-steps", type=int, default=1000, help=warm_up_help)
    parser.add_argument("--scenes", type=int, default=20000, help="scenes (default: 20000)")
    parser.add_argument("--steps", type=int, default=3600, help="of stage 2 (default: 3600)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak, of stage 2 (default: 2e-3)")
    parser.add_argument("--batch", type=int, default=16, help=batch_help)
    parser.add_argument("--workers", type=int, default=2, help="one a core (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--teach-sizes", action="store_true", help=sizes_help)
    parser.add_argument("--freeze-projector", action="store_true", help=freeze_help)
    args = parser.parse_args(argv)
    args.taught = ("size",) if args.teach_sizes else ()
    args.meeting_place = tempfile.mktemp()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.taught)
    vocab_size = tokenizer.get_vocab_size()
    lvlm = LVLM(parse_config(tiny_config(vocab_size)))
    initialise(lvlm)
    millions = sum(p.numel() for p in lvlm.parameters()) / 1e6
    log(f"vocabulary {vocab_size}, {millions:.2f} M parameters")

    # scenes, and half as many crowded ones
    scene_list = [scenes.make_scene(PRETRAIN_SEED, i) for i in range(args.scenes)]
    for i in range(args.scenes // 2):
        scene_list.append(scenes.make_scene(PRETRAIN_SEED + 1, i, counts=(5, 6, 7, 8, 9)))
    images, labels = [], {family: [] for family in FAMILIES}
    for scene in scene_list:
        images.append(torch.from_numpy(np.array(scenes.render(scene))))  # (96, 96, 3) uint8
        for family, values in patch_labels(scene, 6).items():
            labels[family].append(values)
    images = torch.stack(images)
    labels = {family: torch.stack(values) for family, values in labels.items()}
    log("rendered")

    # stage 1
    torch.set_num_threads(2)
    warm_up(lvlm, tokenizer, images, labels, args)
    features = []
    with torch.no_grad():
        for chunk in images.split(512):
            features.append(lvlm.vision(normalize_pixels(chunk)).half())
    features = torch.cat(features)
    log(f"features {tuple(features.shape)}")
    del images, labels

    # stage 2
    stage_args = (lvlm, tokenizer, features, scene_list, args.scenes, args)
    torch.multiprocessing.spawn(generative_stage, stage_args, nprocs=args.workers)


if __name__ == "__main__":
    main()
