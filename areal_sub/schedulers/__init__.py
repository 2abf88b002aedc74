"""Where the processes of a run are started. `local.py`: on this machine."""
