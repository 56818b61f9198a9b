"""The results of a run for another program, or to paste: `sdnb report RUN --format markdown`, `json` or `csv`."""

import csv
import io
import json
from typing import Any

FORMATS = ("markdown", "json", "csv")
_COLUMNS = ("name", "value", "unit", "n", "low", "high", "text", "how")


def export(kind: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """`about`: what a run says about its page. `rows`: of its results table, see `metrics.results.Result`."""
    if kind == "json":
        told = {name: about[name] for name in ("title", "state", "machine", "settings", "reproduce") if name in about}
        return json.dumps({**told, "results": rows}, indent=2, ensure_ascii=False)
    if kind == "csv":
        written = io.StringIO()
        table = csv.DictWriter(written, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        return written.getvalue().rstrip()
    first = f"**{rows[0]['name']}: {rows[0]['text']}**" if rows else "no step has been recorded"
    tables = [{row["name"]: row["text"] for row in rows[1:]}, about.get("machine") or {}]
    return "\n\n".join([f"### {about.get('title', 'a run')}", first, *map(_table, filter(None, tables))])


def _table(facts: dict[str, str]) -> str:
    lines = [f"| {_cell(name)} | {_cell(text)} |" for name, text in facts.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
