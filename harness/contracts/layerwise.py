"""A method that needs the model again: layer by layer, each scored on what the layers before hand on."""

from typing import Protocol, cast

from harness.contracts.method import Method


class LayerwiseMethod(Method, Protocol):
    """It decides about one MoE layer at a time: ``decide`` is given the ``Statistics`` of that layer alone.

    These hold ``looks_at``, and ``Statistics.look`` is what it may ask besides. ``requires`` is empty: no pass over the
    whole model is made for it.
    """

    @property
    def looks_at(self) -> frozenset[str]:
        """Statistics (``harness.contracts.statistics.STATISTICS``) of the layer's routed tokens."""
        ...

    @property
    def sequential(self) -> bool:
        """The next layer is given what this one computes once its plan is applied; else what the intact one does."""
        ...

    @property
    def every_token(self) -> bool:
        """``LayerLook.document_saliency`` is asked for, which needs all tokens; the others may do with a sample."""
        ...


def layerwise(method: Method) -> LayerwiseMethod | None:
    """The method itself where it decides layer by layer."""
    return cast(LayerwiseMethod, method) if hasattr(method, "looks_at") else None
