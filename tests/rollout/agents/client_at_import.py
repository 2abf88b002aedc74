"""Wants its key before there is a rollout, as a client that is made in a module does."""

import os

KEY = os.environ["OPENAI_API_KEY"]


def agent(data):
    return 0.0
