"""Adapters that put the loss into public trainers, one file per trainer."""
