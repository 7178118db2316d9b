"""The compiled floor: arrays in, geometry and pointers down. Private; the public face is ``fastbn``.

Everything here checks its arguments (this is the last place Python can reach) and raises ValueError or TypeError that
names the argument, before anything is written. ``x`` is whatever ``fastbn._functional`` documents; parameters are 1-D
float arrays of one element per channel, or None. ``weight``/``bias`` None means ones/zeros.
"""

from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]
_Params = _Array | None

DTYPES: tuple[str, ...]
ACTIVATIONS: tuple[str | None, ...]

class Saved:
    """What a forward leaves for its backward: the statistics, the call's settings, and the gate where one is needed.

    Immutable. ``count`` is the number of elements per channel, and 0 where the statistics were constants (inference).
    """

    count: int
    moved: bool
    eps: float
    channel_axis: int
    activation: str | None
    negative_slope: float
    has_residual: bool
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...  # TypeError: a forward makes it
    def __copy__(self) -> Saved: ...  # itself
    def __deepcopy__(self, memo: object) -> Saved: ...  # itself
    @property
    def mean(self) -> _Array: ...  # float64 (C,), read-only
    @property
    def var(self) -> _Array: ...  # float64 (C,), biased, read-only

class Prepared:
    """One channel-wise affine map made ready once; immutable, thread-safe."""

    def __init__(
        self,
        dtype: np.dtype[Any],
        mean: _Array,
        var: _Array,
        weight: _Params,
        bias: _Params,
        eps: float,
        channel_axis: int,
        activation: str | None,
        negative_slope: float,
    ) -> None: ...
    def __call__(self, x: Any, residual: Any = None, out: _Array | None = None) -> _Array: ...

# What is in no range, of no such name or of no such type is an error that names the argument and says what came.
def number(name: str, value: Any, low: float = ..., high: float = ...) -> float: ...
def choice(name: str, value: Any, choices: tuple[str | None, ...]) -> Any: ...
def flag(name: str, value: object) -> bool: ...
def said(value: object) -> str: ...  # what came, in a few words
def forward(
    x: Any,
    weight: _Params,
    bias: _Params,
    eps: float,
    channel_axis: int,
    activation: str | None,
    negative_slope: float,
    residual: Any,
    out: _Array | None,
) -> tuple[_Array, Saved]: ...

# The running statistics take part in the checks of forward_train, and are written last, both or neither:
# running = (1 - momentum) * running + momentum * batch, with the unbiased variance. Strided arrays are fine.
# With a `layer`, whose lock is held, its _tracked or num_batches_skipped counts the batch together with them.
# With `guard` they are only written if all would be finite; Saved.moved says whether they were.
def forward_train(
    x: Any,
    running_mean: _Params,
    running_var: _Params,
    weight: _Params,
    bias: _Params,
    momentum: float,
    eps: float,
    channel_axis: int,
    activation: str | None,
    negative_slope: float,
    residual: Any,
    out: _Array | None,
    guard: bool = False,
    layer: Any = None,
) -> tuple[_Array, Saved]: ...
def normalize(
    x: Any,
    mean: _Array,
    var: _Array,
    weight: _Params,
    bias: _Params,
    eps: float,
    channel_axis: int,
    activation: str | None,
    negative_slope: float,
    residual: Any,
    out: _Array | None,
    mean_name: str = "running_mean",  # what error messages call them
    var_name: str = "running_var",
) -> _Array: ...

# normalize that can be differentiated: Saved.count is 0.
def forward_eval(
    x: Any,
    mean: _Array,
    var: _Array,
    weight: _Params,
    bias: _Params,
    eps: float,
    channel_axis: int,
    activation: str | None,
    negative_slope: float,
    residual: Any,
    out: _Array | None,
) -> tuple[_Array, Saved]: ...
def commit(layer: Any, pairs: list[tuple[_Array, _Array]], tracked: int | None) -> None: ...

# (dx, dweight, dbias, dresidual or None). weight and bias are the forward's. dweight and dbias come in weight's dtype,
# or in the parameter dtype of x (float64 for float64 data, else float32) where weight is None.
def backward(
    grad_output: Any, x: Any, saved: Saved, weight: _Params, bias: _Params, out: _Array | None
) -> tuple[_Array, _Array, _Array, _Array | None]: ...

# count, mean, mean_lo, m2: new arrays, and read-only.
def moments(x: Any, channel_axis: int) -> tuple[int, _Array, _Array, _Array]: ...
def backward_reduce(grad_output: Any, x: Any, mean: _Array, channel_axis: int) -> tuple[_Array, _Array]: ...
def backward_apply(
    grad_output: Any,
    x: Any,
    mean: _Array,
    var: _Array,
    weight: _Params,
    sum_dy: _Array,
    sum_dy_xmu: _Array,
    count: float,
    eps: float,
    channel_axis: int,
    out: _Array | None,
) -> _Array: ...

# The store of idle memory for results: at most `limit` bytes, and what has been idle for more than `seconds` goes back
# when the store is next used. RuntimeError where a thread that is gone since a fork holds it.
def set_recycling(limit: int, seconds: int) -> None: ...
def clear_recycled() -> int: ...  # gives it back; its bytes
def recycled() -> dict[str, int]: ...  # limit, idle, blocks; counters: made, reused, released
def renew_lock() -> None: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def isa() -> str: ...  # the tier in use
def isas() -> tuple[str, ...]: ...  # the tiers this machine can run, best first
def built_isas() -> tuple[str, ...]: ...  # the tiers compiled in
def use_isa(name: str) -> None: ...  # for tests: change the tier
def known_isas() -> tuple[str, ...]: ...  # the tiers that this version has code for
def parallel_runtime() -> str: ...  # "pthreads", "openmp" or "serial"
def parallel_sees_openmp() -> bool: ...
def parallel_counters() -> dict[str, int]: ...
def machine() -> dict[str, int]: ...  # what the plan works with: cache sizes in bytes, and fbn_machine.follows

# The plan's decisions for a call, without running it.
def plan(
    op: str,
    dtype: str,
    family: str,
    outer: int,
    channels: int,
    inner: int,
    threads: int,
    gated: bool = False,
    adjacent: bool = True,
    residual: bool = False,
    machine: dict[str, int] | None = None,
    aligned: bool = True,
    beside: bool | None = None,  # None: what the kernels in use can do
) -> dict[str, Any]: ...
def view(x: Any, name: str) -> _Array: ...
def copy(src: _Array, dst: _Array, threads: int) -> None: ...  # the streaming copy: contiguous, same size in bytes
