"""A fixed sample of the bad inputs of bad_input.py, which says what is checked and runs all.

Not here: mutants of images, and what takes long (python tests/bad_input.py, by hand).
"""

import bad_input
import pytest

# kind | label of bad_input.all_cases(), and the command where several have both
SAMPLE = """
model/config.json | vision_config.hidden_size -1
model/config.json | text_config.num_key_value_heads '8'
model/config.json | vision_feature_layer 100
model/config.json | projector_hidden_act 'other'
model/config.json | [[[[[[
model/preprocessor_config.json | size 5
model/tokenizer.json | zeros
model/model.safetensors | huge
model/model.safetensors | pickle
model/model.safetensors | tensor absent
shards/model.safetensors.index.json | weight_map {'a': '.'}
shards/b.safetensors | cut
merged/vladva.json | config.image_template ''
run/adapter.safetensors | config.temperature -1
run/adapter.safetensors | tensor NaN
half/config.json | lr 'x'
half/checkpoints/step-000001.safetensors | tensor.exp_avg twice as long
half/checkpoints/step-000001.safetensors | tensor.step absent
coco.npz | image_emb pickle
coco.npz | text_emb complex
coco.npz | image_emb no rows of (4, 8)
coco/dataset_coco.json | images.0.filename '../outside.png'
sugarcrepe/swap_att.json | 0.filename absent
image | EPS
image in pairs | (1, 200000) | check
image in pairs | bomb, all rows | train
row | image '../outside.png' | fill
row | short '@nested' | check
row | long '\\ud800' | check
row | line '[[[[[[[[[[[[' | fill
row | generated @digits | check
flag | --model 'none/at/all'
flag | --temperature 'nan'
flag | --text-data 'none/at/all'
flag | --steps 1
output | --save-embeddings 'none/x'
output | --out 'pairs.jsonl/x'
flag | --out half
flag | --out leftover
flag | --lr 5
"""
CASES = {}
for case in bad_input.all_cases():
    CASES[f"{case.kind} | {case.label} | {case.command}"] = case
    CASES.setdefault(f"{case.kind} | {case.label}", case)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bad_input.make_world(tmp_path_factory.mktemp("bad_input"))


def test_the_generator_makes_hundreds_of_different_cases_for_all_commands():
    cases = bad_input.all_cases()
    assert len({(case.kind, case.label, case.command) for case in cases}) == len(cases) > 300
    assert {case.command for case in cases if case.expected == "refused"} == {*bad_input.COMMANDS}


@pytest.mark.parametrize("name", SAMPLE.strip().splitlines())
def test_a_bad_input_ends_in_one_line_and_nothing_is_lost(name, world, tmp_path):
    ending = bad_input.run_case(CASES[name], world, tmp_path / "case")
    assert bad_input.problem(CASES[name], ending) is None
