"""What the person sees at the end: tables and figures, on the terminal and as ``report.md``."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture: ``draw(path)`` writes a PNG there."""

    name: str
    draw: Callable[[Path], None]
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """Tables, figures, the numbers that a sweep compares, and files to write beside them.

    ``files``: name -> the text, or a function that writes the file at the path it gets.
    """

    title: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    summary: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: dict[str, str | Callable[[Path], None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """What a report is made from.

    Attributes:
      state: the final state, host arrays.
      rows: the rows of metrics.jsonl, in order: ``{"step", "stage", "kind": "train" | "eval", "eval"?, metrics...}``.
      timings: the rows of timing.jsonl.
      directory: the run directory.
    """

    state: Any
    rows: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    directory: Path

    def curve(self, stage: str, metric: str, evaluation: str | None = None) -> tuple[list[int], list[float]]:
        """Steps and values of one metric: of training, or of the named evaluation."""
        kind = "train" if evaluation is None else "eval"
        found = [
            (row["step"], row[metric])
            for row in self.rows
            if row["stage"] == stage and row["kind"] == kind and row.get("eval") == evaluation and metric in row
        ]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, stage: str, evaluation: str, metric: str) -> float:
        """The last value of an evaluation's metric."""
        return self.curve(stage, metric, evaluation)[1][-1]


def markdown(report: Report) -> str:
    """The report as Markdown; figures are linked from ``figures/``."""
    parts = [f"# {report.title}", ""]
    for table in report.tables:
        parts += [f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
        parts += [_row(row) for row in table.rows]
        parts += ["", *([table.caption, ""] if table.caption else [])]
    for figure in report.figures:
        parts += [f"![{figure.name}](figures/{figure.name}.png)", "", *([figure.caption, ""] if figure.caption else [])]
    parts += [f"- {note}" for note in report.notes]
    return "\n".join(parts).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def write(report: Report, directory: Path) -> None:
    """Writes figures/, report.md, the extra files and, last, results.json, which marks the run as finished."""
    figures = directory / "figures"
    figures.mkdir(exist_ok=True)
    for figure in report.figures:
        figure.draw(figures / f"{figure.name}.png")
    for name, content in report.files.items():
        if callable(content):
            content(directory / name)
        else:
            (directory / name).write_text(content)
    (directory / "report.md").write_text(markdown(report))
    temporary = directory / "results.json.new"
    temporary.write_text(json.dumps({"title": report.title, "summary": report.summary}, indent=2) + "\n")
    temporary.replace(directory / "results.json")


def show(report: Report, directory: Path) -> None:
    """Prints the tables on standard output and says where the figures lie."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    if not console.is_terminal:
        # Nobody reads a table cut to 80 columns in a log file.
        console = Console(width=180)
    console.print(f"\n[bold]{report.title}[/bold]", highlight=False)
    for table in report.tables:
        left = {"title_justify": "left", "caption_justify": "left"}
        drawn = RichTable(title=table.title, caption=table.caption or None, **left)
        for index, column in enumerate(table.columns):
            drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in table.rows:
            drawn.add_row(*(str(cell) for cell in row))
        console.print(drawn, highlight=False)
    for note in report.notes:
        console.print(f"  {note}", highlight=False, markup=False)
    console.print(f"  report: {directory / 'report.md'}", highlight=False, markup=False, soft_wrap=True)
    if report.figures:
        console.print(f"  figures: {directory / 'figures'}", highlight=False, markup=False, soft_wrap=True)
