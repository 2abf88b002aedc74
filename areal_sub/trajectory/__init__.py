"""What a rollout left behind: its journal, its tree of turns, and the training samples of it."""
