"""Speed and memory as ratios measured in one process, so that they mean the same on every machine."""
