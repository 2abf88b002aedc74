"""`python -m areal_sub.config`: print the reference of all configuration keys (Markdown)."""

from __future__ import annotations

from areal_sub.config.reference import main

if __name__ == "__main__":
    main()
