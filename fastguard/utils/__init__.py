"""What the other packages share: files, signals, the terminal, processes of a launch."""
