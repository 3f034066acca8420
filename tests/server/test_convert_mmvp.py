"""`foldserve convert mmvp` on checkpoints of the authors' names; what it shares with `convert stf` is tested there."""

from __future__ import annotations

import json
from math import floor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from foldserve.server import cli
from foldserve.server.convert.mmvp import convert, resampled
from foldserve.server.convert.source import ConversionError
from foldserve.server.engine.families.mmvp import dino_config
from tests import mmvp_checkpoint, stf_checkpoint

EXPECTED_NAMES = {
    "model.mm_projector.0.weight": "multi_modal_projector.clip.linear_1.weight",
    "model.mm_projector.2.bias": "multi_modal_projector.clip.linear_2.bias",
    "model.dino_mm_projector.0.bias": "multi_modal_projector.dino.linear_1.bias",
    "model.dino_mm_projector.2.weight": "multi_modal_projector.dino.linear_2.weight",
    "model.layers.1.self_attn.q_proj.weight": "language_model.model.layers.1.self_attn.q_proj.weight",
    "model.vision_tower.vision_tower.vision_model.encoder.layers.22.mlp.fc1.bias": (
        "vision_tower.vision_model.encoder.layers.22.mlp.fc1.bias"
    ),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    mmvp_checkpoint.write_authors(tmp_path / "source")
    mmvp_checkpoint.write_dino(tmp_path / "dino")
    stf_checkpoint.write_tower(tmp_path / "clip")
    return tmp_path / "source"


def converted(source: Path, dino: Path) -> Path:
    return convert(source, dino, source.parent / "target", vision_tower=source.parent / "clip")


def test_every_tensor_arrives_under_its_new_name(source: Path, tmp_path: Path) -> None:
    theirs = torch.load(source / "pytorch_model.bin", weights_only=True)
    dino = load_file(tmp_path / "dino" / "model.safetensors")
    (file,) = converted(source, tmp_path / "dino").glob("*.safetensors")
    ours = load_file(file)
    for name, new in EXPECTED_NAMES.items():
        assert torch.equal(ours[new], theirs[name])
    towers = {name.removeprefix("dino_tower."): x for name, x in ours.items() if name.startswith("dino_tower.")}
    unused = {"embeddings.mask_token", "layernorm.weight", "layernorm.bias"}
    assert towers.keys() == dino.keys() - unused
    positions = "embeddings.position_embeddings"
    assert towers[positions].shape == (1, 1 + 12 * 12, 64)
    assert all(torch.equal(towers[name], dino[name]) for name in towers.keys() - {positions})


def test_config_is_what_is_served(source: Path, tmp_path: Path) -> None:
    config: Any = AutoConfig.from_pretrained(converted(source, tmp_path / "dino"))
    assert config.architectures == ["MmvpForConditionalGeneration"]
    assert (config.image_seq_length, config.vision_feature_layer) == (2 * 144, -2)
    dino = dino_config(config)
    assert (dino.hidden_size, dino.num_hidden_layers, dino.image_size) == (64, mmvp_checkpoint.LAYERS, 168)


def test_positions_are_resampled_as_by_dinov2() -> None:
    """From 37 x 37 to 24 x 24: a cubic through 4 x 4 neighbours, whose distance follows from 24.1 / 37."""
    positions = torch.randn(1, 1 + 37 * 37, 2, generator=torch.Generator().manual_seed(0))
    found = resampled(positions, 24)
    assert torch.equal(found[:, 0], positions[:, 0])
    grid = positions[0, 1:].view(37, 37, 2)
    for row, column in ((0, 0), (3, 17), (23, 23), (12, 5)):
        weights, rows = cubic((row + 0.5) * 37 / 24.1 - 0.5)
        across, columns = cubic((column + 0.5) * 37 / 24.1 - 0.5)
        want = torch.einsum("i,j,ijc->c", weights, across, grid[rows][:, columns])
        torch.testing.assert_close(found[0, 1 + 24 * row + column], want, atol=1e-4, rtol=0)
    assert resampled(positions, 37) is positions


def cubic(place: float) -> tuple[torch.Tensor, list[int]]:
    """Weights of four neighbours of a place, and which they are in a row of 37."""
    first = floor(place) - 1
    weights = torch.tensor([weight_at(abs(place - first - i)) for i in range(4)])
    return weights, [min(max(first + i, 0), 36) for i in range(4)]


def weight_at(x: float, a: float = -0.75) -> float:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)


def refused(source: Path, dino: Path) -> str:
    with pytest.raises(ConversionError) as error:
        converted(source, dino)
    assert not (source.parent / "target").exists()
    return str(error.value)


def test_what_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    mmvp_checkpoint.write_dino(tmp_path / "registers", model_type="dinov2_with_registers")
    assert "has model_type 'dinov2_with_registers': a DINOv2 without" in refused(source, tmp_path / "registers")
    dino = tmp_path / "dino" / "model.safetensors"
    weights = load_file(dino)
    save_file(weights | {"embeddings.cls_token": weights["embeddings.cls_token"] + 1}, dino, metadata={"format": "pt"})
    assert "give the DINOv2 that it was trained with" in refused(source, tmp_path / "dino")
    del weights["encoder.layer.1.norm1.bias"]
    save_file(weights, dino, metadata={"format": "pt"})
    assert "lacks the tensors encoder.layer.1.norm1.bias" in refused(source, tmp_path / "dino")
    theirs = torch.load(source / "pytorch_model.bin", weights_only=True)
    narrow = theirs | {"model.dino_mm_projector.0.weight": torch.zeros(128, 32)}
    torch.save(narrow, source / "pytorch_model.bin")
    assert "dino.linear_1.weight has the shape [128, 32]" in refused(source, tmp_path / "dino")
    del theirs["model.dino_mm_projector.0.weight"]
    torch.save(theirs, source / "pytorch_model.bin")
    assert "is no MMVP checkpoint: it needs the tensors" in refused(source, tmp_path / "dino")


def test_another_width_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small/config.json").write_text(json.dumps(mmvp_checkpoint.dino_config(224)))
    save_file(mmvp_checkpoint.dino_weights(256), tmp_path / "small/model.safetensors", metadata={"format": "pt"})
    assert "has 128 channels and patches of 14 pixels, but must have those of CLIP, 64" in refused(
        source, tmp_path / "small"
    )


@pytest.mark.usefixtures("source")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(tmp_path / name) for name in ("source", "dino", "target")]
    cli.main(["convert", "mmvp", *folders, "--vision-tower", str(tmp_path / "clip")])
    assert f"foldserve serve {tmp_path / 'target'}" in capsys.readouterr().out
