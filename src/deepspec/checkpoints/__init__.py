"""Drafts on disk: written, read, inspected, and exported to servers."""
