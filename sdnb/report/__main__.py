"""`python -m sdnb.report out.ipynb`: an executed notebook as one HTML page."""

from sdnb.report.page import main

if __name__ == "__main__":
    main()
