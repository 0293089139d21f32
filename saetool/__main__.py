"""``python -m saetool`` and the ``saetool`` script."""

import sys


def main() -> None:
    from saetool.cli import app

    try:
        app()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        from saetool.errors import SaetoolError

        if not isinstance(error, SaetoolError):
            print(
                "saetool: this is a bug; please report it with the traceback below and the command you ran.",
                file=sys.stderr,
            )
        raise


if __name__ == "__main__":
    main()
