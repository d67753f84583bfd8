"""What an evaluation is to do: the settings of a run, and the rows that they ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmr_tools.results import settings_path
from lmr_tools.schema import LmrError, Split
from lmr_tools.tables import fingerprint, read_json, sha256_file
from lmr_tools.testset_layouts import Entry, Plan
from lmr_tools.testsets import choose_references, plan_testset
from mrefsr.systems import METHODS

POLICIES = ("first", "best", "each")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the rows of a run, and where its data and weights lie.

    `count`: at most so many references (None: all there are); `tiers`: those alone (none: all). `policy` is how a
    method is given one reference of several: `first`; `each`, a row for every one; `best`, the one whose result has the
    highest PSNR on Y, which looks at the target and so is an upper bound. `all`: any number; `none`: it takes none.
    """

    benchmark: str
    data: str
    split: str
    protocol: str
    method: str
    weights: str | None
    weights_sha256: str | None
    label: str
    count: int | None
    tiers: tuple[str, ...]
    policy: str

    @property
    def run_id(self) -> str:
        """Twelve hex digits; equal for equal settings, wherever the weights lie."""
        values = dataclasses.asdict(self)
        return fingerprint([values[name] for name in sorted(values) if name != "weights"])


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row to be made; `name` is that of its files."""

    name: str
    entry: Entry


def make_settings(
    *,
    benchmark: str,
    data: Path,
    split: str,
    protocol: str,
    method: str,
    weights: Path | None,
    label: str | None,
    count: int | None,
    tiers: Sequence[str],
    policy: str | None,
) -> Settings:
    """`Settings` with the weights' sha256, the data's full path, and defaults filled in."""
    if weights is not None and not weights.is_file():
        raise LmrError(f"--weights {weights}: no such file; lmr convert-checkpoint or lmr train makes one")
    return Settings(
        benchmark=benchmark,
        data=str(data.resolve()),
        split=split if benchmark == "dataset" else "",
        protocol=protocol,
        method=method,
        weights=None if weights is None else str(weights),
        weights_sha256=None if weights is None else sha256_file(weights),
        label=label or method,
        count=count if METHODS[method].references != 0 else None,
        tiers=tuple(tiers),
        policy=choose_policy(method, policy),
    )


def load_settings(run: Path, run_id: str) -> Settings:
    """The settings of a run in a folder."""
    values = read_json(settings_path(run, run_id))
    try:
        return Settings(**{**values, "tiers": tuple(values["tiers"])})
    except (TypeError, KeyError):
        raise LmrError(f"{settings_path(run, run_id)}: settings of another version; evaluate again") from None


def plan_run(settings: Settings) -> Plan:
    """The test set of a run."""
    return plan_testset(settings.benchmark, Path(settings.data), Split(settings.split or Split.TEST))


def choose_policy(method: str, policy: str | None) -> str:
    """The policy of a method: what was asked for, or its default. LmrError where the method takes no reference."""
    takes = METHODS[method].references
    if takes == 0:
        if policy:
            raise LmrError(f"--reference-policy {policy}: {method} takes no reference; leave the option out")
        return "none"
    return policy or ("first" if takes == 1 else "all")


def plan_jobs(settings: Settings, plan: Plan, limit: int | None) -> list[Job]:
    """The rows of a run, in the order of the plan; with `limit`, those of the first targets."""
    jobs = []
    for entry in plan.entries[:limit]:
        chosen = choose_references(entry, benchmark=settings.benchmark, count=settings.count, tiers=settings.tiers)
        references = chosen.references
        if settings.policy == "none":
            references = ()
        elif settings.policy == "first":
            references = references[:1]
        if settings.policy == "each":
            for number, reference in enumerate(references, 1):
                single = dataclasses.replace(chosen, references=(reference,))
                jobs.append(Job(name=f"{entry.image_id}.{number}", entry=single))
        else:
            jobs.append(Job(name=entry.image_id, entry=dataclasses.replace(chosen, references=references)))
    return jobs
