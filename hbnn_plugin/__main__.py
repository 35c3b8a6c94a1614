"""``python -m hbnn_plugin``: see ``launcher/command.py``."""

import sys
import traceback

from .launcher.command import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # writing the report can cost Python its own way to end with an interrupt's status
        traceback.print_exc()
        sys.exit(130)
