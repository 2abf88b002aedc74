"""`areal-sub replay`: an agent against the answers that a recorded rollout was given."""
