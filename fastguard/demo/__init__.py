"""`fastguard demo`: Flow-GRPO and GRPO-Guard on scikit-learn's digits, from pretraining to the report."""

from fastguard.extras import need

need("train")
