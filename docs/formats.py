"""The memory of a Flux update with frozen weights in 8 and 4 bits, as the planner predicts it, and what they cost.

    python docs/formats.py           plan it (some minutes) into formats.json; write the page's tables and the picture
    python docs/formats.py --draw    only tables and picture, from formats.json

It needs no GPU: the real program runs on tensors without data. Distances to full precision are of a tiny random Flux.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastguard.backbones.flux import Flux
from fastguard.backbones.lora import add_lora
from fastguard.backbones.pipeline.backbone import blocks_of
from fastguard.backbones.quantize import Format, quantize_linears
from fastguard.config import LoraConfig, Recipe, recompute_levels
from fastguard.memory import plan, update_bytes
from fastguard.recipe import find_recipe, load_recipe
from fastguard.report.palette import BLUE, GREEN, VERMILLION

HERE = Path(__file__).parent
TABLE, PAGE, PICTURE = HERE / "formats.json", HERE / "benchmarks.md", HERE / "images" / "flux_formats.png"
FORMATS = {"none": "bfloat16", "int8": "int8, float8", "nf4": "nf4"}
"""Those whose memory differs, and what they stand for: float8 takes as much as int8."""
LEVELS = recompute_levels(fuse=True)
SIZES = {512: "flux_lora", 1024: "flux_lora_1024"}
MICRO_BATCHES = (1, 3)
CARDS = (16, 24, 32, 48)
"""GB"""
PARTS = ("weights", "gradients", "optimizer", "activations", "trajectories")
COLORS = {"none": VERMILLION, "int8": BLUE, "nf4": GREEN}
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
"""Behind numbers that a line would cross."""
GIB = 2**30
Row = dict[str, Any]


def chosen(size: int, how: Any, level: Any, micro_batch: int) -> Recipe:
    """LoRA of rank 64 on attention and feed-forward, 512 text tokens, 8-bit AdamW."""
    recipe = load_recipe(find_recipe(SIZES[size]))
    return replace(
        recipe,
        model=replace(recipe.model, quantize=how, recompute=level),
        prompts=replace(recipe.prompts, max_tokens=512),
        update=replace(recipe.update, optimizer="adamw8bit", micro_batch=micro_batch),
    )


def rows() -> Iterator[Row]:
    """Bytes of each part at the peak of the update."""
    for size in SIZES:
        for how in FORMATS:
            for level in LEVELS:
                for micro_batch in MICRO_BATCHES:
                    phase = plan(chosen(size, how, level, micro_batch)).phase("update")
                    parts = {part: getattr(phase, part) for part in PARTS}
                    yield {"size": size, "format": how, "level": level, "micro_batch": micro_batch, **parts}


def costs() -> Iterator[Row]:
    """Bytes moved by an update of one image of 1024 x 1024 (4,608 tokens), and distances on a tiny random model."""
    full, _ = update_bytes(chosen(1024, "none", "pointwise", 1))
    for how in get_args(Format):
        moved, _ = update_bytes(chosen(1024, how, "pointwise", 1))
        yield {"format": how, "bytes": moved, "bytes_in_full_precision": full, **distances(how)}


def distances(how: Any) -> dict[str, float]:
    """Between a tiny Flux and the same with quantized weights: of the velocity, and the cosine of the gradients of its
    adapters."""
    torch.manual_seed(0)
    model: Any = Flux().spec.tiny().transformer
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    narrow = copy.deepcopy(model)
    for block in blocks_of(Flux().spec, narrow).values():
        quantize_linears(block, torch.device("cpu"), how)
    (velocity, gradient), (found, found_gradient) = _run(model), _run(narrow)
    cosine = torch.nn.functional.cosine_similarity(found_gradient, gradient, dim=0)
    return {
        "velocity_distance": float((found - velocity).norm() / velocity.norm()),
        "gradient_cosine": float(cosine),
    }


def _run(model: Any) -> tuple[Tensor, Tensor]:
    add_lora(model, LoraConfig(rank=4, alpha=4), Flux.lora_targets)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    velocity = model(
        hidden_states=randn(4, 64, 16), encoder_hidden_states=randn(4, 16, 32), pooled_projections=randn(4, 32),
        timestep=torch.tensor([0.2, 0.4, 0.6, 0.8]), guidance=torch.full((4,), 3.5), img_ids=torch.zeros(64, 3),
        txt_ids=torch.zeros(16, 3), return_dict=False,
    )[0]  # fmt: skip
    velocity.backward(randn(*velocity.shape))
    return velocity.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def peak_gib(row: Row) -> float:
    return sum(row[part] for part in PARTS) / GIB


def tables(found: dict[str, list[Row]]) -> dict[str, str]:
    """The tables between the page's markers."""
    by = {(r["size"], r["format"], r["level"], r["micro_batch"]): peak_gib(r) for r in found["peaks"]}
    heads = [f"{size} x {size}, {n}" for size in SIZES for n in MICRO_BATCHES]
    peaks = [f"| `quantize` | `recompute` | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    for how in FORMATS:
        for level in LEVELS:
            cells = [f"{by[size, how, level, n]:.1f}" for size in SIZES for n in MICRO_BATCHES]
            names = "`none`" if how == "none" else ", ".join(f"`{name}`" for name in FORMATS[how].split(", "))
            peaks.append(f"| {names} | `{level}` | {' | '.join(cells)} |")
    costs = [
        "| `quantize` | extra bytes moved | distance of the velocity | cosine of the gradient |",
        "| --- " * 4 + "|",
    ]
    for r in found["costs"]:
        extra = r["bytes"] / r["bytes_in_full_precision"] - 1
        near = f"{r['velocity_distance']:.1%} | {r['gradient_cosine']:.4f}"
        costs.append(f"| `{r['format']}` | {extra:.1%} | {near} |")
    return {"formats": "\n".join(peaks), "costs of formats": "\n".join(costs)}


def write_tables(found: dict[str, list[Row]]) -> None:
    text = PAGE.read_text()
    for marker, table in tables(found).items():
        before, begin, rest = text.partition(f"<!-- {marker}: begin -->\n")
        _, end, after = rest.partition(f"<!-- {marker}: end -->")
        text = before + begin + table + "\n" + end + after
    PAGE.write_text(text)


def draw(found: dict[str, list[Row]]) -> None:
    """Peaks of both sizes at a micro-batch of 1: a group of bars for each level, and cards as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, len(SIZES), sharey=True)
    for axis, size in zip(axes, SIZES, strict=True):
        for place, level in enumerate(LEVELS):
            for i, how in enumerate(FORMATS):
                key = (size, how, level, 1)
                (row,) = [r for r in found["peaks"] if (r["size"], r["format"], r["level"], r["micro_batch"]) == key]
                x = place + 0.26 * (i - 1)
                label = FORMATS[how] if place == 0 and size == 512 else None
                axis.bar(x, peak_gib(row), 0.24, color=COLORS[how], label=label)
                axis.text(
                    x, peak_gib(row) + 0.4, f"{peak_gib(row):.0f}", ha="center", fontsize=6, color="#333333", bbox=WHITE
                )
        for card in CARDS:
            axis.axhline(card * 1e9 / GIB, color="#333333", linewidth=0.8, linestyle="--", zorder=0)
            if size == max(SIZES):
                axis.text(len(LEVELS) - 0.5, card * 1e9 / GIB, f" {card} GB", fontsize=7, va="center", color="#333333")
        axis.set_title(f"{size} x {size}", fontsize=9, weight="bold", color="#333333")
        axis.set_xticks(range(len(LEVELS)), LEVELS, fontsize=8)
        axis.set_xlim(-0.5, len(LEVELS) - 0.5)
        axis.tick_params(axis="y", labelsize=8, colors="#555555")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("peak of the update, GiB")
    figure.legend(loc="outside lower center", ncols=len(FORMATS), frameon=False, fontsize=8)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="do not plan, take formats.json as it is")
    if not parser.parse_args().draw:
        groups = {name: [json.dumps(row) for row in make()] for name, make in (("peaks", rows), ("costs", costs))}
        lists = [f'"{name}": [\n' + ",\n".join(lines) + "\n]" for name, lines in groups.items()]
        TABLE.write_text("{" + ",\n".join(lists) + "}\n")
    found = json.loads(TABLE.read_text())
    write_tables(found)
    draw(found)


if __name__ == "__main__":
    main()
