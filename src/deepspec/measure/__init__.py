"""Measuring drafts: evaluations, and the rows of their results."""
