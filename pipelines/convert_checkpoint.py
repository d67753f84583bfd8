"""`lmr convert-checkpoint`: published .pth files go in, one self-contained and checked checkpoint comes out."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lmr_tools.schema import LmrError

# Those of mrefsr.checkpoints, which is too heavy to import here.
KINDS = ("mrefsr", "c2-matching", "masa", "esrgan", "matcher")
FILE = click.Path(path_type=Path)


@click.command("convert-checkpoint")
@click.option("--kind", required=True, type=click.Choice(KINDS), help="Whose weights they are.")
@click.argument("net", metavar="NET.pth", type=FILE)
@click.option(
    "--extractor", type=FILE, metavar="F.pth", help="C2-Matching's feature_extraction.pth (mrefsr, c2-matching)."
)
@click.option("--vgg19", type=FILE, metavar="F.pth", help="torchvision's VGG19 (mrefsr, c2-matching).  [TORCH_HOME]")
@click.argument("out", metavar="OUT.safetensors", type=FILE)
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found and written as JSON.")
def convert_checkpoint(
    kind: str, net: Path, extractor: Path | None, vgg19: Path | None, out: Path, force: bool, as_json: bool
) -> None:
    """Turn published weights into a checkpoint of lmr-tools.

    NET.pth is the network's file, flat or under `params` or `params_ema`. It is read without running any code in it,
    and every tensor's name, shape and values are checked. OUT.safetensors then holds all that the method needs.
    Kind matcher is feature_extraction.pth alone, to train with (lmr train --matcher).
    """
    _check_out(out, [path for path in (net, extractor, vgg19) if path], force)

    from lmr_tools.tables import sha256_file
    from mrefsr.checkpoints import save_checkpoint
    from mrefsr.foreign import convert

    checkpoint = convert(kind, net, extractor=extractor, vgg19=vgg19)
    save_checkpoint(out, checkpoint)
    digest, size = sha256_file(out), out.stat().st_size
    if as_json:
        summary = {"out": str(out), "kind": kind, "bytes": size, "sha256": digest, "config": checkpoint.config}
        click.echo(json.dumps(summary | checkpoint.provenance, indent=2))
        return
    for source in checkpoint.provenance["sources"]:
        click.echo(
            f"{source['part']}: {source['file']}, {source['tensors']} tensors, {source['parameters'] / 1e6:.2f} M "
            f"parameters, {source['naming']} names, {source['entry']}"
        )
    click.echo(f"{out}: {kind}, {size / 1e6:.1f} MB, sha256 {digest}")


def _check_out(out: Path, sources: list[Path], force: bool) -> None:
    """Refuse an OUT that would destroy something, before anything is read."""
    if out.suffix != ".safetensors":
        raise LmrError(f"{out}: the checkpoint is a safetensors file; name it {out.with_suffix('.safetensors')}")
    if out.is_dir():
        raise LmrError(f"{out}: is a folder; name a file for the checkpoint")
    if any(out.exists() and source.exists() and out.samefile(source) for source in sources):
        raise LmrError(f"{out}: is one of the files to convert; name another")
    if out.exists() and not force:
        raise LmrError(f"{out}: exists already; name another file, or give --force to overwrite it")
