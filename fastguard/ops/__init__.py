"""The operators: one file each, with its formula, its torch version, the operator and the autograd Function."""
