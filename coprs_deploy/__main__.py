"""The command line as ``python -m coprs_deploy``."""

import sys

from coprs_deploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
