"""Dense architectures that an MoE can be carved from: Qwen2-MoE computes whatever their layers do."""

from typing import Any

from harness.errors import WinnowError

DENSE = ("llama", "mistral", "qwen2")


def check_dense(config: Any) -> None:
    """Raises WinnowError where the model of a transformers ``config`` is not one of ``DENSE``."""
    if config.model_type not in DENSE:
        raise WinnowError(f"cannot carve a '{config.model_type}' model, only {', '.join(DENSE)}")
