"""What is in a packed file, and how it is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hbnn_plugin
from hbnn_plugin.export import save_packed
from hbnn_plugin.export.capture import binary_weights
from hbnn_plugin.host.bits import unpack_bits
from packed_files import header, stored
from tiny_hosts import ScaledConv, tiny_net
from training_helpers import trained


def test_the_header_says_what_is_inside(tmp_path: Path) -> None:
    net = trained(ScaledConv, radius=0.03)
    save_packed(net, tmp_path / "file")
    found = header(tmp_path / "file")
    assert (found["format"], found["plugin"], found["bit_order"]) == (1, hbnn_plugin.__version__, "little")
    assert found["layers"]["conv1"] == {"tensor": "weight", "cls": "ScaledConv", "shape": [5, 4, 3, 3], "cluster": 0}
    assert found["clusters"][0]["radius"] == 0.03 and found["clusters"][0]["per"] == "filter"
    tensors = stored(tmp_path / "file")
    assert tensors["conv1.weight.bits"].shape == (23,)  # 180 bits
    assert torch.equal(unpack_bits(tensors["conv1.weight.bits"], 180), binary_weights(net)["conv1"].bits.flatten())
    assert tensors["conv1.weight.scale"].shape == (5,)
    assert not any("point" in key or "latent" in key or "extra_state" in key for key in tensors)


def test_one_scale_for_all_filters_is_one_number(tmp_path: Path) -> None:
    save_packed(tiny_net(), tmp_path / "file")
    assert header(tmp_path / "file")["layers"]["conv1"]["scale"] == 1.0
    assert "conv1.weight.scale" not in stored(tmp_path / "file")


@pytest.mark.parametrize("step", ["pathlib.Path.write_bytes", "os.replace"])
def test_a_failed_write_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    save_packed(tiny_net(), tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="disk full"):
        save_packed(tiny_net(seed=1), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_safetensors_is_optional(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "optional = 'safetensors openvino onnx onnxruntime onnxscript matplotlib'.split()\n"
        "sys.modules.update(dict.fromkeys(optional))\n"
        "import torch, hbnn_plugin.export\n"
        "layer = torch.nn.Linear(3, 2)\n"
        "print(hbnn_plugin.complexity(layer, (3,)).paper.ops)\n"
        "try: hbnn_plugin.export.load_packed('file', layer)\n"
        "except ImportError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "6\npacked files need safetensors: pip install 'hbnn-plugin[packed]'\n"


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_packed(trained(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_size > 0
