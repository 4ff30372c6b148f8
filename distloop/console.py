"""What a person sees: one block at the start, a progress bar or plain lines, and a table at the end."""

import time
from collections.abc import Mapping
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_LINE_EVERY_SECS = 10.0  # without a terminal: often enough to see life, rare enough for a log file


@final
class Display:
    """Print a run's course; nothing unless `enabled`. Enter it around the training for the progress bar."""

    def __init__(self, *, enabled: bool) -> None:
        self._console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[values]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, visible=False, values="")
        self._last_line = time.monotonic()

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def facts(self, title: str, facts: Mapping[str, Any]) -> None:
        """Print a titled block with a line for each fact."""
        self._console.print(f"[bold]{title}[/bold]")
        for name, value in facts.items():
            self._console.print(f"  {name:<18}{value}", markup=False)

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False)
        self._last_line = time.monotonic()

    def update(self, *, step: int, total_steps: int, description: str, values: str) -> None:
        """Move the bar to `step`; without a terminal print a line now and then."""
        self._bar.update(
            self._task, completed=step, total=total_steps, description=description, values=values, visible=True
        )
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY_SECS:
            self.line(f"{description}  step {step}/{total_steps}  {values}")

    def table(self, columns: Mapping[str, Mapping[str, float]]) -> None:
        """Print a table: a row for each metric, a column for each split."""
        table = Table("", *columns)
        for metric in dict.fromkeys(name for values in columns.values() for name in values):
            cells = [f"{values[metric]:.4f}" if metric in values else "" for values in columns.values()]
            table.add_row(metric, *cells)
        self._console.print(table)


def show(metrics: Mapping[str, float]) -> str:
    """Return `loss 0.1234  accuracy 0.9812`."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
