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
        """The bytes of the routed experts and of what stands for some, as they lie in this worker's memory."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        from harness.backends.vllm_standins import StandIns

        modules = list(self.get_model().modules())
        experts = (module for module in modules if isinstance(module, RoutedExperts))
        named = (pair for module in experts for pair in module.named_parameters())
        matrices = sum(parameter.nbytes for name, parameter in named if name != "e_score_correction_bias")
        return matrices + sum(module.stored_bytes for module in modules if isinstance(module, StandIns))
