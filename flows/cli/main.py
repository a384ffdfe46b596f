"""The `overnight` command. Commands import what is heavy when they run, so that help is instant."""

import errno
import sys
from typing import Annotated

import typer

from flows.cli import data, model, service, train
from flows.cli.options import USER_ERROR
from flows.runtime.process_exit import exit_process
from gpt.errors import GPTError, Problem, StorageError
from gpt.gc_tuning import tune_gc

SUMMARY = "Pretrain a GPT overnight on one GPU, from Parquet to an evaluated model."
START_HERE = """\b
Begin with:
  overnight sample-corpus data/sample.parquet
  overnight validate configs/tiny.toml
  overnight run configs/tiny.toml
"""

STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)
"""Of a disk or folder, which the user can mend; other errors of the system are bugs."""

app = typer.Typer(
    name="overnight",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for group in (train, data, model, service):
    app.add_typer(group.app)


def main() -> None:
    """Run the command. A `GPTError`, or a disk or folder that cannot be used, prints its message
    alone and exits with code 2."""
    tune_gc()
    try:
        app()
    except GPTError as error:
        print(error, file=sys.stderr)
        exit_process(USER_ERROR)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        remedy = "free space there, or use a folder that you can write, e.g. by run.root or --root"
        place = str(error.filename or "the disk")
        print(StorageError(Problem(place, "", str(error.strerror), remedy)), file=sys.stderr)
        exit_process(USER_ERROR)
    except SystemExit as exiting:
        exit_process(exiting.code)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(f"overnight {version('overnight')}")
        raise typer.Exit


@app.callback(help=SUMMARY, epilog=START_HERE)
def overnight(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
