"""What `lmr upscale` will make, as a list of jobs: all files are found and all clashes told before any work begins."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmr_tools.schema import LmrError


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to make. Without references `problem` says why it can not be made, where that is so."""

    target: Path
    references: tuple[Path, ...]
    out: Path
    matches: Path | None
    problem: str | None = None

    def done(self) -> bool:
        return self.out.exists() and (self.matches is None or self.matches.exists())


def plan_one(
    target: Path, given: Sequence[Path], refs: Path | None, out: Path, matches: Path | None, force: bool
) -> Job:
    """The job of a single picture. LmrError when a file is missing or would be overwritten."""
    if refs is not None:
        raise LmrError(f"--refs {refs}: goes with a folder of targets; for one picture give --ref {refs}")
    if not target.is_file():
        raise LmrError(f"{target}: no such picture")
    for path in (out, matches):
        if path is None:
            continue
        if path.is_dir():
            raise LmrError(f"{path}: is a folder; name a file such as {path / (target.stem + '.png')}")
        if path.exists() and not force:
            raise LmrError(f"{path}: exists already; name another file, or give --force to overwrite it")
    if out.suffix.lower() != ".png":
        raise LmrError(f"{out}: the result is a PNG; name it {out.with_suffix('.png')}")
    if matches is not None and matches.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise LmrError(f"{matches}: the picture of matches is a .png or .jpg; use one of these endings")
    job = Job(target=target, references=_all_references(given), out=out, matches=matches)
    _check_apart([job])
    return job


def plan_folder(targets: Path, given: Sequence[Path], refs: Path | None, out: Path, matches: Path | None) -> list[Job]:
    """One job for each picture in `targets`, by name. LmrError when nothing could come of it."""
    pictures = _pictures(targets)
    if not pictures:
        raise LmrError(f"{targets}: holds no picture ({', '.join(_suffixes())})")
    stems: dict[str, Path] = {}
    for picture in pictures:
        if picture.stem in stems:
            raise LmrError(f"{stems[picture.stem]} and {picture}: both would become {picture.stem}.png; rename one")
        stems[picture.stem] = picture
    for folder in (out, matches):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise LmrError(f"{folder}: is a file; for a folder of targets name a folder")
    if out.resolve() == targets.resolve():
        raise LmrError(f"{out}: is the folder of the targets; name another for the results")
    common = _all_references(given)
    own = references_of(stems, refs)
    layout = f"expected in {refs}/NAME/ or as {refs}/NAME_*, where NAME is the target's without its ending"
    if refs is not None and not common and not any(own.values()):
        raise LmrError(f"--refs {refs}: no references for any of the {len(stems)} targets; {layout}")
    if refs is None and not common:
        raise LmrError("no references: give --refs FOLDER, or --ref FILE for references that all targets share")
    jobs = []
    for stem, picture in stems.items():
        references = (*common, *own[stem])
        place = None if matches is None else matches / f"{stem}.png"
        problem = None if references else f"no references, {layout.replace('NAME', stem, 2)}"
        job = Job(target=picture, references=references, out=out / f"{stem}.png", matches=place, problem=problem)
        jobs.append(job)
    _check_apart(jobs)
    return jobs


def references_of(stems: Iterable[str], refs: Path | None) -> dict[str, list[Path]]:
    """Each target's references: those in refs/STEM/, then refs/STEM_*, which go to the longest stem that fits."""
    found: dict[str, list[Path]] = {stem: [] for stem in stems}
    if refs is None:
        return found
    if not refs.is_dir():
        raise LmrError(f"--refs {refs}: no such folder")
    for stem in found:
        if (refs / stem).is_dir():
            found[stem] += _pictures(refs / stem)
    for picture in _pictures(refs):
        fitting = [stem for stem in found if picture.stem.startswith(f"{stem}_")]
        if fitting:
            found[max(fitting, key=len)].append(picture)
    return found


def left_over(folder: Path, jobs: Sequence[Job]) -> list[str]:
    """Names of what lies in `folder` and no job reads; results and hidden files aside."""
    named = [path for job in jobs for path in (job.target, *job.references, job.out, job.matches) if path is not None]
    known = {place for path in named for place in (path.resolve(), path.resolve().parent)}
    return sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.resolve() not in known)


def _all_references(given: Sequence[Path]) -> tuple[Path, ...]:
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = _pictures(path)
            if not inside:
                raise LmrError(f"--ref {path}: this folder holds no picture ({', '.join(_suffixes())})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise LmrError(f"--ref {path}: no such file")
    return tuple(found)


def _pictures(folder: Path) -> list[Path]:
    suffixes = _suffixes()
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def _suffixes() -> tuple[str, ...]:
    from lmr_tools.images import SUFFIXES

    return SUFFIXES


def check_writable(*paths: Path | None) -> None:
    """Before any work: the folder that each result goes to exists and takes files."""
    for path in paths:
        if path is None:
            continue
        folder = path if path.is_dir() else path.absolute().parent
        if not folder.is_dir():
            raise LmrError(f"{path}: the folder {folder} does not exist; make it first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise LmrError(f"{path}: the folder {folder} is not writable; choose another")


def _check_apart(jobs: Sequence[Job]) -> None:
    """No result may take the place of a picture that is read, or of another result."""
    read = {path.resolve() for job in jobs for path in (job.target, *job.references)}
    made: set[Path] = set()
    for path in (path for job in jobs for path in (job.out, job.matches) if path is not None):
        if path.resolve() in read:
            raise LmrError(f"{path}: is one of the pictures that are read; name another place for the result")
        if path.resolve() in made:
            raise LmrError(f"{path}: would be written twice; name another place for the picture of matches")
        made.add(path.resolve())
