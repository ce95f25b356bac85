"""A slow scheduler, so that a test can watch requests run on any machine."""

import time

from minipaged.scheduler.fcfs import FCFSScheduler
from minipaged.scheduler.output import SchedulerOutput


class SlowScheduler(FCFSScheduler):
    """At most 200 steps per second."""

    def schedule(self) -> SchedulerOutput:
        time.sleep(0.005)
        return super().schedule()
