"""test_torch -- PyTorch as second witness: in float64 for the functions, side by side for the layer.

Skipped where PyTorch is not installed. Seeded bug that turns it red: momentum counted the other way round.
"""

import re

import arrays
import numpy as np
import pytest
from arrays import ACTIVATIONS, normal, parameters
from tolerance import assert_close

import fastbn

torch = pytest.importorskip("torch")
F = torch.nn.functional

pytestmark = pytest.mark.torch


def wide(array):
    return None if array is None else torch.from_numpy(array.astype(np.float64))


def channels_second(tensor, axis):
    return tensor.movedim(axis, 1)


def activate(z, activation, slope=0.01):
    return {
        None: lambda: z,
        "relu": lambda: F.relu(z),
        "relu6": lambda: F.relu6(z),
        "leaky_relu": lambda: F.leaky_relu(z, slope),
    }[activation]()


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_functions(dtype, layout, activation, added, training, rng):
    """y, running statistics and every gradient, PyTorch's from autograd in float64."""
    if dtype == arrays.FLOAT64:
        pytest.skip("PyTorch has nothing wider than float64 to witness with; test_float64 allows it its errors")
    shape, axis = layout(6, 5, 42)
    x, residual, grad_output = (normal(rng, shape, dtype, mean=m) for m in (1, 0, 0))
    weight, bias = parameters(rng, 5, dtype)
    mean, var = rng.standard_normal(5).astype(np.float32), rng.uniform(0.5, 2, 5).astype(np.float32)
    running = mean.copy(), var.copy()
    witness = [wide(a).requires_grad_() for a in (x, weight, bias, residual)]
    witness_running = wide(mean), wide(var)
    z = F.batch_norm(channels_second(witness[0], axis), *witness_running, *witness[1:3], training, 0.1, 1e-5)
    z = z.movedim(1, axis) + (witness[3] if added else 0)
    kinks = z.detach().abs().minimum((z.detach() - 6).abs()).numpy()
    grad_output = np.where(kinks < 1e-5, 0, grad_output).astype(dtype)
    expected = activate(z, activation)
    expected.backward(wide(grad_output))

    options = {"channel_axis": axis, "activation": activation, "residual": residual if added else None}
    y = fastbn.batch_norm(x, *running, weight, bias, training, 0.1, 1e-5, **options)
    assert_close(y, expected.detach().numpy(), 8)
    if training:
        for found, wanted in zip(running, witness_running, strict=True):
            assert_close(found, wanted.numpy())
        _, saved = fastbn.batch_norm_forward(x, weight, bias, **options)
    else:
        _, saved = fastbn._native.forward_eval(
            x, mean, var, weight, bias, 1e-5, axis, activation, 0.01, options["residual"], None
        )
    dx, dweight, dbias, *rest = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
    assert_close(dx, witness[0].grad.numpy(), 10)
    assert_close(dweight, witness[1].grad.numpy(), 100)
    assert_close(dbias, witness[2].grad.numpy(), 100)
    if added:
        assert_close(rest[0], witness[3].grad.numpy())


def test_float64(layout, rng):
    shape, axis = layout(6, 5, 42)
    x, grad_output = normal(rng, shape, np.float64), normal(rng, shape, np.float64)
    weight, bias = parameters(rng, 5, arrays.FLOAT64)
    witness = [wide(a).requires_grad_() for a in (x, weight, bias)]
    expected = F.batch_norm(channels_second(witness[0], axis), None, None, *witness[1:], True).movedim(1, axis)
    expected.backward(wide(grad_output))
    y, saved = fastbn.batch_norm_forward(x, weight, bias, channel_axis=axis)
    np.testing.assert_allclose(y, expected.detach(), rtol=1e-13, atol=1e-13)
    for found, tensor in zip(fastbn.batch_norm_backward(grad_output, x, saved, weight, bias), witness, strict=True):
        np.testing.assert_allclose(found, tensor.grad, rtol=1e-12, atol=1e-12)


def test_building_blocks(layout, rng):
    """var_mean is PyTorch's moments; its synchronized backward is made of the same two sums."""
    shape, axis = layout(6, 5, 42)
    x = normal(rng, shape, np.float32, mean=3)
    m = fastbn.moments(x, channel_axis=axis)
    flat = channels_second(wide(x), axis).transpose(0, 1).reshape(5, -1)
    var, mean = torch.var_mean(flat, dim=1, correction=0)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-7)
    np.testing.assert_allclose(m.var(), var, rtol=3e-7)


def pair(**options):
    """Our layer and PyTorch's, with the same parameters."""
    ours, theirs = fastbn.BatchNorm(4, **options), torch.nn.BatchNorm2d(4, **options)
    if ours.weight is not None:
        with torch.no_grad():
            theirs.weight.uniform_(0.5, 1.5)
            theirs.bias.uniform_(-1, 1)
        ours.weight, ours.bias = theirs.weight.detach().numpy(), theirs.bias.detach().numpy()
    return ours, theirs


def agree(found, expected, tolerance=2e-5):
    if expected is None:
        assert found is None
    else:
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("track_running_stats", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None], ids=str)
def test_layer(momentum, track_running_stats, affine, rng):
    """Three batches of training, then eval, each with its backward."""
    torch.manual_seed(0)
    ours, theirs = pair(momentum=momentum, track_running_stats=track_running_stats, affine=affine, eps=1e-4)
    for step in range(5):
        ours.train(step < 3)
        theirs.train(step < 3)
        assert ours.training == theirs.training
        x, grad_output = normal(rng, (3, 4, 5, 6), np.float32, mean=step), normal(rng, (3, 4, 5, 6), np.float32)
        tensor = torch.from_numpy(x).requires_grad_()
        theirs.zero_grad()
        expected = theirs(tensor)
        expected.backward(torch.from_numpy(grad_output))
        agree(ours(x), expected)
        agree(ours.backward(grad_output), tensor.grad)
        if affine:
            agree(ours.grad_weight, theirs.weight.grad, 1e-4)
            agree(ours.grad_bias, theirs.bias.grad, 1e-4)
        agree(ours.running_mean, theirs.running_mean)
        agree(ours.running_var, theirs.running_var)
        if track_running_stats:
            assert ours.num_batches_tracked == theirs.num_batches_tracked.item() == min(step + 1, 3)


def test_residual_and_relu_through_autograd(rng):
    """The block of a residual network: relu(bn(x) + shortcut)."""
    torch.manual_seed(0)
    _, theirs = pair()
    ours = fastbn.BatchNorm(4, activation="relu")
    ours.weight, ours.bias = theirs.weight.detach().numpy(), theirs.bias.detach().numpy()
    x, residual, grad_output = (normal(rng, (3, 4, 5, 6), np.float32) for _ in range(3))
    tensor, shortcut = torch.from_numpy(x).requires_grad_(), torch.from_numpy(residual).requires_grad_()
    expected = F.relu(theirs(tensor) + shortcut)
    expected.backward(torch.from_numpy(grad_output))
    agree(ours(x, residual), expected)
    agree(ours.backward(grad_output), tensor.grad)
    agree(ours.grad_residual, shortcut.grad)
    agree(ours.grad_weight, theirs.weight.grad, 1e-4)
    agree(ours.grad_bias, theirs.bias.grad, 1e-4)


def test_state_dict_goes_both_ways(rng):
    torch.manual_seed(0)
    ours, theirs = pair()
    for _ in range(3):
        theirs(torch.from_numpy(normal(rng, (3, 4, 5, 6), np.float32, mean=2)))
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    assert ours.num_batches_tracked == 3
    agree(ours.running_mean, theirs.running_mean, 0)
    agree(ours.running_var, theirs.running_var, 0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours(normal(rng, (3, 4, 5, 6), np.float32))
    other = torch.nn.BatchNorm2d(4)
    other.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in ours.state_dict().items()})
    assert other.num_batches_tracked.item() == 4
    x = normal(rng, (3, 4, 5, 6), np.float32)
    agree(ours.eval()(x), other.eval()(torch.from_numpy(x)))


def test_one_value_per_channel_in_their_words(rng):
    x = normal(rng, (1, 4, 1, 1), np.float32)
    with pytest.raises(ValueError, match="more than 1 value") as theirs:
        torch.nn.BatchNorm2d(4)(torch.from_numpy(x))
    words, _, _ = str(theirs.value).partition(" torch.Size")
    with pytest.raises(ValueError, match=re.escape(words)):
        fastbn.BatchNorm(4)(x)


def test_channels_last_tensors(rng):
    """Without a copy in between: the result has the strides that PyTorch's own has."""
    x = torch.from_numpy(normal(rng, (3, 4, 5, 6), np.float32)).to(memory_format=torch.channels_last)
    y, _ = fastbn.batch_norm_forward(x)
    expected = F.batch_norm(x, None, None, training=True)
    agree(y, expected)
    assert tuple(s // 4 for s in y.strides) == expected.stride() == x.stride()
    out = torch.empty_like(x)
    fastbn.batch_norm_forward(x, out=out.numpy())
    agree(out.numpy(), expected)
    for part in (x[:, 1:3], x[::2], x[..., 1:], x.transpose(2, 3)):
        agree(fastbn.batch_norm_forward(part)[0], F.batch_norm(part, None, None, training=True))


def test_a_tensor_that_requires_grad_is_refused(rng):
    """NumPy cannot view it, and a silent copy would lose the gradient."""
    x = torch.from_numpy(normal(rng, (3, 4, 5), np.float32)).requires_grad_()
    with pytest.raises(TypeError, match=r"\bx\b"):
        fastbn.batch_norm_forward(x)


def test_folding(rng):
    """A convolution and a batch norm in one."""
    torch.manual_seed(0)
    convolution, theirs = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
    for _ in range(3):
        theirs(convolution(torch.randn(5, 3, 8, 8)) * 3 + 1)
    ours = fastbn.BatchNorm(4)
    ours.load_state_dict({k: v.detach().numpy() for k, v in theirs.state_dict().items()})
    weight, bias = fastbn.fold_conv(convolution.weight.detach().numpy(), convolution.bias.detach().numpy(), ours)
    x = torch.randn(2, 3, 8, 8)
    expected = theirs.eval()(convolution(x))
    agree(F.conv2d(x, torch.from_numpy(weight), torch.from_numpy(bias)).numpy(), expected)


def test_a_tensor_that_is_the_negative_of_its_memory():
    """DLPack does not carry the bit."""
    x = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    with pytest.raises(TypeError, match="resolve_neg"):
        fastbn.batch_norm_forward(x)
    fastbn.batch_norm_forward(x.resolve_neg())
