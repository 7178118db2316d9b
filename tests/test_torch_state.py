"""test_torch_state.py -- the layer, its state and its folding beside PyTorch's."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastbn

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def pair(**settings):
    theirs = torch.nn.BatchNorm2d(4, **settings)
    if theirs.affine:
        with torch.no_grad():
            theirs.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
            theirs.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    mine = fastbn.BatchNorm(4, **settings)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def data(seed, shape=(5, 4, 3, 2)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2 + 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}, {"affine": False}, {"track_running_stats": False}],
)
def test_training_and_eval_are_pytorchs(settings):
    mine, theirs = pair(**settings)
    for seed in range(3):
        x = data(seed)
        tensor = torch.from_numpy(x).requires_grad_()
        expected = theirs(tensor)
        assert_allclose(mine(x), expected.detach(), rtol=0, atol=3e-6)
        grad = data(seed + 10)
        expected.backward(torch.from_numpy(grad))
        assert_allclose(mine.backward(grad), tensor.grad, rtol=0, atol=1e-5)
        if theirs.affine:
            assert_allclose(mine.grad_weight, theirs.weight.grad, rtol=1e-5, atol=1e-5)
            assert_allclose(mine.grad_bias, theirs.bias.grad, rtol=1e-5, atol=1e-5)
            theirs.zero_grad()
    state = theirs.state_dict()
    assert list(mine.state_dict()) == list(state)
    for key, value in mine.state_dict().items():
        assert_allclose(value, state[key], rtol=1e-6, err_msg=key)
        assert value.shape == tuple(state[key].shape)
    mine.eval()
    theirs.eval()
    x, grad = data(5), data(6)
    tensor = torch.from_numpy(x).requires_grad_()
    expected = theirs(tensor)
    assert_allclose(mine(x), expected.detach(), rtol=0, atol=3e-6)
    expected.backward(torch.from_numpy(grad))
    assert_allclose(mine.backward(grad), tensor.grad, rtol=0, atol=1e-5)


def test_tensors_are_taken_as_they_are():
    mine, theirs = pair()
    x = torch.from_numpy(data(0)).contiguous(memory_format=torch.channels_last)
    y = mine(x)
    assert_allclose(y, theirs(x).detach(), rtol=0, atol=3e-6)
    assert y.strides == tuple(4 * stride for stride in x.stride())
    assert_allclose(mine.backward(x), mine.backward(x.numpy()))


def test_state_goes_to_pytorch():
    mine, theirs = pair()
    mine(data(0))
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in mine.state_dict().items()})
    for key, value in theirs.state_dict().items():
        assert_array_equal(value, mine.state_dict()[key])


def outcome(load, state, strict):
    try:
        missing, unexpected = load(state, strict=strict)
    except (RuntimeError, ValueError):
        return "error"
    return sorted(missing), sorted(unexpected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "change",
    [{}, {"weight": None}, {"num_batches_tracked": None}, {"a": 1}, {"a": 1, "bias": None}, {"weight": np.ones(3)}],
)
def test_what_is_missing_unknown_or_of_another_size_is_what_it_is_in_pytorch(change, plain, strict):
    """Seeded bugs: strict=False that passes over sizes; a state without version that must have the counter."""
    mine, theirs = pair()
    ours, state = mine.state_dict(), theirs.state_dict()
    for key, value in change.items():
        for target in (ours, state):
            if value is None:
                del target[key]
            else:
                target[key] = torch.as_tensor(value) if target is state else value
    if plain:
        ours, state = dict(ours), dict(state)
    expected = outcome(torch.nn.BatchNorm2d(4).load_state_dict, state, strict)
    assert outcome(fastbn.BatchNorm(4).load_state_dict, ours, strict) == expected
    assert outcome(fastbn.BatchNorm(4).load_state_dict, state, strict) == expected


def test_one_value_per_channel_is_pytorchs_error():
    mine, theirs = pair()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as expected:
        theirs(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as info:
        mine(np.zeros((1, 4, 1, 1), np.float32))
    assert str(info.value) == str(expected.value).replace("torch.Size(", "").replace(")", "")


def test_an_empty_batch_is_counted_by_pytorch_alone():
    """A difference that is meant: an average over all batches has nothing to count there."""
    mine, theirs = pair(momentum=None)
    x = np.zeros((0, 4, 3, 2), np.float32)
    assert mine(x).shape == tuple(theirs(torch.from_numpy(x)).shape)
    assert (mine.num_batches_tracked, int(theirs.num_batches_tracked)) == (0, 1)
    assert_array_equal(mine.running_mean, theirs.running_mean)


def test_freezing_a_layer_of_a_pytorch_network():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    for seed in range(3):
        net(torch.from_numpy(data(seed, (2, 3, 6, 6))))
    net.eval()
    x = torch.from_numpy(data(9, (2, 3, 6, 6)))
    op = fastbn.FrozenBatchNorm.from_state_dict(net.state_dict(), "1.", activation="relu")
    assert_allclose(op(net[0](x).detach()), net(x).detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_pytorchs_and_computes_the_same(rank, groups, transposed, bias):
    """Seeded bug: parameters refused because gradients would follow them."""
    name = f"Conv{'Transpose' * transposed}{rank}d"
    convolution = getattr(torch.nn, name)(4, 6, 3, groups=groups, bias=bias).eval()
    norm = getattr(torch.nn, f"BatchNorm{rank}d")(6)
    x = torch.randn(2, 4, *[5] * rank, generator=torch.Generator().manual_seed(0))
    norm(convolution(x))
    norm.eval()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-2, 2, 6))
        expected = norm(convolution(x))
        weight, shift = fastbn.fold_conv(
            convolution.weight, convolution.bias, norm, transposed=transposed, groups=groups
        )
        convolution.weight.copy_(torch.from_numpy(weight))
        convolution.bias = torch.nn.Parameter(torch.from_numpy(shift))
        assert_allclose(convolution(x), expected, rtol=0, atol=5e-6)
