"""Keeps what it finds in its environment when it is imported, as Hugging Face's libraries do."""

import os

FOUND = dict(os.environ)


def agent(data):
    return {name: [FOUND.get(name), os.environ.get(name)] for name in data["names"]}
