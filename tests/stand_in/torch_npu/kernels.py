"""Every operator on device tensors: views are made at once, all others are launched as kernels that compute on the CPU.

The results of a kernel exist from the start, with their shape, which torch computes on its meta device. Their values
come when the kernel runs.
"""

import functools
from types import SimpleNamespace

import torch

from . import copies, devices, generators, memory

aten = torch.ops.aten
# For any device torch computes these by many smaller operators, if a device does not have them.
_WHOLE = {
    "convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward", "native_layer_norm",
    "native_layer_norm_backward", "native_dropout", "embedding", "embedding_dense_backward",
}  # fmt: skip
_TAKE_NUMBERS = {"aten::add", "aten::sub", "aten::mul", "aten::div", "aten::floor_divide"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def register() -> list[torch.library.Library]:
    """Registrations last as long as their library."""
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(call, "PrivateUse1")
    for name in torch._C._dispatch_get_all_op_names():
        space, _, name = name.partition("::")
        packet, _, overload = name.partition(".")
        if space == "aten" and (packet.startswith("_foreach_") or packet in _WHOLE) and "out" not in overload:
            op = getattr(getattr(aten, packet), overload or "default")
            some.impl(name, functools.partial(call, op), "PrivateUse1")
    for name, kernel in (
        ("empty.memory_format", _empty), ("empty_strided", _empty_strided), ("resize_", _resize),
        ("copy_", copies.copy), ("_copy_from", copies.copy_from), ("_to_copy", copies.to_copy),
        ("record_stream", lambda tensor, stream: None), ("_has_compatible_shallow_copy_type", _may_move),
    ):  # fmt: skip
        some.impl(name, kernel, "PrivateUse1")
    some.impl("is_pinned", copies.is_pinned, "CPU")
    some.impl("_pin_memory", copies.pin_memory, "CPU")
    return [everything, some]


@functools.cache
def _facts(op) -> SimpleNamespace:
    """What the schema of an operator says."""
    arguments, returns = op._schema.arguments, op._schema.returns
    written = [a for a in arguments if a.alias_info and a.alias_info.is_write]

    def written_to(result):
        """The argument that a result is; None if it is new."""
        sets = result.alias_info and result.alias_info.before_set
        return next((a.name for a in written if sets and a.alias_info.before_set == sets), None)

    return SimpleNamespace(
        names=[a.name for a in arguments],
        results=[written_to(result) for result in returns],
        out=[a.name for a in written if a.is_out],
        tensors=[a.name for a in arguments if "Tensor" in str(a.type) and op._schema.name not in _TAKE_NUMBERS],
        view=op._schema.name == "aten::set_" or any(r.alias_info and not r.alias_info.is_write for r in returns),
        random=torch.Tag.nondeterministic_seeded in op.tags,
        # Its result is a number, or has a shape that depends on values, which torch finds too late.
        waits=any("Tensor" not in str(r.type) for r in returns) or op._schema.name == "aten::repeat_interleave",
    )


def call(op, *args, **kwargs):
    """Any operator that has a device tensor among its arguments, or makes one."""
    facts = _facts(op)
    if facts.view:
        return memory.view(op, *args, **kwargs)
    arguments = {**dict(zip(facts.names, args)), **kwargs}
    on = devices.used(_device_of(op, arguments))
    for name in facts.tensors:  # torch hands over Python's numbers, which it takes for tensors
        if isinstance(arguments.get(name), (int, float)):
            dtype = torch.result_type(arguments[facts.names[0]], arguments[name])
            arguments[name] = torch.full((), arguments[name], dtype=dtype, device="cpu")
    if facts.random:
        generator = arguments.get("generator") or on.generator
        arguments |= {name: None for name in arguments if name == "generator"}
        seed = generators.draw_seed(generator, torch.device("npu", on.index))
    try:
        results = None if facts.waits else _results(op, facts, arguments, on)
    except NotImplementedError:  # the shape depends on the values
        results = None
    held = {name: each(_empty_host if name in facts.out else _held, value) for name, value in arguments.items()}
    if "device" in held:
        held["device"] = torch.device("cpu")
    compute = functools.partial(computed_by.get(op._schema.name, _itself), op, held)
    if facts.random:
        compute = functools.partial(generators.seeded, seed, compute)
    if results is None:
        return _at_once(on, compute)
    # A kernel writes to the arguments that an operator changes. Results it computes elsewhere, and copies.
    new = [index for index, name in enumerate(facts.results) if name is None or name in facts.out]
    targets = [each(memory.on_host, results[index]) for index in new]
    several = len(results) > 1

    def kernel():  # it does not hold the results, which are freed with their last tensor
        values = compute()
        if new:
            values = values if several else (values,)
            _copy(targets, [values[index] for index in new])

    on.launch(kernel)
    return results[0] if len(results) == 1 else tuple(results) or None


def _device_of(op, arguments: dict):
    """The one device that all tensors are on. Scalars may be on the host, and indices."""
    found = []
    for value in arguments.values():
        each(found.append, value)
    on = {tensor.device for tensor in found if tensor.device.type == "npu"}
    others = {tensor.device for tensor in found if tensor.device.type != "npu" and tensor.dim()}
    if len(on) > 1 or (others and op._schema.name not in _INDEXING):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, on | others)))}! (when checking arguments of {op})"
        )
    return on.pop() if on else arguments["device"]


def each(function, value):
    """Apply a function to a tensor, or to all tensors of a list; other values stay as they are."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return [each(function, part) for part in value] if isinstance(value, (list, tuple)) else value


def _held(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel computes with: the memory of a device tensor, or the value that a host's tensor has now."""
    if tensor.device.type == "npu":
        return memory.on_host(tensor)
    return tensor.clone()


def _empty_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device="cpu")


def _itself(op, held: dict):
    return op(**held)


def in_float32(op, held: dict):
    """With sums in float32, as on an accelerator. torch's own for a CPU in half precision are slow, too."""
    return op(**{name: each(_widened, value) for name, value in held.items()})


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# What computes an operator, where it is not torch's own for a CPU.
computed_by = {
    f"aten::{name}": in_float32
    for name in ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
}  # fmt: skip


def _results(op, facts: SimpleNamespace, arguments: dict, on) -> list:
    """The tensors that an operator will return: arguments that it writes to, and new ones."""
    given = [arguments.get(name) for name in facts.results]
    if None not in facts.results and all(arguments[name].numel() for name in facts.out):
        return given
    key = (op, *((name, _key(value)) for name, value in arguments.items()))
    if key not in _shapes:
        shapes = {name: each(_shape, value) for name, value in arguments.items()}
        found = op(**shapes | {"device": torch.device("meta")} if "device" in shapes else shapes)
        _shapes[key] = found if len(given) > 1 else (found,)
    for tensor, shape, name in zip(given, _shapes[key], facts.results):
        if name in facts.out and tensor.shape != shape.shape:
            _resize(tensor, shape.shape)
    new = functools.partial(_like, on)
    return [each(new, s) if name is None else t for t, s, name in zip(given, _shapes[key], facts.results)]


_shapes = {}  # of results that have been computed, which can take longer than all else


def _key(value):
    """What tells a value from others that could lead to other shapes."""
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype, value.device.type == "npu"
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "npu" and tensor.dim() == 0:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _may_move(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensor.data = other is possible, between this device and the host, too: so parameters stay the same."""
    return {tensor.device.type, other.device.type} <= {"npu", "cpu"} and tensor.layout == other.layout


def _like(on, shape: torch.Tensor) -> torch.Tensor:
    return on.allocate(shape.size(), shape.stride(), shape.dtype)


def _copy(targets: list, values) -> None:
    for target, value in zip(targets, values):
        if isinstance(target, list):
            _copy(target, value)
        elif target is not None and value.numel():  # some results have values in some cases only
            target.copy_(value)


def _at_once(on, compute):
    """Wait for the device, and for an operator: the host needs a value, or a shape."""
    values = []
    on.launch(lambda: values.append(compute()))
    on.run()

    def to_device(value: torch.Tensor) -> torch.Tensor:
        tensor = _like(on, value)
        memory.on_host(tensor).copy_(value)
        return tensor

    value = each(to_device, values[0])
    return tuple(value) if isinstance(values[0], tuple) else value


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    shape = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format)
    return _empty_strided(size, shape.stride(), dtype=shape.dtype, device=device)


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return devices.used(device).allocate(size, stride, dtype or torch.get_default_dtype())


def _resize(tensor: torch.Tensor, size, *, memory_format=None) -> torch.Tensor:
    """To a size that fits into the storage, or into a new one with the old values."""
    shape = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    storage, start = tensor.untyped_storage(), tensor.storage_offset()
    if (start + shape.numel()) * tensor.itemsize > storage.nbytes():
        grown = _empty_strided((start + shape.numel(),), (1,), dtype=tensor.dtype, device=tensor.device)
        old = memory.as_strided(tensor, (storage.nbytes() // tensor.itemsize,), (1,), 0)
        copies.copy(memory.as_strided(grown, old.size(), (1,), 0), old)
        storage = grown.untyped_storage()
    return memory.view(aten.set_.source_Storage_storage_offset, tensor, storage, start, size, shape.stride())
