"""Linear layers as convolutions: the same numbers by another library."""

import copy

import torch
from torch import nn
from training import train

from sdnb.machine import onednn_linear
from sdnb.models.pipeline import load_parts
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
    unet = load_parts(config).unet
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
    losses = []
    for slower in (True, False):
        monkeypatch.setattr(onednn_linear, "_mkl_is_slower", lambda slower=slower: slower)
        run = train(settings, steps=4, output_dir=str(tmp_path / str(slower)))
        losses.append(torch.tensor(run.steps.loss.to_numpy()))
        assert len(seen) == 1, "where MKL is slower, and only there"
    assert torch.allclose(*losses, rtol=1e-4)
    monkeypatch.setattr(onednn_linear, "_mkl_is_slower", lambda: True)
    train(settings, mixed_precision="bf16", output_dir=str(tmp_path / "bf16"))
    assert len(seen) == 1, "in float32 only"
