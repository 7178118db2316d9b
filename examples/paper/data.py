"""data -- the images the studies learn from: scikit-learn's digits, or the user's own MNIST or CIFAR-10 files."""

import gzip
import io
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


@dataclass(frozen=True)
class Dataset:
    """Images (count, channels, height, width) as float32 in [0, 1], and their classes 0 to 9."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x_train.shape[1:]

    def flat(self) -> "Dataset":
        """The same images as rows of pixels, for the perceptrons."""
        rows = (x.reshape(len(x), -1) for x in (self.x_train, self.x_test))
        x_train, x_test = rows
        return Dataset(self.name, x_train, self.y_train, x_test, self.y_test)

    def split(self, count: int) -> "Dataset":
        """The first `count` images to train on, and all others to test on."""
        x, y = np.concatenate([self.x_train, self.x_test]), np.concatenate([self.y_train, self.y_test])
        name = f"{self.name}, {count} images to train on and {len(x) - count} to test on"
        return Dataset(name, x[:count], y[:count], x[count:], y[count:])


def load(path: str | Path | None = None) -> Dataset:
    """Load the user's files at `path`, or scikit-learn's handwritten digits."""
    if path is None:
        return digits()
    path = Path(path)
    if path.suffix == ".npz":
        return mnist_npz(path)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or directory")
    if (path / "cifar-10-batches-py").is_dir():
        path = path / "cifar-10-batches-py"
    if any((path / name).exists() for name in CIFAR_FILES):
        return cifar10(path)
    if any(_idx_path(path, name) for name in MNIST_FILES):
        return mnist_idx(path)
    raise ValueError(
        f"{path}: found neither MNIST ({MNIST_FILES[0]}[.gz] and its three siblings, or an .npz file) "
        f"nor CIFAR-10 for Python ({CIFAR_FILES[0]} and its siblings)"
    )


def digits() -> Dataset:
    """Scikit-learn's 1797 digits of 8 x 8 pixels, of which a fixed random quarter is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images, labels = bunch.images[order, None] / 16, bunch.target[order]
    return _dataset("scikit-learn digits (8×8)", images[450:], labels[450:], images[:450], labels[:450])


def mnist_idx(folder: Path) -> Dataset:
    """MNIST as its four IDX files, each of them plain or gzipped."""
    arrays = []
    for name in MNIST_FILES:
        path = _idx_path(folder, name)
        if path is None:
            raise ValueError(f"{folder}: {name}[.gz] is missing")
        arrays.append(read_idx(path))
    x_train, y_train, x_test, y_test = arrays
    return _dataset("MNIST", *_greyscale(folder, x_train, y_train), *_greyscale(folder, x_test, y_test))


def mnist_npz(path: Path) -> Dataset:
    """MNIST as one npz file of the arrays x_train, y_train, x_test and y_test."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        # Pickled objects stay refused: a data file has no business running code.
        with np.lib.npyio.NpzFile(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise ValueError(f"expected the arrays {', '.join(keys)}; {', '.join(missing)} missing")
            x_train, y_train, x_test, y_test = (file[key] for key in keys)
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path}: not a readable MNIST npz file: {error}") from error
    return _dataset("MNIST", *_greyscale(path, x_train, y_train), *_greyscale(path, x_test, y_test))


def cifar10(folder: Path) -> Dataset:
    """CIFAR-10 as the six pickled batches of its Python version."""
    batches = [_cifar_batch(folder / name) for name in CIFAR_FILES]
    x_train, y_train = (np.concatenate(parts) for parts in zip(*batches[:-1], strict=True))
    return _dataset("CIFAR-10", x_train, y_train, *batches[-1])


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes, plain or gzipped, and check that its length is what its header says."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or raw[3] == 0:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (it starts with {raw[:4].hex() or 'nothing'})")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise ValueError(f"{path}: the header is cut short")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header])
    # Python's integers, because a damaged header can name a product beyond int64.
    size = 1
    for extent in shape:
        size *= extent
    if len(raw) - header != size:
        raise ValueError(f"{path}: the header promises {size} bytes of data for {shape}, found {len(raw) - header}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays, bytes, numbers and their containers, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            # Protocol 2 writes bytes as an encoded string.
            ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        }
        try:
            return allowed[module.rpartition(".")[2], name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}, which no CIFAR-10 batch contains"
            ) from None


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: not a readable CIFAR-10 batch: {error}") from error
    if images.ndim != 2 or images.shape[1] != 3072 or images.dtype != np.uint8:
        raise ValueError(f"{path}: expected rows of 3072 bytes, found {images.dtype} {images.shape}")
    _check_labels(path, images, labels)
    return images.reshape(-1, 3, 32, 32) / np.float32(255), labels


def _greyscale(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: expected images of unsigned bytes, (count, height, width), found {images.dtype} {images.shape}"
        )
    _check_labels(path, images, labels)
    return images[:, None] / np.float32(255), labels


def _check_labels(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: {len(images)} images, but labels of {labels.dtype} {labels.shape}")
    if not len(labels):
        raise ValueError(f"{path}: no images")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{path}: labels are 0 to {CLASSES - 1}, found {labels.min()} to {labels.max()}")


def _idx_path(folder: Path, name: str) -> Path | None:
    spellings = (name, name + ".gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz")
    return next((folder / spelling for spelling in spellings if (folder / spelling).is_file()), None)


def _dataset(name: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Dataset:
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{name}: training images are {x_train.shape[1:]}, test images {x_test.shape[1:]}")
    return Dataset(
        name,
        np.ascontiguousarray(x_train, np.float32),
        y_train.astype(np.int64),
        np.ascontiguousarray(x_test, np.float32),
        y_test.astype(np.int64),
    )
