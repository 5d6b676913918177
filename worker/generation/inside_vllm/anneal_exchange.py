"""What vLLM's workers have beside their own methods: an exchange of weights that is complete. Runs in vLLM's processes.

vLLM 0.32's `reload_weights` forgets the packed copy that CPUs compute a tied output layer with: it went on with the
old embeddings, and the text was wrong without an error. This is the only module of ours that vLLM imports.
"""

from typing import Any


class WeightExchange:
    """Mixed into vLLM's worker (`--worker-extension-cls`)."""

    reload_weights: Any
    model_runner: Any

    def exchange_weights(self, folder: str) -> None:
        """Put the weights of that checkpoint in the place of those that are loaded."""
        self.reload_weights(weights_path=folder)
        head = getattr(self.model_runner.get_model(), "lm_head", None)
        if head is not None:
            head.quant_method.process_weights_after_loading(head)  # packs it anew on CPUs, does nothing on GPUs
