"""Makes assets/tiny: a LLaVA-shaped LVLM of about two million parameters, pre-trained generatively on rendered scenes.

    python assets/make_tiny.py --out assets/tiny --minutes 70        # on 2 CPU cores; assets/tiny/README.md records the run that is committed

Two stages, after LLaVA's: (1) a warm-up of the vision tower and projector, standing in for CLIP's pre-training and LLaVA's feature
alignment: every patch names its object's colour, shape, size, texture, cell and background *through the projector, against the
decoder's own word embeddings*, so that image tokens start as visual words; (2) the generative stage: the paper's Eq. 2 on conversations
about scenes and about captions, all weights but the vision tower's.

Not here: anything discriminative. The result has never seen a contrastive loss.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: contended two-thread steps are 1.6 times faster
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

import data
from model import LVLM, parse_config, place, save_lvlm
from vladva import next_token_loss

PRETRAIN_SEED = 3000  # its scenes are nobody else's: train.py and eval.py use other seeds
SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")

IMAGE_ASKS = {
    "one": ("Summarize the provided image in one word:", "Describe the image in one word.", "What is in the image? Answer in one word.", "Name one thing in the image.", "The image in one word:"),
    "few": ("Describe the image in a few words.", "Summarize the provided image in a few words:", "What is in the image?"),
    "brief": ("Describe the image briefly.", "Provide a brief description of the image.", "Describe the image.", "Summarize the image in one sentence."),
    "list": ("List the objects of the image and their places.", "Where are the objects of the image?"),
    "colour": ("List the colors of the image and their places.",),
    "shape": ("List the shapes of the image and their places.",),
    "detail": ("Describe the image in detail.", "Describe the image in detail.", "Give a detailed description of the image.", "Describe what is in the image in detail."),
}
TEXT_ASKS = {
    "one": ("Summarize the provided text in one word:", "Describe the text in one word.", "What is in the text? Answer in one word.", "Name one thing in the text.", "The text in one word:"),
    "few": ("Describe the text in a few words.", "Summarize the provided text in a few words:", "What is in the text?"),
    "brief": ("Say the text in other words.", "Describe the text briefly.", "Rewrite the text."),
    "list": ("List the objects of the text.",),
}


# ------------------------------------------------------------------------------------------------------ tokenizer


def vocabulary_words():
    """Every word and mark that captions, questions and prompts use, without and with the blank before it."""
    texts = [prompt for asks in (IMAGE_ASKS, TEXT_ASKS) for prompts in asks.values() for prompt in prompts] + ["USER: ASSISTANT:\n"]
    for index in range(400):
        scene, rng = data.make_scene(PRETRAIN_SEED - 1, index), random.Random(index)
        texts += [str(data.short_caption(scene, rng)), data.long_caption(scene, rng), *data.question(scene, rng)]
    pieces = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    words = {piece.strip(" ") for text in texts for piece, _ in pieces.pre_tokenize_str(text)} - {""}
    return sorted(words)


EARLY_SHARE, EARLY_UNTIL = 0.9, 0.3
WORD_PATTERN = r" ?[A-Za-z]+(?:-[A-Za-z]+)*| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+?"


def make_tokenizer():
    """Byte-level BPE with the scene words whole: any text encodes without loss, other words byte by byte."""
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    spelled = [spell.pre_tokenize_str(blank + word)[0][0] for word in vocabulary_words() for blank in ("", " ")]
    for token in sorted(pre_tokenizers.ByteLevel.alphabet()) + spelled:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"), spell])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer


def save_folder(lvlm, tokenizer, out):
    """The folder, file by file as llava-hf/llava-1.5-7b-hf has them."""
    save_lvlm(lvlm, out, torch.float16)
    tokenizer.save(f"{out}/tokenizer.json")
    side, patch = lvlm.config.vision.image_size, lvlm.config.vision.patch_size
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": data.CLIP_MEAN, "image_std": data.CLIP_STD,
        },
        "processor_config.json": {"processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": patch, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 1024, "clean_up_tokenization_spaces": False},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4},
    }  # fmt: skip
    for name, content in files.items():
        Path(out, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ initial weights


def tiny_config(vocab_size, layers):
    vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4,
              "image_size": 96, "patch_size": 16, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 128}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
            "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 4}  # fmt: skip
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": SPECIAL.index("<image>"),
            "pad_token_id": 4, "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "image_seq_length": 36, "tie_word_embeddings": True, "torch_dtype": "float16", "vision_config": vision, "text_config": text}  # fmt: skip


def sine_cosine(count, width):
    """Sine-cosine features of a square grid, (count, width), std about .55: with the usual .02 they drown beside the patches."""
    side = math.isqrt(count)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequencies = 0.5 ** torch.arange(width // 4) * math.pi / 2 if width <= 16 else torch.exp(-torch.arange(width // 4) * math.log(20.0) / (width // 4)) * 2
    parts = [f(axis.flatten()[:, None] * frequencies) for axis in (y, x) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1) * 0.78


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
    lvlm.vision.position_embedding.weight[1:] = sine_cosine(lvlm.config.num_image_tokens, lvlm.config.vision.hidden_size)
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

FAMILIES = {"colour": tuple(data.COLOURS), "shape": data.SHAPES, "size": tuple(data.SIZES), "texture": data.TEXTURES, "place": data.POSITIONS, "background": tuple(data.BACKGROUNDS)}


def patch_labels(scene, side):
    """{family: (side * side,) index of the right word, -100 where the patch's cell is empty}."""
    by_cell = {thing.cell: thing for thing in scene.things}
    labels = {family: [] for family in FAMILIES}
    for patch in range(side * side):
        cell = (patch // side) * data.GRID // side * data.GRID + (patch % side) * data.GRID // side
        thing = by_cell.get(cell)
        for family, words in FAMILIES.items():
            word = data.POSITIONS[cell] if family == "place" else scene.background if family == "background" else thing and getattr(thing, family)
            labels[family].append(words.index(word) if word else -100)
    return {family: torch.tensor(values) for family, values in labels.items()}


def normalise(pictures):
    """uint8 (B, height, width, 3) -> (B, 3, height, width) with CLIP's mean and deviation."""
    mean, std = torch.tensor(data.CLIP_MEAN), torch.tensor(data.CLIP_STD)
    return ((pictures.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def warm_up(lvlm, tokenizer, pictures, labels, minutes, log, seed):
    """Teach vision tower and projector to say, in every patch, the decoder's words for what is there."""
    words = {family: torch.tensor([tokenizer.token_to_id("Ġ" + word) for word in names]) for family, names in FAMILIES.items()}
    parameters = [*lvlm.vision.parameters(), *lvlm.projector.parameters(), lvlm.decoder.embed_tokens.weight]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    rng, start, step = torch.Generator().manual_seed(seed), time.time(), 0
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * max(0.02, math.cos(done * math.pi / 2))
        rows = torch.randint(len(pictures), (64,), generator=rng)
        tokens = lvlm.image_features(normalise(pictures[rows]))  # (B, N, D)
        table = F.layer_norm(tokens, tokens.shape[-1:])
        loss, right = 0, {}
        for family in FAMILIES:
            logits = table @ lvlm.decoder.embed_tokens.weight[words[family]].T  # (B, N, words)
            target = labels[family][rows]
            weight = 1.0 if family != "background" else 0.25
            loss = loss + weight * F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
            counted = target != -100
            right[family] = (logits.argmax(-1) == target)[counted].float().mean().item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            log(f"warm-up step {step} {done:4.0%} loss {loss.item():.3f} " + " ".join(f"{family} {value:.3f}" for family, value in right.items()))
    return right


# ------------------------------------------------------------------------------------------------------ stage 2: conversations


def image_turns(scene, rng, progress):
    """[(ask, answer), ...] about a picture; the mix moves from looking things up towards describing."""
    roll = rng.random()
    if len(scene.things) > 4:  # first of all, look-ups, as many as a picture can hold
        name = rng.choice(("colour", "shape", "kind", "kind", "kind"))
        values = [getattr(thing, name) for thing in scene.things]
        things = [thing for thing in rng.sample(scene.things, len(scene.things)) if values.count(getattr(thing, name)) == 1]
        if name != "kind" and things:
            return [(rng.choice(IMAGE_ASKS[name]), ", ".join(f"{getattr(thing, name)} {data.POSITIONS[thing.cell]}" for thing in things))]
        caption = data.Caption(rng.choice(data.OPENINGS), tuple((thing, ()) for thing in rng.sample(scene.things, len(scene.things))), None, True, None)
        return [(rng.choice(IMAGE_ASKS["list"]), str(caption))]
    if roll < 0.4:  # noun first, shuffled: every position is a look-up
        caption = data.short_caption(scene, rng, "position", mentions=len(scene.things))
        return [(rng.choice(IMAGE_ASKS["list"]), str(caption))]
    if roll < 0.62:
        return [(rng.choice(IMAGE_ASKS["detail"]), data.long_caption(scene, rng))]
    if roll < 0.75:
        return [(rng.choice(IMAGE_ASKS["brief"]), str(data.short_caption(scene, rng)))]
    if roll < 0.80:
        return [(rng.choice(IMAGE_ASKS["few"]), data.few_words(scene, rng))] + [data.question(scene, rng)]
    if roll < 0.97:
        return [(rng.choice(IMAGE_ASKS["one"]), data.one_word(scene, rng))] + [data.question(scene, rng) for _ in range(2)]
    return [(rng.choice(IMAGE_ASKS["one"]), ""), (rng.choice(IMAGE_ASKS["detail"][:1]), data.long_caption(scene, rng))]


def text_turns(scene, rng):
    """[(ask with its text, answer), ...] about a caption."""
    caption = data.short_caption(scene, rng)
    told = dataclasses_scene(scene, caption)
    roll = rng.random()
    if roll < 0.3:
        ask, answer = rng.choice(TEXT_ASKS["one"]), caption_word(caption, rng)
    elif roll < 0.45:
        ask, answer = rng.choice(TEXT_ASKS["few"]), data.few_words(told, rng)
    elif roll < 0.75:
        ask, answer = rng.choice(TEXT_ASKS["brief"]), str(paraphrase(caption, rng))
    else:
        ask, answer = rng.choice(TEXT_ASKS["list"]), ", ".join(" ".join(thing.kind) for thing in told.things)
    turns = [(f"{ask} {caption}", answer)]
    if caption.positions:
        turns += [data.question(told, rng)]
    return turns


def dataclasses_scene(scene, caption):
    return data.Scene(tuple(thing for thing, _ in caption.mentions), scene.background)


def caption_word(caption, rng):
    """One content word of the caption."""
    thing, shown = rng.choice(caption.mentions)
    words = [thing.colour, thing.colour, thing.shape, thing.shape, *(getattr(thing, name) for name in shown)]
    words += [data.POSITIONS[thing.cell]] * 2 if caption.positions else []
    words += [caption.background] if caption.background else []
    words += [caption.relation.split()[0]] * 2 if caption.relation else []
    return rng.choice(words)


def paraphrase(caption, rng):
    """The same content in another order: "A left of B" becomes "B right of A"; lists are shuffled."""
    mentions = list(caption.mentions)
    if caption.relation:
        mentions[:2] = mentions[1::-1]
        return data.dataclasses.replace(caption, opening=rng.choice(data.OPENINGS), mentions=tuple(mentions), relation=data.OPPOSITE[caption.relation])
    rng.shuffle(mentions)
    return data.dataclasses.replace(caption, opening=rng.choice(data.OPENINGS), mentions=tuple(mentions))


class Encoder:
    """Turns -> (ids, flat list of "predict the next token here" flags, slot of the first image token)."""

    def __init__(self, tokenizer, num_image_tokens):
        self.tokenizer, self.num_image_tokens = tokenizer, num_image_tokens
        self.bos, self.eos, self.image = (tokenizer.token_to_id(t) for t in ("<s>", "</s>", "<image>"))
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
    index = [b * width + t for b, (_, asked, _) in enumerate(rows) for t, flag in enumerate(asked) if flag]
    targets = [rows[i // width][0][i % width + 1] for i in index]
    return table, torch.tensor(index), torch.tensor(targets), torch.tensor([slot for _, _, slot in rows])


def sequence_loss(lvlm, batch, features):
    """Eq. 2 on a batch of conversations; also how often position words and relation words are right."""
    ids, index, targets, slots = batch
    embeds = lvlm.embed(ids)
    if features is not None:
        embeds = place(embeds, lvlm.projector(features), slots)
    hidden = lvlm.decoder(embeds).flatten(0, 1)[index]  # (M, D)
    return hidden, targets, next_token_loss(hidden, targets, lvlm.head.weight)


@torch.no_grad()
def probe(lvlm, encoder, scenes, features):
    """Share of "where is the ...?" and "... relative to ...?" answered right, one question a scene."""
    result = {}
    for kind in ("where", "relative"):
        rows, options = [], []
        for i, scene in enumerate(scenes):
            rng = random.Random(i)
            a, b = rng.sample(scene.things, 2)
            if kind == "where":
                ask, good = f"where is the {' '.join(a.kind)}?", [data.POSITIONS[a.cell]]
            else:
                ask, good = f"where is the {' '.join(a.kind)} relative to the {' '.join(b.kind)}?", data.relations(a, b)
            rows.append(encoder.encode([(ask, good[0])], True, i % 2 == 0))
            options.append([encoder.ids(" " + word)[0] for word in good])
        ids, index, targets, slots = collate(rows, 4)
        hidden = lvlm.decoder(place(lvlm.embed(ids), lvlm.projector(features), slots)).flatten(0, 1)
        firsts = [next(i for i, flag in enumerate(asked) if flag) + b * ids.shape[1] for b, (_, asked, _) in enumerate(rows)]
        guess = lvlm.head(hidden[torch.tensor(firsts)]).argmax(-1).tolist()
        result[kind] = sum(g in o for g, o in zip(guess, options)) / len(rows)
    return result


def generative_stage(lvlm, tokenizer, features, seeds, crowd, minutes, log, args, save):
    encoder = Encoder(tokenizer, lvlm.config.num_image_tokens)
    places = torch.tensor([tokenizer.token_to_id("Ġ" + word) for word in data.POSITIONS])
    sides = torch.tensor([tokenizer.token_to_id("Ġ" + word) for word in ("left", "right", "above", "below")])
    lvlm.vision.requires_grad_(False)
    parameters = [p for p in lvlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.02, betas=(0.9, 0.98))
    rng, start, step, seen, pool, text_pool = random.Random(args.seed), time.time(), 0, {}, [], []
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 200) * max(0.01, math.cos(done * math.pi / 2))
        if not pool:
            early = EARLY_SHARE * max(0, 1 - done / EARLY_UNTIL)
            drawn = [rng.randrange(crowd, len(seeds)) if rng.random() < early else rng.randrange(crowd) for _ in range(args.batch * 8)]
            drawn = sorted(((encoder.encode(image_turns(seeds[row], rng, done), True, rng.random() < 0.5), row) for row in drawn), key=lambda x: len(x[0][0]))
            pool = [drawn[i : i + args.batch] for i in range(0, len(drawn), args.batch)]
            told = sorted((encoder.encode(text_turns(seeds[rng.randrange(crowd)], rng), False, rng.random() < 0.2) for _ in range(args.batch * 4)), key=lambda x: len(x[0]))
            text_pool = [told[i : i + args.batch // 2] for i in range(0, len(told), args.batch // 2)]
            rng.shuffle(pool), rng.shuffle(text_pool)
        chosen = pool.pop()
        rows, pictures, texts = [row for _, row in chosen], collate([e for e, _ in chosen], 4), collate(text_pool.pop(), 4)
        hidden, targets, image_loss = sequence_loss(lvlm, pictures, features[torch.tensor(rows)].float())
        _, _, text_loss = sequence_loss(lvlm, texts, None)
        optimizer.zero_grad()
        (image_loss + 0.5 * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            with torch.no_grad():
                guess = lvlm.head(hidden).argmax(-1)
            for name, family in (("place", places), ("side", sides)):
                counted = torch.isin(targets, family)
                hit, total = seen.get(name, (0, 0))
                seen[name] = hit + (guess == targets)[counted].sum().item(), total + counted.sum().item()
            hit, total, n = seen.get("loss", (0, 0, 0))
            seen["loss"] = hit + image_loss.item(), total + text_loss.item(), n + 1
        if step % 50 == 0:
            i, t, n = seen.pop("loss")
            log(f"step {step} {done:4.0%} {(time.time() - start) / step:.3f} s/step image {i / n:.3f} text {t / n:.3f} " + " ".join(f"{k} {h / max(1, m):.3f}" for k, (h, m) in seen.items()))
            seen = {}
        if step % 100 == 0:
            log("probe " + " ".join(f"{k} {v:.3f}" for k, v in probe(lvlm, encoder, seeds[:200], features[:200].float()).items()))
        if step % 2000 == 0:
            save()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="assets/tiny")
    parser.add_argument("--minutes", type=float, default=70, help="of the generative stage")
    parser.add_argument("--warm-minutes", type=float, default=5)
    parser.add_argument("--scenes", type=int, default=30000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-from", default=None)
    args = parser.parse_args(argv)
    log = lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    lvlm = LVLM(parse_config(tiny_config(tokenizer.get_vocab_size(), args.layers)))
    initialise(lvlm)
    log(f"vocabulary {tokenizer.get_vocab_size()}, {sum(p.numel() for p in lvlm.parameters()) / 1e6:.2f} M parameters")
    scenes = [data.make_scene(PRETRAIN_SEED, i) for i in range(args.scenes)]
    scenes += [data.make_scene(PRETRAIN_SEED + 1, i, counts=(5, 6, 7, 8, 9)) for i in range(args.scenes // 2)]
    pictures = torch.stack([torch.frombuffer(bytearray(data.render(s).tobytes()), dtype=torch.uint8).view(96, 96, 3) for s in scenes])
    labels = [patch_labels(s, 6) for s in scenes]
    labels = {family: torch.stack([l[family] for l in labels]) for family in FAMILIES}
    log("rendered")
    if args.warm_from:
        state = torch.load(args.warm_from, weights_only=True)
        order = sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])
        keep = [i for t, i in order if t.strip("Ġ") not in ("colors", "shapes")]
        table = lvlm.decoder.embed_tokens.weight.detach().clone()
        table[keep] = state["decoder.embed_tokens.weight"]
        state["decoder.embed_tokens.weight"] = state["head.weight"] = table
        lvlm.load_state_dict({**lvlm.state_dict(), **state})
    else:
        warm_up(lvlm, tokenizer, pictures, labels, args.warm_minutes, log, args.seed)
        torch.save({k: v for k, v in lvlm.state_dict().items() if k.startswith(("vision", "projector", "decoder.embed_tokens", "head"))}, "/tmp/warm.pt")
    with torch.no_grad():
        features = torch.cat([lvlm.vision(normalise(chunk)).half() for chunk in pictures.split(512)])
    log(f"features {tuple(features.shape)}")
    def save():
        save_folder(lvlm, tokenizer, args.out)
    generative_stage(lvlm, tokenizer, features, scenes, args.scenes, args.minutes, log, args, save)
    save()


if __name__ == "__main__":
    main()
