"""`python -m areal_sub` is `areal-sub`."""

from areal_sub.cli import main

main()
