"""An agent on a framework that is not installed."""

import not_to_be_had


def agent(data):
    return not_to_be_had.solve(data)
