"""Another device than the CPU, where there is none: what is put there computes on the CPU, and meets no CPU tensor.

with OtherDevice():
    x = elsewhere(torch.ones(3))  # x.device is "meta", in the place of a GPU
    x + 1                         # as on a GPU, a number is taken from anywhere
    x + torch.ones(3)             # AssertionError, where a GPU has an error of its own
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

COPIES, INDEX = ("aten::_to_copy", "aten::copy_"), ("aten::index", "aten::index_put_")


class Elsewhere(Tensor):
    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device="meta")

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def new_tensor(self, *args, **kwargs):
        return elsewhere(self.inner.new_tensor(*args, **kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def elsewhere(values):
    """Tensors in dictionaries, lists and so on."""
    return tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, Tensor) else leaf, values)


def compute(func, args, kwargs):
    name, tensors = func.name().split(".")[0], [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    theirs = [t for t in tensors if not isinstance(t, Elsewhere) and t.ndim > 0]
    ours = any(isinstance(t, Elsewhere) for t in tensors)
    if name in INDEX:  # a GPU's tensor takes indices from the CPU, not the other way round
        assert not ours or isinstance(args[0], Elsewhere), f"{name}: a CPU tensor, and indices from elsewhere"
    elif name not in COPIES:
        assert not (ours and theirs), f"{name}: CPU tensors among others"
    args, kwargs = tree_map(lambda leaf: leaf.inner if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    if asked := kwargs.get("device"):
        kwargs, ours = kwargs | {"device": "cpu"}, torch.device(asked).type == "meta"
    found = func(*args, **kwargs)
    return elsewhere(found) if ours else found


class _Made(TorchDispatchMode):
    """What is made elsewhere from the start, torch.zeros(3, device=x.device)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Told(TorchFunctionMode):
    """The same of torch.tensor([1, 2], device=x.device), whose numbers no dispatcher sees."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            return elsewhere(torch.tensor(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def other_device():
    with _Made(), _Told():
        yield
