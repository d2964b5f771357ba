"""How the pocket target, its prompts and its ready-made drafts were made: `python -m tools.pocket`."""
