"""autograd -- fastbn's kernels as PyTorch's batch norm, on the memory of the tensors."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastbn


def view(tensor: Tensor | None) -> Any:
    """The memory of a tensor as an array, whatever its strides: what `.numpy()` is, and for bfloat16, too."""
    if tensor is None:
        return None
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


class _Function(torch.autograd.Function):
    """Results and the gradient of x go where PyTorch allocated them; what is saved are tensors that exist anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str | None,
        negative_slope: float,
    ) -> Tensor:
        y = torch.empty_like(x)
        ctx.eps, ctx.activation, ctx.negative_slope, ctx.saved = eps, activation, negative_slope, None
        options = {
            "activation": activation,
            "negative_slope": negative_slope,
            "residual": view(residual),
            "out": view(y),
        }
        if training:
            _, ctx.saved = fastbn.batch_norm_forward(view(x), view(weight), view(bias), eps, **options)
            if ctx.saved.count:
                unbiased = ctx.saved.var * (ctx.saved.count / (ctx.saved.count - 1))
                for running, batch in ((running_mean, ctx.saved.mean), (running_var, unbiased)):
                    if running is not None:
                        running.lerp_(torch.tensor(batch, dtype=running.dtype), momentum)
            ctx.save_for_backward(x, weight, bias)
        else:
            statistics = view(running_mean), view(running_var)
            fastbn.batch_norm(view(x), *statistics, view(weight), view(bias), False, momentum, eps, **options)
            # Behind an activation, the result says where the gradient passes.
            ctx.save_for_backward(x, weight, bias, running_mean, running_var, y if activation else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, *constants = ctx.saved_tensors
        dx, dresidual = torch.empty_like(x), None
        if ctx.saved is not None:
            _, dweight, dbias, *more = fastbn.batch_norm_backward(
                view(dy), view(x), ctx.saved, view(weight), view(bias), out=view(dx)
            )
            if more:
                dresidual = _tensor(more[0])
        else:
            mean, var, y = constants
            dresidual = dz = dy if y is None else _before(dy, y, ctx.activation, ctx.negative_slope)
            dbias, dweight = fastbn.backward_reduce(view(dz), view(x), view(mean))
            dweight /= np.sqrt(view(var).astype(np.float64) + ctx.eps)
            nothing = np.zeros_like(dbias)
            fastbn.backward_apply(
                view(dz), view(x), view(mean), view(var), view(weight), nothing, nothing, 0, ctx.eps, out=view(dx)
            )
        found = [dx, dresidual if ctx.needs_input_grad[1] else None]
        for parameter, gradient in ((weight, dweight), (bias, dbias)):
            found.append(None if parameter is None else _tensor(gradient).to(parameter.dtype))
        return *found, *[None] * 7


def _tensor(array: np.ndarray) -> Tensor:
    """The other way round."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _before(dy: Tensor, y: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The gradient before an activation whose result is y; like PyTorch's, it does not pass at a kink."""
    if activation == "leaky_relu":
        return torch.where(y > 0, dy, dy * negative_slope)
    stopped = y <= 0 if activation == "relu" else (y <= 0) | (y >= 6)
    return dy.masked_fill(stopped, 0)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with what `fastbn.batch_norm` fuses; differentiable once."""
    if negative_slope < 0:
        raise ValueError(f"negative_slope must be at least 0, got {negative_slope}")
    return _Function.apply(
        x, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation, negative_slope
    )


class _Fused:
    """What makes PyTorch's modules fastbn's: the forward. Parameters, buffers and states stay PyTorch's own."""

    def __init__(self, *args: Any, activation: str | None = None, negative_slope: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)
        counted = self.training and self.num_batches_tracked is not None
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (int(self.num_batches_tracked) + 1) if counted else 0.0
        # As in PyTorch: what is not tracked does not move, and where there is nothing the batch serves.
        moving = not self.training or self.track_running_stats
        y = batch_norm(
            x,
            self.running_mean if moving else None,
            self.running_var if moving else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
        )
        if counted:
            self.num_batches_tracked += 1
        return y

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class BatchNorm1d(_Fused, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` by fastbn, with an activation and a residual."""


class BatchNorm2d(_Fused, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` by fastbn, with an activation and a residual."""
