"""The page of a training run, from the files that it leaves in its folder."""

from __future__ import annotations

from pathlib import Path

from fastguard.backbones import family_of
from fastguard.report.data import read_run
from fastguard.report.page import Section, write_page
from fastguard.report.pictures import (
    evaluation_grids,
    gold_section,
    optimization_pictures,
    ratio_pictures,
    reward_pictures,
    time_pictures,
    training_grids,
)
from fastguard.report.words import (
    clip_advice,
    partial_notice,
    planned_epochs,
    ratio_text,
    reward_text,
    settings_table,
    summary,
    time_text,
)


def write_run_report(run: Path) -> Path:
    """Write `run`/report.html, and its pictures to `run`/report/. Returns the page's path.

    Raises UserError if `run` is not the folder of a run.
    """
    found = read_run(run)
    out = run / "report"
    out.mkdir(exist_ok=True)
    sections = [
        Section("In short", points=summary(found)),
        Section("Reward", reward_text(found), pictures=reward_pictures(found, out)),
        gold_section(found, out),
        Section(
            "The ratio, and what is clipped", ratio_text(found), clip_advice(found), pictures=ratio_pictures(found, out)
        ),
        Section("Optimization", pictures=optimization_pictures(found, out)),
        Section("Time and memory", time_text(found), pictures=time_pictures(found, out)),
        Section("Images of training", pictures=training_grids(found, out)),
        Section("Images of evaluations", pictures=evaluation_grids(found, out)),
        Section("Updates that were skipped", points=found.skipped[-10:]),
        Section("Settings", table=settings_table(found.recipe)),
    ]
    told = [s for s in sections if s.paragraphs or s.points or s.table or s.pictures]
    model = found.recipe.model
    what = family_of(model.kind).describe(model)
    rewards = ", ".join(reward.label for reward in found.recipe.rewards)
    lead = (
        f"{found.recipe.objective.name} on {what}, rewarded by {rewards}: {found.done} of {planned_epochs(found)} done."
    )
    return write_page(run / "report.html", f"Run {run.resolve().name}", lead, told, partial_notice(found))
