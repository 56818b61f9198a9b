"""`python -m sdnb.report out.ipynb`: the same as `sdnb report`."""

import sys

from sdnb.__main__ import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
