"""Fine-tuning for the GLM-4 family: dialogues in, checkpoints that anybody can open out."""

__version__ = "0.1.0"
