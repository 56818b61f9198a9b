"""Does a fault lose or change work? Kills trainings at random moments, lets writes fail, and launches many runs in one
kernel.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills 400 --errors 200 --launches 50 --seed 1

- Kills: SIGKILL at a random moment of a training, which then resumes, until it is complete. On two ranks, one of them
  is killed, or the other, or both.
- Errors: a random operation in the run folder (open, write, rename, fsync, …) fails, with "no space left" from then on,
  or once with "input/output error". Then the training resumes. This needs a C compiler, `cc`.
- Launches: a kernel launches runs, and counts what is left of each.

At the end, every training must have the records, losses and weights of one that nothing disturbed, to the bit, and no
file that does not belong to it. Processes are forked from one that has loaded everything. The exit status is 1 if
anything was lost, changed or left behind.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from common import at_least, describe, file_of, write
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from sdnb.data import openmoji
from sdnb.launch.ranks import free_port
from sdnb.models import embedded
from sdnb.run import folder as run_folder

STEPS = 16
FLAGS = (
    "--dataset_name=openmoji --resolution=64 --center_crop --random_flip --use_ema --max_train_samples=26 "
    "--train_batch_size=2 --gradient_accumulation_steps=2 --learning_rate=1e-3 "
    f"--max_train_steps={STEPS} --lr_warmup_steps=0 --checkpointing_steps=4 --checkpoints_total_limit=3 --seed=7 "
    "--validation_loss_steps=8 --report_to=none --resume_from_checkpoint=latest"
)
PATIENCE_SECONDS = 120.0
GRACE_SECONDS = 30.0  # of torch's launcher
NEVER = 10**9
MOMENTS = ("before step 1", "between", "after the last step")
# What a kernel has, after a launch.
LOOK = """
import json, os, tempfile, psutil
def look():
    own = psutil.Process()
    print(json.dumps({
        "processes": len(own.children(recursive=True)), "file handles": own.num_fds(), "threads": own.num_threads(),
        "/dev/shm": len(os.listdir("/dev/shm")), "temporary files": len(os.listdir(tempfile.gettempdir())),
        "memory, MiB": round(own.memory_full_info().uss / 2**20, 1)}))
"""
LAUNCH = """
from sdnb.launch.notebook import launch
from sdnb.launch.plan import prepare
from sdnb.settings.config import TrainConfig
run = launch(prepare(TrainConfig(**SETTINGS)))
run.results
"""


@dataclass(frozen=True)
class Fault:
    """The `nth` operation in the run folder fails with an error number, in one rank. `for_good`: all after it, too."""

    rank: int
    nth: int
    number: int
    for_good: bool


class Attempt:
    """A training on some ranks, from its start or its last checkpoint. What it prints goes into a file."""

    def __init__(self, flags: list[str], ranks: int, work: Path, fault: Fault | None = None) -> None:
        self.printed, self.counters = work / "printed.txt", [work / f"count-{rank}" for rank in range(ranks)]
        port, self.processes = str(free_port()), []
        for rank in map(str, range(ranks)):
            told = {} if ranks == 1 else dict(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )  # fmt: skip
            told |= dict(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1")
            counter = self.counters[int(rank)]
            counter.write_bytes(bytes(8))
            its = fault if fault and int(rank) == fault.rank else Fault(int(rank), NEVER, 0, False)
            arguments = (flags, told, str(self.printed), str(counter), its)
            self.processes.append(_server.Process(target=_rank, args=arguments))
        self.printed.unlink(missing_ok=True)
        for process in self.processes:
            process.start()

    def wait(self) -> bool:
        """Whether all ranks end. When one has failed, the others get SIGTERM, as from torch's launcher."""
        end, told = time.monotonic() + PATIENCE_SECONDS, False
        while running := [process for process in self.processes if process.exitcode is None]:
            if time.monotonic() > end:
                self.kill(running)
                return False
            if self.failed and not told:
                end, told = time.monotonic() + GRACE_SECONDS, True
                for process in running:
                    process.terminate()
            multiprocessing.connection.wait([process.sentinel for process in running], 0.5)
        return True

    def kill(self, processes: list[Any]) -> list[Any]:
        """SIGKILL. Returns those that were still running."""
        running = [process for process in processes if process.exitcode is None]
        for process in running:
            process.kill()
            process.join()
        return running

    @property
    def failed(self) -> bool:
        return any(process.exitcode for process in self.processes)

    def operations(self, rank: int) -> int:
        """How many operations the rank had in the run folder."""
        return int.from_bytes(self.counters[rank].read_bytes(), sys.byteorder)


def _rank(flags: list[str], told: dict[str, str], printed: str, counter: str, fault: Fault) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as a program has it on Linux; here it would be the server's
    os.environ.update(told)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if _faulty():
        (folder,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--output_dir="))
        operation = ctypes.c_long(fault.nth)
        ctypes.CDLL(None).arm_faults(folder.encode(), counter.encode(), operation, fault.number, int(fault.for_good))
    sys.argv = ["sdnb.train", *flags]
    runpy.run_module("sdnb.train", run_name="__main__", alter_sys=True)


_server = multiprocessing.get_context("forkserver")


class Trials:
    """Trainings of one kind, and what an undisturbed one of them gives."""

    def __init__(self, ranks: int, flags: list[str], work: Path) -> None:
        self.ranks, self.flags, self.work = ranks, flags, work
        self.work.mkdir()
        self.number, self.problems = 0, list[str]()
        attempt = self.attempt()
        if not attempt.wait() or attempt.failed:
            raise RuntimeError(f"an undisturbed training failed:\n{attempt.printed.read_text()[-3000:]}")
        self.seconds = run_folder.RunFolder(self.folder).summary["total_seconds"]
        self.expected = self.outcome()
        self.operations = [attempt.operations(rank) for rank in range(ranks)]
        self.number += 1

    @property
    def folder(self) -> Path:
        return self.work / f"run-{self.number}"

    def attempt(self, fault: Fault | None = None) -> Attempt:
        return Attempt([*self.flags, f"--output_dir={self.folder}"], self.ranks, self.work, fault)

    def outcome(self) -> dict[str, Any]:
        """What must be the same to the bit: the records, the held-out losses, the weights, and the names of files."""
        run = run_folder.RunFolder(self.folder)
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        weights = [path for path in files if path.suffix == ".safetensors" and "checkpoint" not in str(path)]
        return {
            "steps": run.steps[["step", "images", "loss", "step_loss", "grad_norm", "lr"]].to_dict("list"),
            "held-out losses": run.validation[["step", "loss"]].to_dict("list"),
            "weights": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(weights)},
            "files": sorted(str(path.relative_to(self.folder)) for path in files),
        }

    def complete(self, what: str) -> None:
        """Resume the training until it is complete, and compare it."""
        attempt = self.attempt()
        ended = attempt.wait()
        self.compare(attempt, what if ended else f"{what}: hangs when it is resumed")

    def compare(self, attempt: Attempt, what: str) -> None:
        """Compare a training that should be complete, and begin another one."""
        if attempt.failed:
            self.problems.append(f"{what}: {attempt.printed.read_text()[-1000:]}")
        else:
            found = self.outcome()
            if different := [name for name in found if found[name] != self.expected[name]]:
                self.problems.append(f"{what}: different: {', '.join(different)}")
        self.number += 1

    def kills(self, count: int, chance: random.Random) -> dict[str, Any]:
        """Kill trainings until `count` processes or pairs of them died."""
        killed, trainings, reached = 0, 0, Counter[str]()
        while killed < count:
            attempt = self.attempt()
            time.sleep(chance.uniform(0, 1.5 * self.seconds))  # some of them get to their end
            victims = chance.choice([attempt.processes[:1], attempt.processes[-1:], attempt.processes])
            died = attempt.kill(victims)
            killed += bool(died)
            if died:
                step = run_folder.last_step(self.folder) if self.folder.exists() else 0
                reached[MOMENTS[(step > 0) + (step == STEPS)]] += 1
            if not attempt.wait():
                self.problems.append(f"kill {killed}: the other rank did not end")
            if not died:
                trainings += 1
                self.compare(attempt, f"training {trainings}, after kill {killed}")
            elif killed == count:
                trainings += 1
                self.complete(f"training {trainings}, after the last kill")
        return dict(ranks=self.ranks, kills=killed, trainings=trainings, moments=dict(reached))

    def errors(self, count: int, chance: random.Random) -> dict[str, Any]:
        """Let one operation fail, or all from one on, in `count` trainings."""
        said, kinds = Counter[str](), Counter[str]()
        for number in range(count):
            for_good = number % 2 == 0
            rank, code = chance.randrange(self.ranks), errno.ENOSPC if for_good else errno.EIO
            fault = Fault(rank, chance.randint(1, self.operations[rank]), code, for_good)
            name = errno.errorcode[code]
            what = f"{name} at operation {fault.nth} of rank {rank}"
            attempt = self.attempt(fault)
            if not attempt.wait():
                self.problems.append(f"{what}: hangs")
            printed = attempt.printed.read_text()
            if attempt.operations(rank) < fault.nth:
                said["not reached"] += 1
            elif "Traceback" in printed:
                said["a traceback"] += 1
                self.problems.append(f"{what}: {printed[-1500:]}")
            else:
                said["an error message" if attempt.failed else "went on"] += 1
                kinds[name] += 1
            if attempt.failed:
                self.complete(what)
            else:
                self.compare(attempt, what)
        return dict(ranks=self.ranks, errors=dict(kinds), operations=self.operations, said=dict(said))


def _faulty() -> bool:
    return "faulty" in os.environ.get("LD_PRELOAD", "")


def soak(count: int, settings: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """Launch runs in one kernel, every other one on two ranks. Returns what the kernel had after each."""
    cells = [new_code_cell(LOOK)]
    for number in range(count):
        mine = {**settings, "num_processes": 1 + number % 2, "output_dir": str(work / f"soak-{number}")}
        cells += [new_code_cell(f"SETTINGS = {mine!r}\n{LAUNCH}"), new_code_cell("look()")]
    notebook = new_notebook(cells=cells)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute(env={**environment, "HF_HUB_OFFLINE": "1"})
    return [json.loads(cell.outputs[0].text) for cell in notebook.cells if cell.source == "look()"]


def growth(looks: list[dict[str, Any]]) -> dict[str, float]:
    """What has grown from the second launch on (the first loads modules): counts, and MiB per launch."""
    return {
        name: looks[-1][name] - looks[1][name] if name != "memory, MiB"
        else round((looks[-1][name] - looks[1][name]) / (len(looks) - 2), 2)
        for name in looks[0]
    }  # fmt: skip


def table(kills: list[dict[str, Any]], errors: list[dict[str, Any]], looks: list[dict[str, Any]]) -> str:
    lines = []
    if kills:
        lines += [f"| ranks | kills | {' | '.join(MOMENTS)} | trainings |", "|---" * 6 + "|"]
        for one in kills:
            moments = [one["moments"].get(name, 0) for name in MOMENTS]
            lines.append(f"| {one['ranks']} | {one['kills']} | {' | '.join(map(str, moments))} | {one['trainings']} |")
        lines.append("")
    if errors:
        lines += ["| ranks | operations of a training | errors | what the training did |", "|---" * 4 + "|"]
        for one in errors:
            kinds, said = (_counted(one[part]) for part in ("errors", "said"))
            lines.append(f"| {one['ranks']} | {' and '.join(map(str, one['operations']))} | {kinds} | {said} |")
        lines.append("")
    if looks:
        grown = growth(looks)
        lines += [
            f"| {len(looks)} launches in one kernel | after 1 | after 2 | after {len(looks)} | growth |",
            "|---" * 5 + "|",
        ]
        for name in looks[0]:
            unit = " per launch" if name == "memory, MiB" else ""
            lines.append(f"| {name} | {looks[0][name]} | {looks[1][name]} | {looks[-1][name]} | {grown[name]}{unit} |")
        lines.append("")
    return "\n".join(lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{many} × {name}" for name, many in counts.items())


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--kills", type=at_least(0), default=100, help="divided among --ranks")
    parser.add_argument("--errors", type=at_least(0), default=60, help="divided among --ranks")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2])
    parser.add_argument("--launches", type=at_least(0), default=20, help="0, or at least 3")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and operations")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    kills, errors, looks, problems = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="sdnb-faults-") as name:
        work = Path(name)
        cache = work / "cache"
        flags = [*FLAGS.split(), f"--pretrained_model_name_or_path={embedded.folder('small')}", f"--cache_dir={cache}"]
        openmoji.folder(64, cache)
        if options.errors:
            _compile(work)
        _server.set_forkserver_preload(["sdnb.training.loop", "sdnb.launch.command_line", "sdnb.metrics.results"])
        about = describe("Faults on purpose", flags=" ".join(FLAGS.split()), seed=options.seed)
        try:
            for ranks in options.ranks:
                if options.kills or options.errors:
                    trials = Trials(ranks, flags, work / f"{ranks}-ranks")
                    print(f"{ranks} ranks: a training takes {trials.seconds:.1f} s", flush=True)
                if options.kills:
                    kills.append(trials.kills(options.kills // len(options.ranks), chance))
                    print(kills[-1], flush=True)
                if options.errors:
                    errors.append(trials.errors(options.errors // len(options.ranks), chance))
                    print(errors[-1], flush=True)
                if options.kills or options.errors:
                    problems += [f"{ranks} ranks: {problem}" for problem in trials.problems]
        except RuntimeError as error:
            sys.exit(f"error: {error}")
        if options.launches:
            settings = dict(
                pretrained_model_name_or_path=str(embedded.folder("small")), dataset_name="openmoji", resolution=64,
                center_crop=True, max_train_samples=26, train_batch_size=2, max_train_steps=6, lr_warmup_steps=0,
                report_to="none", cache_dir=str(cache),
            )  # fmt: skip
            looks = soak(options.launches, settings, work)
            counted = {name: many for name, many in growth(looks).items() if name != "memory, MiB" and many > 0}
            problems += [f"{options.launches} launches: {many} more {name}" for name, many in counted.items()]
    lost = "\n".join(f"- {problem}" for problem in problems) or "Nothing was lost, changed or left behind."
    runs = dict(kills=kills, errors=errors, launches=looks, problems=problems)
    write(file_of(options, "faults"), f"{table(kills, errors, looks)}\n{lost}", about, runs=runs)
    print(f"\n{table(kills, errors, looks)}\n{lost}")
    sys.exit(bool(problems))


def _compile(work: Path) -> None:
    """Make the library that lets operations fail, and have the processes of the trainings load it."""
    source, library = Path(__file__).with_name("faulty.c"), work / "faulty.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(source), "-ldl"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("error: --errors needs a C compiler, and there is no cc. Install one, or give --errors 0")
    if done.returncode:
        sys.exit(f"error: cc cannot compile the library for --errors:\n{done.stderr}")
    os.environ["LD_PRELOAD"] = str(library)


if __name__ == "__main__":
    main()
