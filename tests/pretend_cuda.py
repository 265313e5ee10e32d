"""A pretended CUDA device: what forks forget on a CPU is refused here as a card would refuse it.

`with pretended() as counts:` tensors on "cuda" live on the CPU, say that they are on cuda:0, and
refuse other devices beside them, numpy, and indices on the device for a tensor on the host. A model
is loaded on the CPU and then moved. counts: kernels by name (views and allocations are none), and
what makes the host wait for the device ("wait: ..."). Not pretended: CUDA graphs (`common.captured`
runs the work), streams, memory, and which kernel CUDA would choose.
"""
import collections
import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import common

CUDA = torch.device("cuda", 0)
COUNTS = collections.Counter()
# With tensors of both devices: copies, and indices on the host (which are copied over first).
MIXED = ("aten.copy_", "aten.index.", "aten.index_put", "aten._index_put")
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique",
         "aten._unique", "aten.equal")
NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.alias",
             "aten._local_scalar_dense", "aten.lift_fresh")


class Pretended(torch.Tensor):
    """A tensor that says that it is on cuda:0. held: the one on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="cpu")

    def __init__(self, held):
        assert type(held) is not Pretended
        self.held = held

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.held = other.held

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self):
        COUNTS["wait: tolist"] += 1
        return self.held.tolist()

    def __repr__(self, **kwargs):
        return f"Pretended({self.held!r})"

    def __reduce_ex__(self, protocol):  # torch.save; loaded with map_location="cpu"
        return self.held.__reduce_ex__(protocol)

    def to(self, *words, **more):  # in a backward pass there is no `Placing`
        return place(torch.Tensor.to, self, *words, **more)

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, leaves = str(func), tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        host = [tensor for tensor in tensors if type(tensor) is not Pretended and tensor.dim()]
        if host and not name.startswith(MIXED):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found "
                               f"cuda:0 and cpu, of shape {tuple(host[0].shape)}")
        if name.startswith(MIXED[1:]) and type(tensors[0]) is not Pretended:
            raise RuntimeError(f"{name}: indices should be on the device of the tensor (cpu)")
        count(func, name, tensors, bool(host))
        known = {id(tensor.held): tensor for tensor in tensors if type(tensor) is Pretended}
        args, kwargs = tree_map(held_of, (args, kwargs or {}))
        if name.startswith("aten.copy_") and id(args[0]) not in known:  # to the host
            return func(*args, **kwargs)
        return tree_map(lambda out: known[id(out)] if id(out) in known else to_device(out),
                        func(*args, **kwargs))


def count(func, name, tensors, host):
    """Of one operation: is it a kernel, does the host wait?"""
    aliases = [returned.alias_info for returned in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    if not is_view and not name.startswith(NO_KERNEL):
        COUNTS[name] += 1
    mask = any(tensor.dtype == torch.bool for tensor in tensors[1:])
    if name.startswith(WAITS) or host or name.startswith(MIXED[1:]) and mask:
        COUNTS[f"wait: {name}"] += 1


def held_of(thing):
    return thing.held if type(thing) is Pretended else thing


def to_device(thing):
    """Tensors on the host -> pretended ones; whatever else as it is."""
    return Pretended(thing) if isinstance(thing, torch.Tensor) and type(thing) is not Pretended \
        else thing


class Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, there):
        ctx.there = type(tensor) is Pretended
        COUNTS["wait: copy between host and device"] += 1
        held = held_of(tensor).detach().clone()
        return Pretended(held) if there else held

    @staticmethod
    def backward(ctx, gradient):
        return move(gradient, ctx.there), None


def move(tensor, there):
    if (type(tensor) is Pretended) == there:
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        return Move.apply(tensor, there)
    return Move.forward(mock.Mock(), tensor, there)


def place(to, tensor, *words, device=None, non_blocking=False, **more):
    """tensor.to(...) of a call that may name a device, a type, or a tensor that has both."""
    rest = []
    for word in words:
        if isinstance(word, torch.Tensor):
            device, word = word.device, word.dtype
        if isinstance(word, (str, int, torch.device)) and not isinstance(word, bool):
            device = torch.device(word)
        else:
            rest.append(word)
    if any(isinstance(word, torch.dtype) for word in [*rest, *more.values()]):
        tensor = to(tensor, *rest, **more)
    return tensor if device is None else move(tensor, torch.device(device).type == "cuda")


class Placing(TorchFunctionMode):
    """Calls that name a device: torch itself would ask for a real one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "cpu":
            return move(args[0], False)
        if name == "cuda":
            return move(args[0], True)
        if name == "to" and isinstance(args[0], torch.Tensor):
            return place(func, *args, **kwargs)
        if name == "new_tensor":
            return move(func(held_of(args[0]), *args[1:], **kwargs), type(args[0]) is Pretended)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            out = func(*tree_map(held_of, args), **{**kwargs, "device": "cpu"})
            if name in ("tensor", "as_tensor"):  # its values come from the host
                COUNTS[f"wait: {name}"] += 1
            return to_device(out)
        return func(*args, **kwargs)


def move_model(model):
    """A network that was loaded on the CPU, 4-bit weights too: all that it holds, on the device."""
    done = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None or type(weight) is Pretended:
                continue
            if id(weight) not in done:  # tied ones stay one
                new = torch.nn.Parameter(Pretended(weight.data.view(weight.shape)), False)
                new.requires_grad_(weight.requires_grad)
                if hasattr(weight, "quant_state"):
                    new.quant_state = move_quant_state(weight.quant_state)
                    new.bnb_quantized, new.quant_type = True, weight.quant_type
                    new.compress_statistics = weight.compress_statistics
                    new.blocksize, new.quant_storage = weight.blocksize, weight.quant_storage
                    new.module = module
                    module.quant_state = new.quant_state
                done[id(weight)] = new
            module._parameters[name] = done[id(weight)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = to_device(buffer)
        for name, thing in list(vars(module).items()):  # `original_inv_freq` and the like
            if isinstance(thing, torch.Tensor):
                setattr(module, name, to_device(thing))
    return model


def move_quant_state(state):
    for name in ("absmax", "code", "offset"):
        setattr(state, name, to_device(getattr(state, name)))
    if state.state2 is not None:
        move_quant_state(state.state2)
    return state


@contextlib.contextmanager
def pretended():
    """While it lasts there is a CUDA device, and `common.load` puts the network there."""
    load = common.load

    def load_and_move(*words):
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            model, processor = load(*words)
        model = move_model(model)
        model.base_logits = to_device(model.base_logits)
        model.fixed_batch = tree_map(to_device, model.fixed_batch)
        # without preserve_rng_state: there are no generators to ask
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={
            "use_reentrant": False, "preserve_rng_state": False})
        return model, processor
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "synchronize": None,
               "get_device_name": "a pretended CUDA device", "max_memory_allocated": 0,
               "memory_allocated": 0, "reset_peak_memory_stats": None, "empty_cache": None,
               "is_bf16_supported": True, "get_device_capability": (8, 9),
               "mem_get_info": (24 * 2**30, 24 * 2**30), "is_current_stream_capturing": False}
    COUNTS.clear()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(
                torch.cuda, name, lambda *words, answer=answer, **more: answer))
        stack.enter_context(mock.patch.object(
            torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None))
        stack.enter_context(mock.patch.object(common, "load", load_and_move))
        stack.enter_context(mock.patch.object(common, "captured", lambda work: work))
        # Module.to makes new parameters: the data of an ordinary one cannot become pretended
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(Placing())
        yield COUNTS
