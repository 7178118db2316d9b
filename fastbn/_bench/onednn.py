"""onednn -- oneDNN through its C interface: NCHW, NHWC, and the blocked layouts that its own kernels prefer.

The library is that of the PyPI package onednn-cpu-gomp. The numbers below are those of its public headers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from functools import partial
from typing import Any

import numpy as np

from fastbn._bench.cases import OPS, Case
from fastbn._bench.data import EPS, Array, Tensors
from fastbn._bench.peers import Peer, Results, Run, named

CPU, IN_ORDER = 1, 1
UNIMPLEMENTED = 3
IMPLEMENTATION, WORKSPACE = 8, 135
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT, FUSE_RELU = 1, 2, 4, 8
DATA_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
ARGUMENTS = {"x": 1, "y": 17, "mean": 49, "var": 50, "w": 51, "b": 52, "workspace": 64}
ARGUMENTS |= {"dx": 129, "dy": 145, "dw": 255, "db": 256}


class _Argument(ctypes.Structure):
    index: int
    memory: int | None
    _fields_ = (("index", ctypes.c_int), ("memory", ctypes.c_void_p))


class OneDNN(Peer):
    """oneDNN 3. It fuses a ReLU, but on a CPU no residual."""

    name = "onednn"
    name, package = "oneDNN", "onednn-cpu-gomp"
    layouts = ("NCHW", "NHWC", "NCHW16c", "NCHW8c")

    def __init__(self) -> None:
        try:
            files = importlib.metadata.files(self.package) or []
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"no package {self.package}") from None
        self._dnnl = ctypes.CDLL(str(next(f for f in files if f.name == "libdnnl.so.3").locate()))
        self._gomp = ctypes.CDLL("libgomp.so.1")  # the one that it has just loaded
        self._engine = self._create("dnnl_engine_create", CPU, ctypes.c_size_t(0))
        self._stream = self._create("dnnl_stream_create", self._engine, IN_ORDER)

    def can(self, case: Case, layout: str, fresh: bool) -> bool:
        """Also whether it has the layout; of the blocked ones the widest that has a kernel of its own."""
        if fresh or case.residual or case.dtype not in DATA_TYPES or case.op not in OPS[:3]:
            return False
        if layout in self.layouts[2:]:
            return layout == next((x for x in self.layouts[2:] if "jit" in self._implementation(case, x)), "")
        return self._implementation(case, layout) != ""

    def make(self, case: Case, tensors: Tensors, layout: str, fresh: bool) -> tuple[Run, Results]:
        t, x, y = tensors, tensors.get("x", layout), tensors.out(layout)
        arrays = {"x": x, "y": y, "w": t.weight, "b": t.bias}
        if case.op == "inference":
            pd = self._descriptor(case, layout, FORWARD_INFERENCE)
            return self._bound(pd, case, layout, arrays | {"mean": t.mean, "var": t.var}, "y")
        forward = self._descriptor(case, layout, FORWARD_TRAINING)
        kept = {name: np.empty_like(t.weight) for name in ("mean", "var")}
        if case.relu:
            self._dnnl.dnnl_memory_desc_get_size.restype = ctypes.c_size_t
            kept["workspace"] = np.zeros(self._dnnl.dnnl_memory_desc_get_size(self._workspace(forward)), np.uint8)
        run, results = self._bound(forward, case, layout, arrays | kept, "y")
        if case.op == "forward":
            return run, results
        run()
        found = {"dx": y, "dw": np.empty_like(t.weight), "db": np.empty_like(t.weight)}
        arrays = {"x": x, "dy": t.get("dy", layout), "w": t.weight}
        return self._bound(
            self._descriptor(case, layout, BACKWARD, forward), case, layout, arrays | kept | found, *found
        )

    def set_threads(self, threads: int) -> None:
        self._gomp.omp_set_num_threads(threads)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._dnnl, function)(*arguments)
        if status == UNIMPLEMENTED:
            raise NotImplementedError(function)
        if status != 0:
            raise RuntimeError(f"{function} returned {status}")

    def _create(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """Return the object that a function gives through its first argument."""
        handle = ctypes.c_void_p()
        self._call(function, ctypes.byref(handle), *arguments)
        return handle

    def _memory(self, shape: tuple[int, ...], dtype: str, layout: str = "") -> ctypes.c_void_p:
        """Describe memory by oneDNN's letters: axes in the order of memory, a blocked one in capitals."""
        letters = "abcde"[: len(shape)]
        if layout == "NHWC":
            letters = f"a{letters[2:]}b"
        elif layout in self.layouts[2:]:
            letters = f"aB{letters[2:]}{layout[4:-1]}b"
        dims = (ctypes.c_int64 * len(shape))(*shape)
        arguments = (len(shape), dims, DATA_TYPES[dtype], letters.encode())
        return self._create("dnnl_memory_desc_create_with_string_tag", *arguments)

    def _descriptor(
        self, case: Case, layout: str, kind: int, forward: ctypes.c_void_p | None = None
    ) -> ctypes.c_void_p:
        data = self._memory(case.shape, case.dtype, layout)
        flags = USE_SCALE | USE_SHIFT | FUSE_RELU * case.relu | USE_GLOBAL_STATS * (kind == FORWARD_INFERENCE)
        name = f"dnnl_batch_normalization_{'backward' if forward else 'forward'}_primitive_desc_create"
        tensors, hint = (3, (forward,)) if forward else (2, ())
        return self._create(name, self._engine, kind, *[data] * tensors, ctypes.c_float(EPS), flags, *hint, None)

    def _implementation(self, case: Case, layout: str) -> str:
        """Name the code that would run: generated, or a reference that is slow; or nothing, as for many dtypes."""
        if layout in self.layouts[2:] and case.shape[1] % int(layout[4:-1]):
            return ""
        name = ctypes.c_char_p()
        try:
            pd = self._descriptor(case, layout, FORWARD_TRAINING)
        except NotImplementedError:
            return ""
        self._call("dnnl_primitive_desc_query", pd, IMPLEMENTATION, 0, ctypes.byref(name))
        return (name.value or b"").decode()

    def _workspace(self, pd: ctypes.c_void_p) -> ctypes.c_void_p:
        """Describe the memory for the signs that a fused ReLU keeps for the backward."""
        query = self._dnnl.dnnl_primitive_desc_query_md
        query.restype = ctypes.c_void_p
        return ctypes.c_void_p(query(pd, WORKSPACE, 0))

    def _bound(
        self, pd: ctypes.c_void_p, case: Case, layout: str, arrays: dict[str, Array], *results: str
    ) -> tuple[Run, Results]:
        primitive = self._create("dnnl_primitive_create", pd)
        data = self._memory(case.shape, case.dtype, layout)
        channels = self._memory((case.shape[1],), "float32")
        arguments = (_Argument * len(arrays))()
        for argument, (name, a) in zip(arguments, arrays.items(), strict=True):
            md = self._workspace(pd) if name == "workspace" else data if a.ndim > 1 else channels
            argument.index = ARGUMENTS[name]
            argument.memory = self._create("dnnl_memory_create", md, self._engine, ctypes.c_void_p(a.ctypes.data)).value
        # The arrays live as long as the results do.
        run = partial(self._dnnl.dnnl_primitive_execute, primitive, self._stream, len(arrays), arguments)
        return run, lambda _: named(layout, *results)([arrays[name] for name in results])
