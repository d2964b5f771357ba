"""How the target answers prompts: in this process, or through servers."""
