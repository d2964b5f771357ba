"""Which of a round's proposals are verified: the policies, and what they ask of a machine's step costs."""
