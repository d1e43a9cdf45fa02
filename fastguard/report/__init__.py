"""Self-contained HTML pages: palette, plots, the page builder, and the report of a run."""

from fastguard.extras import need

need("train")
