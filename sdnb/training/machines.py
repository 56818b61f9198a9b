"""When a machine of the run is lost, the others end, and say so."""

import logging
import os
import sys
from contextlib import suppress

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from sdnb.errors import RunError
from sdnb.machine.links import Links
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig

logger = logging.getLogger("sdnb")


def link(config: TrainConfig, accelerator: Accelerator) -> Links:
    """Connect this machine with the others. All ranks call it, and the first one of each machine connects. If a machine
    is lost, that rank writes the failure and ends, and the launcher of its machine ends the others there."""

    def end(machine: int, what: str) -> None:
        help_ = "To go on, repeat the command on every machine with resume_from_checkpoint = latest."
        print(f"error: {what}. {help_}", file=sys.stderr, flush=True)
        with suppress(RunError):  # the disk may be full
            run_folder.fail(run_folder.path_of(config), machine * config.ranks_here, what, help_)
        os._exit(1)  # at once: the main thread waits for the lost machine

    links = Links(end)
    if config.num_machines == 1:
        return links
    port = [links.listen(config.num_machines) if accelerator.is_main_process else 0]
    broadcast_object_list(port)
    if accelerator.is_local_main_process and not accelerator.is_main_process:
        address = os.environ["MASTER_ADDR"]
        try:
            links.connect(config.machine_rank, address, port[0])
        except OSError as error:
            logger.warning(
                "machine %d cannot connect to port %d of %s: %s. If a machine is lost, it may wait for an hour",
                config.machine_rank, port[0], address, error,
            )  # fmt: skip
    return links
