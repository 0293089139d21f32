"""The README cannot lie: its reference is generated from the program, its commands exist.

python tests/test_readme.py --write      renews the reference block
"""

import re
import sys
from pathlib import Path

import typer.main

from saetool.cli import app

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- reference: generated -->", "<!-- /reference -->"


def reference() -> str:
    """Every verb with its arguments and options, as the program declares them."""
    lines = []
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        summary = (command.help or "").strip().splitlines()[0]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments)
        lines += [f"**`saetool {name} {usage}`** {summary}", ""]
        options = []
        for option in command.params:
            if option.param_type_name != "option" or option.name in COMMON:
                continue
            words = " / ".join(sorted({*option.opts, *option.secondary_opts}, key=lambda o: (o.startswith("--"), o)))
            options.append(f"`{words}`")
        if options:
            lines += [" ".join(options), ""]
    return "\n".join(lines).strip()


COMMON = {"overwrite", "dry_run", "json_", "quiet", "debug", "seed", "device", "resume", "log", "out"}


def block(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip()


def test_the_reference_is_the_programs() -> None:
    assert block(README.read_text()) == reference(), "run: python tests/test_readme.py --write"


def test_every_command_line_in_the_readme_names_a_real_verb_and_real_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = "\n".join(re.findall(r"```sh\n(.*?)```", README.read_text(), re.S)).replace("\\\n", " ")
    found = re.findall(r"^saetool (\S+)(.*)$", text, re.M)
    assert len(found) >= 8
    for verb, rest in found:
        known = {o for p in commands[verb].params for o in (*p.opts, *p.secondary_opts)}
        used = set(re.findall(r"(?<=\s)(--?[a-z][\w-]*)", rest.split("#")[0]))
        assert used <= known, (verb, used - known)


if __name__ == "__main__" and "--write" in sys.argv:
    old = README.read_text()
    README.write_text(f"{old.split(BEGIN)[0]}{BEGIN}\n{reference()}\n{END}{old.split(END)[1]}")
