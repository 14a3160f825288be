"""Dialogues -> token ids with their trained spans, in the checkpoint's own chat layout."""
