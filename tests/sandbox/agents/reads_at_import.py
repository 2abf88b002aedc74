"""Keeps what it finds in its environment when it is imported."""

import os

FOUND = dict(os.environ)


def agent(data):
    return [[FOUND.get(name), os.environ.get(name)] for name in data["names"]]
