"""Images on disk: CIFAR-100's layout, folders of images; and what every kind of set promises to training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cifar
import image_folder
from distributed import World
from images import Images

if TYPE_CHECKING:
    from collections.abc import Iterable

    from images import ImageSet

RECORD = 2 + 3 * 32 * 32
COUNT = 13
# Where a worker is forked, Python 3.12 and later warn of torch's threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture
def cifar100(tmp_path: Path) -> Path:
    """The official layout: coarse label i % 20, fine label i % 100, noise; zeros after 200 records."""
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    for name, records in (("train.bin", 50_000), ("test.bin", 10_000)):
        content = np.random.default_rng(0).integers(0, 256, (200, RECORD), dtype=np.uint8)
        content[:, 0], content[:, 1] = np.arange(200) % 20, np.arange(200) % 100
        (folder / name).write_bytes(content.tobytes())
        os.truncate(folder / name, records * RECORD)
    return folder


def test_cifar100_is_read_by_its_fine_labels(cifar100: Path) -> None:
    train, test = cifar.load(cifar100.parent, limit=150, classes=100)
    assert train.labels.tolist() == [i % 100 for i in range(150)]
    record = np.fromfile(cifar100 / "train.bin", dtype=np.uint8, count=RECORD, offset=7 * RECORD)
    assert np.array_equal(train.pixels[7].flatten(), record[2:])
    assert (train.flip, train.shift, test.flip, test.shift) == (True, 4, False, 0)
    assert train.mean == (0.5071, 0.4865, 0.4409)
    assert len(cifar.load(cifar100, classes=100)[1]) == 10_000


def damage(path: Path, record: int, byte: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(record * RECORD + byte)
        file.write(bytes([value]))


def test_cifar100_errors_name_file_record_value_and_mend(cifar100: Path, tmp_path: Path) -> None:
    mend = r".*cifar-100-binary\.tar\.gz"
    with pytest.raises(FileNotFoundError, match=r"CIFAR-100.*train\.bin" + mend):
        cifar.load(tmp_path / "elsewhere", classes=100)
    damage(cifar100 / "train.bin", 3, 0, 20)
    with pytest.raises(ValueError, match=r"train\.bin.*record 3 has coarse label 20, .*end at 19" + mend):
        cifar.load(cifar100, limit=50, classes=100)
    damage(cifar100 / "train.bin", 3, 0, 19)
    damage(cifar100 / "test.bin", 4, 1, 100)
    with pytest.raises(ValueError, match=r"test\.bin.*record 4 has fine label 100, .*end at 99" + mend):
        cifar.load(cifar100, limit=50, classes=100)
    os.truncate(cifar100 / "test.bin", 10_000 * RECORD + 1)
    with pytest.raises(ValueError, match=r"test\.bin is too long: 30740001 bytes instead of 30740000" + mend):
        cifar.load(cifar100, limit=50, classes=100)
    os.truncate(cifar100 / "test.bin", 10_000 * RECORD - 1)
    with pytest.raises(ValueError, match=r"test\.bin is truncated" + mend):
        cifar.load(cifar100, limit=50, classes=100)
    (cifar100 / "test.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.bin is missing" + mend):
        cifar.load(cifar100, limit=50, classes=100)
    with pytest.raises(ValueError, match="classes is 20"):
        cifar.load(cifar100, classes=20)


def picture(path: Path, width: int, height: int, blue: int) -> None:
    """Red grows from left to right, green from top to bottom; PNG keeps every value."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([red, green, np.full_like(red, blue)], 2)
    Image.fromarray(pixels.round().astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes; 13 images to train on, 7 to evaluate on, of several shapes, each with a blue of its own."""
    for part, counts in (("train", (6, 4, 3)), ("val", (3, 2, 2))):
        blue = 0
        for name, count in zip("abc", counts, strict=True):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                picture(tmp_path / part / name / f"{i}.PNG", 40 + 9 * i, 64 - 5 * i, blue)
                blue += 10
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.fixture(params=["in memory", "in files"])
def images(request: pytest.FixtureRequest, folder: Path) -> ImageSet:
    """A training set of 13 images."""
    if request.param == "in files":
        return image_folder.load(folder, size=16, workers=0)[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (COUNT, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(COUNT) % 3, (0.5,) * 3, (0.25,) * 3, shift=2, flip=True)


def equal(first: Iterable[tuple[Tensor, Tensor]], second: Iterable[tuple[Tensor, Tensor]]) -> bool:
    one, two = list(first), list(second)
    return len(one) == len(two) and all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_an_epoch_depends_on_seed_and_epoch_alone_and_can_be_resumed(images: ImageSet) -> None:
    state = torch.get_rng_state()
    whole = list(images.epoch(1, 2, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(labels) for _, labels in whole] == [4, 4, 4]  # a single image is left out
    assert equal(images.epoch(1, 2, 4, start=1), whole[1:])
    assert not equal(images.epoch(1, 3, 4), whole)
    assert not equal(images.epoch(2, 2, 4), whole)
    assert equal(images.to(torch.device("cpu")).epoch(1, 2, 4), whole)
    plain = images.split(0.5)[1]
    orders = [[labels.tolist() for _, labels in plain.epoch(*draw, 7)] for draw in ((1, 2), (1, 3), (2, 2))]
    assert orders[0] not in orders[1:]


def test_training_sees_every_shift_and_both_mirror_images() -> None:
    ramp = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    images = Images(ramp, torch.zeros(200, dtype=torch.long), (0.0,) * 3, (1.0,) * 3, shift=1, flip=True)
    padded = torch.nn.functional.pad(ramp[0], (1,) * 4)
    mirrored = torch.nn.functional.pad(ramp[0].flip(2), (1,) * 4)
    views = {
        (flip, y, x): whole[:, y : y + 8, x : x + 8]
        for flip, whole in enumerate((padded, mirrored))
        for y in range(3)
        for x in range(3)
    }
    seen: list[tuple[int, int, int]] = []
    for batch, _ in images.epoch(0, 0, 50):
        for image in (batch * 255).round().to(torch.uint8):
            (view,) = [name for name, expected in views.items() if torch.equal(image, expected)]
            seen.append(view)
    assert set(seen) == set(views)
    assert 70 < sum(flip for flip, _, _ in seen) < 130


def test_ranks_see_together_what_one_process_sees(images: ImageSet) -> None:
    worlds = [World(rank, 3) for rank in range(3)]
    for whole, shares in (
        (images.epoch(0, 0, 7), [images.epoch(0, 0, 7, world=world) for world in worlds]),
        (images.batches(11), [images.batches(11, world) for world in worlds]),
    ):
        parts = [list(share) for share in shares]
        for step, (pixels, labels) in enumerate(whole):
            for rank, batches in enumerate(parts):
                if rank < len(labels):
                    assert torch.equal(batches[step][0], pixels[rank::3])
                    assert torch.equal(batches[step][1], labels[rank::3])
                else:
                    assert len(batches) == step  # nothing is left for it
    assert images.steps(7) == images.steps(7, worlds[0]) == 2
    assert (images.steps(8), images.steps(8, worlds[0])) == (2, 1)  # 5 images are too few for three ranks
    with pytest.raises(ValueError, match="2 images is too small for 3"):
        images.steps(2, worlds[0])


def test_held_out_images_are_others_and_as_they_are(images: ImageSet) -> None:
    everything = {tuple(pixels.flatten().tolist()) for batch, _ in images.batches(5) for pixels in batch}
    kept, held_out = images.split(0.3)
    assert (len(kept), len(held_out)) == (9, 4)
    parts = [{tuple(p.flatten().tolist()) for batch, _ in s.batches(5) for p in batch} for s in (kept, held_out)]
    assert parts[0] | parts[1] == everything
    assert equal(held_out.batches(5), images.split(0.3)[1].batches(5))
    shown = {tuple(pixels.flatten().tolist()) for batch, _ in held_out.epoch(0, 0, 2) for pixels in batch}
    assert shown == parts[1]  # not augmented
    assert not parts[0] >= {tuple(pixels.flatten().tolist()) for batch, _ in kept.epoch(0, 0, 3) for pixels in batch}
    assert torch.equal(held_out.labels, torch.cat([labels for _, labels in held_out.batches(3)]))
    with pytest.raises(ValueError, match="leaves 13"):
        images.split(0.01)


def unscaled(batch: Tensor) -> Tensor:
    return batch * torch.tensor(image_folder.STD).view(-1, 1, 1) + torch.tensor(image_folder.MEAN).view(-1, 1, 1)


def test_folders_are_read_in_order_with_their_classes(folder: Path) -> None:
    train, val = image_folder.load(folder, size=16, workers=0)
    assert train.labels.tolist() == [0] * 6 + [1] * 4 + [2] * 3
    ((batch, labels),) = val.batches(10)
    assert labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert torch.allclose(unscaled(batch)[:, 2, 8, 8] * 255, torch.arange(7) * 10.0, atol=0.01)
    few, fewer = image_folder.load(folder, size=16, limit=5, workers=0)
    assert (len(few), len(fewer)) == (5, 5)
    assert len(set(few.labels.tolist())) > 1


def test_evaluation_takes_seven_eighths_of_the_centre(folder: Path) -> None:
    _, val = image_folder.load(folder, size=32, workers=0)
    ((batch, _),) = val.batches(10)
    red, green, _ = unscaled(batch)[0]  # 40 × 64 pixels, so 32 of 37 and 32 of 59
    for colour, whole in ((red[0], 37), (green[:, 0], 59)):
        assert (colour[0] + colour[-1]).item() == pytest.approx(1, abs=0.03)
        assert (colour[-1] - colour[0]).item() == pytest.approx(31 / (whole - 1), abs=0.03)


def test_training_takes_random_parts_and_mirrors_half(folder: Path) -> None:
    for path in (folder / "train").rglob("*.PNG"):
        picture(path, 120, 120, 0)
    train, _ = image_folder.load(folder, size=32, workers=0)
    batches = [batch for epoch in range(24) for batch, _ in train.epoch(0, epoch, COUNT)]
    corners = unscaled(torch.cat(batches))[:, :2, [0, -1], [0, -1]]  # of red and green, at both ends of the diagonal
    widths, heights = (corners[:, :, 1] - corners[:, :, 0]).T * 119 / 120 * 32 / 31
    assert 0.4 < (widths < 0).float().mean() < 0.6
    areas, ratios = widths.abs() * heights, widths.abs() / heights
    assert 0.07 < areas.min() < 0.12 and 0.9 < areas.max() < 1.01
    assert 0.45 < areas.mean() < 0.56  # 0.54 less what does not fit
    assert 0.72 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.38
    assert corners.min() < 0.05 and corners.max() > 0.95


def test_where_no_part_fits_training_takes_the_centre(folder: Path) -> None:
    for path in (folder / "train").rglob("*.PNG"):
        picture(path, 6, 120, 0)
    train, _ = image_folder.load(folder, size=16, workers=0)
    corners = unscaled(next(train.epoch(0, 0, COUNT))[0])[:, :2, [0, -1], [0, -1]]
    assert corners[:, 0].sum(1).tolist() == pytest.approx([1] * COUNT, abs=0.01)
    assert corners[:, 1].mean(1).tolist() == pytest.approx([0.5] * COUNT, abs=0.01)


def test_workers_change_nothing(folder: Path) -> None:
    sets = [image_folder.load(folder, size=16, workers=workers)[0] for workers in (0, 2)]
    assert equal(*(s.epoch(3, 1, 4, start=1) for s in sets))
    assert equal(*(s.batches(5) for s in sets))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(folder: Path, workers: int) -> None:
    path = folder / "val" / "b" / "1.PNG"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"val/b/1\.PNG is not a readable image"):
        list(image_folder.load(folder, workers=workers)[1].batches(2))


def test_folder_errors_say_what_is_missing_where(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit is 0"):
        image_folder.load(folder, limit=0)
    with pytest.raises(FileNotFoundError, match=r"no folder .*elsewhere/train.*val/CLASS"):
        image_folder.load(tmp_path / "elsewhere")
    (folder / "train" / "d").mkdir()
    with pytest.raises(ValueError, match=r"train has 4 classes and val has 3: .*val has no folder d"):
        image_folder.load(folder)
    (folder / "val" / "d").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train/d holds no images"):
        image_folder.load(folder)
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"bare/train holds no class folders"):
        image_folder.load(tmp_path / "bare")
