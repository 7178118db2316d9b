"""test_errors -- wrong arguments, one at a time, in every parameter of every public function.

Each must be a TypeError or a ValueError that names the argument and what came, and must leave every array as it was.

Seeded bug that turns it red: the check of a parameter's length removed in one entry (with the sanitizers: a report).
"""

import functools
import io
import re

import numpy as np
import pytest

import fastbn

SHAPE, C = (4, 3, 5), 3


def tensor(value=1.0, shape=SHAPE, dtype=np.float32):
    return (np.arange(np.prod(shape)).reshape(shape) % 7 + value).astype(dtype)


def vector(value=1.0, length=C, dtype=np.float32):
    return (np.arange(length) + value).astype(dtype)


def a_saved(shape=SHAPE, dtype=np.float32, **options):
    return fastbn.batch_norm_forward(tensor(shape=shape, dtype=dtype), **options)[1]


def read_only():
    out = tensor(7)
    out.flags.writeable = False
    return out


# A good argument for every parameter, and the parameters of every function.
GOOD = {
    "x": tensor,
    "residual": lambda: tensor(2),
    "grad_output": lambda: tensor(3),
    "out": lambda: tensor(7),
    "saved": a_saved,
    "running_mean": lambda: vector(0),
    "running_var": vector,
    "mean": lambda: vector(0),
    "var": vector,
    "weight": vector,
    "bias": vector,
    "sum_dy": vector,
    "sum_dy_xmu": vector,
    "count": lambda: 20,
    "training": lambda: True,
    "momentum": lambda: 0.1,
    "eps": lambda: 1e-5,
    "channel_axis": lambda: 1,
    "activation": lambda: "leaky_relu",
    "negative_slope": lambda: 0.1,
    "num_features": lambda: C,
    "affine": lambda: True,
    "track_running_stats": lambda: True,
    "dtype": lambda: "float64",
    "on_nonfinite": lambda: "skip",
    "num_batches_tracked": lambda: 5,
    "num_batches_skipped": lambda: 5,
    "ddof": lambda: 1,
    "max_bytes": lambda: 1 << 20,
    "nbytes": lambda: 1 << 20,
    "mode": lambda: "dicts",
    "network": lambda: fastbn.BatchNorm(C),
    "batches": lambda: [tensor(), tensor(2)],
    "method": lambda: "ema",
    "layers": lambda: None,
    "progress": lambda: False,
    "tolerance": lambda: 0.1,
}
SETTINGS = "eps channel_axis activation negative_slope residual out"
FUNCTIONS = {
    "batch_norm": f"x running_mean running_var weight bias training momentum {SETTINGS}",
    "batch_norm_eval": f"x running_mean running_var weight bias momentum {SETTINGS}",
    "batch_norm_forward": f"x weight bias {SETTINGS}",
    "batch_norm_backward": "grad_output x saved weight bias out",
    "moments": "x channel_axis",
    "normalize": f"x mean var weight bias {SETTINGS}",
    "backward_reduce": "grad_output x mean channel_axis",
    "backward_apply": "grad_output x mean var weight sum_dy sum_dy_xmu count eps channel_axis out",
    "layer": "x residual out",
    "layer_eval": "x residual out",
    "layer_backward": "grad_output out",
    "frozen": "x residual out",
    "made": "num_features eps momentum affine track_running_stats channel_axis activation negative_slope dtype "
    "on_nonfinite",
    "assigned": "eps momentum channel_axis activation negative_slope on_nonfinite training num_batches_tracked "
    "num_batches_skipped",
    "var": "ddof",
    "save": "max_bytes",
    "load": "max_bytes",
    "set_recycle_limit": "nbytes",
    "show_config": "mode",
    "calibrate": "network batches method layers progress",
    "train_eval_gap": "network batches layers tolerance progress",
}


def good_arguments(function):
    return {parameter: GOOD[parameter]() for parameter in FUNCTIONS[function].split()}


class Protocol:
    """An array to NumPy's functions and none to ours: what it gives may be a copy, and writing there is lost."""

    def __array__(self, dtype=None, copy=None):
        return tensor()


class Interface:
    def __init__(self):
        self.array = tensor()
        self.__array_interface__ = self.array.__array_interface__


class Impostor(Protocol):
    """isinstance() takes it for an array."""

    __class__ = np.ndarray


# kind of parameter -> {label: (bad value, what the message must say came)}
NOT_ARRAYS = {
    "list": (lambda: [[1.0]], r"\blist\b"),
    "tuple": (lambda: (1.0, 2.0, 3.0), r"\btuple\b"),
    "float": (lambda: 1.5, r"\bfloat\b"),
    "str": (lambda: "array", r"\bstr\b"),
    "object": (object, r"\bobject\b"),
    "protocol": (Protocol, r"\bProtocol\b"),
    "interface": (Interface, r"\bInterface\b"),
    "impostor": (Impostor, r"\bImpostor\b"),
    "masked": (lambda: np.ma.ones(SHAPE, np.float32), "masked"),
}
TENSORS = {
    **NOT_ARRAYS,
    "int32": (lambda: tensor(dtype=np.int32), "int32"),
    "bool": (lambda: tensor(dtype=bool), "bool"),
    "complex64": (lambda: tensor(dtype=np.complex64), "complex64"),
    "object_dtype": (lambda: tensor(dtype=object), "object"),
    "str_dtype": (lambda: tensor().astype(str), "U"),
}
X = {
    **TENSORS,
    "None": (lambda: None, "None"),
    "longdouble": (lambda: tensor(dtype=np.longdouble), "float128|longdouble"),
    "structured": (lambda: np.zeros(SHAPE, "f4,f4"), "f4"),
    "datetime": (lambda: np.zeros(SHAPE, "M8[s]"), "datetime64"),
    "0-d": (lambda: np.array(np.float32(3)), r"\b0\b|\(\)"),
    "1-D": (lambda: vector(), r"\b1\b|\(3,\)"),
}
LIKE_X = {
    **TENSORS,
    "float64": (lambda: tensor(dtype=np.float64), "float64"),
    "float16": (lambda: tensor(dtype=np.float16), "float16"),
    "shorter": (lambda: tensor(shape=(3, 3, 5)), r"\(3, 3, 5\)"),
    "longer": (lambda: tensor(shape=(4, 3, 6)), r"\(4, 3, 6\)"),
    "transposed": (lambda: tensor(shape=(5, 3, 4)), r"\(5, 3, 4\)"),
    "flat": (lambda: tensor(shape=(60,)), r"\(60,\)"),
    "extra_axis": (lambda: tensor(shape=(1, 4, 3, 5)), r"\(1, 4, 3, 5\)"),
    "broadcastable": (lambda: tensor(shape=(1, 3, 1)), r"\(1, 3, 1\)"),
    "empty": (lambda: tensor(shape=(0, 3, 5)), r"\(0, 3, 5\)"),
}
OUT = {**LIKE_X, "read_only": (read_only, "read-only"), "stride_0": (lambda: np.lib.stride_tricks.as_strided(
    np.full(5, 7, np.float32), SHAPE, (0, 0, 4)), "stride")}  # fmt: skip
PARAMETER = {
    **NOT_ARRAYS,
    "int64": (lambda: vector(dtype=np.int64), "int64"),
    "bool": (lambda: vector(dtype=bool), "bool"),
    "complex128": (lambda: vector(dtype=np.complex128), "complex128"),
    "object_dtype": (lambda: vector(dtype=object), "object"),
    "short": (lambda: vector(length=2), r"\b2\b"),
    "long": (lambda: vector(length=4), r"\b4\b"),
    "empty": (lambda: vector(length=0), r"\b0\b"),
    "one": (lambda: vector(length=1), r"\b1\b"),
    "0-d": (lambda: np.array(np.float32(1)), r"\(\)|0-D|\b0\b"),
    "2-D": (lambda: vector().reshape(1, 3), r"\(1, 3\)|2-D|\b2\b"),
    "column": (lambda: vector().reshape(3, 1), r"\(3, 1\)|2-D|\b2\b"),
}
REQUIRED = {**PARAMETER, "None": (lambda: None, "None")}


def read_only_vector():
    value = vector()
    value.flags.writeable = False
    return value


RUNNING = {
    **PARAMETER,
    "read_only": (read_only_vector, "read-only"),
    "float16": (lambda: vector(dtype=np.float16), "float16"),
    "stride_0": (lambda: np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (3,), (0,)), "stride"),
}
ODD = {
    "str": (lambda: "0.1", "got str"),
    "bytes": (lambda: b"1", "got bytes"),
    "list": (lambda: [0.1], "got list"),
    "tuple": (lambda: (1,), "got tuple"),
    "complex": (lambda: 1j, "got complex"),
    "bool": (lambda: True, "got bool"),
    "np.bool": (lambda: np.bool_(True), "got bool"),
    "array": (lambda: vector(), "got ndarray"),
    "type": (lambda: int, "got type"),
}
NONE = {"None": (lambda: None, "None")}
NUMBER = {
    **ODD,
    "nan": (lambda: np.nan, "got nan"),
    "inf": (lambda: np.inf, "got inf"),
    "astronomical": (lambda: 10**400, r"got 1000.*\(401 characters\)"),
    "endless": (lambda: 1 << 100_000, "got an integer of 100001 bits"),
}
POSITIVE = {**NUMBER, "negative": (lambda: -1e-5, "got -1e-05")}
INTEGER = {
    **ODD,
    **NONE,
    "float": (lambda: 1.0, "got float"),
    "too_small": (lambda: -(1 << 70), "got -1180591620717411303424"),
    "too_large": (lambda: 1 << 70, "got 1180591620717411303424"),
    "endless": (lambda: 1 << 100_000, "got an integer of 100001 bits"),
}
NATURAL = {**INTEGER, "negative": (lambda: -1, "got -1")}
AXIS = {**INTEGER, "just_too_large": (lambda: 3, "got 3"), "just_too_small": (lambda: -4, "got -4")}
CHOICE = {
    "unknown": (lambda: "gelu", "got 'gelu'"),
    "empty": (lambda: "", "got ''"),
    "upper": (lambda: "ReLU", "got 'ReLU'"),
    "long": (lambda: "x" * 100_000, r"got 'xxx.*\(100002 characters\)"),
    "bytes": (lambda: b"relu", "got bytes"),
    "number": (lambda: 1, "got int"),
    "list": (lambda: ["relu"], "got list"),
    "array": (lambda: vector(), "got ndarray"),
}
DTYPE = {
    "name": (lambda: "foo", "got 'foo'"),
    "int": (lambda: int, "got int64"),
    "i4": (lambda: "i4", "got int32"),
    "longdouble": (lambda: np.longdouble, "got float128|got longdouble"),
    "number": (lambda: 5, "got 5"),
    "list": (lambda: [1], r"got \[1\]"),
    "fields": (lambda: "f4,f4", "got .*f0"),
    "array": (lambda: vector(), r"got array\("),
}
FLAG = {
    **NONE,
    "int": (lambda: 1, "got int"),
    "str": (lambda: "no", "got str"),
    "array": (lambda: np.ones(2), "got ndarray"),
}
LAYERS = {
    "int": (lambda: 5, "got int"),
    "0-d": (lambda: np.array(1.0), "got ndarray"),
    "empty": (list, "got none"),
    "numbers": (lambda: [1], "got int"),
}
SAVED = {
    "None": (lambda: None, "None"),
    "number": (lambda: 5, "int|5"),
    "tuple": (lambda: (vector(), vector()), "tuple"),
    "moments": (lambda: fastbn.moments(tensor()), "Moments"),
}
KINDS = {
    "x": X,
    "residual": LIKE_X,
    "grad_output": {**LIKE_X, "None": (lambda: None, "None")},
    "out": OUT,
    "weight": PARAMETER,
    "bias": PARAMETER,
    "mean": REQUIRED,
    "var": REQUIRED,
    "sum_dy": REQUIRED,
    "sum_dy_xmu": REQUIRED,
    "running_mean": RUNNING,
    "running_var": RUNNING,
    "eps": {**POSITIVE, **NONE},
    "training": FLAG,
    "momentum": {**NUMBER, **NONE},
    "negative_slope": {**NUMBER, **NONE},
    "count": {**POSITIVE, **NONE},
    "channel_axis": AXIS,
    "activation": CHOICE,
    "saved": SAVED,
    "num_features": NATURAL,
    "affine": FLAG,
    "track_running_stats": FLAG,
    "dtype": DTYPE,
    "on_nonfinite": {**CHOICE, **NONE},
    "num_batches_tracked": NATURAL,
    "num_batches_skipped": NATURAL,
    "ddof": {**NUMBER, **NONE},
    "max_bytes": NATURAL,
    "nbytes": NATURAL,
    "mode": {**CHOICE, **NONE},
    "network": {**NONE, "int": (lambda: 5, "got int")},
    "batches": {**NONE, "array": (tensor, "got ndarray")},
    "method": {**CHOICE, **NONE},
    "layers": LAYERS,
    "tolerance": {**POSITIVE, **NONE},
    "progress": {label: case for label, case in FLAG.items() if label != "None"},
}
# A layer does not know x yet, and may average over all batches.
OF_A_LAYER = {
    "channel_axis": {**INTEGER, "65th": (lambda: 64, "got 64")},
    "momentum": {**POSITIVE, "2": (lambda: 2, "got 2")},
}  # fmt: skip


def cases():
    for function, parameters in FUNCTIONS.items():
        for parameter in parameters.split():
            kind = KINDS.get(parameter, {})
            if function == "batch_norm_eval" and parameter.startswith("running"):
                kind = REQUIRED
            if function in ("made", "assigned"):
                kind = OF_A_LAYER.get(parameter, kind)
            for label in kind:
                yield pytest.param(function, parameter, *kind[label], id=f"{function}-{parameter}-{label}")


def calls(function):
    """The function, and the arrays it owns."""
    if function in ("layer", "layer_eval", "layer_backward", "frozen"):
        bn = fastbn.BatchNorm(C, activation="relu")
        own = [bn.weight, bn.bias, bn.running_mean, bn.running_var]
        if function == "frozen":
            return bn.freeze(), own
        if function == "layer_backward":
            bn(tensor())
            return bn.backward, own
        return bn.train(function == "layer"), own
    if function == "made":
        return fastbn.BatchNorm, []
    if function == "assigned":
        bn = fastbn.BatchNorm(C)
        return lambda **settings: [setattr(bn, *setting) for setting in settings.items()], [bn.weight]
    if function == "var":
        return fastbn.moments(tensor()).var, []
    if function == "save":
        return functools.partial(fastbn.save, io.BytesIO(), {"a": 1.0}), []
    if function == "load":
        file = io.BytesIO()
        fastbn.BatchNorm(C).save(file)
        return functools.partial(fastbn.load, file), []
    return getattr(fastbn, function.removesuffix("_eval")), []


@pytest.mark.parametrize(("function", "parameter", "make", "came"), list(cases()))
def test_one_wrong_argument(function, parameter, make, came):
    """Red with a vector of any length accepted, or a bool for a number."""
    arguments = good_arguments(function)
    call, own = calls(function)
    arguments[parameter] = bad = make()
    watched = [a for a in (*arguments.values(), *own) if issubclass(type(a), np.ndarray) and a.dtype != object]
    before = [a.tobytes() for a in watched]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**arguments)
    message = str(caught.value)
    assert re.search(rf"\b{parameter}\b", message), f"does not name {parameter}: {message}"
    assert re.search(came, message), f"does not say what came: {message}"
    assert len(message) < 300
    assert [a.tobytes() for a in watched] == before
    assert arguments[parameter] is bad


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_good_arguments_are_good(function):
    """Otherwise the cases above would fail for reasons of their own."""
    arguments = good_arguments(function)
    call, _ = calls(function)
    limit = fastbn.get_recycle_limit()
    call(**arguments)
    fastbn.set_recycle_limit(limit)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("function", ["layer", "layer_eval", "frozen"])
def test_x_with_another_number_of_channels(function, channels):
    """The layer's arrays are right by definition. Red where the message is about one of them."""
    call, own = calls(function)
    before = [a.tobytes() for a in own]
    with pytest.raises(ValueError, match=rf"^x must have 3 channels along axis 1, got .*\b{channels}\b"):
        call(tensor(shape=(4, channels, 5)))
    assert [a.tobytes() for a in own] == before


def test_x_of_another_dtype_than_the_frozen():
    call, _ = calls("frozen")
    with pytest.raises(TypeError, match=r"x .*float32.*float64"):
        call(tensor(dtype=np.float64))


@pytest.mark.parametrize("bad", [tensor(shape=(4, 3, 6)), tensor(dtype=np.float64)], ids=["shape", "dtype"])
def test_backward_of_another_x(bad):
    """The saved state belongs to one shape and dtype."""
    with pytest.raises((TypeError, ValueError), match=r"\bx\b"):
        fastbn.batch_norm_backward(np.ones_like(bad), bad, a_saved())


@pytest.mark.parametrize(("mean", "var"), [(None, vector()), (vector(), None), (None, None)])
def test_inference_needs_both_statistics(mean, var):
    """PyTorch: both must be defined."""
    with pytest.raises((TypeError, ValueError), match=r"running_mean|running_var"):
        fastbn.batch_norm(tensor(), mean, var, training=False)


MEMORY = np.arange(8.0)
READ_BACK = np.arange(4.0)
SHARING = {
    "the same": (MEMORY[:4],) * 2,
    "the same, which owns it": (READ_BACK,) * 2,
    "a part": (MEMORY[:4], MEMORY[3:7]),
    "turned round": (MEMORY[:4], MEMORY[3::-1]),
    "a view of the other": (READ_BACK, READ_BACK[:]),
    "and the other of it": (READ_BACK[:], READ_BACK),
    "in other units": (MEMORY[:4], MEMORY[3:5].view(np.float32)),
}


@pytest.mark.parametrize("case", SHARING)
def test_running_statistics_that_share_memory(case):
    """Training writes both. Seeded bugs: only the same object seen; arrays side by side refused, or inference."""
    mean, var = SHARING[case]
    x, before = tensor(shape=(5, 4), dtype=np.float64), (MEMORY.copy(), READ_BACK.copy())
    with pytest.raises(ValueError, match="running_mean and running_var must not share memory in training"):
        fastbn.batch_norm(x, mean, var, training=True)
    np.testing.assert_array_equal(MEMORY, before[0])
    np.testing.assert_array_equal(READ_BACK, before[1])
    fastbn.batch_norm(x, mean, var)
    both = np.ones((4, 2))
    for side in (both.T, both.reshape(2, 4)):
        fastbn.batch_norm(x, *side, training=True)


@pytest.mark.parametrize("function", ["fold_conv", "fold_linear"])
@pytest.mark.parametrize(
    ("weight", "bias", "bn", "named"),
    [
        (lambda: tensor(shape=(4, 2)), lambda: None, lambda: fastbn.BatchNorm(3), "weight"),
        (lambda: tensor(shape=(3, 2)), lambda: vector(length=4), lambda: fastbn.BatchNorm(3), "bias"),
        (lambda: tensor(shape=(3, 2)), lambda: vector().reshape(1, 3), lambda: fastbn.BatchNorm(3), "bias"),
        (lambda: tensor(shape=(3, 2), dtype=np.int32), lambda: None, lambda: fastbn.BatchNorm(3), "weight"),
        (lambda: None, lambda: None, lambda: fastbn.BatchNorm(3), "weight"),
        (lambda: np.float32(1), lambda: None, lambda: fastbn.BatchNorm(3), "weight"),
        (lambda: tensor(shape=(3, 2)), lambda: None, lambda: None, "bn"),
        (lambda: tensor(shape=(3, 2)), lambda: None, lambda: fastbn.BatchNorm(3, track_running_stats=False), "bn"),
    ],
)
def test_folding(function, weight, bias, bn, named):
    given_weight, given_bias, layer = weight(), bias(), bn()
    if function == "fold_conv" and isinstance(given_weight, np.ndarray):
        given_weight = given_weight[..., None, None]
    with pytest.raises((TypeError, ValueError), match=named):
        getattr(fastbn, function)(given_weight, given_bias, layer)


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", 1 << 40, True], ids=str)
@pytest.mark.parametrize("call", [fastbn.set_num_threads, fastbn.num_threads])
def test_number_of_threads(call, n):
    before = fastbn.get_num_threads()
    with pytest.raises((TypeError, ValueError), match=r"^n must be "):
        call(n)
    assert fastbn.get_num_threads() == before


@pytest.mark.parametrize("name", ["sse", "", "AVX2 ", None, 3], ids=str)
def test_unknown_isa(name):
    before = fastbn._native.isa()
    with pytest.raises((TypeError, ValueError)):
        fastbn._native.use_isa(name)
    assert fastbn._native.isa() == before


def test_foreign_tensor_of_a_foreign_dtype():
    """DLPack may bring what NumPy can hold and batch norm cannot take."""
    from arrays import Foreign

    with pytest.raises(TypeError, match="int32"):
        fastbn.moments(Foreign(tensor(dtype=np.int32)))


class Broken:
    """Claims to speak DLPack."""

    def __dlpack__(self, **keywords):
        raise RuntimeError("no")

    def __dlpack_device__(self):
        return (1, 0)


class OnAGpu(Broken):
    def __dlpack_device__(self):
        return (2, 0)


@pytest.mark.parametrize("kind", [Broken, OnAGpu])
@pytest.mark.parametrize("parameter", ["x", "residual"])
def test_foreign_tensor_that_cannot_be_viewed(kind, parameter):
    arguments = good_arguments("normalize")
    arguments[parameter] = kind()
    with pytest.raises((TypeError, ValueError), match=parameter):
        fastbn.normalize(**arguments)


def test_what_constructors_and_scalars_refuse():
    zeros, ones = np.zeros(3), np.ones(3)
    for axis in (1.5, None, "1", True):
        with pytest.raises(TypeError, match="channel_axis"):
            fastbn.FrozenBatchNorm.from_arrays(zeros, ones, channel_axis=axis)
        with pytest.raises(TypeError, match="channel_axis"):
            fastbn.BatchNorm(3, channel_axis=axis)
    x = np.ones((4, 3), np.float32)
    for call in (
        lambda: fastbn.normalize(x, zeros, ones, eps=10**400),
        lambda: fastbn.BatchNorm(3, eps=10**400),
        lambda: fastbn.FrozenBatchNorm.from_arrays(zeros, ones, eps=10**400),
    ):
        with pytest.raises(ValueError, match="eps"):
            call()
    for momentum in (np.inf, -np.inf, np.nan):
        mean, var = zeros.astype(np.float32), ones.astype(np.float32)
        with pytest.raises(ValueError, match="momentum"):
            fastbn.batch_norm(x, mean, var, training=True, momentum=momentum)
        assert (mean == 0).all()
        assert (var == 1).all()


def test_a_gradient_that_its_dtype_cannot_hold_is_infinite():
    """And no exception, for dx is written by then. Red where NumPy converts under the caller's errstate."""
    x = np.array([[1.0], [2.0], [4.0]], np.float32)
    weight = np.ones(1, np.float16)
    _, saved = fastbn.batch_norm_forward(x, weight)
    with np.errstate(all="raise"):
        _, _, dbias = fastbn.batch_norm_backward(np.full_like(x, 1e6), x, saved, weight)
    assert dbias.dtype == np.float16
    assert np.isinf(dbias).all()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fastbn.set_num_threads("2"), "n must be an integer, got str"),
        (lambda: fastbn.moments(tensor()).var(ddof="1"), "ddof must be a real number, got str"),
        (lambda: fastbn.FrozenBatchNorm.from_batch_norm(5), "bn must be a BatchNorm, got int"),
        (lambda: fastbn.FrozenBatchNorm.from_state_dict({}, 5), "prefix must be a str, got int"),
        (lambda: fastbn.FrozenBatchNorm.from_state_dict([]), "state must be a mapping of names to arrays, got list"),
        (lambda: fastbn.FrozenBatchNorm.from_arrays(np.ma.ones(3), vector()), "mean must be .* got MaskedArray"),
        (lambda: fastbn.BatchNorm(3).load_state_dict({}, prefix=5), "prefix must be a str, got int"),
        (lambda: fastbn.BatchNorm(3).state_dict(None), "prefix must be a str, got NoneType"),
        (lambda: fastbn.Moments(3, np.ma.ones(3), vector()), "mean must be .* got MaskedArray"),
        (
            lambda: fastbn.fold_linear(np.ma.ones((3, 3)), None, fastbn.BatchNorm(3)),
            "weight must be .* got MaskedArray",
        ),
        (
            lambda: fastbn.normalize(tensor(), vector(), vector(), eps=np.ones(1)),
            "eps must be a real number, got ndarray",
        ),
        (lambda: setattr(fastbn.BatchNorm(3), "weight", np.ma.ones(3)), "weight must be .* got MaskedArray"),
    ],
)
def test_a_wrong_argument_of_what_is_called_less(call, named):
    with pytest.raises(TypeError, match=named):
        call()


def test_so_many_channels_that_their_bytes_overflow():
    """A view of strides 0 may have them. Red with a size that is multiplied unseen: a crash."""
    x = np.broadcast_to(np.float16(1), (1, 1 << 61))
    vector = np.broadcast_to(np.float16(1), (1 << 61,))
    for call in (
        lambda: fastbn.normalize(x, vector, vector),
        lambda: fastbn.batch_norm_forward(x, vector),
        lambda: fastbn.backward_reduce(x, x, vector),
        lambda: fastbn.FrozenBatchNorm.from_arrays(vector, vector),
        lambda: fastbn._native.Prepared("float16", vector, vector, None, None, 1e-5, 1, None, 0.0),
    ):
        with pytest.raises((MemoryError, ValueError)):
            call()


class Reshapes:
    """A number, or a tensor, that gives x another shape when it is asked."""

    def __init__(self, x, value):
        self.x, self.value = x, value

    def __float__(self):
        self.x.shape = (self.x.shape[0], -1)
        return float(self.value)

    def __dlpack_device__(self):
        return self.value.__dlpack_device__()

    def __dlpack__(self, **options):
        float(self) if self.value.ndim == 0 else setattr(self.x, "shape", (self.x.shape[0], -1))
        return self.value.__dlpack__(**options)


@pytest.mark.parametrize("shape", [(2, 3, 100_000), (4, 3, 50)])
def test_an_argument_that_changes_the_shape_of_x(shape):
    """Row 14. Red, by a crash, without the checks of arrange."""
    three = np.zeros(3), np.ones(3)
    for call in (
        lambda x: fastbn.normalize(x, *three, eps=Reshapes(x, 1e-5)),
        lambda x: fastbn.normalize(x, *three, residual=Reshapes(x, np.zeros(shape, np.float32))),
        lambda x: fastbn.batch_norm_forward(x, eps=Reshapes(x, 1e-5)),
        lambda x: fastbn.batch_norm(x, *three, training=True, momentum=Reshapes(x, 0.1)),
        lambda x: fastbn.batch_norm(x, *three, eps=Reshapes(x, 0.1)),
        lambda x: fastbn.BatchNorm(3)(x, residual=Reshapes(x, np.zeros(shape, np.float32))),
        lambda x: fastbn.FrozenBatchNorm.from_arrays(*three)(x, residual=Reshapes(x, np.zeros(shape, np.float32))),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call(np.ones(shape, np.float32))


def test_a_frozen_operation_that_is_made_while_it_is_made():
    class Again:
        def __float__(self):
            fastbn.FrozenBatchNorm.__init__(op, np.zeros(2000), np.ones(2000))
            return 1e-5

    op = fastbn.FrozenBatchNorm.__new__(fastbn.FrozenBatchNorm)
    with pytest.raises(TypeError, match="immutable"):
        fastbn.FrozenBatchNorm.__init__(op, np.zeros(2), np.ones(2), eps=Again())
