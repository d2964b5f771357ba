"""Results files: compared, and shown as one page."""
