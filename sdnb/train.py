"""`python -m sdnb.train`: the reference's command line. It reads the flags before it loads what trains, so that a
mistake in them shows at once."""

import sys

if __name__ == "__main__":
    try:
        from sdnb.launch.command_line import main
    except KeyboardInterrupt:
        sys.exit(130)
    main()
