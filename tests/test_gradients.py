"""test_gradients -- the backward is the derivative of the forward, and obeys the laws of the mathematics.

Seeded bug that turns it red: the term of the variance left out of dx.
"""

import numpy as np
import pytest
from arrays import ACTIVATIONS, FLOAT64, normal, parameters
from tolerance import assert_close, epsilon

import fastbn
from fastbn import _native

STEP = 1e-5


def central_difference(loss, array):
    """The gradient of loss() with respect to array, changed one element at a time and put back."""
    gradient = np.empty(array.shape)
    for place in np.ndindex(array.shape):
        kept = array[place]
        array[place] = kept + STEP
        above = loss()
        array[place] = kept - STEP
        below = loss()
        array[place] = kept
        gradient[place] = (above - below) / (2 * STEP)
    return gradient


def away_from_kinks(rng, shape, z):
    """A residual that moves every z to 0.1 and more from 0 and from 6."""
    target = rng.choice([-2.0, -0.3, 0.4, 2.5, 5.2, 6.7, 9.0], shape) + rng.uniform(-0.1, 0.1, shape)
    return target - z


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_central_differences(isa, layout, activation, affine, residual, mode, rng):
    shape, axis = layout(3, 4, 5)
    x, grad_output = normal(rng, shape, FLOAT64, mean=0.5), rng.standard_normal(shape)
    weight, bias = parameters(rng, 4, FLOAT64) if affine else (None, None)
    mean, var = rng.standard_normal(4), rng.uniform(0.5, 2, 4)
    settings = {"channel_axis": axis, "activation": activation, "negative_slope": 0.2}

    def forward(added, **changed):
        options = {**settings, **changed}
        if mode == "training":
            return fastbn.batch_norm_forward(x, weight, bias, 1e-3, residual=added, **options)
        return _native.forward_eval(x, mean, var, weight, bias, 1e-3, axis, options["activation"], 0.2, added, None)

    z = forward(None, activation=None)[0]
    added = away_from_kinks(rng, shape, z) if residual else None
    if not residual and activation is not None:
        # Without a residual the kink cannot be dodged by design: leave such elements out of the loss.
        grad_output[(np.abs(z) < 0.01) | (np.abs(z - 6) < 0.01)] = 0

    def loss():
        return float(np.sum(forward(added)[0] * grad_output, dtype=np.longdouble))

    _, saved = forward(added)
    dx, dweight, dbias, *rest = fastbn.batch_norm_backward(grad_output, x, saved, weight, bias)
    checks = [(dx, x)]
    if affine:
        checks += [(dweight, weight), (dbias, bias)]
    if residual:
        checks += [(rest[0], added)]
    for gradient, array in checks:
        np.testing.assert_allclose(gradient, central_difference(loss, array), rtol=1e-7, atol=2e-8)


def test_batch_statistics_take_part(isa, layout, rng):
    """Training and inference have different gradients even where they have the same output."""
    shape, axis = layout(3, 4, 5)
    x, grad_output = normal(rng, shape, FLOAT64), rng.standard_normal(shape)
    y, saved = fastbn.batch_norm_forward(x, channel_axis=axis)
    y2, constants = _native.forward_eval(x, saved.mean, saved.var, None, None, 1e-5, axis, None, 0.01, None, None)
    assert_close(y2, y)
    training = fastbn.batch_norm_backward(grad_output, x, saved)
    inference = fastbn.batch_norm_backward(grad_output, x, constants)
    assert np.abs(training[0] - inference[0]).max() > 0.01
    for a, b in zip(training[1:], inference[1:], strict=True):
        assert_close(a, b, 60)


# Identities of the paper. eps is 0 in them: with it they hold only nearly.


def test_identity_is_recovered(isa, dtype, layout, rng):
    """gamma = sigma and beta = mu undo the normalization."""
    shape, axis = layout(6, 5, 70)
    x = normal(rng, shape, dtype, mean=0.5)
    m = fastbn.moments(x, channel_axis=axis)
    y, _ = fastbn.batch_norm_forward(x, np.sqrt(m.var()), m.mean, 0.0, channel_axis=axis)
    assert_close(y, x.astype(np.float64), 4)


def test_gradients_are_orthogonal(isa, dtype, layout, rng):
    """Sum dx = 0 and sum dx * x_hat = 0: no step can move the mean or the variance of the output."""
    shape, axis = layout(6, 5, 70)
    x, grad_output = normal(rng, shape, dtype, mean=2), normal(rng, shape, dtype)
    weight, _ = parameters(rng, 5, dtype)
    y, saved = fastbn.batch_norm_forward(x, weight, None, 0.0, channel_axis=axis)
    dx = fastbn.batch_norm_backward(grad_output, x, saved, weight)[0].astype(np.float64)
    normalized = np.moveaxis(y.astype(np.float64), axis, 0).reshape(5, -1) / weight[:, None]
    dx = np.moveaxis(dx, axis, 0).reshape(5, -1)
    # Each element of dx carries a rounding error of its own; they add up at worst, at the scale of the largest.
    bound = 2 * epsilon(dtype) * np.abs(dx).max() * dx.shape[1]
    assert np.abs(dx.sum(axis=1)).max() <= bound
    assert np.abs((dx * normalized).sum(axis=1)).max() <= bound


@pytest.mark.parametrize("a", [0.01, 0.5, 3.0, 1000.0])
def test_scale_of_the_weights_does_not_matter(isa, a, rng):
    """BN(Wu) = BN((aW)u), and the same for its gradient with respect to u; that with respect to W is divided by a."""
    u, w = rng.standard_normal((40, 12)), rng.standard_normal((7, 12))
    gamma, beta = parameters(rng, 7, FLOAT64)
    grad_output = rng.standard_normal((40, 7))

    def run(matrix):
        x = u @ matrix.T
        y, saved = fastbn.batch_norm_forward(x, gamma, beta, 0.0)
        dx = fastbn.batch_norm_backward(grad_output, x, saved, gamma, beta)[0]
        return y, dx @ matrix, dx.T @ u

    y, du, dw = run(w)
    scaled_y, scaled_du, scaled_dw = run(a * w)
    np.testing.assert_allclose(scaled_y, y, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(scaled_du, du, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(scaled_dw, dw / a, rtol=1e-11, atol=1e-12 / a)


def test_a_bias_before_has_no_effect(isa, rng):
    """BN(Wu + b) = BN(Wu), so the gradient of b is 0: ignoring that is what makes b grow without bound."""
    x, grad_output, b = rng.standard_normal((40, 7)), rng.standard_normal((40, 7)), rng.standard_normal(7)
    y, _ = fastbn.batch_norm_forward(x)
    shifted, saved = fastbn.batch_norm_forward(x + b)
    np.testing.assert_allclose(shifted, y, rtol=1e-12, atol=1e-13)
    db = fastbn.batch_norm_backward(grad_output, x + b, saved)[0].sum(axis=0)
    np.testing.assert_allclose(db, 0, atol=1e-13)


def test_gradient_is_linear(isa, dtype, layout, rng):
    """The backward of a sum is the sum of the backwards; doubling is exact."""
    shape, axis = layout(5, 6, 33)
    x, grad_output = normal(rng, shape, dtype), normal(rng, shape, dtype)
    _, saved = fastbn.batch_norm_forward(x, channel_axis=axis, activation="relu")
    once = fastbn.batch_norm_backward(grad_output, x, saved)
    twice = fastbn.batch_norm_backward(2 * grad_output, x, saved)
    for a, b in zip(once, twice, strict=True):
        exact = np.abs(a) > 1e-3  # smaller ones may be subnormal in float16
        assert np.array_equal((2 * a)[exact], b[exact])
