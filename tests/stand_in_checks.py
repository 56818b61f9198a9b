"""What must hold on the stand-in for an accelerator. Each check runs in a process of its own, see test_stand_in.py."""

import concurrent.futures
import os
import time
import traceback

import pytest
import torch

CHECKS = {}  # functions by their names
FAULTS = {}  # the name of a check that notices a fault of the stand-in


def check(*faults):
    """Decorates a function that notices these faults."""

    def add(function):
        CHECKS[function.__name__] = function
        FAULTS.update(dict.fromkeys(faults, function.__name__))
        return function

    return add


def in_fork(function, *arguments):
    """Run a function in a forked process; raises AssertionError with what it raises."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with open(reading) as file:
            problem = file.read()
        status = os.waitpid(child, 0)[1]
        assert not problem and status == 0, problem or f"it ended with status {status}"
        return
    try:
        function(*arguments)
    except BaseException:
        os.write(writing, traceback.format_exc().encode())
    os._exit(0)


def run(name, fault):
    """A check, on a stand-in that may have a fault."""
    import torch_npu

    if fault:
        torch_npu.faults.apply(fault)
    CHECKS[name]()


# waiting and time


@check("no_synchronize")
def waits():
    ones = torch.ones(3, device="npu")
    early = (ones + ones).to("cpu", non_blocking=True)
    assert early.isnan().all()
    torch.npu.synchronize()
    assert early.tolist() == [2, 2, 2]
    assert (ones + 2).cpu().tolist() == [3, 3, 3]  # a copy that blocks waits by itself


@check()
def an_event_waits_for_what_was_before_it():
    first, event = torch.ones(1, device="npu").to("cpu", non_blocking=True), torch.npu.Event()
    event.record()
    second = torch.ones(1, device="npu").to("cpu", non_blocking=True)
    assert not event.query()
    event.synchronize()
    assert event.query() and first.item() == 1 and second.isnan()
    torch.npu.current_stream().synchronize()
    assert second.item() == 1


@check("stale_copy")
def pinned_memory_is_read_late():
    pinned, pageable = torch.ones(2).pin_memory(), torch.ones(2)
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not pageable.is_pinned()
    copies = [host.to("npu", non_blocking=True) for host in (pinned, pageable)]
    pinned.fill_(7), pageable.fill_(7)
    assert [copy.tolist() for copy in copies] == [[7, 7], [1, 1]]


@check()
def a_loader_pins_its_batches():
    batches = list(torch.utils.data.DataLoader(torch.arange(4.0), batch_size=2, pin_memory=True))
    assert all(batch.is_pinned() for batch in batches) and batches[1].tolist() == [2, 3]


@check("host_clock")
def events_measure_the_device():
    before, after = (torch.npu.Event(enable_timing=True) for _ in range(2))
    before.record()
    torch.npu._sleep(0.05)
    after.record()
    time.sleep(0.3)
    torch.npu.synchronize()
    time.sleep(0.3)
    assert 50 <= before.elapsed_time(after) < 250


# memory


@check("memory_in_mib", "peak_not_reset", "never_frees")
def memory_is_counted_in_bytes():
    before, reserved = torch.npu.memory_allocated(), torch.npu.memory_reserved()
    large = torch.empty(3 * 2**20, dtype=torch.uint8, device="npu")
    part = large[:10]
    assert torch.npu.memory_allocated() - before == 3 * 2**20
    assert torch.npu.memory_reserved() - reserved == 4 * 2**20
    del large
    assert torch.npu.memory_allocated() - before == 3 * 2**20, "a view keeps it"
    del part
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() - before == 3 * 2**20
    torch.npu.reset_peak_memory_stats()
    torch.npu.empty_cache()
    assert torch.npu.max_memory_allocated() == before and torch.npu.memory_reserved() == reserved
    assert torch.npu.mem_get_info() == (2**30 - reserved, 2**30)
    assert torch.npu.get_device_properties(0).total_memory == 2**30


@check()
def memory_is_freed_before_kernels_run():
    before = torch.npu.memory_allocated()
    for _ in range(10):  # of 128 MiB, with 1 GiB
        torch.zeros(2**25, device="npu").add_(1)
    assert torch.npu.memory_allocated() == before


@check()
def memory_ends():
    with pytest.raises(RuntimeError, match=r"NPU out of memory\. Tried to allocate 2048\.00 MiB"):
        torch.empty(2**31, dtype=torch.uint8, device="npu")
    torch.ones(3, device="npu")


@check()
def torch_accelerator_is_it():
    assert torch.accelerator.current_accelerator().type == "npu" and torch.accelerator.device_count() == 2
    tensor = torch.ones(256, device="npu")
    assert torch.accelerator.memory_allocated() == tensor.nbytes
    early = tensor.to("cpu", non_blocking=True)
    torch.accelerator.synchronize()
    assert early.sum() == 256


# random numbers


@check("generator_not_restored", "seed_ignored")
def random_numbers_repeat():
    def draw():
        return torch.rand(2, device="npu").tolist()

    torch.manual_seed(3)
    first, on_host = draw(), torch.rand(2).tolist()
    torch.manual_seed(3)
    assert draw() == first != on_host
    state, second = torch.npu.get_rng_state(), draw()
    assert second != first
    torch.npu.set_rng_state(state)
    assert draw() == second
    own = [torch.Generator("npu").manual_seed(5) for _ in range(2)]
    assert own[0].device == torch.device("npu:0") and isinstance(torch.default_generator, torch.Generator)
    assert len({tuple(torch.randn(2, generator=one, device="npu").tolist()) for one in own}) == 1
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, generator=torch.Generator(), device="npu")


# computing


@check()
def tensors_stay_where_they_are():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="npu") + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="npu:0") + torch.ones(2, device="npu:1")
    assert (torch.ones(2, device="npu") * torch.tensor(3.0)).tolist() == [3, 3]
    assert torch.ones(1, device="npu:1").new_tensor([1]).get_device() == 1
    with torch.device("npu"):
        assert torch.tensor([1]).is_npu and torch.ones(2).is_npu
    with torch.npu.device(1):
        assert {torch.ones(2).to("npu").device.index, torch.ones(2, device="npu").device.index} == {1}


@check()
def views_alias():
    base = torch.zeros(4, 3, device="npu", requires_grad=True)
    table = base * 1
    table[1:3, 2] = table[0, :2] * 3 + 5
    table.t()[0].add_(1)
    table.square().sum().backward()
    assert table.tolist() == [[1, 0, 0], [1, 0, 5], [1, 0, 5], [1, 0, 0]]
    assert base.grad.tolist() == [[32, 30, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]]


@check()
def gradients_come_on_any_device_and_thread():
    def backward(index):
        tensor = torch.ones(2, device=f"npu:{index}", requires_grad=True)
        (tensor * 3).sum().backward()
        return tensor.grad.tolist()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        for index in range(2):
            assert backward(index) == thread.submit(backward, index).result() == [3, 3]


@check()
def values_decide_shapes():
    tensor = torch.arange(6, device="npu")
    assert tensor[tensor % 2 == 0].tolist() == [0, 2, 4] and tensor.nonzero().shape == (5, 1)
    assert torch.equal(tensor, tensor.clone()) and bool((tensor >= 0).all())


@check()
def a_module_moves_with_its_parameters():
    import io

    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    assert layer.to("npu").weight is weight and weight.is_npu
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for where, expected in ((None, "npu"), ("cpu", "cpu")):
        file.seek(0)
        loaded = torch.load(file, map_location=where)["weight"]
        assert loaded.device.type == expected and torch.equal(loaded.cpu(), weight.cpu())


@check()
def autocast_chooses_precisions():
    one = torch.randn(3, 3, device="npu")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("npu", dtype):
            half = one @ one
            assert half.dtype == torch.nn.functional.linear(one, one).dtype == dtype
            assert (half + one).dtype == half.softmax(-1).dtype == half.sum().dtype == half.exp().dtype == torch.float32
            assert torch.nn.functional.layer_norm(half, (3,)).dtype == half.norm().dtype == torch.float32
    assert (one @ one).dtype == torch.float32


@check("scaler_never_skips", "saturates")
def the_scaler_skips_an_overflow():
    layer = torch.nn.Linear(4, 4, bias=False).to("npu")
    before, optimizer = layer.weight.tolist(), torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("npu", init_scale=2.0**15)
    with torch.autocast("npu", torch.float16):
        loss = layer(torch.full((2, 4), 1e3, device="npu")).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert layer.weight.tolist() == before and scaler.get_scale() == 2.0**14


@check("bf16_claimed")
def half_products_are_right():
    for dtype in (torch.float16, torch.bfloat16):
        one = torch.randn(8, 8).to(dtype)
        assert torch.allclose((one.npu() @ one.npu()).float().cpu(), (one.float() @ one.float()), rtol=2e-2, atol=2e-2)


@check("wrong_norm")
def a_half_group_norm_is_right():
    images = torch.randn(2, 4, 8, 8).half()
    expected = torch.nn.functional.group_norm(images.float(), 2)
    assert torch.allclose(torch.nn.functional.group_norm(images.npu(), 2).float().cpu(), expected, atol=4e-3)


@check("gelu_by_tanh")
def gelu_is_exact():
    numbers = torch.linspace(-3, 3, 50)
    exact = torch.nn.functional.gelu(numbers)
    assert torch.allclose(torch.nn.functional.gelu(numbers.npu()).cpu(), exact, atol=1e-6)


@check("weights_in_half")
def the_optimizer_keeps_float32():
    weight = torch.ones(3, device="npu", requires_grad=True)
    weight.grad = torch.ones(3, device="npu")
    torch.optim.AdamW([weight], lr=1e-4).step()
    assert weight.cpu().lt(1).all()


# processes


@check()
def a_used_device_cannot_be_forked():
    torch.ones(2, device="npu")
    assert not torch.npu._is_in_bad_fork()
    in_fork(_device_is_refused)


def _device_is_refused():
    assert torch.npu._is_in_bad_fork()
    with pytest.raises(RuntimeError, match="Cannot re-initialize NPU in forked subprocess"):
        torch.ones(2, device="npu")


@check()
def libraries_find_it():
    from accelerate import Accelerator
    from accelerate.utils import is_npu_available
    from diffusers.utils import is_torch_npu_available as in_diffusers
    from transformers.utils import is_torch_npu_available as in_transformers

    assert is_npu_available(check_device=True) and in_diffusers() and in_transformers()
    assert Accelerator(mixed_precision="fp16").device.type == "npu"


@check()
def all_faults_are_tried():
    import torch_npu

    assert set(torch_npu.faults.FAULTS) == set(FAULTS)
