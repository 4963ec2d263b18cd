"""What of tests/gpu.py runs on a CPU."""

import gpu
import pytest
import torch
from test_train import write_pairs

import train as training
from extras import plan


@pytest.fixture(scope="module")
def model():
    return gpu.random_model(gpu.SMALL_VISION, gpu.SMALL, "cpu", torch.float32)


def test_two_equal_models_have_equal_gradients_and_none_is_zero(model):
    assert gpu.gradient_difference("cpu") == 0
    # lora_b is zero at the start, and with it lora_a's gradient
    for name, gradient in gpu.gradients(model, caching=False).items():
        assert "lora_a" in name or gradient.abs().max() > 0


def test_batches_have_the_lengths_of_the_plan(model):
    batch = gpu.random_batch(model, 3, 20)
    planned = plan.meta_batch(plan.meta_model(plan.DECODERS["7B"]), 3, 20)
    image_tokens = 576 - 4
    assert batch.images.input_ids.shape[1] == planned.images.input_ids.shape[1] - image_tokens
    assert batch.texts.input_ids.shape == planned.texts.input_ids.shape
    assert len(batch.caption_targets) == len(planned.caption_targets)


def test_a_step_is_timed(model):
    batch = gpu.random_batch(model, 2, 5)
    config = training.TrainConfig(gradient_caching=True)
    assert 0 < gpu.seconds_a_step(model, [batch], config, steps=1) < 10


def test_a_run_resumes_to_the_byte(random_folder, tmp_path):
    pairs = write_pairs(tmp_path)
    assert gpu.resumes_to_the_byte("cpu", "--model", str(random_folder), "--data", str(pairs))


def test_without_cuda_it_says_so():
    with pytest.raises(SystemExit, match="needs CUDA"):
        gpu.main([])
