"""Hydra configuration of winnow."""
