"""``python -m gossip_hvd``: see ``cli.py``."""

from gossip_hvd.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
