"""test_study_data -- CIFAR-10's Python batches as the studies load them, and what becomes of damaged ones."""

import io
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
if EXAMPLES not in sys.path:
    sys.path.append(EXAMPLES)

from paper.data import CIFAR_FILES, load  # noqa: E402


class Python2(pickle._Pickler):
    """Writes every string as Python 2 did, with which the real batches were made."""

    def save_string(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {str: save_string, bytes: save_string}


def python2(batch):
    file = io.BytesIO()
    Python2(file, 2).dump(batch)
    return file.getvalue()


def batch(rng, count=3, **changes):
    images = rng.integers(0, 256, (count, 3072), np.uint8)
    whole = {"batch_label": "b", "labels": rng.integers(0, 10, count).tolist(), "data": images} | changes
    return {key.encode(): value for key, value in whole.items()}


@pytest.fixture
def folder(tmp_path, rng):
    for name in CIFAR_FILES:
        (tmp_path / name).write_bytes(python2(batch(rng)))
    return tmp_path


@pytest.mark.parametrize("write", [python2, lambda batch: pickle.dumps(batch, 2), lambda batch: pickle.dumps(batch, 4)])
def test_batches_become_images(write, folder, rng):
    """In the order of the files; red planes first, rows of 32."""
    batches = [batch(rng, count) for count in (1, 2, 3, 4, 5, 6)]
    for name, one in zip(CIFAR_FILES, batches, strict=True):
        (folder / name).write_bytes(write(one))
    data = load(folder)
    assert data.name == "CIFAR-10"
    assert data.x_train.shape == (15, 3, 32, 32)
    assert data.x_test.shape == (6, 3, 32, 32)
    assert data.x_train.dtype == np.float32
    assert data.y_train.tolist() == [label for one in batches[:5] for label in one[b"labels"]]
    assert data.y_test.tolist() == batches[5][b"labels"]
    assert data.x_train[1, 2, 5, 7] == np.float32(batches[1][b"data"][0, 2 * 1024 + 5 * 32 + 7]) / np.float32(255)


def test_the_folder_is_found_from_above_and_from_a_file(folder, tmp_path_factory):
    above = tmp_path_factory.mktemp("above")
    os.rename(folder, above / "cifar-10-batches-py")
    assert load(above).x_train.shape == load(above / "cifar-10-batches-py" / "test_batch").x_train.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((3, 3071), np.uint8)}, r"expected rows of 3072 bytes, found uint8 \(3, 3071\)"),
        ({"data": np.zeros((3, 3072), np.float32)}, "expected rows of 3072 bytes, found float32"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": np.zeros(0, int)}, "no images"),
        ({"labels": [0, 1]}, "3 images, but labels"),
        ({"labels": [0, 1, 10]}, "labels are 0 to 9, found 0 to 10"),
        ({"labels": [0, 1, 0.5]}, "labels of float64"),
    ],
)
def test_wrong_contents_are_named(changes, message, folder, rng):
    path = folder / "data_batch_4"
    path.write_bytes(python2(batch(rng, **changes)))
    with pytest.raises(ValueError, match=rf"data_batch_4: .*{message}"):
        load(folder)


def test_every_cut_of_a_file_is_refused(folder):
    path = folder / "data_batch_2"
    whole = path.read_bytes()
    for length in [*range(64), *range(64, len(whole), 499), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="data_batch_2: not a readable CIFAR-10 batch"):
            load(folder)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({b"data": 1})])
def test_what_is_no_batch_is_refused(content, folder):
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch: not a readable CIFAR-10 batch"):
        load(folder)


def test_a_missing_batch_is_named(folder):
    (folder / "data_batch_3").unlink()
    with pytest.raises(ValueError, match="data_batch_3: not a readable CIFAR-10 batch"):
        load(folder)


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_runs_no_code(protocol, folder, rng):
    """Neither os.mkdir nor eval: a data file may build arrays, and nothing else."""
    trace = folder / "trace"
    calls = [(os.mkdir, str(trace)), (eval, f"__import__('os').mkdir({str(trace)!r})")]
    for call in calls:
        (folder / "data_batch_1").write_bytes(pickle.dumps(batch(rng, extra=Hostile(*call)), protocol))
        with pytest.raises(ValueError, match=r"data_batch_1: .*asks for .*, which no CIFAR-10 batch contains"):
            load(folder)
    assert not trace.exists()


@pytest.mark.parametrize("name", [None, "train.csv"])
def test_a_folder_of_neither_is_refused(name, tmp_path):
    if name:
        (tmp_path / name).write_text("1,2")
    with pytest.raises(ValueError, match=r"found neither MNIST .* nor CIFAR-10"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no such file or directory"):
        load(tmp_path / "absent")
