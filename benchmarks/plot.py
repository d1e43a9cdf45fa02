"""README tables and pictures, and the notes of docs/hopper.md, from the result files.

    python benchmarks/plot.py [--out DIR]

Rewrites what stands between the markers of README.md and docs/hopper.md, and the pictures in benchmarks/results/plots/.
Devices are never mixed: each has its own tables, from its newest rows. What was not measured says so; what was only
predicted, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import figures
import goals
import program
import results
import tables
import tune

README = results.ROOT / "README.md"
NOTES = results.ROOT / "docs" / "hopper.md"
PLOTS = results.RESULTS / "plots"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Files = list[dict[str, Any]]


def newest(files: Files, section: str) -> dict[str, dict[str, Any]]:
    """The newest run of a section for each device."""
    runs = [run for file in files for run in file.get(section, [])]
    runs.sort(key=lambda run: str(run["environment"]["time"]))
    return {run["environment"]["device"]: run for run in runs}


def newest_anywhere(files: Files, section: str) -> dict[str, Any] | None:
    """The newest run of a section that does not depend on the machine."""
    runs = newest(files, section).values()
    return max(runs, key=lambda run: str(run["environment"]["time"]), default=None)


def picture(title: str, stem: str, draw: Callable[..., None], device: str, *drawn: Any) -> str:
    """Draw it, and the Markdown that shows it."""
    path = PLOTS / f"{stem}_{results.slug(device)}.png"
    draw(path, device, *drawn)
    return f"![{title}]({path.relative_to(results.ROOT)})"


def unmeasured(what: str, command: str) -> str:
    return f"**{what}**: not yet measured. `python benchmarks/{command}` does it on a GPU; it is part of gpu_suite.py."


def loss_parts(files: Files) -> list[str]:
    """The loss as bench_transition.py measures it, then the kernels alone."""
    parts = []
    for device, section in newest(files, "loss").items():
        parts.append(tables.loss_table(device, section))
        parts.append(picture("times of the loss", "loss", figures.loss_plot, device, section))
    devices = results.newest_rows(files, "kernels")
    for device, rows in devices.items():
        parts.append(tables.kernel_tables(device, rows))
        if any("error" not in row for row in rows.values()):
            parts.append(tables.memory_sentence(rows))
            parts.append(picture("loss and step", "kernels", figures.kernels_plot, device, rows))
    if not devices:
        parts.append(unmeasured("Kernels of loss and step on an H100 or H200", "bench_kernels.py --save"))
    return parts


def flux_parts(files: Files) -> list[str]:
    """Times where they were measured, and the count of bytes."""
    parts = []
    kernels, blocks = results.newest_rows(files, "flux_kernels"), results.newest_rows(files, "flux_blocks")
    for device, rows in kernels.items():
        parts.append(tables.flux_kernels_table(device, rows))
        of_blocks = blocks.get(device, {})
        if of_blocks:
            parts.append(tables.flux_blocks_table(device, of_blocks))
        if any("error" not in row for row in rows.values()):
            parts.append(picture("Flux kernels and blocks", "flux", figures.flux_plot, device, rows, of_blocks))
    if not kernels:
        parts.append(unmeasured("Flux kernels and blocks on an H100 or H200", "bench_flux_block.py --save"))
    counted = newest_anywhere(files, "flux_bytes")
    return parts + ([] if counted is None else [tables.flux_bytes_table(counted)])


def train_step_parts(files: Files) -> list[str]:
    """Measured where it was; else the planner's predictions, called by their name."""
    parts = []
    for device, rows in results.newest_rows(files, "train_step").items():
        cases = dict(sorted(rows.items(), key=lambda item: tables.case_order(item[1])))
        parts.append(tables.train_step_table(device, cases))
        if any("error" not in row for row in cases.values()):
            parts.append(tables.share_sentence(device, cases))
            parts.append(picture("training step", "train_step", figures.train_step_plot, device, cases))
    if not parts:
        what = "Training step of the whole of Flux, and the loss's share of it"
        parts.append(unmeasured(what, "bench_train_step.py --save"))
        plans = results.newest_rows(files, "plan_train_step", by_device=False)
        parts += [tables.planned_table(rows) for rows in plans.values()]
    return parts


def replace_between(text: str, begin: str, end: str, content: str) -> str:
    before, rest = text.split(begin)
    _, after = rest.split(end, 1)
    return f"{before}{begin}\n{content}\n{end}{after}"


def notes(text: str, files: Files) -> str:
    """docs/hopper.md with the results of each experiment under its prediction."""
    devices = results.newest_rows(files, tune.SECTION)
    for name in tune.EXPERIMENTS:
        text = replace_between(text, f"<!-- {name} -->", "<!-- end -->", tables.tuning_table(name, devices))
    return text


def main() -> None:
    parser = program.parser(__doc__)
    program.add_out(parser)
    args = parser.parse_args()
    try:
        files = results.load(args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    reached = goals.table(goals.measured(files))
    parts = [
        *loss_parts(files),
        *flux_parts(files),
        *train_step_parts(files),
        f"Numbers to reach on a GPU:\n\n{reached}",
    ]
    pages = {
        README: replace_between(README.read_text(), BEGIN, END, "\n\n".join(parts)),
        NOTES: notes(NOTES.read_text(), files),
    }
    for path, text in pages.items():  # both, or none if one could not be made
        path.write_text(text)
    print(f"wrote {README.name}, {NOTES.name}" + "".join(f"\n  {path}" for path in sorted(PLOTS.glob("*.png"))))


if __name__ == "__main__":
    main()
