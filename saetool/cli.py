"""The program: registers the verbs, and turns every error into one line and the right exit code.

Exit codes: 0 done, 1 failed or refused, 2 usage, 130 interrupted, 141 closed pipe.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from saetool import __version__
from saetool.errors import SaetoolError
from saetool.options import Debug

# torch asks the system for large blocks at every step; in huge pages they cost a five-hundredth of the page faults, a
# tenth of a training step. Read by torch when it is first imported.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _Boundary(TyperGroup):
    """Catches what a verb raises. One place decides how an error looks and which exit code it has."""

    def invoke(self, ctx: Any) -> Any:
        Debug.on = False
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except SaetoolError as error:
            if Debug.on:
                raise
            verb = f" {ctx.invoked_subcommand}" if ctx.invoked_subcommand else ""
            print(f"saetool{verb}: {error.message}", file=sys.stderr)
            if error.hint:
                print(f"hint: {error.hint}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            raise typer.Exit(141) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Boundary,
    name="saetool",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"saetool {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Sparse autoencoders as shell pipelines over checkpoint files.

    cache → train → threshold → eval → stitch → meta → autointerp → report
    """


def spread(args: list[str], options: tuple[str, ...]) -> list[str]:
    """``--o a b --x`` as ``--o a --o b --x``, for ``options`` that take several values."""
    out, option = [], ""
    for at, arg in enumerate(args):
        if arg == "--":
            return out + args[at:]
        if arg.startswith("-") and arg != "-":
            option = arg if arg in options else ""
            out.append(arg)
        elif option and out[-1] != option:
            out += [option, arg]
        else:
            out.append(arg)
    return out


def _taking_several(options: tuple[str, ...]) -> type[TyperCommand]:
    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, spread(args, options))

    return Command


def _register() -> None:
    from saetool.commands import SEVERAL, VERBS

    for name, function in VERBS.items():
        app.command(name, cls=_taking_several(SEVERAL.get(name, ())))(function)


_register()
