"""The network: layers against naive loops, cached generation against none, weights key by key.

Not here: outputs of transformers and full-size shapes (test_llava.py), Qwen2-VL
(test_qwen2_vl.py), writing weights (test_export.py).
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP_L_336, VICUNA_7B, hub_config, make_folder, random_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import model as lvlm_module
from model import LVLM, generate, load_lvlm, parse_config
from vladva import VladVA, VladVAConfig

EXACT = {"atol": 1e-4, "rtol": 1e-4}  # float32 against a loop in another order


@pytest.fixture(scope="module")
def lvlm(random_folder):
    return load_lvlm(random_folder)


# -------------------------------------------------------------------------------------- layers


def test_rms_norm_keeps_float32_statistics_in_bfloat16(lvlm):
    norm = copy.deepcopy(lvlm.decoder.norm).to(torch.bfloat16)
    torch.nn.init.ones_(norm.weight)
    x = torch.randn(3, 64).to(torch.bfloat16)
    wanted = x.float() / (x.float().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.equal(norm(x), wanted.to(torch.bfloat16))


def rotary_tables(positions: list[int], width: int, theta: float, dtype):
    """cos and sin of some positions, (T, K) each."""
    frequencies = lvlm_module.rotary_frequencies(width, theta, "cpu")
    angles = torch.tensor(positions)[:, None].float() * frequencies
    return lvlm_module.rotary_tables(angles, dtype)


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def rotated(x, position):
        return lvlm_module.apply_rotary(x, *rotary_tables([position], 8, 10000.0, torch.float64))

    def score(q_position, k_position):
        return (rotated(q, q_position) * rotated(k, k_position)).sum().item()

    scores = [score(position, position - 3) for position in (3, 10, 40)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)  # angles are float32
    assert abs(score(10, 3) - scores[0]) > 1e-2


def test_decoder_attention_equals_a_naive_loop(lvlm):
    """Grouped-query heads, causal: query head h reads key-value head h // (H / G)."""
    attention = lvlm.decoder.layers[0].self_attn
    config = lvlm.config.decoder
    num_heads, groups, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    num_tokens = 5
    x = torch.randn(1, num_tokens, config.hidden_size)
    cos, sin = rotary_tables(list(range(num_tokens)), width, config.rope_theta, torch.float32)

    def split(projected, count):
        return projected.view(num_tokens, count, width).transpose(0, 1)  # (count, T, K)

    q = lvlm_module.apply_rotary(split(attention.q_proj(x), num_heads), cos, sin)
    k = lvlm_module.apply_rotary(split(attention.k_proj(x), groups), cos, sin)
    v = split(attention.v_proj(x), groups)
    out = torch.zeros(num_tokens, num_heads, width)
    for h in range(num_heads):
        g = h // (num_heads // groups)
        for t in range(num_tokens):
            scores = k[g, : t + 1] @ q[h, t] / width**0.5
            weights = torch.softmax(scores, 0)
            for s in range(t + 1):
                out[t, h] += weights[s] * v[g, s]
    wanted = attention.o_proj(out.flatten(1))
    torch.testing.assert_close(attention(x, (cos[None, None], sin[None, None]))[0], wanted, **EXACT)


@pytest.mark.parametrize("cached", [False, True])
def test_attention_gets_a_key_for_each_query_head(cached, monkeypatch):
    """Shared keys with a mask or in float32 used to mean the slow kernel of a GPU.

    The two ways are equal to the bit.
    """
    num_heads = []
    attention = F.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        num_heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    decoder = LVLM(parse_config(random_config())).decoder
    inputs_embeds = torch.randn(2, 5, 64)
    cache = lvlm_module.KVCache(decoder.config, inputs_embeds) if cached else None
    decoder(inputs_embeds, cache=cache)
    assert num_heads == [(4, 4, 4)] * 2
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    repeated = (heads.repeat_interleave(2, dim=1) for heads in (k, v))
    assert torch.equal(attention(q, *repeated), attention(q, k, v, enable_gqa=True))


def test_vision_tower_equals_a_naive_forward_and_stops_at_the_feature_layer(lvlm):
    tower = lvlm.vision
    config = lvlm.config.vision
    side = config.patch_size
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    patches = (
        pixels[0].unfold(1, side, side).unfold(2, side, side)
    )  # (3, rows, columns, side, side)
    patches = patches.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)  # (N, 3 side side)
    patches = patches @ tower.patch_embedding.weight.flatten(1).T
    x = torch.cat([tower.class_embedding[None], patches]) + tower.position_embedding.weight
    x = tower.pre_layrnorm(x)
    for block in tower.layers[:-1]:  # vision_feature_layer -2: the last block is not run
        normed = block.layer_norm1(x)
        heads = []
        for name in ("q_proj", "k_proj", "v_proj"):
            projected = block.self_attn[name](normed)
            heads.append(projected.unflatten(-1, (config.num_attention_heads, -1)).transpose(0, 1))
        q, k, v = heads
        mixed = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
        x = x + block.self_attn["out_proj"](mixed.transpose(0, 1).flatten(1))
        up = block.mlp["fc1"](block.layer_norm2(x))
        x = x + block.mlp["fc2"](up * torch.sigmoid(1.702 * up))
    torch.testing.assert_close(tower(pixels)[0], x[1:], **EXACT)


def test_projector_uses_the_exact_gelu(lvlm):
    features = torch.randn(2, 3, lvlm.config.vision.hidden_size)
    first, second = lvlm.projector.linear_1, lvlm.projector.linear_2
    hidden = features @ first.weight.T + first.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    wanted = hidden @ second.weight.T + second.bias
    torch.testing.assert_close(lvlm.projector(features), wanted, **EXACT)


def test_gradient_checkpointing_changes_no_gradient(lvlm):
    embeds = torch.randn(2, 6, lvlm.config.decoder.hidden_size)
    gradients = []
    for lvlm.decoder.gradient_checkpointing in (False, True):
        x = embeds.clone().requires_grad_()
        lvlm.decoder(x).square().sum().backward()
        gradients.append(x.grad)
    lvlm.decoder.gradient_checkpointing = False
    assert torch.equal(*gradients)


def test_the_wanted_states_are_those_of_the_whole(lvlm):
    """Values and gradients, with and without checkpointing: nothing depends on what is left out."""
    torch.manual_seed(0)
    embeds = torch.randn(2, 6, lvlm.config.decoder.hidden_size)
    state_index = torch.tensor([11, 3, 4])

    def states_and_gradient(state_index, all_states):
        x = embeds.clone().requires_grad_()
        if all_states:
            states = lvlm.decoder(x).flatten(0, 1)[state_index]
        else:
            states = lvlm.decoder(x, state_index=state_index)
        states.square().sum().backward()
        return states.detach(), x.grad

    wanted = states_and_gradient(state_index, all_states=True)
    for lvlm.decoder.gradient_checkpointing in (False, True):
        torch.testing.assert_close(states_and_gradient(state_index, False), wanted, **EXACT)
    lvlm.decoder.gradient_checkpointing = False


# ---------------------------------------------------------------------------------- generation


@pytest.fixture
def eos_token(lvlm, monkeypatch):
    """A function that sets the model's end-of-sequence token for one test; -1: never generated."""

    def set_token(token_id):
        monkeypatch.setattr(lvlm, "config", replace(lvlm.config, end_tokens=[token_id]))

    return set_token


def test_cached_generation_equals_running_everything_again(lvlm, eos_token):
    """Two right-padded prompts: the greedy tokens of a forward without cache or padding."""
    eos_token(-1)
    torch.manual_seed(0)
    prompts = [torch.randint(5, 400, (length,)) for length in (9, 4)]
    padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    answers = generate(
        lvlm, lvlm.decoder.embed_tokens(padded), torch.tensor([9, 4]), max_new_tokens=12
    )
    for prompt, answer in zip(prompts, answers):
        ids = prompt.tolist()
        for _ in range(12):
            hidden_states = lvlm.decoder(lvlm.decoder.embed_tokens(torch.tensor([ids])))
            ids.append(lvlm.lm_head(hidden_states[0, -1]).argmax().item())
        assert answer == ids[len(prompt) :]


def test_generation_stops_at_the_end_token_of_each_row(lvlm, eos_token):
    torch.manual_seed(0)
    embeds = lvlm.decoder.embed_tokens(torch.randint(5, 400, (2, 6)))
    lengths = torch.tensor([6, 6])
    eos_token(-1)
    endless = generate(lvlm, embeds, lengths, max_new_tokens=20)
    eos = endless[0][2]
    wanted = [ids[: ids.index(eos)] if eos in ids else ids for ids in endless]
    eos_token(eos)
    assert generate(lvlm, embeds, lengths, max_new_tokens=20) == wanted


@pytest.mark.parametrize(
    "count, message", [(5000, "4 . 5000 new tokens.* 1024"), (0, "4 . 0 new tokens: wanted 1 or")]
)
def test_generation_refuses_what_does_not_fit(lvlm, count, message):
    embeds = lvlm.decoder.embed_tokens(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        generate(lvlm, embeds, torch.tensor([4]), count)


# ------------------------------------------------------------------------------------- folders


def sharded(folder, raw):
    """A random folder whose weights lie in two shards with an index."""
    make_folder(folder, raw)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for first, file in enumerate(
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    ):
        names = sorted(tensors)[first::2]
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_load_to_the_same_model(lvlm, tmp_path):
    again = load_lvlm(sharded(tmp_path, random_config()))
    for a, b in zip(lvlm.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_tied_heads_share_one_weight(tmp_path):
    """Also where the file stores the shared weight twice, as some tied checkpoints do."""
    folder = make_folder(tmp_path, random_config(tie_word_embeddings=True))
    tied = load_lvlm(folder)
    assert tied.lm_head.weight is tied.decoder.embed_tokens.weight
    embeddings = tied.decoder.embed_tokens.weight.clone()
    change_tensors(folder, {"language_model.lm_head.weight": embeddings})
    assert torch.equal(load_lvlm(folder).lm_head.weight, embeddings)


def test_loading_freezes_and_converts(random_folder):
    lvlm = load_lvlm(random_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in lvlm.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in lvlm.parameters())


def change_tensors(folder, changes: dict) -> None:
    """Rewrite model.safetensors with some tensors added, replaced, or (None) taken out."""
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors")


def test_missing_unexpected_and_misshapen_keys_are_listed_together(tmp_path):
    make_folder(tmp_path, random_config())
    changes = {
        "language_model.model.norm.weight": None,
        "language_model.model.norm.bias": torch.zeros(64),
        "multi_modal_projector.linear_1.bias": torch.zeros(3),
    }
    change_tensors(tmp_path, changes)
    with pytest.raises(ValueError) as error:
        load_lvlm(tmp_path)
    for part in (
        f"the weights of {tmp_path} do not fit its config.json",
        "decoder.norm.weight is missing",
        "decoder.norm.bias is unexpected",
        "projector.linear_1.bias is [3], wanted [64]",
    ):
        assert part in str(error.value)


def test_known_leftovers_of_old_checkpoints_are_ignored(tmp_path):
    make_folder(tmp_path, random_config())
    leftovers = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "vision_tower.vision_model.embeddings.position_ids": torch.ones(1, 37),
    }
    change_tensors(tmp_path, leftovers)
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
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_lvlm(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing"):
        load_lvlm(folder)


# --------------------------------------------------------------------------------- config.json


def test_left_out_fields_take_the_documented_defaults():
    """What llava-hf/llava-1.5-7b-hf's config.json holds, and the LLaVA-1.5-7B that it means."""
    config = parse_config(hub_config(VICUNA_7B))
    decoder = config.decoder
    assert (decoder.hidden_size, decoder.intermediate_size) == (4096, 11008)
    assert decoder.num_hidden_layers == decoder.num_key_value_heads == 32
    assert decoder.head_dim == 128
    assert (decoder.rope_theta, decoder.rms_norm_eps) == (10000.0, 1e-5)
    assert (config.bos_token_id, config.end_tokens) == (1, [2])
    assert config.image_grid() == (24, 24)
    with torch.device("meta"):
        lvlm = LVLM(config)
    assert lvlm.vision.num_blocks == 23
    count = sum(p.numel() for p in lvlm.parameters())
    assert count == 7_063_427_072  # the hub's count of llava-1.5-7b-hf


def changed_config(section: str | None, change: dict) -> dict:
    """random_config with some fields of a section (None: of the top) changed."""
    raw = random_config()
    if section is None:
        return raw | change
    return raw | {section: raw[section] | change}


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("text_config", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("text_config", {"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        ("text_config", {"rope_parameters": "default"}, "rope_parameters is 'default'"),
        ("text_config", {"hidden_act": "gelu"}, "text_config: hidden_act is 'gelu'"),
        ("text_config", {"attention_bias": True}, "attention_bias is True"),
        ("text_config", {"model_type": "mistral"}, "text_config: model_type is 'mistral'"),
        ("vision_config", {"hidden_act": "gelu"}, "vision_config: hidden_act is 'gelu'"),
        (None, {"model_type": "llava_next"}, "model_type is 'llava_next'"),
        (None, {"model_type": None}, "model_type is None"),
        (None, {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        (None, {"vision_config": None}, "vision_config is None"),
        (None, {"text_config": []}, r"text_config is \[\]"),
        (None, {"image_token_index": None}, "image_token_id is None"),
        (None, {"image_token_index": "3"}, "image_token_id is '3'"),
        (None, {"image_token_index": 491}, "<image>.* 491"),
        (None, {"vision_feature_layer": [-2, -5]}, "vision_feature_layer is"),
        (None, {"vision_feature_layer": -9}, "vision_feature_layer"),
        ("text_config", {"hidden_size": "64"}, "hidden_size is '64', wanted"),
        ("text_config", {"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, wanted"),
        ("text_config", {"rope_theta": "1e4"}, "rope_theta is '1e4', wanted"),
        ("text_config", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, wanted"),
        ("text_config", {"num_key_value_heads": 3}, "do not divide"),
        ("vision_config", {"image_size": "96"}, "image_size is '96', wanted"),
        ("vision_config", {"num_attention_heads": True}, "num_attention_heads is True"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(section, change, message):
    """One ValueError that names the field, never an arithmetic error or another model."""
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        LVLM(parse_config(changed_config(section, change)))


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("text_config", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("text_config", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("text_config", {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("vision_config", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("vision_config", {"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_dimensions_below_one_are_refused_by_name(section, change, message):
    """Zero heads ended in a ZeroDivisionError, or in a model whose first image failed."""
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        LVLM(parse_config(changed_config(section, change)))


def test_several_end_tokens_are_read_and_need_embeddings():
    """Llama 3's config.json lists two; any ends an answer, the first ends trained captions."""
    config = parse_config(changed_config("text_config", {"eos_token_id": [2, 3]}))
    assert config.end_tokens == [2, 3]
    for tokens in ([], [2, "3"], [2, -1], -1):
        with pytest.raises(ValueError, match="no embedding of <image> or end token"):
            parse_config(changed_config("text_config", {"eos_token_id": tokens}))


@pytest.mark.parametrize("rope_type", ["rope_type", "type"])
def test_default_rope_scaling_changes_nothing(rope_type):
    raw = changed_config("text_config", {"rope_scaling": {rope_type: "default"}})
    assert parse_config(raw) == parse_config(random_config())


def test_rope_parameters_win_over_rope_theta():
    """As in transformers 5, which writes them; an integer base is a number too."""
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    raw = changed_config("text_config", {"rope_theta": 7.0, "rope_parameters": rope})
    assert parse_config(raw).decoder.rope_theta == 50000.0
    assert parse_config(changed_config("text_config", {"rope_theta": 7})).decoder.rope_theta == 7


def test_image_token_id_is_the_newer_name_of_image_token_index():
    raw = random_config()
    raw["image_token_id"] = raw.pop("image_token_index")
    assert parse_config(raw) == parse_config(random_config())


def test_fields_of_the_full_config_that_this_code_does_not_use_are_left_alone():
    raw = hub_config(VICUNA_7B | {"use_cache": True, "pretraining_tp": 1})
    raw["vision_config"] = CLIP_L_336 | {"initializer_factor": 1.0}
    assert parse_config(raw) == parse_config(hub_config(VICUNA_7B))


@pytest.mark.parametrize(
    "raw, message",
    [
        ([1], r"section is \[1\], wanted a JSON object"),
        ({"lora_rank": 4, "scene": 1}, r"section has unknown fields \['scene'\]"),
        ({"lora_rank": "4"}, "section: lora_rank is '4', wanted"),
        ({"lora_rank": None}, "section: lora_rank is None, wanted"),
        ({"lora": 1}, "section: lora is 1, wanted"),
        ({"min_pixels": 1.5}, "section: min_pixels is 1.5, wanted"),
    ],
)
def test_from_json_names_the_field_that_does_not_fit(raw, message):
    with pytest.raises(ValueError, match=message):
        lvlm_module.from_json(VladVAConfig, raw, "section")


# ----------------------------------------------------------------------- the embedded default


def test_the_tiny_folder_is_small_half_precision_and_complete():
    folder = data.model_folder("tiny")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}
    lvlm = load_lvlm(folder)
    assert lvlm.config.decoder.tie_word_embeddings
    assert all(p.isfinite().all() for p in lvlm.parameters())


def test_the_tiny_model_describes_scenes_it_has_never_seen():
    """A foundation that had decayed would show here; docs/results.md has the figures of more."""
    from extras import scenes

    scores = scenes.caption_accuracy(VladVA.from_pretrained("tiny"), seed=77, count=40)
    assert scores["placed"] > 80
    assert scores["where"] > 80
