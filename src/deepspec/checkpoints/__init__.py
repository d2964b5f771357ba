"""Drafts on disk: they are read, written, inspected, and exported to servers."""
