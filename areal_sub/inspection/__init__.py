"""`areal-sub inspect`: what became of each rollout of a run, and of each of its tokens, and why.

Reads a run's folder, also while the run goes on; writes nothing there, starts nothing, loads no
torch. Whatever an agent or a model has written is escaped before it reaches a terminal.
"""
