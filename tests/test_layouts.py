"""test_layouts -- every arrangement of memory: the right answer, in x's own order, and never a write elsewhere.

Seeded bug that turns it red: the stride of a collapsed dimension taken from the wrong axis.
"""

import os
import subprocess
import sys
import tracemalloc

import arrays
import numpy as np
import pytest
import twin
from arrays import FLOAT16, FLOAT32, FLOAT64, normal, parameters
from fresh import ASAN
from tolerance import assert_close, assert_gradients

import fastbn

SHAPES = {2: (6, 5), 3: (4, 5, 7), 4: (3, 5, 4, 6), 5: (2, 3, 4, 3, 5), 6: (2, 3, 2, 3, 2, 4)}
VIEWS = [(ndim, name) for ndim in SHAPES for name in arrays.views(ndim)]


def in_order_of(x):
    """An array with the memory order that NumPy itself would give a copy of x."""
    return np.empty_like(x, dtype=x.dtype.newbyteorder("="))


def check_everything(x, grad_output, residual, axis, rng):
    """Every function on these arrays against the twin; returns the results that are tensors."""
    dtype = x.dtype.newbyteorder("=")
    weight, bias = parameters(rng, x.shape[axis], dtype)
    options = {"channel_axis": axis, "activation": "leaky_relu", "residual": residual}
    expected, reference = twin.batch_norm_forward(x, weight, bias, **options)
    scale = twin.value_scale(reference, weight, bias, residual)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
    assert_close(y, expected, scale)
    grad_output[...] = twin.off_kinks(grad_output, reference)
    found = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
    assert_gradients(found, grad_output, reference, weight)

    m, exact = fastbn.moments(x, channel_axis=axis), twin.moments(x, channel_axis=axis)
    np.testing.assert_allclose(m.mean, exact.mean.astype(float), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(m.m2, exact.m2.astype(float), rtol=1e-5)
    z = fastbn.normalize(x, m.mean, m.var(), weight, bias, **options)
    assert_close(z, expected, scale)
    sums = fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
    for total, wanted in zip(sums, twin.backward_reduce(grad_output, x, m.mean, channel_axis=axis), strict=True):
        np.testing.assert_allclose(total, wanted.astype(float), rtol=1e-5, atol=1e-4)
    given = grad_output, x, m.mean, m.var(), weight, *sums, m.count
    dx = fastbn.backward_apply(*given, channel_axis=axis)
    plain = twin.batch_norm_forward(x, weight, bias, channel_axis=axis)[1]
    assert_close(
        dx, twin.backward_apply(*given, channel_axis=axis), twin.gradient_scales(grad_output, plain, weight)[0]
    )
    return y, found[0], found[3], z, dx


@pytest.mark.parametrize(("ndim", "name"), VIEWS)
def test_views(ndim, name, dtype, rng):
    """x, grad_output and residual in this arrangement, with the channels on every axis in turn."""
    arrange = arrays.views(ndim)[name]
    for axis in range(-1, ndim - 1):
        x, grad_output, residual = (arrange(normal(rng, SHAPES[ndim], dtype)) for _ in range(3))
        if not grad_output.flags.writeable:
            grad_output = grad_output.copy()
        for result in check_everything(x, grad_output, residual, axis, rng):
            assert result.dtype == dtype
            assert result.strides == in_order_of(x).strides
        assert fastbn.moments(x, channel_axis=axis).count == x.size // x.shape[axis]


@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
def test_mixed_arrangements(ndim, dtype, rng):
    """x one way, grad_output another, residual a third, out a fourth.

    Red where a dimension is turned round in one array and not in the other.
    """
    found = arrays.views(ndim)
    names = list(found)
    for shift in range(0, len(names), 3):
        one, two, three, four = (found[names[(shift + step) % len(names)]] for step in (0, 5, 11, 17))
        x, residual = one(normal(rng, SHAPES[ndim], dtype)), three(normal(rng, SHAPES[ndim], dtype))
        grad_output = two(normal(rng, SHAPES[ndim], dtype))
        if not grad_output.flags.writeable:
            grad_output = grad_output.copy()
        for result in check_everything(x, grad_output, residual, shift % ndim, rng):
            assert result.strides == in_order_of(x).strides
        out = four(np.zeros(SHAPES[ndim], dtype))
        if out.flags.writeable and out.dtype.isnative:
            y = fastbn.batch_norm_forward(x, channel_axis=shift % ndim, out=out)[0]
            assert y is out
            assert_close(np.array(y), twin.batch_norm_forward(x, channel_axis=shift % ndim)[0])


@pytest.mark.parametrize("name", [name for name in arrays.views(4) if name not in ("read_only", "big_endian")])
def test_out(name, dtype, rng):
    """out= of any arrangement, every place around it untouched."""
    arrange = arrays.views(4)[name]
    shape = (3, 6, 4, 5)
    x, grad_output = normal(rng, shape, dtype), normal(rng, shape, dtype)
    weight, bias = parameters(rng, 6, dtype)
    for axis in (1, -1):
        weight, bias = parameters(rng, shape[axis], dtype)
        expected, reference = twin.batch_norm_forward(x, weight, bias, channel_axis=axis)
        out = arrange(np.zeros(shape, dtype))
        y, saved = fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis, out=out)
        assert y is out
        assert_close(np.array(y), expected)
        assert_surroundings(out)
        dx = arrange(np.zeros(shape, dtype))
        assert fastbn.batch_norm_backward(grad_output, x, saved, weight, bias, out=dx)[0] is dx
        wanted = twin.batch_norm_backward(grad_output, x, reference, weight, bias)[0]
        scale = twin.gradient_scales(grad_output, reference, weight)[0]
        assert_close(np.array(dx), wanted, scale)
        assert_surroundings(dx)
        m = fastbn.moments(x, channel_axis=axis)
        z = arrange(np.zeros(shape, dtype))
        assert fastbn.normalize(x, m.mean, m.var(), weight, bias, channel_axis=axis, out=z) is z
        assert_close(np.array(z), expected)
        assert_surroundings(z)
        sums = fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
        given = grad_output, x, m.mean, m.var(), weight, *sums, m.count
        dx2 = arrange(np.zeros(shape, dtype))
        assert fastbn.backward_apply(*given, channel_axis=axis, out=dx2) is dx2
        assert_close(np.array(dx2), wanted, scale)
        assert_surroundings(dx2)


def assert_surroundings(view):
    """What lies in the owner of a view and not in the view is still NaN, as `arrays` made it."""
    owner = view
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if owner.dtype == view.dtype and owner.size > view.size and np.isnan(owner.astype(float)).any():
        assert np.isnan(owner.astype(float)).sum() == owner.size - view.size


def zero_stride_views():
    def broadcast(axis):
        return lambda x: np.broadcast_to(np.take(x, [0], axis), x.shape)

    return {
        **{f"axis{axis}": broadcast(axis) for axis in range(4)},
        "all": lambda x: np.broadcast_to(x[:1, :1, :1, :1], x.shape),
    }


@pytest.mark.parametrize("name", zero_stride_views())
def test_zero_strides(name, dtype, rng):
    """Broadcast views are inputs like any other; the result is a whole array."""
    arrange = zero_stride_views()[name]
    for axis in range(4):
        x, residual, grad_output = (arrange(normal(rng, SHAPES[4], dtype)) for _ in range(3))
        weight, bias = parameters(rng, SHAPES[4][axis], dtype)
        options = {"channel_axis": axis, "residual": residual}
        y, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
        expected, reference = twin.batch_norm_forward(x, weight, bias, **options)
        assert_close(y, expected, twin.value_scale(reference, weight, bias, residual))
        assert 0 not in y.strides
        assert y.flags.writeable
        found = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
        assert_gradients(found, grad_output, reference, weight)


def test_overlapping_windows(dtype, rng):
    """A sliding-window view: elements that share memory, read only."""
    x = np.lib.stride_tricks.sliding_window_view(normal(rng, (9, 20), dtype), (3, 4))
    for axis in range(4):
        assert_close(
            fastbn.batch_norm_forward(x, channel_axis=axis)[0], twin.batch_norm_forward(x, channel_axis=axis)[0]
        )


SELF_OVERLAPPING = "out whose elements share memory"


def test_out_that_shares_its_own_memory(rng):
    """Such an out cannot hold a result."""
    x = normal(rng, (4, 3, 5), FLOAT32)
    raw = np.zeros(5, np.float32)
    out = np.lib.stride_tricks.as_strided(raw, x.shape, (0, 0, 4))
    with pytest.raises(ValueError, match="out"):
        fastbn.batch_norm_forward(x, out=out)
    assert not raw.any()


# Overlap: what NumPy's ufuncs give, which is what separate arrays give.

OVERLAPS = [0, 1, 3, 16, 35, 139]


def overlapping(values, shift):
    """An array with these values, and another that begins `shift` elements later in the same memory."""
    raw = np.zeros(values.size + shift, values.dtype)
    first = raw[: values.size].reshape(values.shape)
    first[...] = values
    return first, raw[shift:].reshape(values.shape)


@pytest.mark.parametrize("direction", ["later", "earlier"])
@pytest.mark.parametrize("shift", OVERLAPS)
@pytest.mark.parametrize("role", ["x", "residual", "grad_output", "x_of_backward"])
def test_partial_overlap(isa, dtype, layout, role, shift, direction, rng):
    """Red where overlap is not looked for."""
    shape, axis = layout(4, 5, 17)
    weight, bias = parameters(rng, 5, dtype)
    x, residual, grad_output = (normal(rng, shape, dtype) for _ in range(3))
    options = {"channel_axis": axis, "activation": "relu", "residual": residual}
    expected, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
    gradients = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)

    given = {"x": x, "residual": residual, "grad_output": grad_output, "x_of_backward": x}[role]
    shared, out = overlapping(given, shift)
    if direction == "earlier":
        out[...] = given
        shared, out = out, shared
    if role == "x":
        y, _ = fastbn.batch_norm_forward(shared, weight, bias, out=out, **options)
    elif role == "residual":
        y, _ = fastbn.batch_norm_forward(x, weight, bias, out=out, **{**options, "residual": shared})
    elif role == "grad_output":
        y, *rest = fastbn.batch_norm_backward(shared, x, saved, weight, bias, out=out)
    else:
        y, *rest = fastbn.batch_norm_backward(grad_output, shared, saved, weight, bias, out=out)
    assert y is out
    if role in ("x", "residual"):
        assert arrays.same_bytes(y, expected)
    else:
        assert all(arrays.same_bytes(a, b) for a, b in zip((y, *rest), gradients, strict=True))


@pytest.mark.parametrize("size", [(4, 5, 17), (16, 32, 28 * 28)], ids=str)
def test_in_place(isa, threads, dtype, layout, size, rng):
    """out is x, residual or grad_output itself."""
    shape, axis = layout(*size)
    weight, bias = parameters(rng, size[1], dtype)
    x, residual, grad_output = (normal(rng, shape, dtype) for _ in range(3))
    for activation, added in ((None, None), ("relu", None), ("relu6", residual)):
        options = {"channel_axis": axis, "activation": activation}
        expected, saved = fastbn.batch_norm_forward(x, weight, bias, residual=added, **options)
        gradients = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
        out = x.copy()
        assert arrays.same_bytes(
            fastbn.batch_norm_forward(out, weight, bias, residual=added, out=out, **options)[0], expected
        )
        m = fastbn.moments(x, channel_axis=axis)
        out = x.copy()
        z = fastbn.normalize(x, m.mean, m.var(), weight, bias, residual=added, **options)
        in_place = fastbn.normalize(out, m.mean, m.var(), weight, bias, residual=added, out=out, **options)
        assert arrays.same_bytes(in_place, z)
        if added is not None:
            out = residual.copy()
            assert arrays.same_bytes(
                fastbn.batch_norm_forward(x, weight, bias, residual=out, out=out, **options)[0], expected
            )
        for aliased in (grad_output, x):
            out = aliased.copy()
            given = (out, x) if aliased is grad_output else (grad_output, out)
            found = fastbn.batch_norm_backward(*given, saved, weight, bias, out=out)
            assert all(arrays.same_bytes(a, b) for a, b in zip(found, gradients, strict=True))
        sums = fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
        rest = m.mean, m.var(), weight, *sums, m.count
        dx = fastbn.backward_apply(grad_output, x, *rest, channel_axis=axis)
        for aliased in (grad_output, x):
            out = aliased.copy()
            given = (out, x) if aliased is grad_output else (grad_output, out)
            assert arrays.same_bytes(fastbn.backward_apply(*given, *rest, channel_axis=axis, out=out), dx)


def test_one_array_for_everything(dtype, layout, rng):
    """x is its own residual and its own result."""
    shape, axis = layout(4, 5, 33)
    x = normal(rng, shape, dtype)
    expected, _ = fastbn.batch_norm_forward(x, channel_axis=axis, residual=x.copy())
    assert arrays.same_bytes(fastbn.batch_norm_forward(x, channel_axis=axis, residual=x, out=x)[0], expected)


def test_transposed_in_place(dtype, rng):
    """out is x turned around: the same memory in another order."""
    x = normal(rng, (12, 5, 12), dtype)
    expected, _ = fastbn.batch_norm_forward(x)
    out = x.transpose(2, 1, 0)
    fastbn.batch_norm_forward(x, out=out)
    assert_close(np.ascontiguousarray(out), expected.astype(float))


def test_parameters_inside_x(rng):
    """Parameters are read before the first result is written over them."""
    x = rng.uniform(0.5, 1.5, (6, 8, 10)).astype(np.float32)
    weight, bias = x[0, :, 0].copy(), x[3, :, 4].copy()
    expected, _ = fastbn.batch_norm_forward(x.copy(), weight, bias)
    found, _ = fastbn.batch_norm_forward(x, x[0, :, 0], x[3, :, 4], out=x)
    assert arrays.same_bytes(found, expected)


@pytest.mark.parametrize("stride", [2, -1, 3])
def test_strided_parameters(dtype, layout, stride, rng):
    shape, axis = layout(4, 6, 9)
    x = normal(rng, shape, dtype)
    values = [rng.uniform(0.5, 1.5, 6).astype(arrays.parameter_dtype(dtype)) for _ in range(4)]
    strided = [arrays.stepped(0, stride)(v) for v in values]
    assert all(v.strides[0] != v.itemsize for v in strided)
    assert arrays.same_bytes(
        fastbn.normalize(x, *values, channel_axis=axis), fastbn.normalize(x, *strided, channel_axis=axis)
    )
    running, plain = [v.copy() for v in values[:2]], strided[:2]
    fastbn.batch_norm(x, *running, training=True, channel_axis=axis)
    fastbn.batch_norm(x, *plain, training=True, channel_axis=axis)
    assert not np.array_equal(plain[0], values[0])
    for a, b in zip(running, plain, strict=True):
        assert np.array_equal(a, b)


# Other owners of memory.


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("name", ["contiguous", "order0231", "step2_axis2", "window"])
def test_dlpack(name, dtype, rng):
    arrange = arrays.views(4)[name]
    x, grad_output, residual = (arrange(normal(rng, SHAPES[4], dtype)) for _ in range(3))
    foreign = [arrays.Foreign(a) for a in (x, grad_output, residual)]
    weight, bias = parameters(rng, SHAPES[4][1], dtype)
    y, saved = fastbn.batch_norm_forward(x, weight, bias, residual=residual)
    y2, saved2 = fastbn.batch_norm_forward(foreign[0], weight, bias, residual=foreign[2])
    assert type(y2) is np.ndarray
    assert y2.strides == y.strides
    assert arrays.same_bytes(y, y2)
    for a, b in zip(
        fastbn.batch_norm_backward(grad_output, x, saved, weight, bias),
        fastbn.batch_norm_backward(foreign[1], foreign[0], saved2, weight, bias),
        strict=True,
    ):
        assert arrays.same_bytes(a, b)
    m, m2 = fastbn.moments(x), fastbn.moments(foreign[0])
    assert m.mean.tobytes() == m2.mean.tobytes()
    assert arrays.same_bytes(
        fastbn.normalize(x, m.mean, m.var(), residual=residual),
        fastbn.normalize(foreign[0], m.mean, m.var(), residual=foreign[2]),
    )
    sums = fastbn.backward_reduce(foreign[1], foreign[0], m.mean)
    assert np.array_equal(sums, fastbn.backward_reduce(grad_output, x, m.mean))
    assert arrays.same_bytes(
        fastbn.backward_apply(grad_output, x, m.mean, m.var(), weight, *sums, m.count),
        fastbn.backward_apply(foreign[1], foreign[0], m.mean, m.var(), weight, *sums, m.count),
    )
    running = np.zeros(5, weight.dtype), np.ones(5, weight.dtype)
    assert arrays.same_bytes(fastbn.batch_norm(foreign[0], *running), fastbn.batch_norm(x, *running))


def test_memory_map(tmp_path, dtype, rng):
    """A read-only file is an input; a writable one is an output."""
    x = normal(rng, (3, 5, 16), dtype)
    path = tmp_path / "x.bin"
    x.tofile(path)
    expected, _ = fastbn.batch_norm_forward(x)
    assert arrays.same_bytes(
        np.asarray(fastbn.batch_norm_forward(np.memmap(path, dtype, "r", shape=x.shape))[0]), expected
    )
    out = np.memmap(path, dtype, "r+", shape=x.shape)
    fastbn.batch_norm_forward(x, out=out)
    out.flush()
    assert np.fromfile(path, np.uint8).tobytes() == expected.tobytes()


COLLAPSIBLE = {
    "nchw": lambda x: (x, 1),
    "nhwc": lambda x: (x, -1),
    "channels_last": lambda x: (np.moveaxis(x, -1, 1), 1),
    "every_other_image": lambda x: (x[::2], 1),
    "images_backwards": lambda x: (x[::-1], 1),
    "some_channels": lambda x: (x[:, 3:9], 1),
    "every_other_channel": lambda x: (x[:, ::2], 1),
    "channels_backwards": lambda x: (x[:, ::-1], 1),
    "some_rows": lambda x: (x[:, :, 1:-1], 1),
    "some_last_channels": lambda x: (x[..., 3:9], -1),
    "one_image_for_all": lambda x: (np.broadcast_to(x[:1], x.shape), 1),
    "read_only": lambda x: (arrays.read_only(x), 1),
}


@pytest.mark.parametrize("name", COLLAPSIBLE)
def test_what_collapses_is_not_copied(name, rng):
    """NumPy tells tracemalloc of every array: a call allocates its results and little more."""
    x, axis = COLLAPSIBLE[name](normal(rng, (20, 16, 40, 32), np.float32))
    grad_output, residual, out = x + 0, x + 0, x + 0
    _, saved = fastbn.batch_norm_forward(x, channel_axis=axis)
    m = fastbn.moments(x, channel_axis=axis)
    sums = fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis)
    for call in (
        lambda: fastbn.batch_norm_forward(x, channel_axis=axis, out=out),
        lambda: fastbn.normalize(x, m.mean, m.var(), channel_axis=axis, residual=residual, out=out),
        lambda: fastbn.batch_norm_backward(grad_output, x, saved, out=out),
        lambda: fastbn.moments(x, channel_axis=axis),
        lambda: fastbn.backward_reduce(grad_output, x, m.mean, channel_axis=axis),
        lambda: fastbn.backward_apply(
            grad_output, x, m.mean, m.var(), None, *sums, m.count, channel_axis=axis, out=out
        ),
    ):
        tracemalloc.start()
        call()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < x.nbytes / 20


WALKS = {
    "as_it_is": lambda x: x.copy(),
    "images_backwards": lambda x: x[::-1].copy()[::-1],
    "columns_backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "transposed_planes": lambda x: x.swapaxes(2, 3).copy().swapaxes(2, 3),
    "channels_last": lambda x: x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2),
    "channels_first": lambda x: x.swapaxes(0, 1).copy().swapaxes(0, 1),
    "between_images": lambda x: np.concatenate([x, x], axis=1)[:, : x.shape[1]],
    "between_rows": lambda x: np.concatenate([x, x], axis=2)[:, :, : x.shape[2]],
    "between_columns": lambda x: np.concatenate([x, x], axis=3)[..., : x.shape[3]],
    "big_endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (1, 4, 5, 5), (3, 1, 5, 5), (20, 1, 1, 1)])
@pytest.mark.parametrize("after", WALKS)
@pytest.mark.parametrize("before", WALKS)
def test_x_may_move_before_the_backward(before, after, shape, rng):
    """The gate of an activation after a residual finds its elements again. Red where the backward takes the geometry of
    its own x for the forward's (arrange without the comparison of strides).
    """
    x, residual, grad_output = (normal(rng, shape, np.float32) for _ in range(3))
    _, saved = fastbn.batch_norm_forward(x, activation="relu", residual=residual)
    expected = fastbn.batch_norm_backward(grad_output, x, saved)
    _, saved = fastbn.batch_norm_forward(WALKS[before](x), activation="relu", residual=residual)
    found = fastbn.batch_norm_backward(grad_output, WALKS[after](x), saved)
    np.testing.assert_array_equal(found[-1], expected[-1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space of a child")
@pytest.mark.skipif(ASAN, reason="AddressSanitizer needs the address space")
def test_more_elements_than_32_bits_count():
    """2**32 and some, in a view that takes 32 KB, where 4 GB are not to be had: 64-bit sizes all the way down."""
    program = """
import resource, numpy as np, fastbn
resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
row = np.random.default_rng(0).standard_normal((1, 2, 4096)).astype(np.float32)
m = fastbn.moments(np.broadcast_to(row, ((1 << 19) + 1, 2, 4096)))
assert m.count == ((1 << 19) + 1) * 4096 > 1 << 31
one = row.astype(np.float64)
np.testing.assert_allclose(m.mean, one.mean(axis=(0, 2)), rtol=1e-6)
np.testing.assert_allclose(m.var(), one.var(axis=(0, 2)), rtol=1e-6)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_windows_with_gaps_in_place(rng):
    """Red when a view is taken to overlap itself only where its elements are more than its memory."""
    base = normal(rng, (8, 20), FLOAT32)
    x = np.lib.stride_tricks.sliding_window_view(base, 4, axis=1, writeable=True)[:, ::2]
    expected, _ = fastbn.batch_norm_forward(x.copy())
    running = np.zeros(x.shape[1]), np.ones(x.shape[1])
    apart = np.zeros(x.shape[1]), np.ones(x.shape[1])
    fastbn.batch_norm(x.copy(), *apart, training=True)
    fastbn.batch_norm(x, *running, training=True, out=x)
    np.testing.assert_array_equal(running, apart)
    for window in range(x.shape[1]):
        for i in range(4):
            places = [w for w in range(x.shape[1]) if 0 <= 2 * window + i - 2 * w < 4]
            candidates = [expected[:, w, 2 * window + i - 2 * w] for w in places]
            assert np.all(np.any([x[:, window, i] == c for c in candidates], axis=0))


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20, 1 << 20), (2, 1 << 40, 3), (1 << 58, 2, 2)], ids=str)
def test_views_that_no_memory_could_hold(shape):
    """2**60 elements without a byte: refused, since the result would not fit."""
    x = np.broadcast_to(np.float32(1), shape)
    with pytest.raises((ValueError, MemoryError)):
        fastbn.batch_norm_forward(x)
