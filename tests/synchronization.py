"""Finds operations that wait for a GPU, on a GPU and without one.

On CUDA torch itself reports them (`torch.cuda.set_sync_debug_mode`). Elsewhere a mode sees every operation and refuses
those that wait on CUDA. Run it on the meta device as well: there a tensor has no values, so that whoever asks for one
gets an error from torch, and a tensor on the CPU among the operands is one that CUDA would have to wait for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


aten = torch.ops.aten
# They return a number to Python, or a tensor whose size depends on values.
WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# They make a tensor from numbers of Python and copy it to the device.
COPYING = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}
BY_INDEX = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class SynchronizationError(AssertionError):
    """An operation that waits for the device on CUDA."""


class _RefuseWaiting(TorchDispatchMode):
    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        operation = func.overloadpacket
        indices = tree_leaves(args[1]) if operation in INDEXING else []
        by_mask = any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices
        )
        by_lengths = operation is aten.repeat_interleave and kwargs.get("output_size") is None
        target = kwargs.get("device")
        elsewhere = {tensor.device.type for tensor in tensors} - {self.device_type}
        if operation is aten._to_copy and target is not None and target.type != self.device_type:
            elsewhere.add(target.type)
        if operation in WAITING or by_mask or by_lengths or elsewhere:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise SynchronizationError(f"{func} waits for the device; its operands have the shapes {shapes}")
        return func(*args, **kwargs)


class _RefuseCopying(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = args[1] if func in (torch.Tensor.new_tensor, *BY_INDEX) else args[0]
        if func in COPYING and not isinstance(given, torch.Tensor):
            raise SynchronizationError(f"{func.__name__} copies numbers to the device and waits for it")
        if func in BY_INDEX and any(isinstance(part, list) for part in (given if type(given) is tuple else [given])):
            raise SynchronizationError("a list as index is copied to the device, which waits for it")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronization(device: torch.device | str) -> Iterator[None]:
    """An error from everything inside that waits for the device. Give `"cpu"`, `"meta"` or a CUDA device."""
    device = torch.device(device)
    if device.type != "cuda":
        with _RefuseWaiting(device.type), _RefuseCopying():
            yield
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
