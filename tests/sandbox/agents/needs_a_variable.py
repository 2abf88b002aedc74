"""Cannot be imported without a variable."""

import os

FOUND = os.environ["A"]


def agent(data):
    return FOUND
