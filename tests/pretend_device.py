"""A pretend accelerator for tests: tensors whose device is not the CPU and whose values are.

Inside `with PretendDevice() as device:` every operation runs for real on the CPU's values. Tensors of two devices in
one operation and float64 on the device are refused; `launches` counts the operations that a GPU would run, `waits`
names what its host would wait for. The device is torch's unused "lazy" one, and has no arithmetic of its own.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)
_ATEN = torch.ops.aten
# What the host needs the values or the size of.
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
_WAITS |= {"bincount", "is_nonzero"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Views and memory: nothing to launch.
_FREE = {"view", "_unsafe_view", "expand", "slice", "select", "unbind", "detach", "alias", "t", "transpose", "permute"}
_FREE |= {"unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "as_strided", "_reshape_alias", "lift_fresh"}
_FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "unfold", "diagonal", "is_pinned"}
_FREE |= {"is_same_size", "_local_scalar_dense", "narrow", "view_as_real", "view_as_complex"}


class PretendTensor(Tensor):
    """A tensor on the device; `values` is its CPU tensor."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "PretendTensor":
        self = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        self.values = values
        return self

    def tolist(self) -> Any:
        for device in _ENTERED[-1:]:
            device.wait("tolist")
        return self.values.tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_ENTERED[-1] if _ENTERED else PretendDevice())._run(func, args, kwargs or {})


class PretendGenerator(torch.Generator):
    """A generator on the device; it draws what a CPU generator of the same seed draws."""

    device = DEVICE  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        _GENERATORS[self._cdata] = self  # an operation is handed another object of the same generator


_GENERATORS: dict[int, PretendGenerator] = {}
_ENTERED: list["PretendDevice"] = []


def _place() -> str:
    """The file and line, outside torch, that asked for the operation."""
    frame = sys._getframe(1)
    while f"{os.sep}torch{os.sep}" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


class PretendDevice(TorchDispatchMode):
    """What happens on the device within the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.waits: list[str] = []

    def __enter__(self) -> "PretendDevice":
        _ENTERED.append(self)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) copies, instead of making it there
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _ENTERED.remove(self)
        torch._C._set_only_lift_cpu_tensors(bool(_ENTERED))

    def wait(self, what: str) -> None:
        self.waits.append(f"{what} at {_place()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.prim.device.default:
            return DEVICE
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        ours = any(isinstance(x, PretendTensor) for x in tensors)
        if not ours and wanted != DEVICE.type:
            return func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            self._copied(func, args, kwargs, wanted)
        else:
            self._check(name, args, kwargs, tensors, ours)
        self.launches += name not in _FREE
        plain = tree_map(lambda x: x.values if isinstance(x, PretendTensor) else x, (args, kwargs))
        plain[1].update({k: None for k in ("device", "pin_memory") if k in kwargs})
        out = func(*plain[0], **plain[1])
        if wanted not in (None, DEVICE.type) or name == "copy_" and not isinstance(args[0], PretendTensor):
            return args[0] if name == "copy_" else out
        return self._kept(func, args, kwargs, out)

    def _copied(self, func: Any, args: Any, kwargs: dict[str, Any], wanted: str | None) -> None:
        """A copy between two devices makes the host wait, unless it is told not to; it casts on the device."""
        source = args[1] if func is _ATEN.copy_.default else args[0]
        to_cpu = not isinstance(args[0], PretendTensor) if func is _ATEN.copy_.default else wanted == "cpu"
        crosses = to_cpu == isinstance(source, PretendTensor)
        blocking = not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
        if crosses and blocking:
            self.wait("copy to the CPU" if to_cpu else "copy to the device")
        dtype = args[0].dtype if func is _ATEN.copy_.default else kwargs.get("dtype") or source.dtype
        if dtype == torch.float64 and isinstance(source, PretendTensor):
            raise TypeError(f"float64 on the device: a copy at {_place()}.")

    def _check(self, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], ours: bool) -> None:
        """Refuse tensors and generators of the CPU, but numbers; note what the host waits for."""
        indices = [x for x in args[1] if x is not None] if name in _INDEXING else []
        host = [x for x in tensors if not isinstance(x, PretendTensor) and x.ndim > 0]
        if indices and not isinstance(args[0], PretendTensor):
            raise RuntimeError(f"A CPU tensor is indexed by one of the device: {name} at {_place()}.")
        if ours and any(not any(x is index for index in indices) for x in host):
            raise RuntimeError(f"Tensors of two devices in one operation: {name} at {_place()}.")
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in _GENERATORS:
            raise RuntimeError(f"A generator of the CPU draws on the device: {name} at {_place()}.")
        if name in _WAITS:
            self.wait({"_local_scalar_dense": "item"}.get(name, name))
        if host:
            self.wait("an index on the CPU")
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.wait("a boolean index")

    def _kept(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        """The result on the device; what was written in place is the tensor that was given."""

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"float64 on the device: {func} at {_place()}.")
            return PretendTensor(value)

        returns = func._schema.returns
        if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            for i, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    return args[i] if i < len(args) else kwargs[argument.name]
        return tree_map(keep, out)


def put(x: Any) -> Any:
    """A tensor, or a module with its parameters and buffers, on the device; not counted."""
    if isinstance(x, Tensor):
        return PretendTensor(x.detach().clone()).requires_grad_(x.requires_grad)
    for module in x.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(put(parameter.detach()), parameter.requires_grad)
        module._buffers.update({key: put(buffer) for key, buffer in module._buffers.items() if buffer is not None})
    return x


def values(x: Tensor) -> Tensor:
    """The CPU's tensor behind one of the device; not counted."""
    assert isinstance(x, PretendTensor), f"{x.device} is not the device"
    return x.values
