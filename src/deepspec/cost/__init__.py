"""What a recipe takes, before anything runs: `deepspec plan`. Arithmetic only: no torch, no transformers."""
