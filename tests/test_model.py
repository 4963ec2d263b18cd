"""The network: layers against naive loops, cached generation against none, weights on disk checked key by key."""

import json

import pytest
import torch
from conftest import make_folder, random_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import model as lvlm_module
from extras import scenes
from model import LVLM, Prefix, generate, load_lvlm, parse_config, place, save_lvlm
from vladva import VladVA

EXACT = dict(atol=1e-4, rtol=1e-4)  # float32 against a loop in another order


@pytest.fixture(scope="module")
def lvlm(random_folder):
    return load_lvlm(random_folder)


# ------------------------------------------------------------------------------------------------------ layers


def test_rms_norm_keeps_float32_statistics_in_bfloat16():
    norm = lvlm_module.RMSNorm(64, 1e-5).to(torch.bfloat16)
    x = torch.randn(3, 64).to(torch.bfloat16)
    wanted = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), wanted.to(torch.bfloat16))


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, p: lvlm_module.rotate(
        x, *lvlm_module.rotary_tables(torch.tensor([p]), 8, 10000.0, torch.float64)
    )
    scores = [(at(q, p) * at(k, p - 3)).sum().item() for p in (3, 10, 40)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)  # angles are float32
    assert abs((at(q, 10) * at(k, 3)).sum().item() - scores[0]) > 1e-2


def test_decoder_attention_equals_a_naive_loop(lvlm):
    """Grouped-query heads, causal: query head h reads key-value head h // (H / G)."""
    attention, config = lvlm.decoder.layers[0].self_attn, lvlm.config.decoder
    heads, groups, width, tokens = config.num_attention_heads, config.kv_heads, config.head_width, 5
    x = torch.randn(1, tokens, config.hidden_size)
    cos, sin = lvlm_module.rotary_tables(
        torch.arange(tokens), width, config.rope_theta, torch.float32
    )
    split = lambda proj, n: lvlm_module.rotate(
        proj(x).view(1, tokens, n, width).transpose(1, 2), cos, sin
    )[0]
    q, k, v = (
        split(attention.q_proj, heads),
        split(attention.k_proj, groups),
        attention.v_proj(x).view(tokens, groups, width).transpose(0, 1),
    )
    out = torch.zeros(tokens, heads, width)
    for h in range(heads):
        for t in range(tokens):
            g = h // (heads // groups)
            weights = torch.softmax(
                torch.stack([q[h, t] @ k[g, s] for s in range(t + 1)]) / width**0.5, 0
            )
            out[t, h] = sum(w * v[g, s] for s, w in enumerate(weights))
    wanted = attention.o_proj(out.flatten(1))
    torch.testing.assert_close(attention(x, (cos[None, None], sin[None, None]))[0], wanted, **EXACT)


def test_vision_tower_equals_a_naive_forward_and_stops_at_the_feature_layer(lvlm):
    tower, config = lvlm.vision, lvlm.config.vision
    pixels, side = torch.randn(1, 3, config.image_size, config.image_size), config.patch_size
    patches = (
        pixels[0]
        .unfold(1, side, side)
        .unfold(2, side, side)
        .permute(1, 2, 0, 3, 4)
        .flatten(2)
        .flatten(0, 1)
    )  # (N, 3 * side * side)
    x = (
        torch.cat(
            [tower.class_embedding[None], patches @ tower.patch_embedding.weight.flatten(1).T]
        )
        + tower.position_embedding.weight
    )
    x = tower.pre_layrnorm(x)
    for block in tower.layers[:-1]:  # vision_feature_layer -2: the last block is not run
        normed, heads = block.layer_norm1(x), config.num_attention_heads
        q, k, v = (
            block.self_attn[n](normed).unflatten(-1, (heads, -1)).transpose(0, 1)
            for n in ("q_proj", "k_proj", "v_proj")
        )
        mixed = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
        x = x + block.self_attn["out_proj"](mixed.transpose(0, 1).flatten(1))
        up = block.mlp["fc1"](block.layer_norm2(x))
        x = x + block.mlp["fc2"](up * torch.sigmoid(1.702 * up))
    torch.testing.assert_close(tower(pixels)[0], x[1:], **EXACT)


def test_projector_uses_the_exact_gelu(lvlm):
    features, p = torch.randn(2, 3, lvlm.config.vision.hidden_size), lvlm.projector
    hidden = features @ p.linear_1.weight.T + p.linear_1.bias
    wanted = (
        0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    ) @ p.linear_2.weight.T + p.linear_2.bias
    torch.testing.assert_close(p(features), wanted, **EXACT)


def test_place_writes_each_row_at_its_own_slot():
    embeds, vectors = torch.zeros(2, 5, 1), torch.tensor([[1.0], [2.0]])
    assert place(embeds, vectors, torch.tensor([0, 3]))[:, :, 0].tolist() == [
        [1, 2, 0, 0, 0],
        [0, 0, 0, 1, 2],
    ]
    assert embeds.sum() == 0  # a copy


def test_plain_attention_equals_the_fused_one_layer_by_layer(lvlm):
    """Weights that are looked at times values, projected, are what the fused kernel gives; no token looks ahead."""
    torch.manual_seed(0)
    embeds = torch.randn(2, 7, lvlm.config.decoder.hidden_size)
    rotary, x = lvlm.decoder.rotary(embeds), embeds
    with torch.no_grad():
        for block, weights in zip(
            lvlm.decoder.layers, lvlm.decoder.attention_maps(embeds), strict=True
        ):
            attention, normed = block.self_attn, block.input_layernorm(x)
            _, _, v = attention.project(normed, rotary)  # (B, G, T, K)
            mixed = weights @ v.repeat_interleave(attention.heads // attention.kv_heads, 1)
            torch.testing.assert_close(
                attention.o_proj(mixed.transpose(1, 2).flatten(2)),
                attention(normed, rotary),
                **EXACT,
            )
            assert weights.triu(1).abs().max() == 0
            x = block(x, rotary)
        torch.testing.assert_close(lvlm.decoder.norm(x), lvlm.decoder(embeds), **EXACT)


def test_checkpointing_changes_no_gradient(lvlm):
    embeds = torch.randn(2, 6, lvlm.config.decoder.hidden_size)
    gradients = []
    for lvlm.decoder.checkpointing in (False, True):
        x = embeds.clone().requires_grad_()
        lvlm.decoder(x).square().sum().backward()
        gradients.append(x.grad)
    lvlm.decoder.checkpointing = False
    assert torch.equal(*gradients)


def test_states_that_are_picked_are_those_of_the_whole(lvlm):
    """Values and gradients, with and without checkpointing: what the last block leaves out, nothing depends on."""
    torch.manual_seed(0)
    embeds, rows, gradients = (
        torch.randn(2, 6, lvlm.config.decoder.hidden_size),
        torch.tensor([11, 3, 4]),
        [],
    )
    for lvlm.decoder.checkpointing in (False, True):
        for picked in (
            lambda x: lvlm.decoder(x, rows=rows),
            lambda x: lvlm.decoder(x).flatten(0, 1)[rows],
        ):
            x = embeds.clone().requires_grad_()
            states = picked(x)
            states.square().sum().backward()
            gradients.append((states.detach(), x.grad))
    lvlm.decoder.checkpointing = False
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], **EXACT)


@pytest.mark.parametrize("shared", [1, 4])
def test_a_prefix_that_is_computed_once_changes_no_state(lvlm, shared):
    torch.manual_seed(0)
    embeds = torch.randn(3, 7, lvlm.config.decoder.hidden_size)
    embeds[:, :shared] = embeds[0, :shared]
    with torch.no_grad():
        prefix = Prefix(lvlm.decoder, embeds[:1, :shared])
        for rows in (slice(0, 3), slice(1, 3)):  # one prefix serves batches of any size
            rest = lvlm.decoder(embeds[rows, shared:], prefix, torch.arange(shared, 7)[None])
            torch.testing.assert_close(rest, lvlm.decoder(embeds[rows])[:, shared:], **EXACT)


# ------------------------------------------------------------------------------------------------------ generation


def test_cached_generation_equals_running_everything_again(lvlm):
    """Two prompts of different lengths, right-padded: each row's greedy tokens are those of a forward without cache or padding."""
    torch.manual_seed(0)
    rows = [torch.randint(5, 400, (length,)) for length in (9, 4)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    got = generate(lvlm, lvlm.embed(padded), torch.tensor([9, 4]), eos_id=-1, max_new_tokens=12)
    for row, tokens in zip(rows, got):
        ids = row.tolist()
        for _ in range(12):
            ids.append(
                lvlm.head(lvlm.decoder(lvlm.embed(torch.tensor([ids])))[0, -1]).argmax().item()
            )
        assert tokens == ids[len(row) :]


def test_generation_stops_at_the_end_token_of_each_row(lvlm):
    prompt = torch.randint(5, 400, (2, 6))
    free = generate(lvlm, lvlm.embed(prompt), torch.tensor([6, 6]), eos_id=-1, max_new_tokens=8)
    eos = free[0][2]
    stopped = generate(lvlm, lvlm.embed(prompt), torch.tensor([6, 6]), eos_id=eos, max_new_tokens=8)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in free]


def test_generation_refuses_what_does_not_fit(lvlm):
    embeds = lvlm.embed(torch.ones(1, 4, dtype=torch.long))
    for count, message in ((5000, "exceed the model's 1024 positions"), (0, "at least 1")):
        with pytest.raises(ValueError, match=message):
            generate(lvlm, embeds, torch.tensor([4]), 2, count)


# ------------------------------------------------------------------------------------------------------ folders


def test_save_and_load_give_the_same_weights_and_config(lvlm, tmp_path):
    save_lvlm(lvlm, tmp_path, torch.float32)
    again = load_lvlm(tmp_path)
    assert again.config == lvlm.config
    for (name, a), (_, b) in zip(lvlm.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), name


def test_every_saved_key_is_in_the_hubs_layout(random_folder):
    with safe_open(random_folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert {
        "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "language_model.lm_head.weight",
    } <= keys
    assert {
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias",
        "vision_tower.vision_model.post_layernorm.weight",
    } <= keys
    assert {
        "language_model.model.layers.1.mlp.gate_proj.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_2.bias",
    } <= keys


def sharded(folder, raw):
    """A random folder whose weights lie in two shards with an index."""
    make_folder(folder, raw)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_load_to_the_same_model(lvlm, tmp_path):
    again = load_lvlm(sharded(tmp_path, random_config()))
    assert all(torch.equal(a, b) for a, b in zip(lvlm.parameters(), again.parameters()))


def test_tied_heads_share_one_weight(tmp_path):
    tied = load_lvlm(make_folder(tmp_path, random_config(tie_word_embeddings=True)))
    assert tied.head.weight is tied.decoder.embed_tokens.weight


def test_loading_freezes_and_converts(random_folder):
    lvlm = load_lvlm(random_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in lvlm.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in lvlm.parameters()
    )


def broken(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_keys_are_listed_together(tmp_path):
    make_folder(tmp_path, random_config())

    def change(tensors):
        tensors["language_model.model.norm.bias"] = tensors.pop("language_model.model.norm.weight")
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(3)

    broken(tmp_path, change)
    with pytest.raises(ValueError) as error:
        load_lvlm(tmp_path)
    for part in (
        f"the weights of {tmp_path} do not fit its config.json",
        "1 missing: language_model.model.norm.weight",
        "1 unexpected: language_model.model.norm.bias",
        "1 of another shape: multi_modal_projector.linear_1.bias (3,), wanted (64,)",
    ):
        assert part in str(error.value)


def test_known_leftovers_of_old_checkpoints_are_ignored(tmp_path):
    make_folder(tmp_path, random_config())
    leftovers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.ones(1, 37),
    }
    broken(tmp_path, lambda tensors: tensors.update(leftovers))
    load_lvlm(tmp_path)


def test_missing_and_truncated_files_are_named(tmp_path):
    folder = sharded(tmp_path, random_config())
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors cannot be read"):
        load_lvlm(folder)
    shard.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors not found"):
        load_lvlm(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_lvlm(folder)


# ------------------------------------------------------------------------------------------------------ config.json


def test_left_out_fields_take_the_documented_defaults():
    """What llava-hf/llava-1.5-7b-hf's config.json holds, and the LLaVA-1.5-7B that it means."""
    raw = {
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "patch_size": 14,
        }
        | {"num_attention_heads": 16, "num_hidden_layers": 24},
    }
    config = parse_config(raw)
    decoder = config.decoder
    assert (
        decoder.hidden_size,
        decoder.intermediate_size,
        decoder.num_hidden_layers,
        decoder.kv_heads,
    ) == (4096, 11008, 32, 32)
    assert (config.num_image_tokens, config.num_vision_blocks, decoder.rope_theta) == (
        576,
        23,
        10000.0,
    )
    with torch.device("meta"):
        assert (
            sum(p.numel() for p in LVLM(config).parameters()) == 7_063_427_072
        )  # the hub's count of llava-1.5-7b-hf


@pytest.mark.parametrize(
    "section, change, message",
    [
        (
            "text_config",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "text_config.rope_scaling",
        ),
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act"),
        (
            None,
            {"model_type": "qwen2_vl"},
            "top.model_type is 'qwen2_vl', but vision_config.model_type is 'clip_vision_model'",
        ),
        (None, {"model_type": "llava_next"}, "top.model_type is 'llava_next'"),
        (None, {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        (None, {"vision_config": None}, "no object 'vision_config'"),
        (None, {"image_token_index": None}, "image_token_index"),
        (None, {"vision_feature_layer": -9}, "vision_feature_layer is -9"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(section, change, message):
    raw = random_config()
    (raw[section] if section else raw).update(change)
    with pytest.raises(ValueError, match=message):
        assert parse_config(raw).num_vision_blocks


# ------------------------------------------------------------------------------------------------------ the embedded default


def test_the_tiny_folder_is_small_half_precision_and_complete():
    folder = data.NAMES["tiny"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}
    lvlm = load_lvlm(folder)
    assert lvlm.config.decoder.tie_word_embeddings and all(
        p.isfinite().all() for p in lvlm.parameters()
    )


def test_the_tiny_model_describes_scenes_it_has_never_seen():
    """A foundation that had decayed would show here; the figures themselves are in the README, on more scenes."""
    scores = scenes.caption_accuracy(VladVA.from_pretrained("tiny"), seed=77, count=40)
    assert scores["placed"] > 80 and scores["where"] > 80
