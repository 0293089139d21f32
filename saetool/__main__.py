"""``python -m saetool`` and the ``saetool`` script."""

import io
import os
import sys

from saetool.errors import SaetoolError


class _StandardOutput(io.FileIO):
    """Standard output, whose errors say what they are of."""

    left = False
    """Whether its reader has gone."""

    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:
            self.left = True
            raise
        except OSError as error:
            raise SaetoolError(f"standard output: cannot be written ({error.strerror})") from None


def main() -> None:
    out = _replace_standard_output()
    code = _run()
    try:
        sys.stdout.flush()
    except (BrokenPipeError, SaetoolError) as error:
        if isinstance(error, SaetoolError) and not code:
            print(f"saetool: {error.message}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain again when it flushes at exit
        code = code or 1
    raise SystemExit(141 if out.left else code)


def _replace_standard_output() -> _StandardOutput:
    """By one that is written whole or raises: with PYTHONUNBUFFERED, a write takes what fits and drops the rest."""
    if sys.stdout is None:  # closed: whoever prints is told, and no file that is opened gets its number
        os.dup2(os.open(os.devnull, os.O_RDONLY), 1)
        encoding, errors, by_line = "utf-8", "strict", False
    else:
        encoding, errors, by_line = sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering
    raw = _StandardOutput(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line)
    return raw


def _run() -> int:
    """The exit code of the command that was typed."""
    from saetool.cli import app
    from saetool.options import Debug

    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        return end.code or 0
    except SaetoolError as error:  # help and the version are printed before a verb begins
        if Debug.on:
            raise
        print(f"saetool: {error.message}", file=sys.stderr)
        return error.exit_code
    except Exception:
        print(
            "saetool: this is a bug; please report it with the traceback below and the command you ran.",
            file=sys.stderr,
        )
        raise
    return 0


if __name__ == "__main__":
    main()
