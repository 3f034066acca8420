"""`foldserve convert stf` on checkpoints of the authors' names and shapes, sound and spoiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from foldserve.server import cli
from foldserve.server.convert.output import ShardedWriter
from foldserve.server.convert.source import ConversionError
from foldserve.server.convert.stf import convert
from tests import stf_checkpoint
from tests.images import photo

Spoil = Callable[[dict[str, Tensor]], Any]

EXPECTED_NAMES = {
    "model.mm_projector_crosslayer.0.weight": "multi_modal_projector.fusion.linear_1.weight",
    "model.mm_projector_crosslayer.2.bias": "multi_modal_projector.fusion.linear_2.bias",
    "model.mm_projector.0.weight": "multi_modal_projector.output.linear_1.weight",
    "model.mm_projector.2.bias": "multi_modal_projector.output.linear_2.bias",
    "model.layers.1.self_attn.q_proj.weight": "language_model.model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight": "language_model.model.norm.weight",
    "model.vision_tower.vision_tower.vision_model.encoder.layers.22.mlp.fc1.bias": (
        "vision_tower.vision_model.encoder.layers.22.mlp.fc1.bias"
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without its tower; the tower lies beside it."""
    folder = tmp_path_factory.mktemp("stf") / "source"
    stf_checkpoint.write(folder, tower=False)
    stf_checkpoint.write_tower(folder.parent / "clip")
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """The same checkpoint, to be spoiled."""
    (tmp_path / "source").mkdir()
    for file in source.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "source"


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor that the index names, from the file that it names."""
    places: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(places.values())}
    assert sum(map(len, files.values())) == len(places)
    return {name: files[file][name] for name, file in places.items()}


def refused(source: Path, target: Path, **options: Any) -> str:
    """The message; nothing must have been left behind."""
    with pytest.raises(ConversionError) as error:
        convert(source, target, **({"vision_tower": source.parent / "clip"} | options))
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}*"))
    return str(error.value)


def test_every_tensor_arrives_under_its_new_name(tmp_path: Path) -> None:
    theirs = stf_checkpoint.write(tmp_path / "source", mm_vision_tower="somewhere")
    stf_checkpoint.write_tower(tmp_path / "clip")
    ours = read(convert(tmp_path / "source", tmp_path / "target", vision_tower=tmp_path / "clip"))
    for name, new in EXPECTED_NAMES.items():
        assert torch.equal(ours[new], theirs[name])
    buffers = [name for name in theirs if name.endswith(("inv_freq", "position_ids"))]
    assert len(ours) == len(theirs) - len(buffers)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weight = theirs[name.replace("language_model.", "", 1)]
        assert ours[name].shape == (384, stf_checkpoint.HIDDEN)
        assert torch.equal(ours[name][:320], weight)
        torch.testing.assert_close(ours[name][320:], weight.mean(0, keepdim=True).expand(64, -1))


def test_config_is_what_transformers_reads(source: Path, tmp_path: Path) -> None:
    config: Any = AutoConfig.from_pretrained(convert(source, tmp_path / "target", vision_tower=source.parent / "clip"))
    assert config.architectures == ["LlavaStfForConditionalGeneration"]
    assert config.stf == {"layers": [23, 21, 18, 15, 12, 9, 6, 3], "kernel": 2, "experts": 1}
    assert config.image_seq_length == 36
    assert config.image_token_index == 320
    assert (config.text_config.vocab_size, config.text_config.num_hidden_layers) == (384, 2)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (64, 24)
    assert str(config.dtype) == "torch.float32"


@pytest.mark.parametrize(("shards", "safetensors"), [(1, True), (3, True), (2, False)])
def test_shards_and_formats_make_no_difference(source: Path, copy: Path, shards: int, safetensors: bool) -> None:
    tower = source.parent / "clip"
    whole = read(convert(source, copy.parent / "whole", vision_tower=tower))
    stf_checkpoint.reshard(copy, shards=shards, safetensors=safetensors)
    target = convert(copy, copy.parent / "parts", vision_tower=tower, shard_bytes=200_000)
    parts = read(target)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    files = list(target.glob("model-*.safetensors"))
    assert len(files) > 5
    biggest = max(tensor.numel() * 4 for tensor in whole.values())
    assert all(file.stat().st_size < max(200_000, biggest) + 20_000 for file in files)


def test_a_tower_in_the_checkpoint_wins_over_the_folder(tmp_path: Path) -> None:
    stf_checkpoint.write(tmp_path / "source")
    stf_checkpoint.write_tower(tmp_path / "clip")
    tower = torch.load(tmp_path / "clip" / "pytorch_model.bin", weights_only=True)
    torch.save({name: x + 1 for name, x in tower.items()}, tmp_path / "clip" / "pytorch_model.bin")
    ours = read(convert(tmp_path / "source", tmp_path / "target", vision_tower=tmp_path / "clip"))
    name = "vision_model.post_layernorm.weight"
    assert torch.equal(ours[f"vision_tower.{name}"], tower[name])


@pytest.mark.parametrize(("experts", "kernel"), [(2, 2), (4, 4)])
def test_kernel_follows_from_the_weights(tmp_path: Path, experts: int, kernel: int) -> None:
    stf_checkpoint.write(tmp_path / "source", kernel=kernel, experts=experts)
    stf_checkpoint.write_tower(tmp_path / "clip")
    target = convert(tmp_path / "source", tmp_path / "target", vision_tower=tmp_path / "clip", experts=experts)
    assert json.loads((target / "config.json").read_text())["stf"]["kernel"] == kernel


def test_prompts_are_encoded_as_by_the_authors(source: Path, tmp_path: Path) -> None:
    """Each side of an image by itself, with sentencepiece."""
    processor = AutoProcessor.from_pretrained(convert(source, tmp_path / "t", vision_tower=source.parent / "clip"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What  is this, 12?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A tree."}]},
        {"role": "user", "content": "Yes?"},
    ]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    system = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    )
    before, after = f"{system} USER: ", "\nWhat  is this, 12? ASSISTANT: A tree."
    assert prompt == f"<s>{before}<image>{after}</s>USER: Yes? ASSISTANT:"
    ids = processor.tokenizer(f"{before}<image>{after}")["input_ids"]
    assert ids == [1, *model.encode(before), 320, *model.encode(after)]
    assert processor.tokenizer.decode(ids[-10:]).endswith("A tree.")


@pytest.mark.parametrize(("ratio", "pads"), [("pad", True), ("square", False), (None, False)])
def test_images_are_padded_where_training_padded_them(copy: Path, source: Path, ratio: str | None, pads: bool) -> None:
    change_config(copy, image_aspect_ratio=ratio)
    target = convert(copy, copy.parent / "target", vision_tower=source.parent / "clip")
    images = AutoProcessor.from_pretrained(target).image_processor
    pixels = images(photo(1, width=336, height=168), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 168, 168)
    edge = pixels[0, :, 0]  # of the mean colour, which is 0, if it is padding
    assert (bool((edge.abs() < 0.02).all())) == pads


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def drop(name: str) -> Spoil:
    return lambda weights: weights.pop(name)


def put(name: str, *shape: int) -> Spoil:
    return lambda weights: weights.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("model.mm_projector_crosslayer.0.weight"), "is no LLaVA-STF checkpoint"),
        (drop("model.mm_projector.0.weight"), "is no LLaVA-STF checkpoint"),
        (
            drop("model.mm_projector_crosslayer.2.bias"),
            "tensors are missing: multi_modal_projector.fusion.linear_2.bias",
        ),
        (drop("model.layers.1.mlp.up_proj.weight"), "missing: language_model.model.layers.1.mlp.up_proj.weight"),
        (drop("lm_head.weight"), "tensors are missing: language_model.lm_head.weight"),
        (put("model.image_newline", 128), "tensors that no LLaVA-STF of this config has: model.image_newline"),
        (
            put("model.layers.2.input_layernorm.weight", 128),
            "has: language_model.model.layers.2.input_layernorm.weight",
        ),
        (
            put("model.mm_projector_crosslayer.0.weight", 256, 256),
            "fusion.linear_1.weight has the shape [256, 256], where the configs of decoder and vision tower, --layers "
            "and --experts give [256, 512]",
        ),
        (put("model.mm_projector.0.weight", 1024, 128), "takes 128 channels, which is k * k * 64 / 1 for no k"),
        (put("model.mm_projector.2.weight", 64, 1024), "has the shape [64, 1024]"),
        (put("model.norm.weight", 64), "language_model.model.norm.weight has the shape [64]"),
    ],
)
def test_odd_tensors_are_refused(source: Path, copy: Path, spoil: Spoil, message: str) -> None:
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)
    spoil(weights)
    torch.save(weights, copy / "pytorch_model.bin")
    assert message in refused(copy, copy.parent / "target", vision_tower=source.parent / "clip")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": {}}, "in the layout of transformers already"),
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'; only 'mlp2x_gelu' can be converted"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "only 'flat' can be converted"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres'; only 'pad' or 'square' or None"),
        ({"hidden_size": None}, "config.json lacks hidden_size"),
        ({"num_hidden_layers": 3}, "tensors are missing: language_model.model.layers.2."),
        ({"vocab_size": 300}, "embed_tokens.weight has the shape [320, 128]"),
    ],
)
def test_configs_that_do_not_fit_are_refused(source: Path, copy: Path, fields: dict[str, object], message: str) -> None:
    change_config(copy, **fields)
    assert message in refused(copy, copy.parent / "target", vision_tower=source.parent / "clip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_tower": None}, "--vision-tower"),
        ({"layers": (23, 21)}, "give [256, 128]"),
        ({"layers": (25, *stf_checkpoint.LAYERS[1:])}, "names block 25, but the vision tower has 24 blocks"),
        ({"layers": (3, 6)}, "deepest first, not (3, 6)"),
        ({"experts": 3}, "was the checkpoint trained with another number of --experts?"),
        ({"experts": 0}, "stf.experts must be an integer of at least 1, not 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    assert message in refused(source, tmp_path / "target", **options)


def test_windows_that_are_larger_than_the_grid_are_refused(tmp_path: Path) -> None:
    """Four experts with k = 4 have the widths of one with k = 2, but the image has 3 x 3 patches only."""
    stf_checkpoint.write(tmp_path / "source", image_size=42)
    stf_checkpoint.write_tower(tmp_path / "clip", image_size=42)
    message = refused(tmp_path / "source", tmp_path / "target", experts=4)
    assert "a square grid of at least 4 x 4 tokens (stf.kernel), not 9 tokens" in message


class Exploit:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_pickle_is_not_executed(source: Path, copy: Path) -> None:
    touched = copy.parent / "touched"
    torch.save({"model.norm.weight": Exploit(touched)}, copy / "pytorch_model.bin")
    message = refused(copy, copy.parent / "target", vision_tower=source.parent / "clip")
    assert "holds more than tensors, and was not loaded" in message
    assert not touched.exists()


def test_damaged_and_missing_files_are_named(source: Path, copy: Path) -> None:
    tower, target = source.parent / "clip", copy.parent / "target"
    (copy / "pytorch_model.bin").write_bytes(b"PK torn")
    assert "pytorch_model.bin" in refused(copy, target, vision_tower=tower)
    torch.save([1, 2], copy / "pytorch_model.bin")
    assert "holds no mapping of names to tensors" in refused(copy, target, vision_tower=tower)
    (copy / "model.safetensors").write_bytes(b"torn")
    assert "is no sound safetensors file" in refused(copy, target, vision_tower=tower)
    index = copy / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../source/model.safetensors"}}')
    assert "'../source/model.safetensors', which is not in its own folder" in refused(copy, target, vision_tower=tower)
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert "which is not there: is the download complete?" in refused(copy, target, vision_tower=tower)
    index.write_text('{"weight_map": 3}')
    assert "has no `weight_map`" in refused(copy, target, vision_tower=tower)
    index.write_text("{")
    assert "cannot be read as JSON" in refused(copy, target, vision_tower=tower)
    for file in (index, copy / "model.safetensors", copy / "pytorch_model.bin"):
        file.unlink()
    (copy / "adapter_config.json").write_text("{}")
    assert "it is a LoRA adapter, merge it into its base model first" in refused(copy, target, vision_tower=tower)
    (copy / "config.json").unlink()
    assert "config.json cannot be read as JSON" in refused(copy, target, vision_tower=tower)


def test_without_a_tokenizer(source: Path, copy: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink()
    message = refused(copy, copy.parent / "target", vision_tower=source.parent / "clip")
    assert "holds no tokenizer that can be read" in message


def test_another_tower_than_clip(source: Path, tmp_path: Path) -> None:
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip" / "config.json").write_text('{"model_type": "siglip"}')
    message = refused(source, tmp_path / "target", vision_tower=tmp_path / "siglip")
    assert "has model_type 'siglip': a CLIP tower is needed" in message


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, tower = tmp_path / "target", source.parent / "clip"
    arguments = ["convert", "stf", str(source), str(target), "--vision-tower", str(tower)]
    cli.main([*arguments, "--layers", "23,21,18,15,12,9,6,3"])
    captured = capsys.readouterr()
    assert f"foldserve serve {target}" in captured.out
    assert "foldserve convert: 100%" in captured.err
    for extra, message in (
        ([], "is not an empty directory"),
        (["--layers", "23;21"], "numbers with commas between them are needed, not '23;21'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*arguments, *extra])
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err


def test_a_tensor_larger_than_a_file_gets_its_own(tmp_path: Path) -> None:
    writer = ShardedWriter(tmp_path, shard_bytes=40)
    tensors = {name: torch.full((size,), float(size)) for name, size in (("a", 4), ("b", 4), ("c", 30), ("d", 1))}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (4 + 4 + 30 + 1)
    assert list(index["weight_map"].values()) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 1, 2, 3)]
    assert all(torch.equal(x, tensors[name]) for name, x in read(tmp_path).items())


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    writer = ShardedWriter(tmp_path)
    writer.add("a", shared)
    writer.add("b", shared[::2])
    writer.finish()
    assert read(tmp_path)["b"].tolist() == [0, 2]
    with pytest.raises(RuntimeError):
        save_file({"a": shared, "b": shared[::2]}, tmp_path / "together")
