"""Families whose images keep their shape, and what frozen vision encoders make of images, kept on disk."""
