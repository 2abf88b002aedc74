"""Starts a daemon when imported, then hangs where it is told to."""

import os
import time

from acts import daemonize

with open(os.path.join(os.path.dirname(__file__), "daemon_import.txt")) as file:
    _name, _hang = file.read().split("\n")
daemonize(_name)
while _hang:
    time.sleep(60)


def agent(data: object) -> float:
    return 1.0
