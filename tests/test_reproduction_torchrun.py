"""A study of ImageNet networks on two processes, from a folder of images to its lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from reproduction import ledger
from two_ranks import torchrun

REPRODUCE = Path(__file__).parent.parent / "examples" / "reproduce.py"


def make_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 3)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def test_torchrun_trains_an_imagenet_study(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    options = ["table5", "--preset", "smoke", "--archs", "resnet18_imagenet", "--hosts", "irnet", "--seeds", "1"]
    options += ["--arms", "bare", "HBNN", "--data", str(tmp_path / "images")]
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    done = torchrun(str(REPRODUCE), *options, *folders)
    assert done.returncode == 0, done.stderr
    lines = ledger.read(tmp_path / "results" / "reproduce-smoke.jsonl")
    assert [line["config"]["arm"] for line in lines] == ["bare", "HBNN"]
    for line in lines:
        assert "2 CPU threads" in line["machine"]
        assert len(line["accuracy"]) == 2
        assert set(line["accuracy"]) <= {round(i / 6, 4) for i in range(7)}  # of all six images, not of a rank's three
        assert all(0 < loss < 20 for loss in line["train_loss"])
    assert lines[1]["reach"] > 0
    assert not list((tmp_path / "runs").glob("[0-9a-f]" * 16 + ".pt"))  # checkpoints of finished runs are gone
