"""The reference MoE that the project ships, and the recipe that made it."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"


def model_path() -> str:
    """The folder of the reference MoE, relative to the working folder where it lies below it: records name it."""
    return str(MODEL_FOLDER.relative_to(Path.cwd()) if MODEL_FOLDER.is_relative_to(Path.cwd()) else MODEL_FOLDER)
