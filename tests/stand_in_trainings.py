"""Trainings on the stand-in for an accelerator: they equal those of the CPU."""

import pytest
import torch
from stand_in_checks import check


@check()
def the_unet_trains_as_on_the_cpu():
    on_cpu, on_device, fused = _losses("cpu"), _losses("npu"), _losses("npu", fused=True)
    assert on_device == pytest.approx(on_cpu, rel=1e-6) and fused == pytest.approx(on_cpu, rel=1e-6)


@check()
def the_unet_trains_in_half_precision():
    assert _losses("npu", torch.float16) == pytest.approx(_losses("cpu"), rel=1e-3)


def _unet():
    from diffusers import UNet2DConditionModel
    from diffusers.models import activations

    from sdnb.models.embedded import ARCHITECTURES

    activations.is_torch_npu_available = lambda: False  # torch_npu's GEGLU is for its device only, and not exact
    torch.manual_seed(0)
    return UNet2DConditionModel(**ARCHITECTURES["tiny-random"]["unet"])


def _batch(generator, size=2):
    noise = [torch.randn(size, 4, 16, 16, generator=generator) for _ in range(2)]
    return *noise, torch.randint(0, 1000, (size,), generator=generator), torch.randn(size, 7, 64, generator=generator)


def _losses(device, half=None, fused=False):
    """Of three steps; the third follows two updates."""
    unet, generator, losses = _unet().to(device), torch.Generator().manual_seed(1), []
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=fused)
    scaler = torch.amp.GradScaler(device, enabled=half is not None)
    for _ in range(3):
        latents, noise, times, texts = (tensor.to(device) for tensor in _batch(generator))
        with torch.autocast(device, half, enabled=half is not None):
            predicted = unet(latents + noise, times, texts).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@check("lost_rank", "wrong_sum")
def two_ranks_train_as_one():
    from accelerate import notebook_launcher

    from sdnb.launch.ranks import free_port

    notebook_launcher(_two_ranks, num_processes=2, use_port=str(free_port()))


def _two_ranks():
    """Each on half of the images, with two micro-batches in a step."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    unet = _unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(gradient_accumulation_steps=2, kwargs_handlers=[views])
    assert (accelerator.distributed_type, accelerator.state.backend) == ("MULTI_NPU", "hccl")
    rank = accelerator.process_index
    assert accelerator.device == torch.device("npu", rank)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    alone, generator = _unet(), torch.Generator().manual_seed(1)
    optimizer_alone = torch.optim.AdamW(alone.parameters(), lr=1e-4)
    for index in range(4):
        latents, noise, times, texts = _batch(generator)
        loss_alone = torch.nn.functional.mse_loss(alone(latents + noise, times, texts).sample, noise)
        (loss_alone / 2).backward()
        if index % 2:
            optimizer_alone.step()
            optimizer_alone.zero_grad()
        own = (tensor[rank : rank + 1].to(accelerator.device) for tensor in (latents + noise, times, texts, noise))
        with accelerator.accumulate(unet):
            *inputs, goal = own
            loss = torch.nn.functional.mse_loss(unet(*inputs).sample, goal)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert accelerator.gather(loss.detach()).mean().item() == pytest.approx(loss_alone.item(), rel=1e-5)
    assert accelerator.gather(torch.full((1, 2), rank, device=accelerator.device)).tolist() == [[0, 0], [1, 1]]
    ranks = [None, None]
    torch.distributed.all_gather_object(ranks, {"rank": rank})
    assert ranks == [{"rank": 0}, {"rank": 1}]
