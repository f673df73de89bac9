"""What each of vLLM's workers (one a device) is made to know. A worker imports this before it builds its model.

So the plugin is there also where its entry point is not installed, or VLLM_PLUGINS leaves it out.
"""

from typing import Any

from harness.backends import vllm_plugin

vllm_plugin.register()


class Extension:
    """What a worker can be asked by name (``worker_extension_cls`` of vLLM)."""

    get_model: Any  # vLLM's own

    def winnow_expert_bytes(self) -> int:
        """The bytes of the routed experts' matrices as they lie in this worker's memory."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        experts = (module for module in self.get_model().modules() if isinstance(module, RoutedExperts))
        return sum(parameter.nbytes for module in experts for parameter in module.parameters())
