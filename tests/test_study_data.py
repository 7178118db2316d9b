"""test_study_data -- MNIST's and CIFAR-10's files as the studies load them, and what becomes of damaged ones."""

import contextlib
import gzip
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

from paper.data import CIFAR_FILES, MNIST_FILES, load  # noqa: E402

KEYS = ("x_train", "y_train", "x_test", "y_test")


def idx(array):
    """The format of http://yann.lecun.com/exdb/mnist: a type, the number of dimensions, their extents, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(rng):
    """Images of 3 rows and 2 columns: 5 to train on, 4 to test on."""
    return [
        made
        for count in (5, 4)
        for made in (rng.integers(0, 256, (count, 3, 2), np.uint8), rng.integers(0, 10, count, np.uint8))
    ]


def idx_folder(arrays, folder, ending="", write=lambda raw: raw):
    for name, array in zip(MNIST_FILES, arrays, strict=True):
        (folder / (name + ending)).write_bytes(write(idx(array)))
    return folder


def idx_gz(arrays, folder):
    return idx_folder(arrays, folder, ".gz", gzip.compress)


def idx_dotted(arrays, folder):
    """As some archives unpack: train-images.idx3-ubyte."""
    for path in idx_folder(arrays, folder).iterdir():
        path.rename(folder / path.name.replace("-idx", ".idx"))
    return folder


def idx_by_a_file(arrays, folder):
    return idx_gz(arrays, folder) / f"{MNIST_FILES[2]}.gz"


def npz(arrays, folder, save=np.savez):
    save(folder / "mnist.npz", **dict(zip(KEYS, arrays, strict=True)))
    return folder / "mnist.npz"


def npz_small(arrays, folder):
    return npz(arrays, folder, np.savez_compressed)


def test_no_digit_is_both_learned_and_tested():
    """Each of scikit-learn's is there once, under its own label. Red with parts that overlap."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    data = load()
    assert (data.x_train.shape, data.x_test.shape) == ((1347, 1, 8, 8), (450, 1, 8, 8))
    images, labels = np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])
    found = sorted((label, image.tobytes()) for image, label in zip(images, labels, strict=True))
    expected = zip((bunch.images / 16).astype(np.float32), bunch.target, strict=True)
    assert found == sorted((label, image.tobytes()) for image, label in expected)
    assert np.bincount(data.y_test).min() > 30


def test_few_images_to_train_on_leave_the_others_to_test_on(mnist, tmp_path):
    whole = load(idx_folder(mnist, tmp_path))
    data = whole.split(2)
    assert data.name == "MNIST, 2 images to train on and 7 to test on"
    for both, parts in (
        ((data.x_train, data.x_test), (whole.x_train, whole.x_test)),
        (
            (data.y_train, data.y_test),
            (whole.y_train, whole.y_test),
        ),
    ):
        assert len(both[0]) == 2
        assert np.array_equal(np.concatenate(both), np.concatenate(parts))
    assert whole.flat().x_train.shape == (5, 6)
    assert np.array_equal(whole.flat().x_test[3], whole.x_test[3].ravel())


@pytest.mark.parametrize("write", [idx_folder, idx_gz, idx_dotted, idx_by_a_file, npz, npz_small])
def test_every_form_of_mnist_becomes_images(write, mnist, tmp_path):
    data = load(write(mnist, tmp_path))
    assert data.name == "MNIST"
    for images, labels, x, y in ((*mnist[:2], data.x_train, data.y_train), (*mnist[2:], data.x_test, data.y_test)):
        assert x.shape == (len(images), 1, 3, 2)
        assert x.dtype == np.float32
        assert np.array_equal(x[:, 0], images / np.float32(255))
        assert np.array_equal(y, labels)
        assert y.dtype == np.int64


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda a: a[0], r"expected images of unsigned bytes, .* found uint8 \(3, 2\)"),
        (0, lambda a: a[:4], r"labels of uint8 \(5,\) for 4 images"),
        (0, lambda a: a[:, :0], "images without a pixel, 0 high and 2 wide"),
        (1, lambda a: a[:, None], r"labels of uint8 \(5, 1\) for 5 images"),
        (1, lambda a: a + np.uint8(10), "labels are 0 to 9, found"),
        (2, lambda a: a[:, :, :1], r"images of \(1, 3, 1\), but those to train on, .* are \(1, 3, 2\)"),
    ],
)
@pytest.mark.parametrize("write", [idx_folder, npz])
def test_wrong_contents_of_mnist_are_named(write, place, change, message, mnist, tmp_path):
    mnist[place] = change(mnist[place])
    with pytest.raises(ValueError, match=message) as refused:
        load(write(mnist, tmp_path))
    assert (MNIST_FILES if write is idx_folder else KEYS)[place] in str(refused.value)


def test_no_images_are_refused(tmp_path):
    none = [np.zeros((0, 3, 2), np.uint8), np.zeros(0, np.uint8)] * 2
    for write in (idx_folder, npz):
        with pytest.raises(ValueError, match="no images"):
            load(write(none, tmp_path))


def test_an_idx_file_of_another_kind_is_refused(mnist, tmp_path):
    path = idx_folder(mnist, tmp_path) / MNIST_FILES[2]
    whole = path.read_bytes()
    for raw, message in (
        (b"", r"not an IDX file of unsigned bytes \(it starts with nothing\)"),
        (b"\x1f\x8b\x08\0", "it starts with 1f8b0800"),
        (whole[:2] + b"\x0d" + whole[3:], "it starts with 00000d03"),
        (whole[:3] + b"\0" + whole[4:], "it starts with 00000800"),
        (whole + b"\0", r"promises 24 bytes of data for \(4, 3, 2\), found 25"),
        (whole[:4] + b"\xff" * 12 + whole[16:], f"promises {(2**32 - 1) ** 3} bytes"),
    ):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=f"{MNIST_FILES[2]}: .*{message}"):
            load(tmp_path)


@pytest.mark.parametrize("name", MNIST_FILES)
def test_a_missing_file_is_named(name, mnist, tmp_path):
    (idx_folder(mnist, tmp_path) / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}\[\.gz\] is missing"):
        load(tmp_path)


@pytest.mark.parametrize("write", [idx_folder, idx_gz])
def test_every_cut_of_an_idx_file_is_refused(write, mnist, tmp_path):
    path = sorted(write(mnist, tmp_path).iterdir())[0]
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            load(tmp_path)


def test_an_npz_that_lacks_an_array_names_it(mnist, tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=mnist[0], y_train=mnist[1])
    with pytest.raises(ValueError, match=r"mnist\.npz: .*x_test, y_test missing"):
        load(tmp_path / "mnist.npz")
    with pytest.raises(ValueError, match=r"absent\.npz: not a readable MNIST npz file: .*No such file"):
        load(tmp_path / "absent.npz")


def test_an_npz_that_is_none_is_refused(tmp_path):
    path = tmp_path / "mnist.npz"
    array = io.BytesIO()
    np.save(array, np.ones(3))
    for raw in (b"", b"text", array.getvalue()):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"mnist\.npz: not a readable MNIST npz file"):
            load(path)


@pytest.mark.parametrize("write", [npz, npz_small])
def test_no_damage_to_an_npz_escapes(write, mnist, tmp_path):
    """Zip has many ways to break: another method, a password, another version. Red with a list of exceptions."""
    path = write(mnist, tmp_path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            with contextlib.suppress(ValueError):
                load(path)


def test_an_npz_runs_no_code(mnist, tmp_path):
    trace = tmp_path / "trace"
    mnist[1] = np.array([Hostile(os.mkdir, str(trace))] * 5, object)
    with pytest.raises(ValueError, match="not a readable MNIST npz file: Object arrays cannot be loaded"):
        load(npz(mnist, tmp_path))
    assert not trace.exists()


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
    for plane in range(3):
        value = np.float32(batches[1][b"data"][0, plane * 1024 + 5 * 32 + 7])
        assert data.x_train[1, plane, 5, 7] == value / np.float32(255)


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
        ({"labels": [0, 1]}, r"labels of int64 \(2,\) for 3 images"),
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


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", ""),
        (b"no pickle", ""),
        (pickle.dumps([1, 2]), "found a list"),
        (pickle.dumps({b"data": 1}), r"found the keys \[b'data'\]"),
        (pickle.dumps({"data": 1, "labels": 2}), r"keys b'data' and b'labels', .* found the keys \['data', 'labels'\]"),
    ],
)
def test_what_is_no_batch_is_refused(content, found, folder):
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=f"test_batch: not a readable CIFAR-10 batch.*{found}"):
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


@pytest.mark.parametrize("content", [b"c" + b"A" * 9000 + b"\x1b[31m\nname\n.", b"c" + b"\x1b[31m" + b"A\nname\n."])
def test_what_a_file_says_is_told_in_few_words(content, folder):
    """And in one line, without a word to the terminal. Seeded bug: a name as it is."""
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match=r"asks for .*, which no CIFAR-10 batch contains") as error:
        load(folder)
    assert len(str(error.value)) < 400 + len(str(folder))
    assert str(error.value).isprintable()


def test_the_set_is_that_of_the_file_named(folder, mnist):
    """Both lie in one folder. Red where a file stands for whatever lies beside it."""
    idx_folder(mnist, folder)
    assert [load(folder / name).name for name in MNIST_FILES] == ["MNIST"] * 4
    assert [load(folder / name).name for name in CIFAR_FILES] == ["CIFAR-10"] * 6
    with pytest.raises(ValueError, match="found both MNIST and CIFAR-10; name a file"):
        load(folder)
    (folder / "train.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"train\.csv: not a file of a known data set; MNIST is .* CIFAR-10"):
        load(folder / "train.csv")


def test_of_two_spellings_the_one_named_is_read(mnist, tmp_path):
    idx_folder(mnist, tmp_path)
    other = [255 - mnist[0], *mnist[1:]]
    idx_gz(other, tmp_path)
    for name, images in ((MNIST_FILES[0], mnist[0]), (f"{MNIST_FILES[0]}.gz", other[0])):
        assert np.array_equal(load(tmp_path / name).x_train[:, 0], images / np.float32(255))


def test_too_few_images_are_counted_and_their_file_named(mnist, tmp_path):
    data = load(idx_folder(mnist, tmp_path))
    data.require(train=5, test=4, varying=6)
    for least, message in (
        ({"train": 6}, f"{MNIST_FILES[0]}: at least 6 images to train on are needed, found 5"),
        ({"test": 5}, f"{MNIST_FILES[2]}: at least 5 images to test on are needed, found 4"),
        ({"varying": 7}, f"{MNIST_FILES[0]}: at least 7 pixels must differ between images, found 6"),
    ):
        with pytest.raises(ValueError, match=message):
            data.require(**least)
    with pytest.raises(ValueError, match=f"{MNIST_FILES[0]} and .*{MNIST_FILES[2]}: at least 10 .* found 9"):
        data.split(10).require(train=10)


@pytest.mark.parametrize("name", [None, "train.csv"])
def test_a_folder_of_neither_is_refused(name, tmp_path):
    if name:
        (tmp_path / name).write_text("1,2")
    with pytest.raises(ValueError, match="found neither MNIST nor CIFAR-10; MNIST is"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no such file or directory"):
        load(tmp_path / "absent")
