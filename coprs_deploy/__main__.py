"""``python -m coprs_deploy``: the command line."""

import sys

from coprs_deploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
