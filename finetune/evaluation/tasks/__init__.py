"""Public tasks: which are meant, how a model is asked, and what every question scored."""
