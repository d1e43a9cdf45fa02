"""What each command of `fastguard` does."""
