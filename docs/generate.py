"""Write the pages that come from the catalogue: one for each method, and the tables by place and by theme."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).parent))

import pairs
from plait.catalogue import FOLDERS
from plait.workbench.index import describe_all

ORDER = [*FOLDERS]


def verdict_table(claims: list[dict]) -> str:
    """The claims of a method and how they came out."""
    if not claims:
        return "Not tested: no claim is entered.\n"
    rows = ["| claim | figure | baseline | verdict |", "| --- | --- | --- | --- |"]
    for claim in claims:
        verdict = claim.get("verdict") or "not run"
        rows.append(f"| {claim['name'].replace('_', ' ')} | {claim['figure']} | {claim['baseline']} | {verdict} |")
    return "\n".join(rows) + "\n"


def page(entry: dict) -> str:
    """One method's page."""
    fields = "\n".join(f"| `{f['name']}` | {f['type']} | `{f['default']}` |" for f in entry["fields"])
    table = f"| field | range | default |\n| --- | --- | --- |\n{fields}\n" if fields else "No fields.\n"
    return (
        f"# {entry['name']}\n\n`{entry['key']}` · {entry['kind']} · places: {', '.join(entry['places'])}\n\n"
        f"```text\n{entry['doc']}\n```\n\n## Reference\n\n{entry['reference']}\n\n## Fields\n\n{table}\n"
        f"## Claims\n\n{verdict_table(entry['claims'])}\nSource: `{entry['file']}`\n"
    )


def table(entries: list[dict]) -> str:
    """A table of methods that links to their pages."""
    rows = ["| method | what it does | claims |", "| --- | --- | --- |"]
    for entry in entries:
        first = entry["doc"].strip().splitlines()[0].replace("|", "\\|")
        held = sum(c.get("verdict") == "holds" for c in entry["claims"])
        rows.append(f"| [{entry['name']}]({entry['key']}.md) | {first} | {held} of {len(entry['claims'])} hold |")
    return "\n".join(rows) + "\n"


COMMAND = "plait compare studies/adapters.yaml --workers 2"


def comparison() -> str:
    """What the published study gave: a table for each task and track."""
    parts = ["# A comparison of adapters\n"]
    path = Path("studies/results/adapters.json")
    if not path.exists():
        return parts[0] + "\nIt has not been run in full yet: `plait compare studies/adapters.yaml` runs it.\n"
    found = json.loads(path.read_text())
    rates, said = found["rates"], found["study"]
    made = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    parts.append(
        f"Made by `{COMMAND}`: {said['seeds']} seeds, {len(said['search']['factors'])} learning rates tried for each "
        f"method on the validation set of {said['search']['task']}; on the other task one may have deserved "
        "another. Intervals of 95 % over seeds. Methods marked = are not told from the best by a paired t "
        "test over the seeds, whose spreads borrow from each other, or not by a paired bootstrap over seeds "
        "and test examples, both with Holm's correction; the order among them says nothing. A rate at the "
        "edge of those that were tried is marked so: a better one may lie beyond. The machine did other work "
        "meanwhile, so of the seconds a step only large "
        f"differences count; `benchmarks/` measures time. {found['machine']}; {made}.\n"
    )
    wanted = [f"{track}, {task}" for track, tasks in said["tracks"].items() for task in tasks]
    if missing := [title for title in wanted if title not in found["tables"]]:
        parts.append(
            f"Not run to the end yet: {'; '.join(missing)}. `studies/results/adapters-runs.tar.gz` holds the runs that "
            f"are done: unpacked into a folder, `{COMMAND} --out FOLDER` goes on there.\n"
        )
    for title, held in found["tables"].items():
        better = held["metric"]["better"]
        parts += [f"## {title}\n", " · ".join(held["facts"]) + f" · {held['metric']['name']}, {better} is better\n"]
        rows = sorted(held["rows"], key=lambda row: row["quality"]["mean"], reverse=better == "higher")
        parts += ["\n".join([*HEAD, *(line(row, rates, held["tied"]) for row in rows)]) + "\n"]
        parts += [f"- {warning}" for warning in held["warnings"]] + [""]
    return "\n".join(parts)


HEAD = (
    "| method | quality | forgetting | folded | folded, 4 bits | trained | peak above the model, MB | weights · "
    "gradients · optimizer · activations, MB | start | s a step | rate |",
    "| --- " * 11 + "|",
)


def line(row: dict, rates: dict, tied: list[str]) -> str:
    """One method's line of the comparison."""

    def shown(interval: dict | None) -> str:
        if not interval:
            return "–"
        return f"{interval['mean']:.4f} ± {(interval['high'] - interval['low']) / 2:.4f}"

    def megabytes(*names: str) -> str:
        return " · ".join("–" if row["memory"].get(n) is None else f"{row['memory'][n] / 1e6:.0f}" for n in names)

    folded, start, rate = row["folded"], row["start"], rates[row["name"]]
    cells = [
        f"{row['name']}{' =' if row['name'] in tied else ''}",
        shown(row["quality"]),
        shown(row["forgetting"]),
        *(shown(folded.get(name)) for name in ("folded", "folded, 4 bits")),
        f"{row['trainable']:,.0f}{'' if row['size']['fits'] else ' (not equal)'}",
        megabytes("above"),
        megabytes("weights", "gradients", "optimizer", "activations"),
        f"{start['seconds']:.1f} s, {start['bytes'] / 1e6:.0f} MB" if start["seconds"] is not None else "–",
        f"{row['seconds_per_step']:.2f}",
        f"{rate['rate']:.1g}{' (edge)' if rate['at the edge'] else ''}",
    ]
    return "| " + " | ".join(cells) + " |"


def write(path: str, text: str) -> None:
    """Write one generated page."""
    with mkdocs_gen_files.open(path, "w") as file:
        file.write(text)


def main() -> None:
    """Write all generated pages."""
    entries = describe_all()
    write("comparison.md", comparison())
    by_place, by_theme = defaultdict(list), defaultdict(list)
    for entry in entries:
        write(f"methods/{entry['key']}.md", page(entry))
        for place in entry["places"]:
            by_place[place].append(entry)
        by_theme[entry["theme"]].append(entry)
    for name, groups, order in (
        ("place", by_place, [p for p in ORDER if p in by_place]),
        ("theme", by_theme, sorted(by_theme)),
    ):
        parts = [f"# Methods by {name}\n"] + [f"## {g}\n\n{table(groups[g])}" for g in order]
        write(f"methods/by-{name}.md", "\n".join(parts))
    write("methods/pairs.md", pairs.page())


main()
