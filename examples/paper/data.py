"""data -- the images the studies learn from: scikit-learn's digits, or the user's own MNIST or CIFAR-10 files."""

import gzip
import io
import pickle
import reprlib
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
KNOWN = (
    f"MNIST is {MNIST_FILES[0]}[.gz] and its three siblings, or an .npz file, "
    f"and CIFAR-10 for Python {CIFAR_FILES[0]} and its siblings"
)


@dataclass(frozen=True)
class Dataset:
    """Images (count, channels, height, width) as float32 in [0, 1], and their classes 0 to 9."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    # Where the images to train on and those to test on came from, for messages.
    sources: tuple[str, str] = ("images to train on", "images to test on")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x_train.shape[1:]

    def flat(self) -> "Dataset":
        """The same images as rows of pixels, for the perceptrons."""
        x_train, x_test = (x.reshape(len(x), -1) for x in (self.x_train, self.x_test))
        return replace(self, x_train=x_train, x_test=x_test)

    def split(self, count: int) -> "Dataset":
        """The first `count` images to train on, and all others to test on."""
        x, y = np.concatenate([self.x_train, self.x_test]), np.concatenate([self.y_train, self.y_test])
        name = f"{self.name}, {count} images to train on and {len(x) - count} to test on"
        return Dataset(
            name, x[:count], y[:count], x[count:], y[count:], (" and ".join(dict.fromkeys(self.sources)),) * 2
        )

    def require(self, train: int = 2, test: int = 1, varying: int = 1) -> None:
        """Raise ValueError for fewer images than this, or fewer pixels that differ between those to train on.

        The least to train on is 2 because one value has no variance.
        """
        for source, x, least, use in zip(
            self.sources, (self.x_train, self.x_test), (train, test), ("train", "test"), strict=True
        ):
            if len(x) < least:
                raise ValueError(f"{source}: at least {least} images to {use} on are needed, found {len(x)}")
        vary = int(np.any(self.x_train != self.x_train[0], 0).sum())
        if vary < varying:
            raise ValueError(
                f"{self.sources[0]}: at least {varying} pixels must differ between images, "
                f"found {vary} in {len(self.x_train)} images to train on"
            )


def load(path: str | Path | None = None) -> Dataset:
    """Load the user's files, or scikit-learn's handwritten digits.

    `path` is a folder that holds MNIST or CIFAR-10, an npz file of MNIST, or any one file of a set, which stands for
    the set that it belongs to.
    """
    if path is None:
        return digits()
    path = Path(path)
    if path.suffix == ".npz":
        return mnist_npz(path)
    if path.is_file():
        if path.name in CIFAR_FILES:
            return cifar10(path.parent)
        if any(path.name in _spellings(name) for name in MNIST_FILES):
            return mnist_idx(path.parent, path)
        raise ValueError(f"{path}: not a file of a known data set; {KNOWN}")
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or directory")
    inner = path / "cifar-10-batches-py"
    batches = inner if inner.is_dir() else path
    is_cifar = any((batches / name).exists() for name in CIFAR_FILES)
    is_mnist = any(_idx_path(path, name) for name in MNIST_FILES)
    if is_cifar and is_mnist:
        raise ValueError(f"{path}: found both MNIST and CIFAR-10; name a file of the one that is meant")
    if is_cifar:
        return cifar10(batches)
    if is_mnist:
        return mnist_idx(path)
    raise ValueError(f"{path}: found neither MNIST nor CIFAR-10; {KNOWN}")


def digits() -> Dataset:
    """Scikit-learn's 1797 digits of 8 x 8 pixels, of which a fixed random quarter is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images, labels = bunch.images[order, None] / 16, bunch.target[order]
    return _dataset("scikit-learn digits (8×8)", images[450:], labels[450:], images[:450], labels[:450])


def mnist_idx(folder: Path, named: Path | None = None) -> Dataset:
    """MNIST as its four IDX files, plain or gzipped; of two spellings of one file, the named one counts."""
    paths = []
    for name in MNIST_FILES:
        path = named if named is not None and named.name in _spellings(name) else _idx_path(folder, name)
        if path is None:
            raise ValueError(f"{folder / name}[.gz] is missing")
        paths.append(str(path))
    return _mnist(paths, [read_idx(Path(path)) for path in paths])


def mnist_npz(path: Path) -> Dataset:
    """MNIST as one npz file of the arrays x_train, y_train, x_test and y_test."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        # Pickled objects stay refused: a data file has no business running code.
        with np.lib.npyio.NpzFile(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise ValueError(f"expected the arrays {', '.join(keys)}; {', '.join(missing)} missing")
            arrays = [file[key] for key in keys]
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path}: not a readable MNIST npz file: {_brief(error)}") from error
    return _mnist([f"{path}, {key}" for key in keys], arrays)


def cifar10(folder: Path) -> Dataset:
    """CIFAR-10 as the six pickled batches of its Python version."""
    batches = [_cifar_batch(folder / name) for name in CIFAR_FILES]
    x_train, y_train = (np.concatenate(parts) for parts in zip(*batches[:-1], strict=True))
    sources = f"{folder / CIFAR_FILES[0]} to {CIFAR_FILES[-2][-1]}", str(folder / CIFAR_FILES[-1])
    return _dataset("CIFAR-10", x_train, y_train, *batches[-1], sources)


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
                f"the file asks for {reprlib.repr(f'{module}.{name}')}, which no CIFAR-10 batch contains"
            ) from None


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
            what = f"the keys {reprlib.repr(list(batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
            raise ValueError(f"expected a dict with the keys b'data' and b'labels', as bytes, found {what}")
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: not a readable CIFAR-10 batch: {_brief(error)}") from error
    if images.ndim != 2 or images.shape[1] != 3072 or images.dtype != np.uint8:
        raise ValueError(f"{path}: expected rows of 3072 bytes, found {_brief(images.dtype)} {images.shape}")
    _check_labels(str(path), str(path), images, labels)
    return images.reshape(-1, 3, 32, 32) / np.float32(255), labels


def _mnist(sources: list[str], arrays: list[np.ndarray]) -> Dataset:
    """From the images and labels to train on and those to test on; `sources` are the names of the four."""
    parts = []
    for place in (0, 2):
        source, images, labels = sources[place], arrays[place], arrays[place + 1]
        if images.ndim != 3 or images.dtype != np.uint8:
            raise ValueError(
                f"{source}: expected images of unsigned bytes, (count, height, width), "
                f"found {_brief(images.dtype)} {images.shape}"
            )
        _check_labels(source, sources[place + 1], images, labels)
        if 0 in images.shape:
            raise ValueError(f"{source}: images without a pixel, {images.shape[1]} high and {images.shape[2]} wide")
        parts += [images[:, None] / np.float32(255), labels]
    return _dataset("MNIST", *parts, (sources[0], sources[2]))


def _check_labels(source: str, of_labels: str, images: np.ndarray, labels: np.ndarray) -> None:
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        found = f"{_brief(labels.dtype)} {labels.shape}"
        raise ValueError(f"{of_labels}: labels of {found} for {len(images)} images of {source}")
    if not len(labels):
        raise ValueError(f"{source}: no images")
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(f"{of_labels}: labels are 0 to {CLASSES - 1}, found {labels.min()} to {labels.max()}")


def _brief(what: object) -> str:
    """In a few words and on one line, for text in it may be the file's."""
    text = " ".join(str(what).split())
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:180]}... ({len(text)} characters)"


def _spellings(name: str) -> tuple[str, ...]:
    """What an IDX file of MNIST is called: plain or gzipped, and as some archives unpack."""
    return name, name + ".gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((folder / one for one in _spellings(name) if (folder / one).is_file()), None)


def _dataset(
    name: str,
    x_train: np.ndarray,
    y_train: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    sources: tuple[str, str] = ("the digits to train on", "the digits to test on"),
) -> Dataset:
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(
            f"{sources[1]}: images of {x_test.shape[1:]}, but those to train on, "
            f"of {sources[0]}, are {x_train.shape[1:]}"
        )
    return Dataset(
        name,
        np.ascontiguousarray(x_train, np.float32),
        y_train.astype(np.int64),
        np.ascontiguousarray(x_test, np.float32),
        y_test.astype(np.int64),
        sources,
    )
