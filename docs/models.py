"""What each model and each recipe takes, as the planner predicts it: bytes saved for backward, peaks, hours.

    python docs/models.py           plan it (some minutes) into models.json; write the page's tables
    python docs/models.py --draw    only the tables, from models.json
    python docs/models.py --only sd35m_lora    plan one recipe and its models again, and keep the other rows

It needs no GPU: the real program runs on tensors without data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastguard.config import LoraConfig, Recipe
from fastguard.memory import hours, kept_activations, plan, run_flops
from fastguard.memory.passes import weights_of
from fastguard.recipe import find_recipe, load_recipe

HERE = Path(__file__).parent
TABLE, PAGE = HERE / "models.json", HERE / "models.md"
MODELS = {
    "FLUX.1-dev": ("flux_lora", "black-forest-labs/FLUX.1-dev"),
    "FLUX.1-Kontext-dev": ("kontext_lora", "black-forest-labs/FLUX.1-Kontext-dev"),
    "FLUX.2-klein-base-4B": ("flux2_klein_lora", "black-forest-labs/FLUX.2-klein-base-4B"),
    "FLUX.2-klein-base-9B": ("flux2_klein_lora", "black-forest-labs/FLUX.2-klein-base-9B"),
    "FLUX.2-dev": ("flux2_lora", "black-forest-labs/FLUX.2-dev"),
    "SD3.5 Medium": ("sd35m_lora", "stabilityai/stable-diffusion-3.5-medium"),
    "SD3.5 Large": ("sd35m_lora", "stabilityai/stable-diffusion-3.5-large"),
    "Qwen-Image": ("qwen_image_lora", "Qwen/Qwen-Image"),
}
"""Their recipe, and their name on the hub."""
RECIPES = ("kontext_lora", "flux2_klein_lora", "flux2_lora", "sd35m_lora", "sd35m_lora_nocfg", "qwen_image_lora")
"""Those of models other than Flux.1, whose plans stand elsewhere."""
LEVELS = ("unfused", "none", "pointwise", "mlp", "block")
PEAKS = (("none", "pointwise"), ("none", "block"), ("int8", "block"), ("nf4", "block"))
"""Formats of the frozen weights, and levels, of the planned peaks."""
UTILISATION = 0.4
"""of the GPU's peak, for the hours"""
GIB = 2**30
Row = dict[str, Any]


def chosen(model: str, size: int, level: str, how: str = "none") -> Recipe:
    """One image a micro-batch, LoRA of rank 32 on the family's layers; guidance as in the recipe."""
    name, path = MODELS[model]
    recipe = load_recipe(find_recipe(name))
    fuse = level != "unfused"
    settings = {"path": path, "height": size, "width": size, "fuse": fuse, "recompute": level if fuse else "none"}
    return replace(
        recipe,
        model=replace(recipe.model, quantize=how, **settings),  # type: ignore[arg-type]
        lora=LoraConfig(32, 64),
        prompts=replace(recipe.prompts, max_tokens=256),
        sampler=replace(recipe.sampler, batch_size=1, decode_batch=1),
        update=replace(recipe.update, minibatches=1, micro_batch=1, ema_decay=0.0, ema_every=1),
        monitor=replace(recipe.monitor, every=0),
    )


def plans(recipe: str | None) -> Iterator[Row]:
    """The whole plan of each recipe, as it is."""
    for name in RECIPES:
        if recipe not in (None, name):
            continue
        loaded = load_recipe(find_recipe(name))
        planned = plan(loaded)
        flops = run_flops(loaded).epoch.total
        yield {
            "recipe": name,
            "recompute": planned.recompute,
            "quantize": loaded.model.quantize,
            "peaks": {phase.name: phase.peak for phase in planned.phases},
            "hours": hours(flops, loaded.hardware.tflops, UTILISATION),
        }


def rows(recipe: str | None) -> Iterator[Row]:
    """Of one image at 1024 x 1024, bytes saved for backward by level; of 512 x 512, the peak of the update."""
    for model, (name, _) in MODELS.items():
        if recipe not in (None, name):
            continue
        planned = chosen(model, 1024, "none")
        weights = weights_of(planned.model, planned.lora)
        fused = weights.fused
        yield {
            "model": model,
            "kind": planned.model.kind,
            "recipe": name,
            "parameters": weights.transformer.count - weights.trained.count,
            "branches": weights.branches,
            "fused": len(fused.fused) if fused else 0,
            "blocks": sum(weights.blocks.values()),
            "saved": {level: kept_activations(chosen(model, 1024, level)).total for level in LEVELS},
            "peaks": {
                f"{how} {level}": plan(chosen(model, 512, level, how)).phase("update").peak for how, level in PEAKS
            },
        }


def tables(content: dict[str, list[Row]]) -> dict[str, str]:
    """The tables of the page by their markers."""
    found = content["models"]
    saved = [f"| model | {' | '.join(f'`{level}`' if level != 'unfused' else 'diffusers' for level in LEVELS)} |"]
    peaks = [f"| model | {' | '.join(f'{how}, `{level}`'.replace('none', 'bf16', 1) for how, level in PEAKS)} |"]
    trains = ["| model | `model.kind` | parameters | branches | fused blocks | recipe |"]
    for lines in (saved, peaks, trains):
        lines.append("| --- " * (lines[0].count("|") - 1) + "|")
    for row in found:
        plain = row["saved"]["unfused"]
        cells = [f"{row['saved'][level] / GIB:.1f}" for level in LEVELS]
        cells[2] += f" ({row['saved']['pointwise'] / plain:.2f}x)"
        saved.append(f"| {row['model']} | {' | '.join(cells)} |")
        cells = [f"{row['peaks'][f'{how} {level}'] / GIB:.1f}" for how, level in PEAKS]
        peaks.append(f"| {row['model']} | {' | '.join(cells)} |")
        trains.append(
            f"| {row['model']} | `{row['kind']}` | {row['parameters'] / 1e9:.1f} billion | {row['branches']} | "
            f"{row['fused']} of {row['blocks']} | `{row['recipe']}` |"
        )
    whole = ["| recipe | frozen weights | `recompute` | encode | rollout | decode | update | hours an epoch |"]
    whole.append("| --- " * (whole[0].count("|") - 1) + "|")
    for row in content["recipes"]:
        cells = [f"{row['peaks'][phase] / GIB:.1f}" for phase in ("encode", "rollout", "decode", "update")]
        how = {"none": "bf16"}.get(row["quantize"], row["quantize"])
        whole.append(f"| `{row['recipe']}` | {how} | `{row['recompute']}` | {' | '.join(cells)} | {row['hours']:.2f} |")
    lines = {"models": trains, "saved": saved, "peaks": peaks, "plans": whole}
    return {marker: "\n".join(table) for marker, table in lines.items()}


def write_tables(found: dict[str, list[Row]]) -> None:
    """Put the tables between their markers."""
    text = PAGE.read_text(encoding="utf-8")
    for marker, table in tables(found).items():
        before, begin, rest = text.partition(f"<!-- {marker}: begin -->\n")
        _, end, after = rest.partition(f"<!-- {marker}: end -->")
        text = before + begin + table + "\n" + end + after
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only write the tables, from models.json")
    parser.add_argument("--only", help="plan the models of this recipe alone, and keep the other rows")
    args = parser.parse_args()
    found = json.loads(TABLE.read_text()) if TABLE.exists() else {"models": [], "recipes": []}
    if not args.draw:
        for part, key, order, made in (
            ("models", "model", MODELS, rows(args.only)),
            ("recipes", "recipe", RECIPES, plans(args.only)),
        ):
            known = {row[key]: row for row in found[part]}
            for row in made:  # written as they come, since each takes a minute
                known[row[key]] = row
                found[part] = [known[name] for name in order if name in known]
                TABLE.write_text(json.dumps(found, indent=1) + "\n")
    write_tables(found)


if __name__ == "__main__":
    main()
