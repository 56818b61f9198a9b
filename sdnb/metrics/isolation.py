"""Whether the machine was the run's own while it was measured. Reads no files and draws nothing."""

from typing import Any

import numpy as np
import pandas as pd

from sdnb.machine.device_kind import kind_of

# Shares of the cores that others may use: of a CPU that trains, and of one whose accelerator trains.
MOST_OF_A_CPU, MOST_BESIDE = 0.05, 0.5
_MOST_SLOWED = 0.05  # of the steps
_LEAST_CLOCK = 0.97  # of that at the beginning


def most_of_others(cpu_trains: bool) -> float:
    """The share of the cores that other processes may use without a warning."""
    return MOST_OF_A_CPU if cpu_trains else MOST_BESIDE


def others_share(steady: pd.DataFrame) -> float:
    """The share of the machine's cores that other processes used in the measured steps; NaN if it was not recorded."""
    if "others_share" not in steady or not steady.seconds.sum():
        return float("nan")
    return float((steady.others_share * steady.seconds).sum() / steady.seconds.sum())


def disturbances(steady: pd.DataFrame, environment: dict[str, Any]) -> list[str]:
    """What disturbed the measured steps, each in a few words; empty if nothing did, or nothing was recorded."""
    found = []
    kind = kind_of(environment.get("devices", {}).get("type"))
    if (share := others_share(steady)) > most_of_others(kind.is_host or not kind.is_known):
        found.append(f"other processes used {share:.0%} of the cores")
    if "slowed_gpus" in steady and (slowed := float((steady.slowed_gpus > 0).mean())) > _MOST_SLOWED:
        found.append(f"a GPU slowed itself down in {slowed:.0%} of the steps")
    clocks = [state["clock_mhz"] for state in steady.get("gpu", ()) if isinstance(state, dict) and "clock_mhz" in state]
    if len(clocks) >= 8:
        quarter = len(clocks) // 4
        begin, end = float(np.median(clocks[:quarter])), float(np.median(clocks[-quarter:]))
        if end < _LEAST_CLOCK * begin:
            found.append(f"the GPU's clock fell from {begin:.0f} to {end:.0f} MHz")
    beside = environment.get("what_else_ran", {}).get("gpu_processes", 0)
    if beside:
        found.append(f"other processes computed on the GPU: {beside} at the start")
    return found
