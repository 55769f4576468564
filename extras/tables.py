"""Tables and figures of a comparison (compare.py), from its rows: one for every run.

All statistics are of one protocol. The unit is a world, of real data a seed; differences are
paired by it.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np

from extras import charts, settings

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; beyond, the last one: a little too wide.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
GROUPS = ("head", "mid", "tail")
COSTS = {"clips seen": ",.0f", "updates": ",.0f", "minutes": ".1f"}  # columns that are no scores
NEEDED = ("phase", "case", "method", "tuned", "seed", "commit", "score")
NOT_MEASURED = {*NEEDED, "folder", "held_out"}  # held_out: of real data, what the tuning scores on


# ------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------


def points_of(method, case_name: str, chosen: dict) -> list[dict]:
    """The settings that are tried for a method: every combination of its grid's values.

    chosen: what `choose` found for the methods above it, one of which it may start from.
    """
    start = {}
    if method.like:
        start = chosen[case_name, method.like] | method.settings
    points = []
    for values in itertools.product(*method.grid.values()):
        points.append(start | dict(zip(method.grid, values, strict=True)))
    return points


def spell(table: dict) -> str:
    return ", ".join(f"{key} = {settings.show(value)}" for key, value in table.items())


def choose(protocol, rows: list[dict]) -> dict[tuple[str, str], dict]:
    """(case, method) -> the point of its grid with the best mean score over the tuning worlds, of
    those that were tried; if none was, the first."""
    chosen = {}
    for case in protocol.case:
        for method in protocol.method:
            key = (case.name, method.name)
            if case.tuned_as:
                chosen[key] = chosen[case.tuned_as, method.name]
                continue
            points = points_of(method, case.name, chosen)
            scores = np.array([mean_score(rows, *key, point) for point in points])
            tried = np.flatnonzero(~np.isnan(scores))
            best = tried[scores[tried].argmax()] if len(tried) else 0
            chosen[key] = points[best]
    return chosen


def mean_score(rows: list[dict], case: str, method: str, point: dict) -> float:
    """Over the tuning worlds; nan if the point was not tried."""
    wanted = ("tuning", case, method, spell(point))
    scores = []
    for row in rows:
        if (row["phase"], row["case"], row["method"], row["tuned"]) == wanted:
            scores.append(float(row["score"]))
    return float(np.mean(scores)) if scores else math.nan


def by_seed(rows: list[dict], case: str, method: str, column: str, phase: str = "final") -> dict:
    """seed -> value; nan where a run has none. Rows of a csv hold texts, an empty one for none."""
    values = {}
    for row in rows:
        if (row["phase"], row["case"], row["method"]) == (phase, case, method):
            value = row.get(column, "")
            values[int(row["seed"])] = math.nan if value == "" else float(value)
    return values


def series(rows: list[dict], case: str, method: str, column: str, phase: str = "final"):
    """The values (worlds,) in the order of the seeds."""
    values = by_seed(rows, case, method, column, phase)
    return np.array([values[seed] for seed in sorted(values)])


def paired(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of the differences by world, and its 95 % t interval (nan for a single world)."""
    mean, count, half = differences.mean(), len(differences), math.nan
    if count > 1:
        half = t_quantile(count) * differences.std(ddof=1) / math.sqrt(count)
    return mean, mean - half, mean + half


def t_quantile(worlds: int) -> float:
    return T975[min(worlds - 1, len(T975)) - 1]


def noise_of_a_run(protocol, rows: list[dict]) -> float:
    """Standard deviation of the score of runs that differ in initialisation and order only; nan
    without such runs. Pooled over the methods that were repeated."""
    squares, freedom = 0.0, 0
    for method in protocol.method:
        scores = series(rows, protocol.case[0].name, method.name, "score", "noise")
        if len(scores) > 1:
            squares += ((scores - scores.mean()) ** 2).sum()
            freedom += len(scores) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def found_four_times_in_five(deviation: float, worlds: int) -> float:
    """The true difference that the interval of so many worlds excludes zero for in 80 % of all
    comparisons, by drawing 20,000 of them."""
    draws = np.random.default_rng(0).standard_normal((20_000, worlds)) * deviation
    half = t_quantile(worlds) * draws.std(1, ddof=1) / math.sqrt(worlds)
    return float(np.quantile(half - draws.mean(1), 0.8))


# ------------------------------------------------------------------------------------------------
# Tables and the figure
# ------------------------------------------------------------------------------------------------


def write_report(protocol, rows: list[dict], out: Path) -> None:
    """compare.md, which is printed too, and compare.svg."""
    text = [f"# {protocol.name}\n\n{protocol.question}\n"]
    commits = sorted({str(row["commit"]) for row in rows})
    unit = "generated videos, an initialisation and an order of the clips"
    if held_out(rows):
        unit = (
            "an initialisation and an order of the clips, always of the same videos, so that an "
            "interval says nothing about other videos"
        )
    text.append(
        f"Recipe {protocol.recipe}, commit {', '.join(commits) or 'unknown'}. The unit is a "
        f"{unit_of(rows)}: {unit}.\n"
    )
    text += [tuning_table(protocol, rows), noise_table(protocol, rows)]
    finals = [row for row in rows if row["phase"] == "final"]
    for case in protocol.case:
        if finals:
            text.append(f"## {case.name or 'Results'}\n")
            text += [score_table(protocol, finals, case), difference_table(protocol, finals, case)]
            text += kind_tables(protocol, finals, case)
    page = "\n".join(filter(None, text))
    (out / "compare.md").write_text(page, encoding="utf-8")
    print(page)
    figure = out / "compare.svg"
    figure.unlink(missing_ok=True)
    if finals:
        FIGURES[protocol.figure](protocol, finals, figure)
    names = ("compare.md", "compare.csv", "compare.svg")
    print(f"in {out}: {', '.join(name for name in names if (out / name).exists())}")


def held_out(rows: list[dict]) -> str:
    """The part of real data that the tuning is scored on; "" for generated worlds."""
    return rows[0].get("held_out", "") if rows else ""


def unit_of(rows: list[dict]) -> str:
    return "seed" if held_out(rows) else "world"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tuning_table(protocol, rows: list[dict]) -> str:
    chosen, lines = choose(protocol, rows), []
    for case in protocol.case:
        for method in protocol.method:
            tried = []
            for point in points_of(method, case.name, chosen):
                score = mean_score(rows, case.name, method.name, point)
                if not math.isnan(score):  # nan: not tried
                    tried.append(f"{spell(point)}: {score:.4f}")
            taken = chosen[case.name, method.name]
            edge = " (edge)" if tried and at_an_edge(method, taken) else ""
            lines.append([case.name, method.name, "; ".join(tried), spell(taken) + edge])
    first = protocol.first_tuning_world
    last, part = first + protocol.tuning_worlds - 1, held_out(rows)
    where = f"on training videos that are held out ({part}), seeds" if part else "on worlds"
    return (
        f"Tuned {where} {first} to {last}, mean mAP. At an edge of its grid, a better value may "
        "lie outside.\n\n" + table(["case", "method", "tried", "taken"], lines)
    )


def at_an_edge(method, taken: dict) -> bool:
    for key, values in method.grid.items():
        if len(values) > 1 and taken[key] in (values[0], values[-1]):
            return True
    return False


def noise_table(protocol, rows: list[dict]) -> str:
    """What a difference of two methods can be known to, before the runs of the table."""
    noise = noise_of_a_run(protocol, rows)
    if not math.isfinite(noise):
        return ""
    of_difference = noise * math.sqrt(2)
    lines = []
    for worlds in sorted({5, 6, 8, 10, 12, 16, 24, protocol.worlds} - {1}):
        half = t_quantile(worlds) * of_difference / math.sqrt(worlds)
        found = found_four_times_in_five(of_difference, worlds)
        mark = " (here)" if worlds == protocol.worlds else ""
        lines.append([f"{worlds}{mark}", f"± {half:.4f}", f"{found:.4f}"])
    same, allows = "world", "allows, if worlds differed in nothing else"
    if held_out(rows):
        same, allows = "videos", "allows"
    header = [f"{unit_of(rows)}s", "95 % interval of a difference", "found in 4 of 5 comparisons"]
    return (
        f"Noise of a run: the same {same} with another initialisation and order, {noise:.4f} (one "
        f"standard deviation); of a difference of two runs {of_difference:.4f}. What that "
        f"{allows}:\n\n" + table(header, lines)
    )


def score_table(protocol, rows: list[dict], case) -> str:
    columns = main_columns(rows)
    lines = []
    for method in protocol.method:
        cells = [method.name]
        for column in columns:
            values = series(rows, case.name, method.name, column)
            if column in COSTS:
                cells.append(f"{values.mean():{COSTS[column]}}")
            else:
                cells.append(mean_and_spread(values))
        lines.append(cells)
    title = f"Mean ± standard deviation over {unit_of(rows)}s.\n\n"
    return title + table(["method", *columns], lines)


def main_columns(rows: list[dict]) -> list[str]:
    """Scores of tasks and of frequency groups, and costs; not those of kinds of classes."""
    columns = []
    for row in rows:
        for column in row:
            _, _, what = column.partition(" ")  # behind the name of the task
            known = what.split(" ")[0] in ("mAP", "top-1", *GROUPS)
            if column not in columns and (column in COSTS or known):
                columns.append(column)
    return sorted(columns, key=lambda column: column in COSTS)


def mean_and_spread(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return "untrained"
    spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def difference(protocol, rows: list[dict], case, method, column: str):
    """By world, to the reference, where both have a value."""
    ours = by_seed(rows, case.name, method.name, column)
    theirs = by_seed(rows, case.name, protocol.reference, column)
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return np.array([value for value in differences if math.isfinite(value)])


def interval(differences: np.ndarray) -> str:
    if len(differences) == 0:
        return ""
    mean, low, high = paired(differences)
    if math.isnan(low):
        return f"{mean:+.4f}"
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def difference_table(protocol, rows: list[dict], case) -> str:
    columns = [column for column in main_columns(rows) if column not in COSTS]
    lines = []
    for method in protocol.method:
        if method.name == protocol.reference:
            continue
        cells = [method.name]
        for column in columns:
            differences = difference(protocol, rows, case, method, column)
            ahead = ""
            if " mAP" in column and len(differences):
                ahead = f", ahead in {(differences > 0).sum()} of {len(differences)}"
            cells.append(interval(differences) + ahead)
        lines.append(cells)
    if not lines:
        return ""
    return (
        f"Difference to {protocol.reference}, paired by {unit_of(rows)}: mean and 95 % t "
        "interval.\n\n" + table(["method", *columns], lines)
    )


def kind_tables(protocol, rows: list[dict], case) -> list[str]:
    """Difference to the reference by kind of class and number of training boxes."""
    kinds = kinds_of(rows)
    tables = []
    for method in protocol.method:
        if method.name == protocol.reference or not kinds:
            continue
        lines = []
        for task, kind in kinds:
            cells = [kind]
            for group in ("", *GROUPS):
                column = f"{task} {kind} {group}".rstrip()
                cells.append(interval(difference(protocol, rows, case, method, column)))
            lines.append(cells)
        title = f"{method.name} minus {protocol.reference}, by kind of class and its boxes:\n\n"
        tables.append(title + table(["kind", "all", *GROUPS], lines))
    return tables


def kinds_of(rows: list[dict]) -> list[tuple[str, str]]:
    """(task, kind) of the columns `TASK KIND`."""
    main, kinds = main_columns(rows), []
    for row in rows:
        for column in row:
            if column in NOT_MEASURED or column in main or column.split()[-1] in GROUPS:
                continue
            task, _, kind = column.partition(" ")
            if (task, kind) not in kinds:
                kinds.append((task, kind))
    return kinds


def score_column(rows: list[dict]) -> str:
    """The first box task's mAP."""
    return next(column for column in main_columns(rows) if " mAP" in column)


def drawn(protocol) -> list:
    """The methods that a figure of differences shows."""
    return [each for each in protocol.method if each.drawn and each.name != protocol.reference]


def lines_of(protocol, rows: list[dict], column: str) -> list[tuple]:
    """(label, differences by world, their mean and interval) for each case and method."""
    lines = []
    for case in protocol.case:
        for method in drawn(protocol):
            values = difference(protocol, rows, case, method, column)
            of_mean = paired(values) if len(values) else (math.nan, math.nan, math.nan)
            lines.append((f"{case.name} {method.name}".strip(), values, of_mean))
    return lines


def minus_reference(protocol, rows: list[dict]) -> str:
    """How the title of a figure of differences ends."""
    return f" minus {protocol.reference}, {protocol.worlds} {unit_of(rows)}s"


def draw_rows(protocol, rows: list[dict], path: Path) -> None:
    """A row for each case and method: a dot for each world, a bar for the interval."""
    score = score_column(rows)
    panels = {"": lines_of(protocol, rows, score)}
    charts.draw_rows(panels, score + minus_reference(protocol, rows)).write(path)


def draw_kinds(protocol, rows: list[dict], path: Path) -> None:
    """The same, and beside it for each kind of class."""
    score = score_column(rows)
    panels = {"all": lines_of(protocol, rows, score)}
    for task, kind in kinds_of(rows):
        panels[kind] = lines_of(protocol, rows, f"{task} {kind}")
    title = f"{score}, and AP by kind of class," + minus_reference(protocol, rows)
    charts.draw_rows(panels, title).write(path)


def draw_lines(protocol, rows: list[dict], path: Path) -> None:
    """The difference to the reference along x, a line for each method."""
    score = score_column(rows)
    lines = {}
    for method in drawn(protocol):
        points = lines[method.name] = []
        for case in protocol.case:
            values = difference(protocol, rows, case, method, score)
            if len(values):
                points.append(charts.Point(case.x, *paired(values)))
    title = score + minus_reference(protocol, rows)
    charts.draw_points(lines, title, protocol.axis, joined=True).write(path)


def draw_kept(protocol, rows: list[dict], path: Path) -> None:
    """Downstream mAP above what is left of the upstream accuracy, a point for each method."""
    tops = [column for column in main_columns(rows) if column.endswith(" top-1")]
    score = score_column(rows)
    points = {}
    for case in protocol.case:
        for method in protocol.method:
            if not tops or not method.drawn:
                continue
            of_tasks = [series(rows, case.name, method.name, column) for column in tops]
            kept = np.mean(of_tasks, axis=0)
            scores = series(rows, case.name, method.name, score)
            if np.isfinite(kept).all():
                x, *x_ends = paired(kept)
                label = f"{case.name} {method.name}".strip()
                points[label] = [charts.Point(x, *paired(scores), *x_ends)]
    if not points:
        print("no figure of what is kept: no upstream task was evaluated")
        return
    title = f"{score}; bars: 95 % interval of a mean, not of a difference"
    charts.draw_points(points, title, "mean upstream top-1", joined=False).write(path)


FIGURES = {"rows": draw_rows, "kinds": draw_kinds, "lines": draw_lines, "kept": draw_kept}


def write_rows(path: Path, rows: list[dict]) -> None:
    columns = []
    for row in rows:
        columns += [column for column in row if column not in columns]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path, protocol: str) -> list[dict]:
    """Of a file of several protocols, whose rows name theirs, those of this one, without the
    columns that only others have. ValueError if a column is missing that the tables need."""
    rows, filled = [], set(NOT_MEASURED)
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [column for column in NEEDED if column not in columns]
        if not any(" mAP" in column for column in columns):
            missing.append("TASK mAP")
        if missing:
            raise ValueError(
                f"{path}: no column {', '.join(missing)}; expected a compare.csv, as compare writes"
            )
        for row in reader:
            if row.pop("protocol", protocol) == protocol:
                rows.append(row)
                filled |= {column for column in row if row[column]}
    for row in rows:
        for column in row.keys() - filled:
            row.pop(column)
    return rows
