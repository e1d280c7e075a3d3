"""The command line. What a command needs is imported when it runs, so that `plait list` starts at once.

Exit codes: 0 all went well; 1 the run failed, or a claim does not hold; 2 the input cannot work (one sentence says
why, and what to do); 130 stopped by Ctrl-C, after a checkpoint where there is a run.
"""

from __future__ import annotations

import errno
import json
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from plait.errors import BadInput, Interrupted, NonFinite

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk without room."""
WIDE = 110
"""Columns of a terminal that has room for a whole table of `plait list` or `plait compare`."""
UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]
"""What a mistyped command or option raises."""


class Commands(TyperGroup):
    """The commands; what a user did wrong is one sentence on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (BadInput, NonFinite, Interrupted) as problem:
            typer.echo(f"plait: {problem}", err=True)
            code = {BadInput: BAD_INPUT, NonFinite: FAILED}.get(type(problem), INTERRUPTED)
            raise typer.Exit(code) from None
        except OSError as problem:
            if problem.errno in FULL:
                said = f"{problem.strerror}: free some room and run the same command again."
            elif problem.filename is not None:
                said = f"cannot use '{problem.filename}' ({problem.strerror}): give another file or folder."
            else:
                raise
            typer.echo(f"plait: {said}", err=True)
            raise typer.Exit(BAD_INPUT) from None
        except UsageError as problem:
            _mistyped(problem, f"{ctx.command_path} {ctx.invoked_subcommand or ''}".rstrip())
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options that stand before the command."""
        given = ctx.meta["given"] = list(args)
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except UsageError as problem:
            if not given:
                raise  # the help, which `plait` alone asks for
            _mistyped(problem, ctx.command_path)
        return rest


def _mistyped(problem: Exception, command: str) -> NoReturn:
    said = problem.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
    typer.echo(f"plait: {said} (see {command} --help).", err=True)
    raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    cls=Commands,
    help="Interlace training methods: run recipes, compare them, find methods and check what they claim.\n\n"
    "Exit codes: 0 all went well; 1 a run failed or a claim does not hold; 2 bad input; 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        from plait import __version__

        typer.echo(f"plait {__version__}")
        raise typer.Exit(OK)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say it.")] = False,
) -> None:
    """Take what stands before a command."""


RecipePath = Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value: methods.lora.rank=4.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def say(values: Any) -> None:
    """Print values as JSON."""
    from plait.workbench.writing import plain

    typer.echo(json.dumps(plain(values), indent=1, ensure_ascii=False, allow_nan=False))


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=False)
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        drawn.add_column(column, no_wrap=number == 0)
    for row in rows:
        drawn.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(drawn)


def number(value: Any) -> str:
    """Return a figure with four digits."""
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


@app.command()
def run(
    recipe: RecipePath,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where the run is kept [runs/NAME].", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Train what a recipe says; run it again to go on where it stopped."""
    from plait.recipe import Recipe
    from plait.workbench.run import run_recipe

    made = Recipe.read(recipe, set_ or [])
    place = out or Path("runs") / made.name
    outcome = run_recipe(made, place)
    if as_json:
        say(outcome.results)
        return
    before, after = outcome.results["metrics"]["before"], outcome.results["metrics"]["after"]
    rows = [
        [f"{name} {metric}", number(before[name].get(metric, "")), number(value)]
        for name, figures in after.items()
        for metric, value in figures.items()
    ]
    table(f"{made.name}: {made.train.steps} steps", ["metric", "before", "after"], rows)
    memory, seconds = outcome.results["memory"], outcome.results["seconds"]
    typer.echo(
        f"{seconds['train']:.1f} s of training, {memory['peak'] / 2**20:.0f} MiB at most; all figures in "
        f"{place / 'results.json'}"
    )


@app.command()
def compare(
    context: typer.Context,
    recipes: Annotated[
        list[Path], typer.Argument(help="Recipes, the first being what the others are held against; or one study.")
    ],
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds each recipe is run with [5].", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where it is kept [runs/A-vs-B].", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help="local, or ray to spread the runs over a cluster.")] = "local",
    workers: Annotated[int, typer.Option(help="How many runs at a time share the cores of this machine.")] = 1,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run recipes on the same data and seeds, and write a page that says which one to use and why.

    Run it again to go on where it stopped: finished runs are kept. A study (a file with a line `study:`) holds many
    methods on several tasks: it searches each method's learning rate, then compares.
    """
    from plait.recipe import Recipe
    from plait.workbench import compare as comparing
    from plait.workbench.report import terminal_table
    from plait.workbench.study import is_study

    typed = shlex.join(["plait", *context.meta["given"]])
    if any(is_study(path) for path in recipes):
        _compare_study(
            recipes, [*(set_ or []), *([f"seeds={seeds}"] if seeds else [])], out, engine, workers, as_json, typed
        )
        return
    made = [Recipe.read(path, set_ or []) for path in recipes]
    with _saying_how_to_go_on():
        results = comparing.compare(made, seeds=seeds or 5, out=out, engine=engine, workers=workers, command=typed)
    if as_json:
        say({key: value for key, value in results.items() if key != "runs"})
    else:
        from rich.console import Console

        heads, lines = terminal_table(results)
        kept = len(heads) if Console().width >= WIDE else 5  # the report has the others
        table(results["title"], heads[:kept], [line[:kept] for line in lines])
        typer.echo("\n" + "\n".join([*comparing.lines(results), "", f"report: {results['files']['report']}"]))
    if any(warning["kind"] == "failed" for warning in results["analysis"]["warnings"]):
        raise typer.Exit(FAILED)


@contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted("stopped; what was done is kept, and the same command goes on from there.") from None


def _compare_study(
    paths: list[Path], overrides: list[str], out: Path | None, engine: str, workers: int, as_json: bool, typed: str
) -> None:
    """Run a study and print a line for each method."""
    from plait.workbench.run_study import run_study, summary
    from plait.workbench.study import Study

    if len(paths) > 1:
        raise BadInput(f"a study is compared by itself: give {paths[0]} alone, or recipes only.")
    with _saying_how_to_go_on():
        results = run_study(Study.read(paths[0], overrides), out, engine=engine, workers=workers, command=typed)
    if as_json:
        say(results)
        return
    table(results["study"]["study"], ["method", "rate", *results["tables"]], summary(results))
    typer.echo(f"\n=: cannot be told from the best\nresults: {results['files']['results']}")


@app.command()
def plan(
    recipe: RecipePath,
    memory: Annotated[str | None, typer.Option(help="What there is, as in 8GB.", show_default=False)] = None,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Predict parameters, memory and time per step before anything is trained; exit code 1 if it does not fit."""
    from plait.recipe import Recipe
    from plait.workbench import plan as planning

    made = Recipe.read(recipe, set_ or [])
    found = planning.plan(made, None if memory is None else planning.parse_memory(memory))
    if as_json:
        say(found)
    else:
        table(f"{made.name}: what it will need", ["", "about", ""], planning.rows(found))
        if "fit" in found:
            typer.echo("\n".join(["", found["fit"]["says"], *(f"  {change}" for change in found["fit"]["change"])]))
    raise typer.Exit(FAILED if "fit" in found and not found["fit"]["fits"] else OK)


@app.command("list")
def list_(
    words: Annotated[list[str] | None, typer.Argument(help="What you look for, in your own words.")] = None,
    place: Annotated[str | None, typer.Option(help="Only methods that act at this place.")] = None,
    theme: Annotated[str | None, typer.Option(help="Only methods of this theme.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or find those that fit a need: plait list "labels are noisy"."""
    from rich.console import Console

    from plait.workbench import find, index

    entries = find.only(index.read(), place, theme)
    if words:
        entries = find.rank(" ".join(words), entries)
    if as_json:
        say(entries)
        return
    columns: dict[str, Any] = {
        "key": lambda e: e["key"],
        "name": lambda e: e["name"],
        "places": lambda e: ", ".join(e["places"]),
        "theme": lambda e: e["theme"],
        "claims": find.verdicts,
        "what it does": find.first_line,
    }
    if Console().width < WIDE:  # what it does needs the room
        del columns["theme"], columns["claims"], columns["name"]
    rows = [[show(e) for show in columns.values()] for e in entries]
    if words and (not entries or entries[0]["score"] < find.FAINT):
        typer.echo(f"plait: no method fits '{' '.join(words)}' well; the nearest are shown, if any.", err=True)
    table(f"{len(rows)} methods", list(columns), rows)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A key or a name.")], as_json: Json = False) -> None:
    """Show one method: equation, reference, fields with their ranges, claims with their verdicts, file."""
    from plait.workbench import find, index

    entry = find.named(name, index.read())
    if as_json:
        say(entry)
        return
    typer.echo(f"{entry['name']}  ({entry['key']}, {entry['kind']}, {entry['theme']}; {', '.join(entry['places'])})\n")
    typer.echo(f"{entry['doc']}\n\n{entry['reference']}\n{entry['file']}\n")
    if entry["fields"]:
        fields = [[f["name"], f["type"], "required" if f["required"] else str(f["default"])] for f in entry["fields"]]
        table("Fields", ["name", "type and range", "default"], fields)
    claims = [[c["name"], c["figure"], c["baseline"], c["verdict"] or "not run"] for c in entry["claims"]]
    if claims:
        table("\nClaims", ["claim", "figure", "baseline", "verdict"], claims)
    else:
        typer.echo("Not tested: no claim is entered.")


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Keys or names; all methods with claims if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where verdicts go [evidence].", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="Seeds, instead of each claim's own number.")] = None,
    first_seed: Annotated[int | None, typer.Option(min=0, help="Where the seeds begin, for fresh ones.")] = None,
    as_json: Json = False,
) -> None:
    """Run the claims of methods and write their verdicts to evidence/KEY.json."""
    from plait.claims.base import evidence
    from plait.workbench import index
    from plait.workbench import verify as verifying
    from plait.workbench.run import versions

    place = out or index.evidence_folder()
    found, rows, holds = [], [], True
    for key, claims in verifying.claims_of(names or []).items():
        verdicts = []
        for verdict in verifying.run(key, claims, place, seeds, first_seed):
            verdicts.append(verdict)
            low, high = verdict.interval
            typer.echo(f"{key} {verdict.claim.name}: {verdict.verdict} ({verdict.seconds:.1f} s)", err=True)
            ours, theirs = (sum(v) / len(v) for v in (verdict.figures, verdict.baselines))
            said = [key, verdict.claim.name, f"{verdict.claim.figure} {number(ours)}", number(theirs)]
            rows.append([*said, verdict.claim.baseline, f"{number(low)} to {number(high)}", verdict.verdict])
            holds = holds and verdict.verdict == "holds"
        found.append(evidence(verdicts, versions()))
    if as_json:
        say(found)
    else:
        columns = ["key", "claim", "figure", "baseline's", "baseline", "improvement, 95 %", "verdict"]
        table(f"Verdicts, written to {place}", columns, rows)
    raise typer.Exit(OK if holds else FAILED)


@app.command()
def export(
    what: Annotated[Path, typer.Argument(metavar="RUN_OR_RECIPE", help="A run's folder, or a recipe to train first.")],
    folder: Annotated[Path, typer.Argument(help="Where the files go.")],
    to: Annotated[str, typer.Option(help="transformers, peft or onnx.")] = "transformers",
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="For peft: cut updates of a higher rank off at this one.", show_default=False),
    ] = None,
    set_: Overrides = None,
) -> None:
    """Write a trained model for other programs: a transformers folder, a PEFT adapter, or ONNX.

    With --rank any trained model becomes a PEFT adapter: its weights minus the base's, cut off at that rank; the
    relative error is printed.
    """
    from plait.workbench.export import export as write

    for path in write(what, to, folder, set_ or [], rank, typer.echo):
        typer.echo(str(path))


def _one_line(message: Warning | str, *where: Any, **more: Any) -> str:
    return f"warning: {message}\n"


def main() -> None:
    """Run the command line and leave with its exit code."""
    warnings.formatwarning = _one_line
    app(prog_name="plait")


if __name__ == "__main__":
    main()
