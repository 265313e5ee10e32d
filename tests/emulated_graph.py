"""A CUDA graph on the CPU: what only a capture changes, shows.

`emulated(work)` stands in for `common.captured(work)`. The work runs once under a recorder, and
what it wrote is undone: recording does nothing on a device. What it computed becomes NaN, so that
a result of the recording that is used later shows; a kernel that would make the host wait is an
error, as in a real capture. The function that comes back does the recorded kernels again, on the
same memory, and no Python: what only Python changed does not change again.
"""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten.alias", "aten.lift_fresh",
             "aten.is_same_size")
WAITS = ("_local_scalar", "nonzero", "masked_select", "aten.item", "aten.equal")


def tensors(thing):
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """kernels: those that run again; before: {address: (storage, its content before)} of what was
    written in place; own: addresses of memory that was made while recording."""

    def __init__(self):
        super().__init__()
        self.kernels, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(kernel)
        if any(word in name for word in WAITS):
            raise RuntimeError(f"the host waits while a graph is captured: {name}")
        written = self.written_in_place(kernel._schema, args, kwargs)
        for tensor in written:
            if address(tensor) not in self.before | dict.fromkeys(self.own):
                storage = tensor.untyped_storage()
                self.before[address(tensor)] = (storage, storage.clone())
        out = kernel(*args, **kwargs)
        returns = kernel._schema.returns
        is_view = any(one.alias_info and not one.alias_info.is_write for one in returns)
        if not written and not is_view:
            self.own.update(address(tensor) for tensor in tensors(out))
        if not is_view and not name.startswith(NO_KERNEL):
            self.kernels.append((kernel, args, kwargs, [] if written else tensors(out)))
        return out

    @staticmethod
    def written_in_place(schema, args, kwargs):
        given = list(zip(args, schema.arguments, strict=False))
        given += [(kwargs[one.name], one) for one in schema.arguments if one.name in kwargs]
        return [value for value, one in given
                if one.alias_info and one.alias_info.is_write and isinstance(value, torch.Tensor)]


def emulated(work):
    recorder = Recorder()
    with recorder:
        work()
    for storage, content in recorder.before.values():
        storage.copy_(content)
    for _, _, _, results in recorder.kernels:
        for tensor in results:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def replay():
        for kernel, args, kwargs, results in recorder.kernels:
            again = tensors(kernel(*args, **kwargs))
            for tensor, value in zip(results, again, strict=False):
                tensor.copy_(value)
    return replay
