"""Answers by the target itself: in this process, or through servers."""
