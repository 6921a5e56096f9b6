"""The rows of a run as a table: beside a time its floor, beside memory preflight's forecast, beside both the goal.

gpu/__main__.py prints it last. A floor is the longer of a call's FLOPs (as preflight counts them) and of the weights
that it reads, at the rates that stage `machine` measured. What failed or found no time is listed under it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Rows = Iterable[dict[str, Any]]
FORECASTS = {"serve": "answering", "swap": "serving", "train": "training"}


def table(rows: Rows) -> list[str]:
    """Lines."""
    rows = list(rows)
    named = {row["name"]: row for row in rows if "value" in row}
    lines = [f"on {row['value']}" for row in rows if row.get("name") == "card"]
    lines += ["", f"{'figure':34} {'measured':>12} {'floor':>10} {'forecast':>10} {'goal':>12}"]
    lines += [_line(row, named) for row in rows if row.get("work")]
    lines += ["", "also measured"]
    lines += [_told(row) for row in rows if "value" in row and not row.get("work") and _counts(row)]
    ended = [f"{row['stage']}: {row['ended']}" for row in rows if row.get("ended", "ok") != "ok"]
    troubles = [f"{row['stage']}: {row['name']}: {row['trouble']}" for row in rows if "trouble" in row]
    return lines + (["", "not as meant", *ended, *troubles] if ended or troubles else ["", "every stage went through"])


def floor_ms(row: dict[str, Any], named: dict[str, dict[str, Any]]) -> float | None:
    """The least time of a figure's work, ms; None while its forecast or the machine's rates are not there."""
    cost, rate = named.get(f"forecast/{row['case']}"), named.get("peak/matmul")
    if cost is None or rate is None:
        return None
    flops = cost[f"{row['work']}_flops"] * row["batch"]
    reading = row.get("bytes", 0) / (named["peak/memory"]["value"] * 1e9)
    return 1e3 * max(flops / (rate["value"] * 1e12), reading)


def _line(row: dict[str, Any], named: dict[str, dict[str, Any]]) -> str:
    value, unit = row["value"], row["unit"]
    floor = forecast = goal = ""
    if unit == "GB":
        cost = named.get(f"forecast/{row['case']}")
        if cost is not None:
            want = cost[FORECASTS[row["work"]]] / 1e9
            forecast = f"{want:.2f}"
            if "within" in row:
                good = abs(value / want - 1) <= row["within"]
                goal = f"±{row['within']:.0%} " + ("met" if good else "missed")
    else:
        least = floor_ms(row, named)
        floor = "" if least is None else f"{least:.2f}"
        if "goal" in row:
            goal = f"≤{row['goal']:g} " + ("met" if value <= row["goal"] else "missed")
    return f"{row['name']:34} {value:>9.4g} {unit:2} {floor:>10} {forecast:>10} {goal:>12}"


def _counts(row: dict[str, Any]) -> bool:
    """Not a row of its own kind's hundred."""
    return not row["name"].startswith(("test/", "import/", "forecast/"))


def _told(row: dict[str, Any]) -> str:
    more = {key: value for key, value in row.items() if key not in ("stage", "name", "value", "unit", "most")}
    rest = ", ".join(f"{key} {value}" for key, value in more.items())
    return f"  {row['name']}: {row['value']} {row['unit']}".rstrip() + (f" ({rest})"[:300] if rest else "")
