"""Linear layers as convolutions: the same numbers by another library."""

import copy

import torch
from torch import nn
from training import train

from sdnb.machine import onednn_linear
from sdnb.models import pipeline as models
from sdnb.settings.config import TrainConfig


def test_a_linear_layer_is_a_convolution():
    layer = nn.Linear(12, 20)
    other = copy.deepcopy(layer)
    onednn_linear.convolve(other)
    assert type(other) is onednn_linear.ConvolvedLinear and list(other.state_dict()) == ["weight", "bias"]
    for shape in ((3, 5, 12), (2, 3, 5, 12), (4, 12)):
        tokens = torch.randn(shape)[..., torch.randperm(12)]
        results = []
        for one in (layer, other):
            one.zero_grad()
            given = tokens.clone().requires_grad_()
            given_back = one(given)
            given_back.square().sum().backward()
            results.append((given_back, given.grad, one.weight.grad, one.bias.grad))
        for mine, its in zip(*results):
            assert mine.shape == its.shape and torch.allclose(mine, its, rtol=1e-4, atol=1e-5)
    without = nn.Linear(12, 20, bias=False)
    assert torch.allclose(onednn_linear.as_convolution(tokens, without.weight), without(tokens), atol=1e-6)


def test_a_whole_unet(settings):
    config = TrainConfig(**settings)
    unet = models.load(config).unet
    convolved = copy.deepcopy(unet)
    onednn_linear.convolve(convolved)
    given = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, unet.config.cross_attention_dim)
    one, other = (each(*given).sample for each in (unet, convolved))
    assert not torch.equal(one, torch.zeros_like(one)) and torch.allclose(one, other, atol=1e-5)
    assert list(convolved.state_dict()) == list(unet.state_dict())


def test_a_training_is_the_same_either_way(settings, monkeypatch, tmp_path):
    seen = []
    convolve = onednn_linear.convolve
    monkeypatch.setattr(onednn_linear, "convolve", lambda module: (seen.append(module), convolve(module)))
    monkeypatch.setattr(onednn_linear, "_mkl_falls_behind", lambda: True)
    losses = []
    for asked in (True, False):
        run = train(settings, steps=4, onednn_linear=asked, output_dir=str(tmp_path / str(asked)))
        losses.append(torch.tensor(run.steps.loss.to_numpy()))
        assert len(seen) == 1, "where it is asked for, and only there"
    assert torch.allclose(*losses, rtol=1e-4)
    train(settings, mixed_precision="bf16", output_dir=str(tmp_path / "bf16"))
    monkeypatch.setattr(onednn_linear, "_mkl_falls_behind", lambda: False)
    train(settings, output_dir=str(tmp_path / "elsewhere"))
    assert len(seen) == 1
