"""``python -m hbnn_plugin [options] train.py ...``: see :mod:`hbnn_plugin.launcher`."""

import sys

from .launcher import main

if __name__ == "__main__":
    main(sys.argv[1:])
