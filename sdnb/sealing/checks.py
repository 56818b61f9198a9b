"""What is checked of a sealed run, each check against what the others cannot change without contradicting it."""

from dataclasses import replace

from sdnb.auditing.case import FAILS, UNKNOWN, Finding, judged
from sdnb.metrics.results import measure
from sdnb.sealing import commitments, records, times
from sdnb.sealing.seal import Sealed, chain

# What one set of settings explains; not if the run was resumed with others.
_OF_ONE_SETTING = ("records", "work of each step", "gradients", "learning rate", "checkpoints: settings and data")


def findings(sealed: Sealed) -> list[Finding]:
    """All checks that need nothing but the sealed file."""
    run = sealed.run
    steps, config = run.steps, run.config
    if steps.empty or not run.summary:
        return [_chain(sealed), Finding("records", FAILS, "they are missing, or those of the end are")]
    measured = measure(run)
    found = [
        _chain(sealed),
        records.records(sealed, steps, config),
        records.work(run, steps, config),
        records.figures(sealed, measured),
        records.losses(steps, config),
        records.gradients(run, steps, config),
        records.learning_rate(run, steps, config),
        times.times(steps),
        times.phases(steps, run.environment),
        times.total_time(run, steps),
        times.processor_time(run, steps),
        times.speed(run, measured),
        times.memory(run, steps),
        times.machine(measured),
        commitments.ranks(sealed, config),
        *commitments.commitments(sealed, config),
        commitments.certificate(run),
        commitments.code(run.environment),
    ]
    if changes := run.environment.get("changed_on_resume"):
        why = f"the run was resumed with changes: {', '.join(map(str, changes))}"
        found = [replace(one, verdict=UNKNOWN, why=f"{one.why}; {why}")
                 if one.verdict == FAILS and one.check in _OF_ONE_SETTING else one for one in found]  # fmt: skip
    return found


def _chain(sealed: Sealed) -> Finding:
    told = {entry["name"]: entry for entry in sealed.seal["entries"]}
    found = {entry["name"]: entry for entry in chain({name: sealed.contents[name] for name in told
                                                      if name in sealed.contents})}  # fmt: skip
    wrong = [f"{name} is missing" for name in told if name not in found]
    wrong += [f"{name} is not in the chain" for name in sealed.contents if name not in told]
    wrong += [f"{name} was changed after it was sealed" for name, entry in found.items()
              if entry["sha256"] != told[name]["sha256"]]  # fmt: skip
    if not wrong and [*told.values()] != [*found.values()]:
        wrong.append("its hashes do not follow from each other")
    return judged("chain", wrong, f"{len(told)} entries, head {sealed.seal['head']}")
