"""A device that is not there: what its tensors hold lies on the CPU, and it is as strict as a GPU.

Under ``Elsewhere``, "meta", where torch keeps tensors without values, becomes a device that has
them. As on Apple's GPUs, its tensors refuse to be float64 and to meet tensors of the CPU (single
numbers and indices excepted). So code that creates a tensor in the wrong place, or moves a table in
float64, fails here as it would there.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
NAME = "meta"


class Far(torch.Tensor):
    """A tensor that says it is on the device; ``near`` holds its values."""

    @staticmethod
    def __new__(cls, near: torch.Tensor) -> "Far":
        if near.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(),
            dtype=near.dtype, device=NAME,
        )  # fmt: skip

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While this is on, the device is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked).type
    far = any(isinstance(x, Far) for x in tensors)
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if far and not moves and func is not aten.index.Tensor:
        strays = [x for x in tensors if not isinstance(x, Far) and x.ndim]
        if strays:
            raise RuntimeError(f"{func}: a tensor {tuple(strays[0].shape)} is on the CPU")
    if func is aten.copy_.default:
        out_far = isinstance(args[0], Far)
    else:
        out_far = far if asked is None else asked == NAME
    near = {id(x.near): x for x in tensors if isinstance(x, Far)}

    def open_up(x):
        return x.near if isinstance(x, Far) else x

    def close(x):
        if not isinstance(x, torch.Tensor) or not out_far:
            return x
        return near.get(id(x)) if id(x) in near else Far(x)

    options = {k: torch.device("cpu") if k == "device" and v is not None else v
               for k, v in kwargs.items()}  # fmt: skip
    return tree_map(close, func(*tree_map(open_up, args), **tree_map(open_up, options)))
