"""The examples as a user runs them: the data reader's errors, a kill in the middle of training, the quickstart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cifar
from hbnn_plugin.retrofit.checkpoint import described

EXAMPLES = Path(__file__).parent.parent / "examples"


def train(data: Path, out: Path, *extra: str) -> list[str]:
    options = (
        "--host irnet --arch resnet8 --size 16 --limit 96 --batch-size 16 --epochs 2 --threads 1 --checkpoint-every 1"
    )
    return [
        sys.executable,
        str(EXAMPLES / "train.py"),
        "--data",
        str(data),
        "--out",
        str(out),
        *options.split(),
        *extra,
    ]


def test_a_killed_training_continues_to_the_same_weights_bit_for_bit(data: Path, tmp_path: Path) -> None:
    subprocess.run(train(data, tmp_path / "whole", "--hbnn"), check=True, capture_output=True)
    interrupted = tmp_path / "interrupted"
    with subprocess.Popen(
        train(data, interrupted, "--hbnn"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (interrupted / "checkpoint.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    saved = torch.load(interrupted / "checkpoint.pt", weights_only=True)["progress"]
    assert not (interrupted / "final.pt").exists()
    assert 6 * saved["epoch"] + saved["step"] < 12  # it was in the middle
    finished = subprocess.run(train(data, interrupted, "--hbnn"), check=True, capture_output=True, text=True)
    assert "Continuing" in finished.stderr
    whole, resumed = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "interrupted"))
    assert list(whole) == list(resumed)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "interrupted")]
    assert results[0]["test_accuracy"] == results[1]["test_accuracy"]
    assert results[0]["fused_difference"] == 0

    refused = subprocess.run(train(data, interrupted, "--hbnn", "--radius", "1"), capture_output=True, text=True)
    assert refused.returncode == 1
    assert "radius" in refused.stderr


def test_cluster_options_reach_the_model(data: Path, tmp_path: Path) -> None:
    options = ["--hbnn", "--radius", "0.2", "--rule", "mobius", "--epochs", "1", "--limit", "32"]
    subprocess.run(train(data, tmp_path, *options), check=True, capture_output=True)
    model = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    settings = [described(value) for key, value in model.items() if key.endswith("._extra_state")]
    assert len(settings) == 6
    assert all(found and (found["radius"], found["rule"]) == (0.2, "mobius") for found in settings)


def test_cluster_options_without_hbnn_are_refused(data: Path, tmp_path: Path) -> None:
    refused = subprocess.run(train(data, tmp_path, "--radius", "1"), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--hbnn" in refused.stderr


def test_cifar_errors_name_the_file_and_the_mend(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin.*cifar-10-binary\.tar\.gz"):
        cifar.load(tmp_path)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*cifar.TRAIN_FILES, *cifar.TEST_FILES]:
        (folder / name).write_bytes(b"")
        os.truncate(folder / name, 10_000 * cifar.LAYOUTS[10].record_bytes)
    train_set, test_set = cifar.load(tmp_path, limit=50)
    assert (len(train_set), len(test_set)) == (50, 50)
    os.truncate(folder / "data_batch_1.bin", 10_000 * cifar.LAYOUTS[10].record_bytes - 1)
    with pytest.raises(ValueError, match=r"data_batch_1\.bin"):
        cifar.load(tmp_path, limit=50)
    (folder / "data_batch_1.bin").write_bytes(b"\x0a" + bytes(10_000 * cifar.LAYOUTS[10].record_bytes - 1))
    with pytest.raises(ValueError, match=r"data_batch_1\.bin.*10"):
        cifar.load(tmp_path, limit=50)
    (folder / "data_batch_1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin"):
        cifar.load(tmp_path, limit=50)


def test_the_quickstart_trains_compares_and_fuses(tmp_path: Path) -> None:
    picture = tmp_path / "quickstart.png"
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--epochs", "2", "--out", str(picture)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "by 0 at most" in done.stdout
    assert "stages.0.0.conv1" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
