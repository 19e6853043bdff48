"""``python -m esmeta.launch``: a training run on many ranks that goes on after a failure.

    python -m esmeta.launch -n 4 --max-restarts 3 -- harlow-openes --set run.checkpoint_every=5

A rank that is lost ends all of them: MPI cannot shrink a running job, and a checkpoint goes on with
any number of ranks. So the whole job is started again with ``--resume``, on the hosts that answer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esmeta import errors
from esmeta.errors import UserError
from esmeta.ranks.launched import launched_ranks
from esmeta.run import cli
from esmeta.run import config as configs
from esmeta.run.hosts import Host, answering, end_marked, read_hosts, stop_with_parent
from esmeta.run.terminal import prepare_streams, wishes_to_stop

EXIT_LOST = 3
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
FINAL = {0: "done", 2: "bad input", EXIT_STOPPED: "told to stop", EXIT_INTERRUPTED: "interrupted"}
"""Exit codes after which a run is not started again."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
# What MPICH says of a rank that ended without MPI's leave, and of the signal that ended it.
_LOST = re.compile(rb"BAD TERMINATION.*?RUNNING AT (\S+)", re.DOTALL)
_SIGNAL = re.compile(rb"EXIT STRING: ([^\n]*\(signal \d+\))")


def parser() -> argparse.ArgumentParser:
    """The command line; a test freezes its flags."""
    p = cli.Parser(
        prog="python -m esmeta.launch",
        usage="python -m esmeta.launch [-n RANKS] [--max-restarts K] [--hosts FILE] "
        "[--launcher COMMAND] -- PRESET [options of esmeta.train]",
        description="Start esmeta.train on several ranks, and again from its last checkpoint when "
        "a rank, a host or the launcher fails.",
        epilog="Not started again: exit codes "
        + ", ".join(f"{code} ({why})" for code, why in FINAL.items())
        + ". SIGTERM and SIGUSR1 let the ranks finish their step and save a checkpoint.",
    )
    p.add_argument("-n", "--ranks", type=int, help="ranks (default: all slots of --hosts)")
    p.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="K",
        help="give up after this many restarts (%(default)s)",
    )
    p.add_argument(
        "--hosts",
        type=Path,
        metavar="FILE",
        help="a line HOST or HOST:SLOTS per host; before every start those that do not answer "
        "ssh are left out",
    )
    p.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="what starts the ranks, e.g. 'srun -n {n}'; {hosts} is the file of the hosts that "
        "answer (default: 'mpirun -n {n}', with hosts 'mpirun -f {hosts} -n {n}', of this "
        "environment or of PATH)",
    )
    return p


@dataclass(frozen=True)
class Job:
    """What is to be run: ``words`` of esmeta.train without ``--resume``, and where and how."""

    ranks: int | None
    max_restarts: int
    hosts: tuple[Host, ...]
    launcher: tuple[str, ...]
    words: tuple[str, ...]
    out: Path
    resume: bool


def _job(argv: Sequence[str]) -> Job:
    own, words = _split(argv)
    args = parser().parse_args(own)
    errors.non_negative_int("--max-restarts", args.max_restarts, example=3)
    if args.ranks is not None:
        errors.positive_int("-n", args.ranks, example=4)
    elif args.hosts is None:
        raise UserError("the number of ranks is missing; write -n 4, or --hosts FILE")
    hosts = () if args.hosts is None else read_hosts(args.hosts)
    train = cli.parser().parse_args(words)
    folder, source, resume = cli.run_folder(train)
    # Bad presets are found here, not by every rank.
    tables = configs.merge(configs.load(source), cli.overrides(train))
    out = folder or cli.new_folder(source, tables["run"].get("seed", 0))
    named = [] if folder else ["--out", str(out)]
    launcher = _launcher(args.launcher, bool(hosts))
    return Job(args.ranks, args.max_restarts, hosts, launcher, (*words, *named), out, resume)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(argv)
    if "--" in words:
        at = words.index("--")
        return words[:at], words[at + 1 :]
    if {"-h", "--help"} & set(words):
        return words, []
    raise UserError(
        "write -- between the options of the launcher and those of the run: "
        "python -m esmeta.launch -n 4 -- harlow-openes"
    )


def _launcher(given: str | None, hosts: bool) -> tuple[str, ...]:
    if given is not None:
        words = tuple(shlex.split(given))
        for needed in ("{n}", *(["{hosts}"] if hosts else [])):
            if not any(needed in word for word in words):
                raise UserError(
                    f"--launcher {given!r} does not say where {needed} goes; write for example "
                    f"--launcher 'mpirun {'-f {hosts} ' if hosts else ''}-n {{n}}'"
                )
        if shutil.which(words[0]) is None:
            raise UserError(f"--launcher {given!r}: there is no command {words[0]!r}; load its MPI")
        return words
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise UserError(
            "there is no mpirun beside python or on PATH; pip install mpich, load the cluster's "
            "MPI, or write --launcher 'srun -n {n}'"
        )
    return (mpirun, *(("-f", "{hosts}") if hosts else ()), "-n", "{n}")


class Attempts:
    """Starts the ranks of a job, passes signals on to them, and starts them again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.mark = f"ESMETA_LAUNCH={uuid.uuid4().hex}"
        self.signal: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self._tails: dict[int, bytes] = {}
        for number in (*wishes_to_stop(), signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        self.signal = number
        self._pass_on()

    def _pass_on(self) -> None:
        # Every launcher hands SIGUSR1 to its ranks; some of them kill the ranks on SIGTERM.
        if self.child is not None and self.child.poll() is None:
            wanted = signal.SIGINT if self.signal == signal.SIGINT else signal.SIGUSR1
            self.child.send_signal(wanted)

    def run(self) -> int:
        """Start until the run is over or there were too many restarts; returns the exit code."""
        failure, code = "", 0
        for restart in range(self.job.max_restarts + 1):
            if restart:
                self._pause(min(_FIRST_PAUSE_S * 2 ** (restart - 1), _LONGEST_PAUSE_S))
            if self.signal is not None:
                return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED
            code, cause = self._attempt(restart, failure)
            if self.signal is not None:
                return self._stopped(code)
            if code in FINAL:
                return code
            failure = f"{cause} at {_where(self.job.out)}"
        _say(f"{failure}; giving up after {_times(self.job.max_restarts)}")
        return code

    def _stopped(self, code: int) -> int:
        if self.signal == signal.SIGINT:
            return EXIT_INTERRUPTED
        # Ranks that have not yet set up anything die of the signal; there is nothing to lose.
        early = (signal.SIGUSR1, 128 + signal.SIGUSR1)
        return EXIT_STOPPED if code in early else code

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.signal is None and time.monotonic() < end:
            time.sleep(0.05)

    def _attempt(self, restart: int, failure: str) -> tuple[int, str]:
        """Start the ranks once; returns the exit code and what went wrong."""
        job = self.job
        hosts = answering(job.hosts)
        gone = [host.name for host in job.hosts if host not in hosts]
        absent = f"{', '.join(gone)} did not answer, " if gone else ""
        slots = sum(host.slots for host in hosts)
        ranks = min(job.ranks or slots, slots) if job.hosts else job.ranks or 1
        if restart:
            place = f"{absent}from {_checkpoint(job.out)} on {ranks} ranks"
            _say(f"{failure}; restart {restart} of {job.max_restarts}, {place}")
        elif absent and hosts:
            _say(f"{absent}starting on {ranks} ranks")
        if ranks == 0:
            return EXIT_LOST, "no host answered"
        with tempfile.TemporaryDirectory(prefix="esmeta-launch-") as folder:
            file = Path(folder) / "hosts"
            file.write_text("".join(f"{host.line}\n" for host in hosts), encoding="utf-8")
            command = _command(job, ranks, file, again=restart > 0)
            code = self._run_ranks(command, restart)
        end_marked(self.mark)
        # MPICH tells on stdout which process was killed.
        return code, _cause(code, b"".join(self._tails.values()))

    def _run_ranks(self, command: list[str], start: int) -> int:
        self._tails = {1: b"", 2: b""}
        # In a session of its own: Ctrl-C must reach the ranks once, through this process.
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # By the number of the start, later ones take over its lock (esmeta.run.lock).
            env=os.environ | dict([self.mark.split("=")]) | {"ESMETA_LAUNCH_START": str(start)},
            start_new_session=True,
            preexec_fn=stop_with_parent,
        )
        assert self.child.stdout is not None and self.child.stderr is not None
        pipes = ((self.child.stdout.fileno(), 1), (self.child.stderr.fileno(), 2))
        readers = [threading.Thread(target=self._copy, args=ends, daemon=True) for ends in pipes]
        for reader in readers:
            reader.start()
        if self.signal is not None:
            self._pass_on()
        code = self.child.wait()
        for reader in readers:
            reader.join(5.0)
        return 128 - code if code < 0 else code

    def _copy(self, source: int, target: int) -> None:
        while chunk := os.read(source, 1 << 16):
            # Nobody may be reading any more; the ranks must be able to write all the same.
            with contextlib.suppress(OSError):
                os.write(target, chunk)
            self._tails[target] = (self._tails[target] + chunk)[-(1 << 14) :]


def _command(job: Job, ranks: int, hosts: Path, *, again: bool) -> list[str]:
    words = [w.replace("{n}", str(ranks)).replace("{hosts}", str(hosts)) for w in job.launcher]
    # A run that died before it had a config.toml starts anew in its empty folder.
    resume = again and not job.resume and (job.out / "config.toml").exists()
    train = [sys.executable, "-m", "esmeta.train", *job.words]
    return [*words, *train, *(["--resume"] if resume else [])]


def _say(text: str) -> None:
    print(f"esmeta.launch: {text}", file=sys.stderr, flush=True)


def _times(restarts: int) -> str:
    return f"{restarts} restart{'s' * (restarts != 1)}"


def _cause(code: int, output: bytes) -> str:
    """What ended the ranks; where the launcher says so, on which host and by which signal."""
    lost, killed = _LOST.search(output), _SIGNAL.search(output)
    if lost is None:
        return f"the ranks ended with exit code {code}"
    how = killed[1].decode() if killed else f"exit code {code}"
    return f"a rank on {lost[1].decode()} ended by {how}"


def _where(out: Path) -> str:
    """The step at work by the last line of the metrics; steps are counted from 0."""
    try:
        # Not by run/record.py, which imports torch: whoever waits for the exit code waits for it.
        text = (out / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
        budget = configs.load(out / "config.toml")["budget"]
    except (OSError, UserError, KeyError):
        return "the start"
    steps = re.findall(r'^\{"step": (\d+),.*\}$', text, re.MULTILINE)
    word = "generation" if budget.get("updates", "none") == "none" else "update"
    return f"{word} {steps[-1] if steps else 0}"


def _checkpoint(out: Path) -> str:
    from esmeta.run.record import load_checkpoint

    saved = load_checkpoint(out)
    return f"step {saved.step}" if saved else "the start"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of the last start."""
    prepare_streams()
    cli.prepare_process()
    try:
        if launched_ranks(os.environ) > 1:
            raise UserError(
                "the launcher itself was started several times, as tasks of one job step; start "
                "it once, and it starts the ranks"
            )
        return Attempts(_job(sys.argv[1:] if argv is None else argv)).run()
    except UserError as error:
        print(f"esmeta: error: {error}", file=sys.stderr, flush=True)
        return 2
