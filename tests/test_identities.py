"""test_identities -- what docs/paper.md derives, on fastbn's own kernels in float64."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import fastbn

A = 3.7


@pytest.fixture
def case(rng):
    """A linear layer before a batch norm: u, W, weight, bias and the gradient behind it."""
    u, dy = rng.normal(size=(50, 6)) + 2, rng.normal(size=(50, 4))
    return u, rng.normal(size=(6, 4)), rng.normal(size=4), rng.normal(size=4), dy


def gradients(u, w, weight, bias, dy):
    x = u @ w
    y, saved = fastbn.batch_norm_forward(x, weight, bias, 0.0)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, saved, weight, bias)
    return y, dx @ w.T, u.T @ dx, dweight, dbias


def test_gamma_and_beta_recover_the_identity(case):
    """Section 3. Seeded bug: the unbiased variance in the forward."""
    u, w, *_ = case
    x, m = u @ w, fastbn.moments(u @ w)
    y, _ = fastbn.batch_norm_forward(x, np.sqrt(m.var()), m.mean, 0.0)
    assert_allclose(y, x, atol=1e-13)


def test_the_scale_of_the_weights_does_not_matter(case):
    """Section 3.3: BN((aW)u) = BN(Wu), the same gradient by u, and one a-th of it by the weights."""
    u, w, *rest = case
    y, du, dw, *_ = gradients(u, w, *rest)
    ya, dua, dwa, *_ = gradients(u, A * w, *rest)
    assert_allclose(ya, y, atol=1e-13)
    assert_allclose(dua, du, atol=1e-13)
    assert_allclose(dwa, dw / A, atol=1e-13)


def test_the_gradient_is_orthogonal_to_shift_and_scale(case):
    """Sum dx = 0 and sum dx xhat = 0, for x + c and c x change nothing. Seeded bug: a term of the backward left out."""
    u, w, weight, bias, dy = case
    x = u @ w
    xhat, saved = fastbn.batch_norm_forward(x, eps=0.0)
    dx, *_ = fastbn.batch_norm_backward(dy, x, saved, weight, bias)
    assert_allclose(dx.sum(0), 0, atol=1e-13)
    assert_allclose((dx * xhat).sum(0), 0, atol=1e-13)


def test_in_eval_mode_the_statistics_are_constants(case):
    """dx = weight / sqrt(var + eps) dy, where neither sum vanishes."""
    u, w, weight, bias, dy = case
    bn = fastbn.BatchNorm(4, dtype=np.float64)
    bn.weight[...], bn.bias[...], bn.running_var[...] = weight, bias, [1.0, 2.0, 3.0, 4.0]
    bn.eval()(u @ w)
    assert_allclose(bn.backward(dy), dy * weight / np.sqrt(bn.running_var + bn.eps), rtol=1e-14)


def test_images_are_the_rows_of_their_places(rng):
    """Section 3.2: the batch of a feature map is samples x height x width. Seeded bug: statistics of each sample."""
    x, dy = rng.normal(size=(2, 5, 3, 4, 6)) * 3 + 1
    weight, bias = rng.normal(size=(2, 3))

    def rows(images):
        return np.moveaxis(images, 1, -1).reshape(-1, 3)

    y, saved = fastbn.batch_norm_forward(x, weight, bias, 0.0)
    assert saved.count == 5 * 4 * 6
    of_rows, saved_of_rows = fastbn.batch_norm_forward(rows(x), weight, bias, 0.0)
    assert_allclose(rows(y), of_rows, atol=1e-13)
    dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, saved, weight, bias)
    dx_of_rows, *others = fastbn.batch_norm_backward(rows(dy), rows(x), saved_of_rows, weight, bias)
    assert_allclose(rows(dx), dx_of_rows, atol=1e-13)
    assert_allclose([dweight, dbias], others, atol=1e-12)
