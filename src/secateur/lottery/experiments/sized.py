"""LogTicket with pools of a chosen share of their planned size, to see where it starts to fail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from secateur.lottery.construction import Plan, Task
from secateur.lottery.log_ticket import LogTicket


@dataclass(frozen=True, kw_only=True)
class SizedLog(LogTicket):
    """See the module's docstring; ``share`` of the planned pool, and no enlargements of it."""

    name: ClassVar[str] = "log"
    share: float = 1.0

    def plan(self, task: Task, tasks: list[Task], plans: list[Plan]) -> Plan:
        """The plan of ``LogTicket``, smaller."""
        plan = super().plan(task, tasks, plans)
        return replace(plan, size=max(1, round(plan.size * self.share)))

    @property
    def attempts(self) -> int:
        """As many as ``growth`` says, also for matching."""
        return self.growth + 1
