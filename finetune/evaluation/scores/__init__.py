"""Scores that need more than a reply beside its reference: a set of labels, another model, a judge."""
