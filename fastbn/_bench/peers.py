"""peers -- what takes part in a benchmark: the streaming copy, fastbn, NumPy, PyTorch, ONNX Runtime; oneDNN has a file.

A peer imports its library when it is made, so that nobody needs those that are not asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import fastbn
from fastbn import _native
from fastbn._bench.cases import Case
from fastbn._bench.data import EPS, Array, Tensors, dtype_of, logical, param_dtype

Run = Callable[[], Any]
Results = Callable[[Any], dict[str, Array]]


@dataclass(frozen=True)
class Contender:
    """A call as a user would make it, and what finds its results: from what it returns to arrays by name."""

    label: str
    run: Run
    results: Results


def named(layout: str, *names: str, read: Callable[[Any], Array] = np.asarray) -> Results:
    """Results by the order in which a call returns them, tensors as (N, C, ...)."""

    def results(returned: Any) -> dict[str, Array]:
        found = returned if isinstance(returned, (tuple, list)) else (returned,)
        arrays = {name: read(a) for name, a in zip(names, found, strict=False)}
        return {name: a if a.ndim == 1 else logical(a, layout) for name, a in arrays.items()}

    return results


class Peer:
    """One library: its layouts, what it can, how to ask for it, and how many threads it uses."""

    name: str
    package: str
    layouts: tuple[str, ...] = ("NCHW",)

    def can(self, case: Case, layout: str, fresh: bool) -> bool:
        """Whether it knows this case; ``fresh`` means that a call allocates its result."""
        return True

    def make(self, case: Case, tensors: Tensors, layout: str, fresh: bool) -> tuple[Run, Results]:
        """Bind a call to the data; asked only for what it can."""
        raise NotImplementedError

    def set_threads(self, threads: int) -> None:
        """Use so many from now on; a peer whose calls carry their number has nothing to set."""


@dataclass(frozen=True)
class Entry:
    """A contender that has not seen the data yet. ``mark`` tells it from those that are alike otherwise."""

    case: Case
    peer: Peer
    layout: str = ""
    fresh: bool = False
    mark: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.peer.name, self.layout, "fresh" * self.fresh, self.mark)))

    def make(self, tensors: Tensors) -> Contender:
        run, results = self.peer.make(self.case, tensors, self.layout, self.fresh)
        if not self.case.reader:
            return Contender(str(self), run, results)
        read = partial(_native.copy, tensors.out("NCHW"), tensors.spare, self.case.threads)

        def both() -> Any:
            returned = run()
            read()
            return returned

        return Contender(str(self), both, results)


def entries(
    case: Case, peers: Sequence[Peer], layouts: Sequence[str], fresh: Sequence[bool], mark: str = ""
) -> Iterator[Entry]:
    """List who takes part in a case: the copy, then every peer in all that it can."""
    yield Entry(case, Copy(), mark=mark)
    for peer in peers:
        for layout in peer.layouts if len(case.shape) > 2 else ("NC",):
            # A layout that a library has to itself cannot be chosen, so it is always in.
            if layout in layouts or layout not in Fastbn.layouts:
                # A reader has to know where the result is.
                able = [f for f in (False, True) if peer.can(case, layout, f) and not (f and case.reader)]
                # Better the other way than not at all: not every function has an out=.
                yield from (Entry(case, peer, layout, f, mark) for f in [f for f in able if f in fresh] or able)


class Copy(Peer):
    """The roof: reads a tensor once and writes one once, past the cache where that is faster."""

    name = "copy"

    def make(self, case: Case, tensors: Tensors, layout: str, fresh: bool) -> tuple[Run, Results]:
        return partial(_native.copy, tensors.get("x", "NCHW"), tensors.out("NCHW"), case.threads), named("")


class Fastbn(Peer):
    """The library itself."""

    name, package = "fastbn", "fastbn"
    layouts = ("NCHW", "NHWC")

    def make(self, case: Case, tensors: Tensors, layout: str, fresh: bool) -> tuple[Run, Results]:
        t, x, y = tensors, tensors.get("x", layout), tensors.out(layout)
        settings: dict[str, Any] = {
            "channel_axis": -1 if layout == "NHWC" else 1,
            "activation": "relu" if case.relu else None,
        }
        out: dict[str, Any] = {} if fresh else {"out": y}
        residual: dict[str, Any] = {"residual": t.get("residual", layout)} if case.residual else {}
        layer = fastbn.BatchNorm(t.channels, EPS, dtype=t.dtype, **settings)
        for name, a in (("weight", t.weight), ("bias", t.bias), ("running_mean", t.mean), ("running_var", t.var)):
            getattr(layer, name)[:] = a
        if case.op == "inference":
            return partial(layer.freeze(), x, **residual, **out), named(layout, "y")
        if case.op == "functional":
            functional = partial(fastbn.batch_norm, x, t.mean, t.var, t.weight, t.bias)
            return partial(functional, **settings, **residual, **out), named(layout, "y")
        if case.op == "forward":
            forward = partial(fastbn.batch_norm_forward, x, t.weight, t.bias, **settings, **residual, **out)
            return forward, named(layout, "y")
        dy = t.get("dy", layout)
        if case.op == "step":

            def step() -> Array:
                layer(x, **residual)
                return layer.backward(dy, **out)

            return step, named(layout, "dx")
        _, saved = fastbn.batch_norm_forward(x, t.weight, t.bias, **settings, **residual, out=y)
        backward = partial(fastbn.batch_norm_backward, dy, x, saved, t.weight, t.bias, **out)
        return backward, named(layout, *("dx", "dw", "db", "dr")[: 3 + case.residual])

    def set_threads(self, threads: int) -> None:
        fastbn.set_num_threads(threads)


class NumPy(Peer):
    """Batch norm as one writes it in NumPy; narrow types need a conversion first, the huge many times the memory."""

    name, package = "NumPy", "numpy"

    def can(self, case: Case, layout: str, fresh: bool) -> bool:
        able = case.dtype in ("float32", "float64") and case.op != "step" and case.nbytes < 1 << 30
        return able and (fresh or not case.backward)

    def make(self, case: Case, tensors: Tensors, layout: str, fresh: bool) -> tuple[Run, Results]:
        t, x, y = tensors, tensors.get("x", layout), None if fresh else tensors.out(layout)
        axes, eps = (0, *range(2, x.ndim)), param_dtype(t.dtype).type(EPS)

        def column(a: Array) -> Array:
            return a.reshape(-1, *(1,) * (x.ndim - 2))

        w, b = column(t.weight), column(t.bias)
        scale = w / np.sqrt(column(t.var) + eps)
        shift = b - column(t.mean) * scale
        r = t.get("residual", layout) if case.residual else None

        def normalized() -> tuple[Array, Array]:
            inv = 1 / np.sqrt(x.var(axes, keepdims=True) + eps)
            return inv, (x - x.mean(axes, keepdims=True)) * inv

        def finished(z: Array) -> Array:
            if r is not None:
                z += r
            return np.maximum(z, 0, out=z) if case.relu else z

        def affine(a: Array, scale: Array, shift: Array) -> Array:
            z = np.multiply(a, scale, out=y)
            z += shift
            return finished(z)

        if not case.training:
            return partial(affine, x, scale, shift), named(layout, "y")
        if case.op == "forward":
            return lambda: affine(normalized()[1], w, b), named(layout, "y")
        dy = t.get("dy", layout)

        def backward() -> tuple[Array, ...]:
            inv, x_hat = normalized()
            dr = dy * (finished(x_hat * w + b) > 0) if case.relu else dy
            db, dw = dr.sum(axes, keepdims=True), (dr * x_hat).sum(axes, keepdims=True)
            dx = w * inv * (dr - (db + x_hat * dw) / (x.size // t.channels))
            return dx, dw.ravel(), db.ravel(), dr

        return backward, named(layout, "dx", "dw", "db", "dr")


class Torch(Peer):
    """PyTorch, contiguous and channels-last. Its backward has no ``out=``, and neither has batch_norm."""

    name, package = "PyTorch", "torch"
    layouts = ("NCHW", "NHWC")

    def __init__(self) -> None:
        self._torch: Any = importlib.import_module("torch")

    def can(self, case: Case, layout: str, fresh: bool) -> bool:
        return fresh or case.op in ("forward", "inference")

    def _tensor(self, a: Array) -> Any:
        """A tensor on the same memory; NumPy and PyTorch do not share a bfloat16."""
        if a.dtype.name == "bfloat16":
            return self._torch.from_numpy(a.view(np.uint16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(a)

    def _array(self, tensor: Any) -> Array:
        tensor = tensor.detach()
        if tensor.dtype == self._torch.bfloat16:
            narrow: Array = tensor.view(self._torch.uint16).numpy().view(dtype_of("bfloat16"))
            return narrow
        return np.asarray(tensor)

    def make(self, case: Case, tensors: Tensors, layout: str, fresh: bool) -> tuple[Run, Results]:
        torch, t = self._torch, tensors

        def data(a: Array) -> Any:
            return self._tensor(logical(a, layout))

        def results(*names: str) -> Results:
            return named("NCHW", *names, read=self._array)

        x, y = data(t.get("x", layout)), data(t.out(layout))
        weight, bias, mean, var = (torch.from_numpy(a.copy()) for a in (t.weight, t.bias, t.mean, t.var))
        r = data(t.get("residual", layout)) if case.residual else None

        def finished(z: Any) -> Any:
            if r is not None:
                z += r
            return z.relu_() if case.relu else z

        if case.op == "functional":
            functional = torch.nn.functional.batch_norm
            return lambda: finished(functional(x, mean, var, weight, bias, False, 0.1, EPS)), results("y")
        dy = data(t.get("dy", layout)) if case.backward else None
        if case.op == "step":
            kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
            layer = kind[x.ndim](t.channels, eps=EPS, dtype=weight.dtype)
            layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
            x.requires_grad_()

            def step() -> Any:
                layer.zero_grad()
                x.grad = None
                finished(layer(x)).backward(dy)
                return x.grad

            return step, results("dx")
        constants = (None, None, True) if case.training else (mean, var, False)
        if case.op == "backward":
            z, *kept = torch.native_batch_norm(x, weight, bias, *constants, 0.1, EPS)
            z = finished(z) if case.relu else None  # which nobody else needs, and which may be gigabytes

            def backward() -> tuple[Any, ...]:
                dr = torch.ops.aten.threshold_backward(dy, z, 0) if case.relu else dy
                arguments = (dr, x, weight, None, None, *kept, True, EPS, [True, True, True])
                return *torch.ops.aten.native_batch_norm_backward(*arguments), dr

            return backward, results("dx", "dw", "db", "dr")
        # The statistics that it leaves for a backward, of which there are none in inference.
        kept = [weight.new_empty(len(weight) * case.training) for _ in range(2)]
        out = {} if fresh else {"out": (y, *kept)}
        native = partial(torch.native_batch_norm, x, weight, bias, *constants, 0.1, EPS, **out)
        return lambda: finished(native()[0]), results("y")

    def set_threads(self, threads: int) -> None:
        self._torch.set_num_threads(threads)


class OnnxRuntime(Peer):
    """ONNX Runtime: a model of one batch norm, its memory bound once; only float32, for its epsilon is of that."""

    name, package = "ONNX Runtime", "onnxruntime"

    def __init__(self) -> None:
        self._onnx: Any = importlib.import_module("onnx")
        self._runtime: Any = importlib.import_module("onnxruntime")

    def can(self, case: Case, layout: str, fresh: bool) -> bool:
        return not fresh and case.op == "inference" and case.dtype == "float32"

    def make(self, case: Case, tensors: Tensors, layout: str, fresh: bool) -> tuple[Run, Results]:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.log_severity_level = 3
        model = self._model(case, tensors)
        session = self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding, y = session.io_binding(), tensors.out(layout)
        for name in ("x", "residual")[: 1 + case.residual]:
            a = tensors.get(name, layout)
            binding.bind_input(name, "cpu", 0, a.dtype, a.shape, a.ctypes.data)
        binding.bind_output("y", "cpu", 0, y.dtype, y.shape, y.ctypes.data)
        return partial(session.run_with_iobinding, binding), lambda _: {"y": y}

    def _model(self, case: Case, tensors: Tensors) -> bytes:
        helper, t = self._onnx.helper, tensors
        element = helper.np_dtype_to_tensor_dtype(t.dtype)
        nodes = [helper.make_node("BatchNormalization", ["x", "w", "b", "m", "v"], ["bn"], epsilon=EPS)]
        if case.residual:
            nodes.append(helper.make_node("Add", [nodes[-1].output[0], "residual"], ["sum"]))
        if case.relu:
            nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], ["relu"]))
        nodes[-1].output[0] = "y"
        constants = {"w": t.weight, "b": t.bias, "m": t.mean, "v": t.var}
        inputs, outputs = (
            [helper.make_tensor_value_info(name, element, case.shape) for name in names]
            for names in (("x", "residual")[: 1 + case.residual], ("y",))
        )
        initializers = [self._onnx.numpy_helper.from_array(a, name) for name, a in constants.items()]
        graph = helper.make_graph(nodes, "batch_norm", inputs, outputs, initializers)
        # Old enough for any runtime that is still in use.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        serialized: bytes = model.SerializeToString()
        return serialized
