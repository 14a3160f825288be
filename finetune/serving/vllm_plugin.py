"""What vLLM finds of this package where both are installed: its entry point `vllm.general_plugins`."""

from __future__ import annotations

ARCHITECTURE = "GLM4VAsTrained"
"""Of no config.json: asked for by --hf-overrides, so that nothing changes for who does not."""


def register() -> None:
    """Tell vLLM of the architecture; its module is imported only when a model asks for it."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"finetune.serving.vllm_glm4v:{ARCHITECTURE}")
