"""What drafts are worth: evaluations, and what they wrote."""
