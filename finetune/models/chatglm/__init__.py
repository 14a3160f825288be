"""GLM-4 in the layout in which it was first published (`model_type: chatglm`)."""
