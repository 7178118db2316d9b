"""convolution -- the convolutional networks of the studies: PyTorch's, but for the batch norm, which is fastbn's."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from paper.autograd import BatchNorm2d, torch
from torch import Tensor, nn


class Network:
    """A PyTorch module as the trainer knows networks: arrays in and out, on the memory of its tensors."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with torch.set_grad_enabled(self.module.training):
            self.y = self.module(torch.from_numpy(x))
        return self.y.detach().numpy()

    def backward(self, dy: np.ndarray) -> None:
        self.module.zero_grad()
        self.y.backward(torch.from_numpy(dy))

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def parameters(self) -> list[np.ndarray]:
        return [p.detach().numpy() for p in self.module.parameters()]

    def gradients(self) -> list[np.ndarray]:
        """In the order of the parameters, after a backward."""
        return [p.grad.numpy() for p in self.module.parameters()]


def initialize(module: nn.Module, rng: np.random.Generator, gain: float = 1.0) -> nn.Module:
    """Weights of Gaussians whose variance is gain² / fan-in, biases 0; from NumPy, as all random numbers here are."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach().numpy()
            weight[...] = rng.normal(0, gain / np.sqrt(weight[0].size), weight.shape)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def convolve(
    inputs: int, outputs: int, size: int = 1, stride: int = 1, *, norm: bool, nonlinearity: str = "relu"
) -> nn.Module:
    """Convolution, batch norm if asked, nonlinearity; the bias is the batch norm's where there is one."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=not norm)]
    fused = norm and nonlinearity == "relu"
    if norm:
        layers.append(BatchNorm2d(outputs, activation="relu" if fused else None))
    if not fused:
        layers.append({"relu": nn.ReLU, "sigmoid": nn.Sigmoid}[nonlinearity]())
    return nn.Sequential(*layers)


class Inception(nn.Module):
    """1×1; 1×1 and 3×3; 1×1 and twice 3×3; and a pool, side by side, as in the paper's appendix.

    With a stride the pool is the maximum and passes through, and there is no 1×1.
    """

    def __init__(self, inputs: int, width: int, stride: int, conv: Callable[..., nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                nn.Sequential(conv(inputs, width), conv(width, width, 3, stride)),
                nn.Sequential(conv(inputs, width), conv(width, width, 3), conv(width, width, 3, stride)),
            ]
        )
        self.outputs = 2 * width
        if stride == 1:
            self.branches.append(conv(inputs, width))
            self.branches.append(nn.Sequential(nn.AvgPool2d(3, 1, padding=1), conv(inputs, width)))
            self.outputs += 2 * width
        else:
            self.branches.append(nn.MaxPool2d(3, stride, padding=1))
            self.outputs += inputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def inception(
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    norm: bool,
    nonlinearity: str = "relu",
    dropout: float = 0.0,
    width: int = 8,
    gain: float = 1.0,
    classes: int = 10,
) -> Network:
    """A small Inception for images of (channels, height, width): a stem that brings them to about 8×8, three blocks."""

    def conv(*args: int) -> nn.Module:
        return convolve(*args, norm=norm, nonlinearity=nonlinearity)

    halvings = max(0, round(np.log2(shape[1] / 8)))
    sizes = [shape[0], *[2 * width] * (halvings + 1)]
    layers = [conv(a, b, 3, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairwise(sizes))]
    channels = sizes[-1]
    for stride in (1, 2, 1):
        layers.append(Inception(channels, width, stride, conv))
        channels = layers[-1].outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(channels, classes))
    return Network(initialize(nn.Sequential(*layers), rng, gain))


class Residual(nn.Module):
    """Two convolutions of 3×3 beside a shortcut, which where the shape changes skips pixels and adds empty channels."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool):
        super().__init__()
        self.first = convolve(inputs, outputs, 3, stride, norm=norm)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not norm)
        self.norm = BatchNorm2d(outputs, activation="relu") if norm else None
        self.stride, self.padding = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.padding))
        return torch.relu(y + x) if self.norm is None else self.norm(y, x)


def resnet(
    depth: int,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    *,
    norm: bool,
    width: int = 16,
    gain: float = 1.0,
    classes: int = 10,
) -> Network:
    """The residual network of 6n + 2 layers that He et al. made for CIFAR-10, on which Bjorck et al. measured."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 2, got {depth}")
    layers: list[nn.Module] = [convolve(shape[0], width, 3, norm=norm)]
    channels = width
    for stage in range(3):
        for block in range(blocks):
            outputs, stride = width << stage, 2 if stage and not block else 1
            layers.append(Residual(channels, outputs, stride, norm))
            channels = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return Network(initialize(nn.Sequential(*layers), rng, gain))


def convolutions(network: Network) -> list[nn.Conv2d]:
    """In the order of the forward."""
    return [layer for layer in network.module.modules() if isinstance(layer, nn.Conv2d)]
