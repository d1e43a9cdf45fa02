"""The text encoders of Flux: one at a time; on the device, there in 8 bits, or on the host; and what is cached."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastguard.backbones.flux import Flux
from fastguard.backbones.pipeline import encoding
from fastguard.backbones.pipeline.encoding import encode_prompts
from fastguard.backbones.quantize import quantize, quantize_linears
from fastguard.blocks.linear import QuantizedLinear
from fastguard.config import Encoders
from fastguard.prompts import ENCODE_BATCH, EncodedPrompts, Prompt
from fastguard.utils.sealed import is_whole

CPU, META = torch.device("cpu"), torch.device("meta")
TOKENS = 16
TEXTS = [f"prompt {i}" for i in range(ENCODE_BATCH + 2)]


@pytest.fixture
def encode(tiny_flux: Path, tmp_path: Path) -> Callable[..., EncodedPrompts]:
    def encoded(
        encoders: Encoders, dtype: torch.dtype = torch.float32, folder: Path = tiny_flux, device: torch.device = CPU
    ) -> EncodedPrompts:
        prompts = [Prompt(text) for text in TEXTS]
        return encode_prompts(Flux().spec, prompts, str(folder), TOKENS, tmp_path / "cache", dtype, device, encoders)

    return encoded


def embeddings(encoded: EncodedPrompts) -> dict[str, Tensor]:
    return encoded.load(range(len(TEXTS)))


@torch.no_grad()
def by_the_pipeline(
    folder: Path, dtype: torch.dtype, change: Callable[[Any], None] = lambda _: None
) -> dict[str, Tensor]:
    """What both encoders together make, in the same batches."""
    pipe: Any = FluxPipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype)
    change(pipe)
    batches = [TEXTS[:ENCODE_BATCH], TEXTS[ENCODE_BATCH:]]
    made = [pipe.encode_prompt(batch, max_sequence_length=TOKENS)[:2] for batch in batches]
    return {name: torch.cat(parts) for name, parts in zip(("embeds", "pooled"), zip(*made, strict=True), strict=True)}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The text encoders that are alive after each loading of a pipeline."""
    real, encoders, found = FluxPipeline.from_pretrained, dict[str, weakref.ref[Any]](), list[list[str]]()

    def spy(*args: Any, **options: Any) -> Any:
        pipe = real(*args, **options)
        for name in ("text_encoder", "text_encoder_2"):
            if getattr(pipe, name) is not None:
                encoders[name] = weakref.ref(getattr(pipe, name))
        found.append([name for name, encoder in encoders.items() if encoder() is not None])
        return pipe

    monkeypatch.setattr(FluxPipeline, "from_pretrained", spy)
    return found


# --- where prompts are encoded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("encoders", "device"), [("device", CPU), ("cpu", META)])
def test_prompts_are_encoded_to_the_bit_as_both_encoders_together_do(
    encode: Callable[..., EncodedPrompts], tiny_flux: Path, encoders: str, device: torch.device, dtype: torch.dtype
) -> None:
    ours, theirs = embeddings(encode(encoders, dtype, device=device)), by_the_pipeline(tiny_flux, dtype)
    for name in ("embeds", "pooled"):
        assert ours[name].dtype == dtype
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("encoders", ["device", "int8", "cpu"])
def test_the_text_encoders_are_never_there_together(
    encode: Callable[..., EncodedPrompts], loaded: list[list[str]], encoders: str
) -> None:
    if encoders == "int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    encode(encoders)
    assert loaded == [["text_encoder"], ["text_encoder_2"]]


@pytest.mark.parametrize(("dtype", "rounding", "loss"), [(torch.float32, 1e-6, 0.01), (torch.bfloat16, 0.01, 0.02)])
def test_t5_in_8_bits_is_t5_with_its_quantized_weights(
    encode: Callable[..., EncodedPrompts], tiny_flux: Path, dtype: torch.dtype, rounding: float, loss: float
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")

    def dequantized(pipe: Any) -> None:
        for layer in pipe.text_encoder_2.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(quantize(layer.weight.data, "int8").dequantize(dtype, "torch"))

    ours, plain = embeddings(encode("int8", dtype)), by_the_pipeline(tiny_flux, dtype)
    assert ours["embeds"].dtype == dtype
    assert torch.equal(ours["pooled"], plain["pooled"])  # CLIP stays as it is
    assert distance(ours["embeds"], by_the_pipeline(tiny_flux, dtype, dequantized)["embeds"]) < rounding
    assert 1e-4 < distance(ours["embeds"], plain["embeds"]) < loss


def test_8_bits_lose_little_more_than_bfloat16_does(encode: Callable[..., EncodedPrompts], tiny_flux: Path) -> None:
    """The shares are those of docs/training.md."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    exact = by_the_pipeline(tiny_flux, torch.float32)["embeds"]
    made = [embeddings(encode(encoders, torch.bfloat16))["embeds"] for encoders in ("int8", "device")]
    assert [f"{distance(embeds, exact):.1%}" for embeds in made] == ["1.2%", "0.7%"]


def test_a_layer_moves_in_8_bits_and_everything_else_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    module = nn.Sequential(nn.Embedding(5, 64), nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 48, bias=False)))
    moved: list[tuple[type, list[torch.dtype]]] = []
    real = nn.Module.to

    def spy(self: nn.Module, *args: Any) -> nn.Module:
        wide = [layer.weight for layer in self.modules() if isinstance(layer, nn.Linear)]
        moved.append((type(self), [weight.dtype for weight in wide]))
        return real(self, *args)

    monkeypatch.setattr(nn.Module, "to", spy)
    quantize_linears(module, META, "int8")
    codes = torch.int8
    assert moved == [(QuantizedLinear, [codes])] * 2 + [(nn.Sequential, [codes] * 2)]
    assert {p.device for p in module.parameters()} == {META}
    assert module[0].weight.dtype == torch.float32
    assert not module[1][0].weight.requires_grad


# --- what is cached


def test_what_changes_the_embeddings_is_part_of_the_key(encode: Callable[..., EncodedPrompts]) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    folders = {encoders: encode(encoders).files[0].parent for encoders in ("device", "int8", "cpu")}
    assert len(set(folders.values())) == 3
    assert encode("int8").files[0].parent == folders["int8"]


class KilledError(BaseException):
    """Nothing catches it."""


def test_a_kill_between_the_encoders_leaves_no_file(
    encode: Callable[..., EncodedPrompts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_flux: Path
) -> None:
    real = encoding._load

    def killed(spec: Any, part: Any, *rest: Any) -> Any:
        if part.encoders == ("text_encoder_2",):
            raise KilledError
        return real(spec, part, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "_load", killed)
        with pytest.raises(KilledError):
            encode("device")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert torch.equal(embeddings(encode("device"))["pooled"], by_the_pipeline(tiny_flux, torch.float32)["pooled"])


def test_a_kill_of_the_last_encoder_leaves_whole_files(
    encode: Callable[..., EncodedPrompts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[list[str]]
) -> None:
    real, calls = encoding._encode, list[str]()

    def killed(part: Any, *rest: Any) -> Iterator[dict[str, Tensor]]:
        calls.extend(part.encoders)
        if calls.count("text_encoder_2") == 2:
            raise KilledError
        yield from real(part, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "_encode", killed)
        with pytest.raises(KilledError):
            encode("device")
    there = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(there) == ENCODE_BATCH
    assert all(is_whole(file) and load_file(file).keys() == {"embeds", "pooled"} for file in there)
    assert calls == 2 * ["text_encoder"] + 2 * ["text_encoder_2"]
    encode("device")
    assert len(loaded) == 4  # the two that are missing need both encoders again


# --- errors


@pytest.fixture
def no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)


@pytest.mark.usefixtures("no_torchao")
def test_without_torchao_the_field_and_the_package_are_named_before_anything_is_loaded(
    encode: Callable[..., EncodedPrompts], loaded: list[list[str]]
) -> None:
    told = (
        r'^prompts\.encoders = "int8" needs torchao: pip install .fastguard-rl\[lowbit\]., or choose "device" or "cpu"$'
    )
    with pytest.raises(ValueError, match=told):
        encode("int8")
    assert loaded == []


def test_what_is_cached_needs_no_torchao(encode: Callable[..., EncodedPrompts], request: pytest.FixtureRequest) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    before = encode("int8")
    request.getfixturevalue("no_torchao")
    assert encode("int8").files == before.files


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named_after_they_are_quantized(
    encode: Callable[..., EncodedPrompts], folder: Path, tmp_path: Path, value: float
) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    file, name = folder / "text_encoder_2" / "model.safetensors", "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    weights = load_file(file)
    weights[name][3, 5] = value
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"weights of text_encoder_2 hold NaN or infinity \({name.removesuffix('.weight')}\.scale\)"
    ):
        encode("int8", folder=folder)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
