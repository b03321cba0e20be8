"""A thread in every rank that knows whether the ranks go on: it names who does not, and ends the run in time.

Every rank beats once a second. Rank 0 judges; if it is silent, rank 1 does, and then the last one. A suspicion is a
warning; only when the others have waited for nearly as long as their collectives may take, the run ends, because then
the collectives' own errors would blame whoever happens to notice first. Whatever the thread's own trouble is, it says
so once, and the run goes on.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable

from megatron_haplovl.config.schema import Config
from megatron_haplovl.operation import hang_words
from megatron_haplovl.operation.arrivals import Arrivals
from megatron_haplovl.operation.beats import Beat, Seen
from megatron_haplovl.operation.endings import BY_AGREEMENT, Ending, ExitCode
from megatron_haplovl.operation.exchange import Exchange
from megatron_haplovl.operation.judgement import Finding, Limits, judge
from megatron_haplovl.operation.last_words import LAUNCHER_GONE, LOST_PEER
from megatron_haplovl.operation.launcher import Launcher
from megatron_haplovl.operation.main_thread import MainThread, Sample
from megatron_haplovl.operation.phase import PhaseClock
from megatron_haplovl.operation.published import Published
from megatron_haplovl.operation.stacks import StackFile, abort, debug_folder, open_stack_file, wake
from megatron_haplovl.parallel.groups import Group

logger = logging.getLogger(__name__)

_TICK = 0.5
_LONGEST_TICK = 2.0
"""A longer one means that this process was stopped, and that nothing can be said about the others meanwhile."""
_SECONDS_TO_PUBLISH = 3.0
_SECONDS_TO_ACKNOWLEDGE = 2.5
_SECONDS_TO_LEAVE = 10.0
"""For the main thread of a rank that ends by itself."""
_SECONDS_BEHIND_FIRST = 2.0
"""Where the ranks cannot talk, those that do not speak end later than the one that does."""
_SECONDS_TO_MISS = 4.0
"""Without a beat, for a rank whose connections have ended."""
_MOST_DUMPS = 20


class Watch:
    """Made at the start of a rank; knows the others from :meth:`join` on.

    Args:
        clock: what the main thread says about itself.
        config: the run's settings.
        launcher: who has started this process.
        is_asked: whether this rank has been asked to leave. One that has saves and leaves, although its launcher, which
            got the same signal, is gone already.
        guarded: looks whether a fault has come before, and a person is needed.
        end: says why the run ends, and ends this process; called in the watch's thread.
    """

    def __init__(
        self,
        clock: PhaseClock,
        config: Config,
        launcher: Launcher,
        is_asked: Callable[[], bool],
        guarded: Callable[[Ending], Ending],
        end: Callable[[Ending], object],
    ) -> None:
        self._clock, self._config, self._launcher = clock, config, launcher
        self._is_asked, self._guarded, self._end = is_asked, guarded, end
        self._rank, self._size = int(os.environ.get("RANK", "0")), 1
        self._set_timeout(60.0 * config.parallel.distributed_timeout_minutes, "--distributed-timeout-minutes")
        self._main = MainThread(clock)
        self._settled = False
        self._number = 0
        self._exchange: Exchange | None = None
        self._arrivals = Arrivals()
        self._stacks: StackFile | None = None
        self._run_id = ""
        self._dumps = 0
        self._alarm = "0"
        self._finding: Finding | None = None
        self._dumped_in_silence = False
        self._has_ended = False
        self._alone_for = 0.0
        self._known_for = 0.0
        self._own: Published | None = None
        self._reported = set[str]()
        self._publish_patience = _SECONDS_TO_PUBLISH
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin with what concerns this process alone: its launcher and its loader."""
        self._thread.start()

    def join(self, run_id: str, control: Group) -> None:
        """Know the others. Called by every rank.

        Args:
            run_id: of this launch.
            control: all ranks.
        """
        self._run_id, self._rank, self._size = run_id, control.rank, control.size
        self._stacks = open_stack_file(self._config.checkpoint.save, run_id, control.rank)
        if control.size == 1:
            return
        key = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{run_id}"
        beat = self._beat(self._main.look(0.0))
        exchange = Exchange(control.rank, control.size, key, reads_all=control.rank in self._judges(), beat=beat)
        control.barrier()
        exchange.start()
        self._exchange = exchange

    def settle(self, timeout: float, flag: str) -> None:
        """Say that the first step is done: from now on, compilers and file systems are no excuse.

        Args:
            timeout: seconds that a collective may take from now on.
            flag: where it comes from.
        """
        self._settled = True
        self._set_timeout(timeout, flag)

    def publish(self, ending: Ending) -> Ending:
        """Make an ending known to every rank; returns the one that was known first, this or another."""
        self._has_ended = True
        if self._exchange is not None:
            self._exchange.beat = _last_beat(self._exchange.beat)
        return self._publish(Published(ending)).ending

    def published(self) -> Ending | None:
        """The ending that is known, if any."""
        known = self._known()
        return None if known is None else known.ending

    def who_is_gone(self) -> str | None:
        """A sentence with the rank that is gone, its host, and what it was doing; None where all are there.

        It takes some seconds. Asked by a rank whose connections to others have ended.
        """
        if self._exchange is None:
            return None
        self._exchange.reads_all = True
        before, begun = self._exchange.received, time.monotonic()
        while time.monotonic() < begun + _SECONDS_TO_MISS:
            time.sleep(_TICK)
            if len(before.beats) < self._size and self._exchange.received.number > before.number:
                before, begun = self._exchange.received, time.monotonic()
        now = self._exchange.received
        gone = [
            beat
            for rank, beat in before.beats.items()
            if rank != self._rank and not beat.left and now.beats[rank].number == beat.number
        ]
        if now.number == before.number:
            if not self._exchange.rank_0_holds:
                return (
                    f"the launcher's store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer: "
                    "that machine or its launcher is gone"
                )
            gone = [beat for beat in gone if beat.rank == 0]
        return "; ".join(hang_words.gone(beat) for beat in gone) or None

    def stop(self) -> None:
        """Watch no longer. Called by every rank at its end."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_LONGEST_TICK)
        if self._exchange is not None:
            if self._exchange.holds_store:
                self._wait(_SECONDS_TO_ACKNOWLEDGE, self._all_have_left)
            self._exchange.stop(_last_beat(self._exchange.beat), _SECONDS_TO_PUBLISH)
        if self._stacks is not None:
            self._stacks.close()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(_TICK):
            now = time.monotonic()
            elapsed, last = min(now - last, _LONGEST_TICK), now
            try:
                self._tick(elapsed)
            except Exception as error:  # The watch must not end what it watches.
                self._report_once(f"the watch of rank {self._rank} has trouble: {type(error).__name__}: {error}")

    def _tick(self, elapsed: float) -> None:
        gone = self._launcher.gone()
        if gone is not None:
            self._alone_for += elapsed
        if gone is not None and not (self._is_asked() and self._alone_for < self._timeout):
            self._publish_patience = _TICK
            self._leave(Published(self._ending(gone, LAUNCHER_GONE)))
        sample = self._main.look(elapsed)
        limit = self._config.data.loader_timeout_seconds
        if sample.moment.phase == "loader" and sample.in_phase >= limit:
            self._end_loader(sample)
        if self._exchange is None:
            return
        own = self._beat(sample)
        if not self._has_ended:
            self._exchange.beat = own
        self._arrivals.update(self._exchange.received, elapsed)
        self._follow_published(elapsed)
        self._follow_alarm()
        self._judge(own)

    def _beat(self, sample: Sample) -> Beat:
        self._number += 1
        moment = sample.moment
        return Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._number,
            step=moment.step,
            phase=moment.phase,
            order=moment.order,
            in_phase=sample.in_phase,
            still=sample.still,
            waits=sample.waits,
            settled=self._settled,
            reading=self._clock.reading() if moment.phase == "loader" else "",
        )

    def _judges(self) -> tuple[int, ...]:
        """Ranks that may have to judge, the first one first."""
        return tuple(sorted({0, 1, self._size - 1}))

    def _judge(self, own: Beat) -> None:
        assert self._exchange is not None
        is_dead = self._limits.is_silent(self._arrivals.silence)
        if is_dead and not self._exchange.rank_0_holds:
            self._report_once(f"the launcher's store does not answer, so nobody watches rank {self._rank}")
        holder_is_silent = is_dead and self._exchange.rank_0_holds and self._rank != 0
        if is_dead and not holder_is_silent:
            return
        seen = self._arrivals.seen(own, 0 if holder_is_silent else None)
        speaks = self._is_first_judge(seen)
        if not speaks and not holder_is_silent:
            self._finding = None
            return
        finding = judge(seen, self._limits)
        if speaks:
            self._warn(finding)
        if holder_is_silent and not self._dumped_in_silence:
            self._dump("rank 0, which holds the store, does not answer")
        self._dumped_in_silence = holder_is_silent
        limit = self._limits.end + (0.0 if speaks else _SECONDS_BEHIND_FIRST)
        if finding is not None and finding.lasted >= limit:
            self._end_hang(finding)

    def _is_first_judge(self, seen: list[Seen]) -> bool:
        silent = {one.beat.rank for one in seen if self._limits.is_silent(one.age)}
        return next((rank for rank in self._judges() if rank not in silent), None) == self._rank

    def _warn(self, finding: Finding | None) -> None:
        before, self._finding = self._finding, finding
        if finding is not None and (before is None or before.episode != finding.episode):
            logger.warning(hang_words.warning(finding, self._folder))
            assert self._exchange is not None
            self._exchange.raise_alarm(f"rank {self._rank}, beat {self._number}")
        elif finding is None and before is not None:
            logger.warning(hang_words.goes_on(before))

    def _follow_alarm(self) -> None:
        assert self._exchange is not None
        alarm = self._exchange.received.alarm
        if alarm != self._alarm:
            self._alarm = alarm
            self._dump(f"asked for by {alarm}")

    def _follow_published(self, elapsed: float) -> None:
        """End as another rank has, or after this rank's main thread should have ended the process."""
        known = self._known()
        if known is None:
            return
        self._known_for += elapsed
        if known.ending.cause in BY_AGREEMENT:
            # The main thread comes to the same end by itself; it may have logs to send before.
            patience = self._timeout
        else:
            patience = _SECONDS_TO_LEAVE if self._has_ended else 0.0
        if self._known_for >= patience:
            self._leave(known)

    def _end_loader(self, sample: Sample) -> None:
        limit = self._config.data.loader_timeout_seconds
        workers = self._config.data.num_workers
        who = "a worker of its loader does not answer" if workers else "reading does not return (--num-workers 0)"
        sentence = (
            f"rank {self._rank} on {socket.gethostname()} has waited {sample.in_phase:.0f} s for "
            f"{self._clock.reading()}, and --loader-timeout-seconds allows {limit}: {who}; stacks are in "
            f"{self._folder}; the same command goes on from the last checkpoint"
        )
        self._leave(Published(self._ending(sentence, "loader hangs"), is_hang=True))

    def _end_hang(self, finding: Finding) -> None:
        sentence = hang_words.sentence(finding, self._folder, self._timeout, self._flag)
        ending = self._ending(sentence, f"hang: {finding.kind}")
        if finding.culprits:
            ending = dataclasses.replace(ending, rank=finding.culprits[0].rank, host=finding.culprits[0].host)
        stopped = finding.culprits if finding.kind == "silent" else ()
        self._leave(Published(ending, is_hang=True, abort=tuple((beat.host, beat.pid) for beat in stopped)))

    def _ending(self, sentence: str, cause: str) -> Ending:
        step = self._clock.moment.step
        return self._guarded(Ending(ExitCode.MACHINE_FAULT, sentence, cause, step - 1 if step else None, self._rank))

    def _leave(self, mine: Published) -> None:
        """End this process, after the others know."""
        try:
            # A stopped rank may hold the store that the ending is published in.
            wake(_here(mine))
            known = self._publish(mine)
            if known != mine:
                wake(_here(known))
            if known.is_hang:
                self._dump(known.ending.cause)
                if known.ending.cause == "loader hangs":
                    abort([child.pid for child in multiprocessing.active_children() if child.pid is not None])
                abort(_here(known), _SECONDS_TO_ACKNOWLEDGE)
            self._end(known.ending)
        finally:
            os._exit(int(mine.ending.code))

    def _publish(self, mine: Published) -> Published:
        known = self._known()
        if known is None or (known.ending.cause == LOST_PEER != mine.ending.cause):
            self._own = known = mine
            if self._exchange is not None:
                text = self._exchange.publish(mine.to_json(), _gives_way_to(mine), self._publish_patience)
                known = Published.of_json(text)
        if self._exchange is not None and self._exchange.holds_store:
            self._wait(_SECONDS_TO_ACKNOWLEDGE, self._all_know)
        return known

    def _known(self) -> Published | None:
        if self._exchange is None or self._exchange.received.ending is None:
            return self._own
        return Published.of_json(self._exchange.received.ending)

    def _all_know(self) -> bool:
        assert self._exchange is not None
        return self._exchange.seen_by >= self._size - 1

    def _all_have_left(self) -> bool:
        assert self._exchange is not None
        return all(beat.left for rank, beat in self._exchange.received.beats.items() if rank != self._rank)

    def _wait(self, seconds: float, until: Callable[[], bool]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            time.sleep(0.05)

    def _dump(self, reason: str) -> None:
        if self._stacks is not None and self._dumps < _MOST_DUMPS:
            self._dumps += 1
            self._stacks.dump(reason)

    def _set_timeout(self, timeout: float, flag: str) -> None:
        self._timeout, self._flag = timeout, flag
        # Earlier than the collectives, by the time that it takes to end everywhere.
        self._limits = Limits(end=timeout - min(10.0, timeout / 5))

    @property
    def _folder(self) -> object:
        return self._stacks.folder if self._stacks is not None else debug_folder(None, self._run_id)

    def _report_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            logger.warning(text)


def _here(ending: Published) -> list[int]:
    """The stopped ranks on this machine."""
    return [pid for host, pid in ending.abort if host == socket.gethostname() and pid != os.getpid()]


def _last_beat(beat: Beat) -> Beat:
    return dataclasses.replace(beat, number=beat.number + 1, left=True)


def _gives_way_to(mine: Published) -> Callable[[str], bool]:
    return lambda known: Published.of_json(known).ending.cause == LOST_PEER != mine.ending.cause
