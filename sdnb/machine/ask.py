"""Says as JSON which accelerators there are: `python -m sdnb.machine.ask`. A process of its own, which lets go of them
when it ends: to ask can open a context on each, and on some kinds a device serves one process at a time."""

import json
from dataclasses import asdict

from sdnb.machine.device_kind import kind_here
from sdnb.machine.environment import devices_of

if __name__ == "__main__":
    print(json.dumps(asdict(devices_of(kind_here()))))
