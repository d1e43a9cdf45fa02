"""`fastguard compare`: the same training with several objectives or settings, over seeds, on one page."""

from fastguard.extras import need

need("train")
