"""Self-contained HTML pages: the builder, and the report of a run."""
