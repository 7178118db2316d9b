"""train.py -- make the server's parameters: random filters, measured statistics, and a readout fitted to digits."""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

import fastbn

sys.path.insert(0, str(Path(__file__).parent))  # where it is anyway, but under python -P
from network import BLOCKS, CHANNELS, CLASSES, EPS, FEATURES, GROWTH, WIDTHS, Network, enlarge, run

PARAMETERS = Path(__file__).with_name("parameters.npz")
TRAINING = 1400


def train(seed: int = 0) -> tuple[dict[str, np.ndarray], float]:
    """Return the parameters and the accuracy on digits that were not used for them."""
    rng = np.random.default_rng(seed)

    def filters(inputs: int, outputs: int) -> np.ndarray:
        return rng.standard_normal((9, outputs, inputs), np.float32) * np.float32(np.sqrt(2 / (9 * inputs)))

    state = {"stem.weight": filters(1, CHANNELS)}
    state |= {f"blocks.{block}.weight": filters(WIDTHS[block], GROWTH) for block in range(BLOCKS)}

    digits, labels = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8).astype(np.uint8)
    images = enlarge(digits[:TRAINING])
    # All at once, so that every layer's running statistics are exactly those of what the layers before it make of these
    # digits.
    layers = [fastbn.BatchNorm(width, eps=EPS, momentum=None, activation="relu") for width in WIDTHS]
    pooled = run(images, state, layers)
    for number, layer in enumerate(layers):
        state |= layer.state_dict(f"norms.{number}.")

    # Ridge regression of the ten indicators.
    mean = pooled.mean(0, dtype=np.float64)
    centred = pooled - mean
    targets = np.eye(CLASSES)[labels[:TRAINING]]
    gram = centred.T @ centred + 0.01 * TRAINING * np.eye(FEATURES)
    weight = np.linalg.solve(gram, centred.T @ (targets - targets.mean(0)))
    state["readout.weight"] = weight.astype(np.float32)
    state["readout.bias"] = (targets.mean(0) - mean @ weight).astype(np.float32)

    network = Network(state)
    answers = np.concatenate([network(part).argmax(1) for part in np.array_split(digits[TRAINING:], 8)])
    return state, float((answers == labels[TRAINING:]).mean())


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PARAMETERS
    state, accuracy = train()
    np.savez(path, **state)
    print(f"{path}: accuracy {accuracy:.1%} on {1797 - TRAINING} digits that were held back")


if __name__ == "__main__":
    main()
