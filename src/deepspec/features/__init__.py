"""The target's features for training: computed in the step, read from a cache, or asked of a server."""
