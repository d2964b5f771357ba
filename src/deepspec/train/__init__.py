"""Training a draft: what a recipe builds, the loop, and a run from data to best checkpoint."""
