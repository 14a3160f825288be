"""Bodies of requests -> prompts with what is wanted of their replies."""
