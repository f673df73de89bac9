"""The reference MoE that the project ships, and the recipe that made it."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"


def model_path(folder: str = "model") -> str:
    """The folder of a shipped MoE, relative to the working folder where it lies below it: records name it."""
    path = MODEL_FOLDER.with_name(folder)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
