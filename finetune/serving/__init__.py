"""An OpenAI-compatible endpoint on a tuned model."""
