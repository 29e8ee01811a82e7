"""Devices that are not there: tensors on them compute on the CPU, but refuse to mix as those of CUDA do.

`PretendTensor` says that it is on a device such as `cuda:1`. Within `pretended()`, operations on tensors of different
devices raise, new tensors are where they are asked for, and `numpy()` works on the CPU alone; what CUDA allows is
allowed: numbers (tensors of no dimension) of the CPU, indices on the CPU, and copies from one device to another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
_COPIES = {"aten._to_copy.default", "aten.copy_.default", "aten._foreach_copy_.default"}
_INDEXED = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default"}


class PretendTensor(torch.Tensor):
    """A tensor that says it is on another device than the CPU, where its numbers are."""

    held: torch.Tensor
    where: torch.device

    @staticmethod
    def __new__(cls, real: torch.Tensor, where: torch.device) -> PretendTensor:
        assert not isinstance(real, PretendTensor), "it pretends already"
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            layout=real.layout, device="meta", requires_grad=real.requires_grad,
        )  # fmt: skip
        made.held, made.where = real, where
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"PretendTensor({self.held}, {self.where})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.where.type == "cuda"

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.held.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.where} device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        copied: Any = PretendTensor(self.held.clone(), self.where).requires_grad_(self.requires_grad)
        copied = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args, kwargs = args[:1], {**(kwargs or {}), "device": args[1].device, "dtype": args[1].dtype}
        if func is torch.Tensor.to and args[0].requires_grad:
            places = [one for one in (*args[1:], *(kwargs or {}).values()) if isinstance(one, str | torch.device)]
            if places and _placed(places[0]) != args[0].device:
                args = (_Moved.apply(args[0], _placed(places[0])), *args[1:])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):  # C++ would put the list on the meta device
            args = (args[0], _indices(args[1]), *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Moved(torch.autograd.Function):
    """A copy on another device, whose gradient goes back: C++, which does so for real ones, knows no pretended one."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, device: torch.device) -> torch.Tensor:
        ctx.before = given.device
        return given.detach().to(device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, None]:
        return gradients[0].to(ctx.before), None


def _indices(given: Any) -> Any:
    """Indices with tensors in the place of lists and arrays."""
    if isinstance(given, tuple):
        return tuple(_indices(one) for one in given)
    return _REAL_AS_TENSOR(given) if isinstance(given, list | np.ndarray) else given


def _placed(device: Any) -> torch.device:
    found = torch.device(device)
    return torch.device("cuda", 0) if found.type == "cuda" and found.index is None else found


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on the CPU, if the devices of its tensors allow it, and say where its results are."""
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        with _Pretending():  # made of others, each of which comes here
            return func.decompose(*args, **kwargs)
    asked, where = kwargs.get("device"), CPU
    if asked is None or str(func) not in _COPIES:
        where = _device_of(func, args, kwargs)
    if asked is not None and torch.device(asked).type == "meta":  # what C++ believes a pretended device to be
        asked = where if where != CPU or func is torch.ops.aten.scalar_tensor.default else asked
    if asked is not None:
        where = _placed(asked)
        kwargs = {**kwargs, "device": where if where.type == "meta" else CPU}
    result = func(*tree_map(_real, args), **tree_map(_real, kwargs))
    if where.type in ("cpu", "meta"):
        return result
    wrapped = tree_map(lambda one: PretendTensor(one, where) if type(one) is torch.Tensor else one, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _real(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _device_of(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """The device of an operation's tensors.

    Raises:
        RuntimeError: If there are several, and CUDA would refuse them.
    """
    name = str(func)
    if name in _COPIES:
        first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
        return first.device
    lists = [one for one in args if isinstance(one, list | tuple) and one and isinstance(one[0], torch.Tensor)]
    if name.startswith(("aten._foreach", "aten._fused")):  # each element of the lists by itself
        for each in zip(*lists, strict=False):
            _check(name, each)
        return lists[0][0].device
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    if name in _INDEXED:
        indices = [one for one in args[1] if one is not None]
        tensors = [one for one in tensors if not any(one is index and index.device == CPU for index in indices)]
        return _check(name, tensors, by=args[0].device)
    return _check(name, tensors)


def _check(name: str, tensors: Any, by: torch.device | None = None) -> torch.device:
    devices = {one.device for one in tensors if one.dim() > 0} | ({by} if by else set())
    if len(devices) <= 1 and not devices - {CPU}:  # numbers alone, or the CPU
        numbers = {one.device for one in tensors} - {CPU}
        if devices and numbers:
            devices |= numbers
        elif numbers:
            devices = numbers
    others = {one.device for one in tensors if one.dim() == 0} - {CPU}
    devices |= others
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {sorted(map(str, devices))} in {name}"
        )
    return next(iter(devices), CPU)


class _Pretending(TorchDispatchMode):
    """Makes tensors where they are asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> torch.Tensor:
    made = _REAL_TENSOR(data, **options)
    return (made if device is None else made.to(device)).requires_grad_(requires_grad)


def _as_tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
    made = _REAL_AS_TENSOR(data, **options)
    return made if device is None or _placed(device) == made.device else made.to(device)


_REAL_TENSOR, _REAL_AS_TENSOR = torch.tensor, torch.as_tensor


class _Generator:
    """Makes generators for devices that are not there."""

    real = torch.Generator

    def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
        return cls.real()


@contextlib.contextmanager
def pretended(monkeypatch: Any) -> Iterator[None]:
    """Within the `with` block, there are CUDA devices to pretend to be on."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch, "tensor", _tensor)
        patch.setattr(torch, "as_tensor", _as_tensor)
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext())
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 34, 1 << 35))
        patch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
        patch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
        with _Pretending():
            yield


def move(module: nn.Module, device: str) -> None:
    """Say that all parameters and buffers of a module are on a device; one that several modules share stays one."""
    where, moved = torch.device(device), {}
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None or isinstance(tensor, PretendTensor):
                continue
            if id(tensor) not in moved:
                made: Any = PretendTensor(tensor.detach(), where)
                is_parameter = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
            (part._parameters if name in part._parameters else part._buffers)[name] = moved[id(tensor)]


def moving_inputs(module: nn.Module, device: str) -> None:
    """Move what a module is called with to a device first, as accelerate does where a model goes on on another."""

    def to_device(_: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, (args, kwargs))

    module.register_forward_pre_hook(to_device, with_kwargs=True)
