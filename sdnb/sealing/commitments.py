"""Whether the ranks, the checkpoints and the certificate of a sealed run agree with it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from sdnb.auditing.case import FAILS, HOLDS, UNKNOWN, Finding, judged
from sdnb.certifying.band import band_for, made_with
from sdnb.certifying.quantities import recorded_quantities
from sdnb.errors import ConfigError
from sdnb.machine.device_kind import kind_of
from sdnb.machine.environment import code_digest
from sdnb.run.folder import CERTIFIED, RunFolder
from sdnb.sealing.records import is_same
from sdnb.sealing.seal import CHECKPOINTS, Sealed, is_of_this_version
from sdnb.settings.config import TrainConfig
from sdnb.settings.fields import IDENTIFIED_BY_DIGEST
from sdnb.training.checkpoint_folder import machine_and_software, records_digest


def ranks(sealed: Sealed, config: TrainConfig) -> Finding:
    summary, devices = sealed.run.summary, sealed.run.environment.get("devices", {})
    ranks, machines = summary.get("ranks") or [], summary.get("machines", 1)
    counts = {"settings": config.ranks, "its summary": summary.get("world_size"), "the ranks that ended": len(ranks)}
    wrong = []
    if len({*counts.values()}) > 1:
        wrong.append(", ".join(f"{count} by {where}" for where, count in counts.items()))
    if len({str(rank.get("checksum")) for rank in ranks}) > 1:
        wrong.append("the weights of the ranks differ at the end")
    files_of_ranks = {
        name: sum(file.startswith("random_states_") for file in made.get("files", ()))
        for name, made in sealed.json(CHECKPOINTS).items() if "records" in made
    }  # fmt: skip
    wrong += [f"{name} has the states of {count}" for name, count in files_of_ranks.items() if count != config.ranks]
    here = len(devices.get("names") or ())
    kind = kind_of(devices.get("type"))
    if kind.is_known and not kind.is_host and here * machines < config.ranks:
        wrong.append(f"{config.ranks} ranks on {machines} machines with {here} devices")
    return judged("ranks", wrong, f"{config.ranks}, with the same weights at the end")


def commitments(sealed: Sealed, config: TrainConfig) -> Iterator[Finding]:
    """Each checkpoint says which records, settings, model, data and machine it was made with."""
    run, environment = sealed.run, sealed.run.environment
    resumed = [one["after_step"] for one in environment.get("resumed", [])]
    last, started = (resumed[-1] if resumed else 0), environment.get("started", 0.0)
    manifests = {
        name: made for name, made in sealed.json(CHECKPOINTS).items()
        # Of those after the last resume, the older ones belong to steps that were given up.
        if "records" in made and (made["step"] <= last or made.get("saved", started) >= started)
    }  # fmt: skip
    silent = [name for name, made in sealed.json(CHECKPOINTS).items() if "records" not in made]
    if silent and is_of_this_version(run):
        yield Finding("checkpoints", FAILS, f"{silent[0]} does not say what it was made with, as this version does")
    if not manifests:
        yield Finding("checkpoints", UNKNOWN, "there is none that says: save some with checkpointing_steps")
        return
    theirs = {**config.trajectory(), "the data": environment.get("data", {}).get("digest")}
    settings = {name: value for name, value in theirs.items() if name not in IDENTIFIED_BY_DIGEST}
    machine, model = machine_and_software(run.folder), {"model": run.model.get("unet_digest")}
    checks: dict[str, Callable[[dict[str, Any]], str]] = {
        "records": lambda made: "" if made["records"] == records_digest(run.folder, made["step"]) else "other records",
        "settings and data": lambda made: _differing(made["settings"] | {"model": made["model"]}, settings | model),
        "machine": lambda made: "" if made["step"] <= last else _differing(made["machine"], machine),
    }  # fmt: skip
    for name, made in manifests.items():
        if name != f"checkpoint-{made['step']}":
            yield Finding("checkpoints", FAILS, f"{name} says that it was made after step {made['step']}")
    for what, differs in checks.items():
        wrong = [f"{name} was made with {difference}" for name, made in manifests.items()
                 if (difference := differs(made))]  # fmt: skip
        yield judged(f"checkpoints: {what}", wrong[:2], f"as {len(manifests)} checkpoints say")


def _differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What a checkpoint says otherwise than the run."""
    return ", ".join(f"{name} {then.get(name)}, not {value}" for name, value in now.items() if then.get(name) != value)


def certificate(run: RunFolder) -> Finding:
    """Whether the certificate's values and limits follow from the records and from the band, if that is here. Those of
    the saved weights were measured by whoever sealed."""
    if not (certificate := run.certificate):
        return Finding("certificate", UNKNOWN, "there is none: `sdnb certify` makes one before the run is sealed")
    rows = {row["name"]: row for row in certificate["quantities"]}
    recorded = recorded_quantities(run, certificate.get("steps", len(run.steps)))
    wrong = [f"{name} is {rows[name]['value']}; from the records it is {value:.6g}" for name, value in recorded.items()
             if name in rows and math.isfinite(value) and not is_same(rows[name]["value"], value)]  # fmt: skip
    outside = [name for name, row in rows.items() if row["value"] is None or
               not row["low"] <= row["value"] <= row["high"]]  # fmt: skip
    if certificate["verdict"] == CERTIFIED and not rows:
        wrong.append(f"it says {CERTIFIED}, and has no quantities")
    if outside and certificate["verdict"] == CERTIFIED:
        wrong.append(f"it says {CERTIFIED}, and {outside[0]} is outside the band")
    try:
        band, made = band_for(run), made_with(run)
    except ConfigError:
        return Finding("certificate", FAILS if wrong else UNKNOWN, "; ".join([*wrong[:2], "its band is not here"]))
    limits = {name: band.limits(name, made) for name in band.quantities}
    if certificate["verdict"] == CERTIFIED and limits.keys() - rows.keys():
        wrong.append(f"it says nothing of {min(limits.keys() - rows.keys())}")
    wrong += [
        f"the band's limits of {name} are {low:.6g} to {high:.6g}"
        for name, (low, high) in limits.items()
        if name in rows and not all(map(is_same, (rows[name]["low"], rows[name]["high"]), (low, high)))
    ]
    return judged("certificate", wrong[:2], f"{certificate['verdict']}, by the limits of {band.file}")


def code(environment: dict[str, Any]) -> Finding:
    version, theirs = environment.get("packages", {}).get("sdnb"), environment.get("code")
    if theirs == code_digest():
        return Finding("code", HOLDS, f"that of sdnb {version}, as it is installed here")
    commit = environment.get("git_commit") or "unknown"
    return Finding("code", UNKNOWN, f"sdnb {version}, commit {commit}; its files are not those installed here")
