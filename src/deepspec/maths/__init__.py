"""Tensor maths: torch and the standard library, no files, no `transformers`, no `torch.distributed`."""
