"""Running agents: in children (`supervisor`, `pool`), inline, and what their results are worth."""
