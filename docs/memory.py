"""The memory of a Flux update at each level of model.recompute, as the planner predicts it.

    python docs/memory.py           plan it (some minutes) into memory.json; write the pages' tables and the picture
    python docs/memory.py --draw    only tables and picture, from memory.json

It needs no GPU: the real program runs on tensors without data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastguard.config import Recipe, recompute_levels
from fastguard.memory import executed_flops, kept_activations, plan
from fastguard.recipe import find_recipe, load_recipe
from fastguard.report.palette import BLUE, GREEN, PURPLE, SKY, VERMILLION

HERE = Path(__file__).parent
TABLE, PICTURE = HERE / "memory.json", HERE / "images" / "flux_memory.png"
RECIPES = {
    "flux_lora": "LoRA, 512 x 512",
    "flux_lora_1024": "LoRA, 1024 x 1024",
    "flux_full_1gpu": "all weights, 512 x 512",
}
LEVELS = ("unfused", *recompute_levels(fuse=True))
"""diffusers' own blocks, then fused blocks from the fastest level to the smallest"""
RECOMPUTED = {
    "unfused": "-",
    "none": "nothing: the input of every linear layer is saved",
    "pointwise": "LayerNorm + modulate, GELU, normalized query and key; no matmul",
    "mlp": "also the first layer of each feed-forward",
    "block": "whole blocks: gradient checkpointing",
    "offload": "whole blocks, whose inputs wait in host memory",
}
PARTS = {"weights": BLUE, "gradients": SKY, "optimizer": GREEN, "activations": VERMILLION, "trajectories": PURPLE}
GIB = 2**30
Row = dict[str, Any]


def at_level(recipe: Recipe, level: str) -> Recipe:
    """The recipe with fused blocks at a level, or with diffusers' own."""
    fuse = level != "unfused"
    return replace(recipe, model=replace(recipe.model, fuse=fuse, recompute=level if fuse else "none"))


def one_image(recipe: Recipe) -> Recipe:
    """The recipe with 512 text tokens and a micro-batch of 1, for what is saved for backward of one image."""
    prompts, update = replace(recipe.prompts, max_tokens=512), replace(recipe.update, micro_batch=1)
    return replace(recipe, prompts=prompts, update=update)


def rows() -> Iterator[Row]:
    """Bytes of each part at the peak of the update; of one image, bytes saved for backward and FLOPs of the update."""
    for name in RECIPES:
        recipe = load_recipe(find_recipe(name))
        for level in LEVELS:
            chosen = at_level(recipe, level)
            phase = plan(chosen).phase("update")
            yield {
                "recipe": name,
                "level": level,
                **{part: getattr(phase, part) for part in PARTS},
                "saved_for_backward": kept_activations(one_image(chosen)).total,
                "flops": executed_flops(one_image(chosen)),
            }


def peak_gib(row: Row) -> float:
    """The peak of the update."""
    return sum(row[part] for part in PARTS) / GIB


def tables(found: list[Row]) -> dict[str, tuple[str, str]]:
    """By page: the name of its markers, and the table between them."""
    by = {(row["recipe"], row["level"]): row for row in found}
    saved = ["| `recompute` | backward recomputes | FLOPs | saved, 1024 x 1024 | saved, 512 x 512 |"]
    peaks = [f"| level | backward recomputes | FLOPs | {' | '.join(f'`{name}`' for name in RECIPES)} |"]
    for lines in (saved, peaks):
        lines.append("| --- " * (lines[0].count("|") - 1) + "|")
    for level in LEVELS:
        large, small = by["flux_lora_1024", level], by["flux_lora", level]
        name = {"unfused": "diffusers' blocks", "pointwise": "`pointwise`, the default"}.get(level, f"`{level}`")
        done = [by[recipe, level]["flops"] / by[recipe, "unfused"]["flops"] for recipe in RECIPES]
        cells = [f"{row['saved_for_backward'] / GIB:.1f} GiB" for row in (large, small)]
        saved.append(f"| {name} | {RECOMPUTED[level]} | {done[1]:.2f} | {' | '.join(cells)} |")
        name = "unfused (`--model.no-fuse`)" if level == "unfused" else f"`{level}`"
        cells = [f"{peak_gib(by[recipe, level]):.1f}" for recipe in RECIPES]
        factors = " to ".join(dict.fromkeys(f"{factor:.2f}" for factor in (min(done), max(done))))
        peaks.append(f"| {name} | {RECOMPUTED[level]} | {factors} | {' | '.join(cells)} |")
    return {"blocks.md": ("saved", "\n".join(saved)), "training.md": ("peaks", "\n".join(peaks))}


def write_tables(found: list[Row]) -> None:
    """Put the tables between the markers of their pages."""
    for page, (marker, table) in tables(found).items():
        path = HERE / page
        before, begin, rest = path.read_text().partition(f"<!-- {marker}: begin -->\n")
        _, end, after = rest.partition(f"<!-- {marker}: end -->")
        path.write_text(before + begin + table + "\n" + end + after)


def draw(found: list[Row]) -> None:
    """Stacked bars of every recipe and level, with the memory of an 80 GB GPU as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axis = figure.add_subplot()
    limit = load_recipe(find_recipe("flux_lora")).hardware.memory_gb * 1e9 / GIB
    places, names, x = [], [], 0.0
    for recipe, title in RECIPES.items():
        start = x
        for level in LEVELS:
            row = next(row for row in found if (row["recipe"], row["level"]) == (recipe, level))
            bottom = 0.0
            for part, color in PARTS.items():
                axis.bar(x, row[part] / GIB, 0.8, bottom, color=color, label=part if x == 0 else None)
                bottom += row[part] / GIB
            axis.text(x, bottom + 1, f"{bottom:.1f}", ha="center", fontsize=7, color="#333333")
            places.append(x)
            names.append(level)
            x += 1
        axis.text((start + x - 1) / 2, 101, title, ha="center", fontsize=9, weight="bold", color="#333333")
        x += 0.8
    axis.axhline(limit, color="#333333", linewidth=0.9, linestyle="--")
    axis.text(-0.5, limit + 1, f"80 GB = {limit:.1f} GiB", fontsize=7, color="#333333")
    axis.set(ylim=(0, 98), xlim=(-0.6, x - 1.2), ylabel="peak of the update, GiB")
    axis.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
    axis.tick_params(axis="y", labelsize=8, colors="#555555")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="do not plan, take memory.json as it is")
    if not parser.parse_args().draw:
        found = list(rows())
        TABLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")
    found = json.loads(TABLE.read_text())
    write_tables(found)
    draw(found)


if __name__ == "__main__":
    main()
