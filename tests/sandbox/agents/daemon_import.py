"""Starts a daemon when imported, then hangs where it is told to."""

import os
import time

from acts import daemonize, wait_for

with open(os.path.join(os.path.dirname(__file__), "daemon_import.txt")) as file:
    _pid_file, _hang = file.read().split("\n")
daemonize(_pid_file)
wait_for(_pid_file)
while _hang:
    time.sleep(60)


def agent(data: object) -> float:
    return 1.0
