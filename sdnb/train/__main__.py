"""`python -m sdnb.train`: the reference's command line. It reads the flags before it loads what trains, so that a
mistake in them shows at once."""

from sdnb.launch.command_line import main

if __name__ == "__main__":
    main()
