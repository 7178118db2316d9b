"""test_machine.py -- hypothesis: a layer's life in any order of events, beside a model in float64 that is all NumPy.

Seeded bug that turns it red: a copy that shares its statistics with the original.
"""

import copy
import io
import pickle

import arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import twin
from arrays import ACTIVATIONS, DTYPES, LAYOUTS, normal
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tolerance import assert_close, assert_gradients

import fastbn

CHANNELS = 5
SIZES = [(2, 1), (3, 7), (4, 64), (1, 130), (33, 3)]
NAMES = ("weight", "bias", "running_mean", "running_var")
seeds = st.integers(0, 1 << 30)


def duplicate_by_file(bn):
    """The state alone: what a call remembers, the mode and the settings are the new layer's."""
    file = io.BytesIO()
    bn.save(file)
    file.seek(0)
    other = copy.copy(bn)
    other.load(file)
    return other


DUPLICATES = [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn)), duplicate_by_file]


class Life(RuleBasedStateMachine):
    """`model` holds what the layer must hold: float64 arrays by name, and the counter."""

    @initialize(
        dtype=st.sampled_from([dtype for dtype in DTYPES.values() if dtype is not None]),
        layout=st.sampled_from(list(LAYOUTS)),
        activation=st.sampled_from(ACTIVATIONS),
        momentum=st.sampled_from([None, 0.0, 0.1, 1.0]),
        guard=st.sampled_from(["propagate", "skip", "raise"]),
        affine=st.booleans(),
    )
    def birth(self, dtype, layout, activation, momentum, guard, affine):
        self.dtype, self.layout = dtype, LAYOUTS[layout]
        self.bn = fastbn.BatchNorm(
            CHANNELS,
            momentum=momentum,
            affine=affine,
            channel_axis=self.layout(1, 1, 1)[1],
            activation=activation,
            dtype=dtype,
            on_nonfinite=guard,
        )
        self.options = {"channel_axis": self.bn.channel_axis, "activation": activation}
        self.names = NAMES if affine else NAMES[2:]
        self.model = {name: np.full(CHANNELS, float(name in ("weight", "running_var"))) for name in self.names}
        self.count = self.skipped = 0
        self.training = self.remembers = True
        self.last = None  # what a backward would differentiate: the twin's memory of the last call, and its x
        self.witnesses = []  # layers that must not change, and the bytes that they have

    def data(self, seed, size, mean=0.0):
        shape, _ = self.layout(size[0], CHANNELS, size[1])
        return normal(np.random.default_rng(seed), shape, self.dtype, mean=mean)

    def forget(self):
        """Nothing is to be differentiated any more: for what a backward would find, there is no promise."""
        self.bn.eval(backward=False).train(self.training)
        self.remembers, self.last = True, None

    @rule(seed=seeds, size=st.sampled_from(SIZES), mean=st.sampled_from([0.0, 3.0, -100.0]), added=st.booleans())
    def call(self, seed, size, mean, added):
        x = self.data(seed, size, mean)
        residual = self.data(seed + 1, size) if added else None
        y = self.bn(x, residual=residual)
        m = self.model
        given = {**self.options, "residual": residual}
        if self.training:
            expected, saved = twin.batch_norm_forward(x, m.get("weight"), m.get("bias"), **given)
            self.count += 1
            share = 1 / self.count if self.bn.momentum is None else self.bn.momentum
            unbiased = saved.var * saved.count / (saved.count - 1)
            for name, batch in (("running_mean", saved.mean), ("running_var", unbiased)):
                m[name] = (1 - share) * m[name] + share * batch.astype(float)
        else:
            mean, var = self.bn.running_mean.copy(), self.bn.running_var.copy()
            expected, saved = twin.forward_eval(x, mean, var, m.get("weight"), m.get("bias"), **given)
        assert_close(y, expected, twin.value_scale(saved, m.get("weight"), m.get("bias"), residual))
        self.last = (saved, x) if self.remembers else None

    @rule(seed=seeds)
    def backward(self, seed):
        if self.last is None:
            with pytest.raises(ValueError, match="backward must"):
                self.bn.backward(self.data(seed, SIZES[0]))
            return
        saved, x = self.last
        grad_output = np.random.default_rng(seed).standard_normal(x.shape).astype(self.dtype)
        grad_output = twin.off_kinks(grad_output, saved)
        dx = self.bn.backward(grad_output)
        parameters = self.bn.grad_weight, self.bn.grad_bias
        if not self.bn.affine:
            assert parameters == (None, None)
            wide = twin.batch_norm_backward(grad_output, None, saved)[1:3]  # float64 has nothing to compare them in
            parameters = [gradient.astype(arrays.parameter_dtype(self.dtype)) for gradient in wide]
        found = dx, *parameters, *([self.bn.grad_residual] if saved.has_residual else [])
        assert_gradients(found, grad_output, saved, self.model.get("weight"))

    @rule()
    def train(self):
        self.bn.train()
        self.training = self.remembers = True

    @rule(backward=st.booleans())
    def evaluate(self, backward):
        self.bn.eval(backward=backward)
        self.training, self.remembers = False, backward
        self.last = self.last if backward else None

    @rule(seed=seeds, name=st.sampled_from(NAMES))
    def assign(self, seed, name):
        if name not in self.names:
            with pytest.raises(ValueError, match=f"{name} cannot be assigned"):
                setattr(self.bn, name, np.ones(CHANNELS))
            return
        values = np.random.default_rng(seed).uniform(0.5, 1.5, CHANNELS).astype(np.float32)
        setattr(self.bn, name, values)
        self.model[name] = values.astype(float)
        self.forget()

    @rule(seed=seeds, count=st.integers(0, 1 << 40))
    def load(self, seed, count):
        rng = np.random.default_rng(seed)
        state = {name: rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32) for name in self.names}
        self.bn.load_state_dict({**state, "num_batches_tracked": count})
        self.model, self.count = {name: value.astype(float) for name, value in state.items()}, count
        self.forget()

    @rule(how=st.sampled_from(DUPLICATES), follow=st.booleans())
    def duplicate(self, how, follow):
        """One of the two lives on, the other must stay as it is."""
        other = how(self.bn)
        if follow:
            self.bn, other = other, self.bn
            self.forget()
        self.witnesses = [*self.witnesses[-2:], (other, self.snapshot(other))]

    @rule(seed=seeds, size=st.sampled_from(SIZES))
    def freeze(self, seed, size):
        """What it computes is what eval mode computes; and it goes on doing so."""
        x, op = self.data(seed, size), self.bn.freeze()
        expected = copy.copy(self.bn).eval(backward=False)(x)
        assert op(x).tobytes() == expected.tobytes()
        assert pickle.loads(pickle.dumps(op))(x).tobytes() == expected.tobytes()

    @rule(seed=seeds)
    def wrong(self, seed):
        """An argument that does not fit changes nothing; the invariant below looks."""
        with pytest.raises((TypeError, ValueError)):
            self.bn(self.data(seed, SIZES[1])[..., :1, :2])
        with pytest.raises(ValueError, match="missing"):
            self.bn.load_state_dict({"weight": np.full(CHANNELS, 7.0)})

    @precondition(lambda self: self.training and self.bn.on_nonfinite != "propagate")
    @rule(seed=seeds, size=st.sampled_from(SIZES), poison=st.sampled_from([np.nan, np.inf, -np.inf]))
    def poison(self, seed, size, poison):
        x = self.data(seed, size)
        x.flat[seed % x.size] = poison
        if self.bn.on_nonfinite == "raise":
            with pytest.raises(ValueError, match="statistics that are finite"):
                self.bn(x)
            return
        y = self.bn(x)
        self.skipped += 1
        self.forget()
        assert np.isnan(y).any()

    @precondition(lambda self: self.training)
    @rule(dims=st.sampled_from([(0, 3), (4, 0)]))
    def empty(self, dims):
        x = self.data(0, dims)
        assert self.bn(x).shape == x.shape
        self.forget()

    @staticmethod
    def snapshot(bn):
        return {name: value.tobytes() for name, value in bn.state_dict().items()}, bn.training

    @invariant()
    def holds_what_the_model_holds(self):
        if not hasattr(self, "bn"):
            return
        assert (self.bn.training, self.bn.num_batches_tracked) == (self.training, self.count)
        assert self.bn.num_batches_skipped == self.skipped
        for name in self.names:
            value = getattr(self.bn, name)
            rounding = np.finfo(value.dtype).eps
            np.testing.assert_allclose(value, self.model[name], rtol=64 * rounding, atol=64 * rounding)
            # Roundings of a step add up over a life; the next step starts from the stored number.
            self.model[name] = value.astype(float)
        for other, before in self.witnesses:
            assert self.snapshot(other) == before


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=200, stateful_step_count=30, deadline=None, derandomize=True, database=None)
