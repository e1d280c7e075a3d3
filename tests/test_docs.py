"""Every Python block of the README and the documentation runs, and every command is one that the program knows."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import plait
from plait.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]
IN_BLOCKS = [
    line
    for page in PAGES
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), re.S)
    for line in re.findall(r"^(?:\$ )?(plait .*)$", block, re.M)
]
IN_SENTENCES = [line for page in PAGES for line in re.findall(r"(?<!`)`(plait [a-z][^`\n]*)`", page.read_text())]
COMMANDS = sorted({*IN_BLOCKS, *IN_SENTENCES})
SMALL = ["--set", "train.steps=2", "--set", "data.rows=90"]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str) -> None:
    exec(compile(block, "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", ["command-line", "quantized"])
def test_commands_run_in_the_order_of_the_page(page: str, tmp_path: Path) -> None:
    """The commands of the documentation, at a reduced size, in a folder of their own."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "evidence").symlink_to(ROOT / "evidence")
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = re.findall(r"^\$ (plait .*)$", text, re.M)
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command)[1:]
        small = SMALL if words[0] in ("run", "compare", "plan") else []
        done = subprocess.run(
            [sys.executable, "-m", "plait.cli", *words, *small], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-800:]}{done.stderr[-2000:]}"


def faults(command: str) -> list[str]:
    """What of a command the program does not know: its name, its options, the files of this repository."""
    _, name, *words = shlex.split(command)
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if name not in known:
        return [name]
    options = {"--help", *(option for p in known[name].params for option in p.opts if option.startswith("-"))}
    odd = [word for word in words if word.startswith("-") and word.partition("=")[0] not in options]
    return odd + [word for word in words if word.startswith(("examples/", "studies/")) and not [*ROOT.glob(word)]]


def test_every_command_named_anywhere_exists_and_takes_its_options() -> None:
    assert "plait compare examples/tweets/*.yaml --seeds 5" in COMMANDS
    assert {command: odd for command in COMMANDS if (odd := faults(command))} == {}
    assert faults("plait comprae a.yaml") == ["comprae"]
    assert faults("plait run examples/nope.yaml --steps 3") == ["--steps", "examples/nope.yaml"]


def test_every_method_that_a_table_or_a_sentence_makes_can_be_made() -> None:
    made = []
    for page in PAGES:
        # the first column of a table of where someone comes from holds others' names
        text = re.sub(r"^\|[^|]*\|", "|", page.read_text(), flags=re.M) if page.stem == "from" else page.read_text()
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
            for call, name in re.findall(r"\b(([A-Z]\w+)\([^()]*\))", code):
                if isinstance(kind := getattr(plait, name, None), type):
                    made.append(eval(call, {name: kind}))  # raises for a field that it has not
    assert len(made) >= 15


def test_every_key_named_in_how_to_choose_is_in_the_catalogue() -> None:
    from plait import catalogue

    text = (ROOT / "docs" / "choose.md").read_text()
    table = "\n".join(line.split("|")[2] for line in text.splitlines() if line.startswith("| ") and "---" not in line)
    named = set(re.findall(r"`([a-z0-9-]+)`", table))
    assert named
    assert named <= set(catalogue.load())
