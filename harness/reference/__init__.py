"""The reference MoE that the project ships, and the recipe that made it."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
