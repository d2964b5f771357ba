"""The command line: each command parses, calls, and prints.

The exit code is 0 for success, 1 for a bug (with its traceback) or a failure of the machine, 2 for bad input,
and 130 after Ctrl-C. Tables and JSON go to standard output, everything else to standard error. Each command
imports what it needs when it runs, so that `deepspec --help` loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deepspec import __version__
from deepspec.cli import (
    calibrate,
    compare,
    data_cache,
    data_download,
    data_features_server,
    data_inspect,
    data_regenerate,
    data_split,
    export,
    generate,
    inspect,
    plan,
    profile,
    quickstart,
    recommend,
    report,
    simulate,
    target_convert,
    train,
    verify,
)
from deepspec.cli import eval as eval_command
from deepspec.cli.common import BAD_INPUT, FAILED, INTERRUPTED, SETTINGS
from deepspec.errors import UserError
from deepspec.files import cannot_write, is_disk_full
from deepspec.log import note, show_error

_RUN = "answers, checkpoints and metrics so far are kept; the same command continues from there"
_PARTS = "the shards and answers finished so far are kept; the same command continues with the rest"
_WHOLE = "nothing was written, and earlier files are unchanged"
KEPT = {
    "quickstart": _RUN,
    "train": _RUN,
    "eval": "with --out, the prompts measured so far are kept; the same command continues from there",
    "calibrate": "the prompts answered so far are kept; the same command continues from there",
    "profile": "the sweeps finished so far are kept; the same command continues from there",
    "regenerate": _PARTS,
    "cache": _PARTS,
    "download": _WHOLE,
    "split": _WHOLE,
    "convert": _WHOLE,
}
"""What Ctrl-C leaves of a command's work."""


class Commands(TyperGroup):
    """A group of commands. It turns their errors into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            show_error(error)
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:
            refused = cannot_write(error)
            if refused is None:
                raise
            show_error(refused)
            raise typer.Exit(FAILED if is_disk_full(error) else BAD_INPUT) from None
        except KeyboardInterrupt:
            kept = KEPT.get(ctx.invoked_subcommand or "", "nothing was left half-written")
            note(f"interrupted: {kept}", style="yellow")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(cls=Commands, help="Make a language model faster without changing its output.", **SETTINGS)


def main() -> None:
    """Run the `deepspec` console script."""
    app(prog_name="deepspec")


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"deepspec {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("plan")(plan.plan)
app.command("eval")(eval_command.evaluate)
app.command("calibrate")(calibrate.calibrate)
app.command("profile")(profile.profile)
app.command("recommend")(recommend.recommend)
app.command("simulate")(simulate.simulate)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("export")(export.export)

data_app = typer.Typer(
    cls=Commands,
    help="Prepare the conversations that a draft is trained on.",
    no_args_is_help=True,
    **SETTINGS,
)
data_app.command("download")(data_download.download)
data_app.command("split")(data_split.split)
data_app.command("regenerate")(data_regenerate.regenerate)
data_app.command("inspect")(data_inspect.inspect)
data_app.command("cache")(data_cache.cache)
data_app.command("features-server")(data_features_server.features_server)
app.add_typer(data_app, name="data")

target_app = typer.Typer(
    cls=Commands, help="Prepare the model that is made faster.", no_args_is_help=True, **SETTINGS
)
target_app.command("convert")(target_convert.convert)
app.add_typer(target_app, name="target")
