"""Images from every source, and what is no source."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.data.image_files import augmentation, decode
from secateur.data.image_sources import read_images
from secateur.data.images import ImageSet, Preprocess
from secateur.errors import SecateurError, UsageError


def picture(path: Path, shade: int, width: int = 12, height: int = 8) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((height, width, 3), shade, dtype=np.uint8)
    array[:, 0] = 255 - shade
    image.fromarray(array).save(path)


def test_digits_are_split_and_scaled_by_the_training_part() -> None:
    pytest.importorskip("sklearn")
    train, test, whole = (read_images(f"digits:{part}") for part in ("train", "test", "all"))
    assert (len(train), len(test)) == (1438, 359)
    assert len(whole) == 1797
    pixels = train.batch(range(len(train))).pixels
    assert abs(float(pixels.mean())) < 0.01
    assert abs(float(pixels.std()) - 1) < 0.01
    assert test.preprocess == train.preprocess
    assert train.shape == (1, 8, 8)
    assert train.fingerprint != test.fingerprint
    assert read_images("digits", "train").fingerprint == train.fingerprint


def test_fashion_mnist_is_read_where_it_is() -> None:
    try:
        images = read_images("fashion-mnist:test")
    except UsageError as error:
        pytest.skip(str(error))
    assert len(images) == 10_000
    assert images.shape == (1, 28, 28)
    assert torch.bincount(images.targets).tolist() == [1000] * 10


def idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">{array.ndim + 1}I", 0x800 + array.ndim, *array.shape)
    data = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def mnist(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 6)):
        idx(folder / f"{prefix}-images-idx3-ubyte.gz", generator.integers(0, 255, (count, 5, 4)))
        idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 3)


def test_a_folder_of_mnists_format(tmp_path: Path) -> None:
    mnist(tmp_path)
    train = read_images(tmp_path)
    assert train.part == "all"
    assert len(train) == 26
    assert read_images(tmp_path, "test").targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(train.classes) == 3
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\10\1\0\0\0\11\1\2")
    from secateur.data import image_sources

    image_sources._mnist.cache_clear()
    with pytest.raises(SecateurError, match="should hold"):
        read_images(tmp_path, "test")


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    for name, shade in (("cat", 10), ("dog", 200)):
        for number in range(5):
            picture(tmp_path / name / f"{number}.png", shade + number)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    how = Preprocess((0.0,) * 3, (1.0,) * 3, 8, 8)
    train, test = (read_images(tmp_path, part, preprocess=how) for part in ("train", "test"))
    assert train.classes == ("cat", "dog")
    assert len(train) + len(test) == 10
    assert not set(train.files) & set(test.files)
    pixels = train.batch([0, len(train) - 1]).pixels
    assert pixels.shape == (2, 3, 8, 8)
    assert float(pixels[0, 0, 4, 4]) == 10
    gray = read_images(tmp_path, "train", preprocess=Preprocess((0.0,), (1.0,), 8, 8), channels=1)
    assert gray.shape == (1, 8, 8)


def test_parts_in_folders_of_their_own_and_files_by_name(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            for number in range(count):
                picture(tmp_path / "both" / part / name / f"{number}.png", 50)
    assert len(read_images(tmp_path / "both", "test")) == 4
    assert len(read_images(tmp_path / "both", "train")) == 6
    for number, name in enumerate(("n01_ant", "n02_bee", "n03_cow")):
        picture(tmp_path / "files" / f"{name}.png", 60 * number)
    found = read_images(tmp_path / "files", "all")
    assert found.classes == ("n01_ant", "n02_bee", "n03_cow")
    assert found.targets.tolist() == [0, 1, 2]
    picture(tmp_path / "both" / "val" / "c" / "0.png", 1)
    with pytest.raises(UsageError, match="no class of the training part"):
        read_images(tmp_path / "both", "test")


def test_pairs_in_memory() -> None:
    pairs = [(torch.rand(3, 4, 4), n % 2) for n in range(6)]
    images = read_images(pairs)
    assert images.shape == (3, 4, 4)
    assert images.targets.tolist() == [0, 1] * 3
    with pytest.raises(UsageError, match="pairs"):
        read_images([(torch.rand(3, 4, 4), 0), (torch.rand(3, 5, 5), 0)])
    with pytest.raises(UsageError, match="pairs"):
        read_images([("a path", 0)])


@pytest.mark.parametrize(
    ("spec", "part", "words"),
    [
        ("digts", None, "did you mean 'digits'"),
        ("digits", "half", "no such part"),
        ("/nowhere/at/all", None, "neither a folder nor"),
    ],
)
def test_no_such_images(spec: str, part: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_images(spec, part)


def test_empty_and_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no images"):
        read_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    pytest.importorskip("PIL")
    with pytest.raises(SecateurError, match="cannot be read as an image"):
        read_images(tmp_path, "all").batch([0])
    picture(tmp_path / "small.png", 9, 4, 4)
    with pytest.raises(SecateurError, match="smaller than the crop"):
        decode(tmp_path / "small.png", 3, Preprocess(crop=8))


def test_sixteen_bits_are_scaled_to_bytes_and_floats_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    deep = np.array([[0, 257, 32768, 65535]] * 2, dtype=np.uint16)
    for name, array in (("deep.png", deep), ("deep.tif", deep.astype(np.int32))):
        image.fromarray(array).save(tmp_path / name)
        for channels in (1, 3):
            pixels = decode(tmp_path / name, channels, Preprocess())
            assert pixels.shape[0] == channels
            assert pixels[0, 0].tolist() == [0, 1, 127, 255]
    image.fromarray(deep.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(SecateurError, match="mode F"):
        decode(tmp_path / "f.tif", 1, Preprocess())


def test_resizing_keeps_the_shape_and_the_centre(tmp_path: Path) -> None:
    picture(tmp_path / "wide.png", 100, 30, 10)
    pixels = decode(tmp_path / "wide.png", 3, Preprocess(resize=20, crop=16))
    assert pixels.shape == (3, 16, 16)
    assert pixels.unique().tolist() == [100]  # the odd left edge is cropped away


def test_labels_must_be_classes() -> None:
    with pytest.raises(UsageError, match="labels outside"):
        ImageSet("x", torch.tensor([0, 3]), ("a", "b"), torch.zeros(2, 1, 2, 2, dtype=torch.uint8))
    with pytest.raises(UsageError, match="no images"):
        ImageSet("x", torch.zeros(0, dtype=torch.int64), ("a",))


def test_augmentation_is_drawn_from_torchs_generator() -> None:
    pytest.importorskip("kornia")
    images = read_images([(torch.rand(1, 8, 6), 0) for _ in range(4)])
    from dataclasses import replace

    changed = replace(images, augment=augmentation("crop-flip", 8, 6))
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(changed.batch(range(4)).pixels)
    assert torch.equal(*drawn)
    plain = images.batch(range(4)).pixels
    assert not torch.equal(drawn[0], plain)
    assert torch.equal(next(changed.batches(4)).pixels, plain)  # never where accuracy is measured
    with pytest.raises(UsageError, match="no such change"):
        augmentation("blur", 8, 8)


def test_first_is_spread_over_all() -> None:
    images = read_images([(torch.zeros(1, 2, 2), n) for n in range(10)])
    assert images.first(5).targets.tolist() == [0, 2, 4, 6, 8]
    assert images.first(None) is images


def test_a_sample_is_drawn_from_all_classes_in_batches_of_one_size() -> None:
    """A folder lies class after class; what is averaged over batches needs all of them in each."""
    targets = torch.arange(4).repeat_interleave(50)
    pixels = (60 * targets)[:, None, None, None].expand(-1, 1, 2, 2).to(torch.uint8)
    images = ImageSet("made", targets, tuple("abcd"), pixels, preprocess=Preprocess((0.0,), (1.0,)),
                      channels=1)  # fmt: skip
    batches = list(images.sample(170, 32))
    assert [len(b.labels) for b in batches] == [32] * 5
    assert all(len(b.labels.unique()) == 4 for b in batches)
    assert len(set(torch.cat([b.labels for b in batches]).tolist())) == 4
    assert [len(b.labels) for b in images.sample(20, 32)] == [20]
    assert torch.equal(next(images.sample(9, 9)).pixels, next(images.sample(9, 9)).pixels)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"mean": "1,2"}, "preprocess.mean"), ({"mean": ["a"]}, "preprocess.mean"),
        ({"std": [0]}, "preprocess.std"), ({"std": []}, "preprocess.std"),
        ({"mean": [float("nan")]}, "preprocess.mean"), ({"resize": -1}, "preprocess.resize"),
        ({"crop": 2.5}, "preprocess.crop"), ({"resize": 8, "crop": 9}, "preprocess.crop"),
        ({"filter": "cubic"}, "preprocess.filter"), ({"size": 3}, "preprocess"),
    ],
)  # fmt: skip
def test_scaling_that_cannot_be_is_refused_by_name(record: dict[str, object], field: str) -> None:
    with pytest.raises(UsageError) as error:
        Preprocess.parse(record)
    assert error.value.field == field


def test_one_number_is_a_list_of_one_and_channels_must_fit() -> None:
    assert Preprocess.parse({"mean": 127, "std": 128}).mean == (127,)
    three = Preprocess((1.0, 2.0, 3.0), (1.0,))
    with pytest.raises(UsageError, match="3 numbers for images of 1 channel"):
        ImageSet("made", torch.zeros(2).long(), ("a",), torch.zeros(2, 1, 2, 2).to(torch.uint8),
                 channels=1, preprocess=three)  # fmt: skip


def test_one_part_alone_and_folders_named_like_images(tmp_path: Path) -> None:
    _folder_of_classes(tmp_path / "set" / "train")
    with pytest.raises(UsageError, match="no folder of the other part"):
        read_images(tmp_path / "set", "train")
    (tmp_path / "set" / "train" / "a" / "x.png").mkdir()
    assert len(read_images(tmp_path / "set" / "train", "all")) == 4


def _folder_of_classes(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(2):
            image.new("RGB", (4, 4)).save(folder / name / f"{number}.png")
