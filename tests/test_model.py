"""What model.py promises: a small network that others' code can use."""

import os

import pytest
import torch
from conftest import CPU
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from dataset import normalize, synthetic_images
from model import CNN
from train import fast_bfloat16


@pytest.fixture
def images():
    """Smooth ones: their whitened differences are small numbers made large."""
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.randn(100, 3, 4, 4), 32, mode="bicubic")
    return images + 0.02 * torch.randn(images.shape)


def test_ten_logits_for_images_of_any_size():
    for size, width in ((16, 1), (24, 8), (32, 32), (45, 8)):
        network = CNN(width).eval()
        assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_the_default_network_is_under_a_million_parameters():
    parameters = sum(weight.numel() for weight in CNN().parameters())
    assert 10_000 < parameters < 1_000_000  # as the assignment asks


def test_whitening_makes_the_outputs_uncorrelated():
    images = normalize(synthetic_images()["train"][0][:500])
    network = CNN()
    network.whiten(images)
    with torch.no_grad():
        outputs = network.whitening(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs[:12].cov(), torch.eye(12), rtol=0, atol=0.02)
    torch.testing.assert_close(outputs[12:], -outputs[:12])
    assert not any(x.requires_grad for x in network.whitening.parameters())


def test_torch_fx_can_read_it(images):
    """As torchvision's `create_feature_extractor` and many tools do."""
    network = CNN().eval()
    expected = network(images)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(images), expected)
    outputs = {"blocks": "features", "linear": "out"}
    found = create_feature_extractor(network, outputs)(images)
    torch.testing.assert_close(found["out"], expected)
    features = network.linear(found["features"].amax((2, 3)) / 2)
    torch.testing.assert_close(features, expected)


@pytest.mark.skipif(os.name == "nt" and not fast_bfloat16(CPU), reason="it may crash")
def test_bfloat16_computes_nearly_the_same(images):
    network = CNN()
    network.whiten(images)
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            short = network(images).float()
    spread = (exact - exact.mean(0)).norm()
    assert 0 < (short - exact).norm() < 0.05 * spread
