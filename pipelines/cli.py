"""The `lmr` command: parses, calls and prints. Heavy imports live in the command bodies, so that --help is instant."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from lmr_tools.allocator import keep_freed_memory
from lmr_tools.schema import LmrError

from .build_dataset import build_dataset
from .convert_checkpoint import convert_checkpoint
from .doctor import doctor
from .evaluate import evaluate
from .explain import explain
from .import_lmr import import_lmr
from .inspect import inspect
from .merge import merge
from .rebuild import rebuild
from .report import report
from .results import results
from .samples import samples
from .train import train
from .train_matcher import train_matcher
from .upscale import upscale
from .verify import verify
from .weights import weights

INTERRUPTED = 130


class Commands(click.Group):
    """A group whose commands end in one clear line: expected failures never show a traceback without --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LmrError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(_os_error(error)) from None
        except KeyboardInterrupt:
            click.echo("interrupted; run the same command again to go on", err=True)
            ctx.exit(INTERRUPTED)


def _os_error(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{name}the disk is full; make room and run the same command again, it goes on where it was"
    return f"{name}{error.strerror or error}"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="lmr-tools", prog_name="lmr")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def cli(debug: bool) -> None:
    """Build a multi-reference super-resolution dataset from your own photos, and use MRefSR with it."""
    keep_freed_memory()


GROWING = (rebuild, import_lmr, merge)
HOUSE = (weights, samples, doctor)
for command in (
    build_dataset,
    verify,
    inspect,
    explain,
    upscale,
    convert_checkpoint,
    evaluate,
    report,
    results,
    train,
    train_matcher,
    *GROWING,
    *HOUSE,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the `lmr` command."""
    sys.exit(cli(prog_name="lmr"))
