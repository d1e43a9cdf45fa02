"""Frozen weights in 8 or 4 bits: those of a transformer's blocks, made block by block and kept on disk, and of T5.

The codes come from the libraries that know the formats: torchao for int8 and float8 (a scale per row), bitsandbytes for
nf4 (QLoRA, arXiv 2305.14314, with scales in 8 bits). bitsandbytes' nf4 is the one that model hubs hold; torchao's is of
another layout, and a prototype.

Axes: N output channel, C input channel.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from fastguard.blocks.linear import QuantizedLinear
from fastguard.blocks.quantized import NESTED, BlockScaled, RowScaled, dequantizes, four_bit, four_bit_weight
from fastguard.errors import UserError
from fastguard.extras import importing
from fastguard.prompts import ANOTHER_CACHE, cache_folder
from fastguard.utils.files import writing
from fastguard.utils.finite import is_finite
from fastguard.utils.sealed import DamagedError, clear_scratch, load_sealed, save_sealed
from fastguard.utils.terminal import a_few

Format = Literal["int8", "float8", "nf4"]
LIBRARIES = {"int8": "torchao", "float8": "torchao", "nf4": "bitsandbytes"}
"""What makes the codes of each format; running the model takes neither."""
BLOCK = 64
"""Weights that share a scale in nf4."""
VERSION = 1
"""Of the files; another one makes them anew."""
SAMPLES = 64
"""Of the content of a file, 4 KiB each."""
REST = "rest"
"""The part of a transformer outside of its blocks."""


# --- one weight -----------------------------------------------------------------------------------------------------


def quantize(weight: Tensor, how: Format) -> RowScaled | BlockScaled:
    """The weight (N, C), floating, in 8 or 4 bits, on its device; `require_library` tells whether it can be done."""
    if how == "nf4":
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
        found = four_bit(codes, state)
        assert found is not None  # `_linear_layers` takes no others
        return found
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = Int8WeightOnlyConfig if how == "int8" else Float8WeightOnlyConfig
    quantize_(layer, config(set_inductor_config=False))
    return row_scaled(layer.weight)


def row_scaled(weight: Any) -> RowScaled:
    """torchao's tensor with a scale per row, without a copy."""
    codes = weight.qdata
    return RowScaled(weight.scale.reshape(-1).float(), codes if codes.dtype == torch.int8 else codes.view(torch.uint8))


def empty(n: int, c: int, how: Format) -> RowScaled | BlockScaled:
    """A weight without values, on the current default device."""
    if how != "nf4":
        return RowScaled(torch.empty(n), torch.empty(n, c, dtype=torch.int8 if how == "int8" else torch.uint8))
    blocks = n * c // BLOCK
    return BlockScaled(
        absmax=torch.empty(-(-blocks // NESTED)),
        codes=torch.empty(n, c // 2, dtype=torch.uint8),
        table=torch.empty(16),
        absmax_codes=torch.empty(blocks, dtype=torch.uint8),
        absmax_table=torch.empty(256),
        absmax_offset=torch.empty(()),
    )


def require_library(how: Format, setting: str, instead: str) -> None:
    """Raise UserError, as `extras.importing`, if the library that makes weights of this format is missing."""
    with importing(LIBRARIES[how], setting, instead):
        import_module({"torchao": "torchao.quantization", "bitsandbytes": "bitsandbytes.functional"}[LIBRARIES[how]])


def require_library_of_model(how: Format) -> None:
    """The same for model.quantize."""
    require_library(how, f'model.quantize = "{how}"', "another format")


# --- any module -----------------------------------------------------------------------------------------------------


def quantize_linears(module: nn.Module, device: torch.device, how: Format) -> None:
    """Move a module from the host to the device with the weights of its linear layers quantized, in place.

    Each weight is quantized on the host and then moved: no wider copy of it is ever on the device, and all devices get
    the same bits.
    """
    for name in list(_linear_layers("", module, how)):
        layer: Any = module.get_submodule(name)
        bias = None if layer.bias is None else layer.bias.data
        _put(module, name, QuantizedLinear(quantize(layer.weight.data, how), bias).to(device))
    module.to(device)


def _linear_layers(prefix: str, module: nn.Module, how: Format) -> Iterator[str]:
    """Names of the layers that can have this format."""
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear and (how != "nf4" or layer.in_features % BLOCK == 0):
            yield f"{prefix}.{name}".lstrip(".")


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


# --- a transformer --------------------------------------------------------------------------------------------------


def quantize_layers(transformer: nn.Module, blocks: Mapping[str, nn.Module], how: Format) -> list[str]:
    """Replace the linear layers of the blocks by layers without values, on the current default device; returns their
    names.

    Args:
        blocks: the transformer's blocks by name. What is outside of them is small, and stays as it is. A module itself,
            by the name "", stands for all of its layers.
    """
    names = [name for prefix, block in blocks.items() for name in _linear_layers(prefix, block, how)]
    for name in names:
        layer: Any = transformer.get_submodule(name)
        bias = None if layer.bias is None else torch.empty_like(layer.bias, device=torch.get_default_device())
        _put(transformer, name, QuantizedLinear(empty(layer.out_features, layer.in_features, how), bias))
    return names


def load_quantized(
    transformer: nn.Module,
    blocks: Mapping[str, nn.Module],
    files: Sequence[Path],
    how: Format,
    dtype: torch.dtype,
    cache: Path | None,
    device: torch.device,
) -> None:
    """Give a transformer on the meta device its weights, those of the blocks' linear layers quantized, in place.

    Block by block, so that neither the host nor the device ever holds more than one in full precision. Blocks are
    cached as they are quantized: a start that was killed goes on, and later ones read the quantized weights alone.

    Args:
        blocks: the transformer's blocks by name.
        files: safetensors files with all of its weights.
        dtype: of the weights that are not quantized.
        cache: as in `prompts.cache_folder`.

    Raises UserError for weights that are not finite, or not there; and if the format's library is missing while
    something is not cached.
    """
    with torch.device("meta"):
        layers = set(quantize_layers(transformer, blocks, how))
    folder = cache_folder(cache) / "quantized" / _key(files, how, dtype)
    with writing(folder, then=ANOTHER_CACHE):
        folder.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder)
    stored = StoredTensors(files)
    for part in tqdm((*blocks, REST), desc=f"loading the transformer in {how}", unit="block", delay=2, disable=None):
        file = folder / f"{part}.safetensors"
        try:
            tensors = load_sealed(file)
        except (OSError, DamagedError):
            require_library_of_model(how)
            names = [name for name in stored.files if _part_of(name, blocks) == part]
            tensors = {key: t for name in names for key, t in _converted(name, stored, layers, how, dtype, device)}
            with writing(file, then=ANOTHER_CACHE):
                save_sealed(tensors, file)
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        transformer.load_state_dict(on_device, strict=False, assign=True)
    if lacking := [name for name, parameter in transformer.named_parameters() if parameter.is_meta]:
        where = files[0].parent if files else "the transformer"
        raise UserError(f"{where} lacks weights that its config.json asks for ({a_few(lacking)}): download it again")


def _part_of(name: str, blocks: Mapping[str, nn.Module]) -> str:
    return next((prefix for prefix in blocks if name.startswith(f"{prefix}.")), REST)


def _converted(
    name: str, stored: StoredTensors, layers: set[str], how: Format, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The tensors on the host that hold one stored weight, by name."""
    tensor = stored[name]
    layer = name.removesuffix(".weight")
    if layer == name or layer not in layers:
        yield name, tensor.to(dtype)
        return
    weight = tensor.to(device, dtype)
    if not is_finite(weight):
        raise UserError(
            f"{stored.files[name]}: {name} holds NaN or infinity, and cannot be quantized: download it again"
        )
    for key, held in QuantizedLinear(quantize(weight, how), None).named_parameters():
        yield f"{layer}.{key}", held.detach().cpu().contiguous()


class StoredTensors:
    """The tensors of several safetensors files by name; each is read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as content:
                self.files |= dict.fromkeys(content.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as content:
            tensor: Tensor = content.get_tensor(name)
        return tensor


def _key(files: Sequence[Path], how: Format, dtype: torch.dtype) -> str:
    """What the quantized weights depend on: gigabytes, for which names, sizes, times and samples of the files stand."""
    digest = hashlib.sha256(f"{VERSION} {how} {dtype}".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with file.open("rb") as content:  # copies may have lost their time of change
            for i in range(SAMPLES):
                content.seek(i * stat.st_size // SAMPLES)
                digest.update(content.read(4096))
    return digest.hexdigest()[:16]


# --- models that others have quantized ------------------------------------------------------------------------------


def adopt_quantized(transformer: nn.Module) -> None:
    """Replace layers that diffusers has quantized by ours around the same memory, in place.

    These are bitsandbytes' layers of 4 and of 8 bits, and layers with torchao's tensors that have a scale per row.
    Other tensors that can dequantize themselves stay. bitsandbytes rounds the input of a layer of 8 bits, too; ours
    does not.
    """
    for name, layer in list(transformer.named_modules()):
        for adopt in (four_bit_weight, _eight_bit_weight, _torchao_weight):
            if (weight := adopt(layer)) is not None:
                bias = None if layer.bias is None else layer.bias.data
                _put(transformer, name, QuantizedLinear(weight, bias))
                break


def _eight_bit_weight(layer: Any) -> RowScaled | None:
    """The weight of bitsandbytes' `Linear8bitLt`; None for any other layer."""
    if (type(layer).__module__, type(layer).__name__) != ("bitsandbytes.nn.modules", "Linear8bitLt"):
        return None
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return RowScaled(scale.reshape(-1).float() / 127, layer.weight.data)


def _torchao_weight(layer: Any) -> RowScaled | None:
    """The weight of a layer with torchao's `Int8Tensor` or `Float8Tensor` of a scale per row; None for any other."""
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or not type(weight).__module__.startswith("torchao."):
        return None
    if not dequantizes(weight):
        return None
    if type(weight).__name__ not in ("Int8Tensor", "Float8Tensor") or list(weight.block_size) != [1, weight.shape[1]]:
        return None
    zero_point = getattr(weight, "zero_point", None)
    if zero_point is not None and bool(zero_point.any()):
        return None
    return row_scaled(weight)


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format that takes as much memory as diffusers' `quantization_config`; None where there is none.

    Raises UserError for one that is not known.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method, kind = settings.get("quant_method"), settings.get("quant_type", "")
    if method == "bitsandbytes":
        return "nf4" if settings.get("load_in_4bit") else "int8"
    name = str(kind.get("default", kind) if isinstance(kind, dict) else kind).lower()
    for how, words in (("float8", ("float8", "fp8")), ("int8", ("int8",))):
        if method == "torchao" and any(word in name for word in words) and not re.search("int4|a8w4|intx", name):
            return how  # type: ignore[return-value]
    raise UserError(
        f"model.path: the transformer is quantized by {method} ({kind}), which cannot be planned; known are "
        "bitsandbytes, and torchao's int8 and float8"
    )
