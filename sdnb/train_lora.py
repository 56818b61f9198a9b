"""`python -m sdnb.train_lora`: the command line of the reference's script for LoRA. See `sdnb.train`."""

import sys

if __name__ == "__main__":
    try:
        from sdnb.launch.command_line import main
        from sdnb.settings.flags import parse
    except KeyboardInterrupt:
        sys.exit(130)
    main(lambda: parse(sys.argv[1:], lora=True))
