"""`megalite verify`: layouts against one process, as a table; exit code 1 if any differs.

It makes a small model of the given form, starts its own ranks, which go from row to row, and shows
for each layout the worst errors and where they are. What the ranks do: verify.py. What --random
draws: covering.py. How it is shown: verify_table.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalite.core.config import Config, LayoutConfig, ModelConfig
from megalite.core.errors import RunError, UserError
from megalite.core.world import World
from megalite.data.atomic import write_json
from megalite.train.as_ranks import rounding_of
from megalite.train.build import pick_device
from megalite.train.covering import Coverage, Drawn, Space, draw_rows, name_of, small_ramp
from megalite.train.own_files import check_own_code
from megalite.train.ranks import Ranks, last_words
from megalite.train.verify import (
    CLOSE,
    CLOSE_LATER,
    TOL,
    Gap,
    gap_from,
    most_urgent,
    other_rounding,
)
from megalite.train.verify_args import VerifyRun
from megalite.train.verify_table import (
    HEADER,
    IN_BITS,
    PLAIN,
    ROUNDING,
    Numbers,
    Result,
    Row,
    coverage_lines,
    head,
    in_bits,
    table_lines,
    tree_of,
)

MOST_RANKS = 16
"""Of one layout that the flags give; more are a mistake on most machines."""
ROW_SECONDS = 300.0
JOBS = "megalite.train.verify"
SMALL_HEAD, SMALL_VOCAB, SMALL_SCALE = 4, 61, 1024.0


def verify(run: VerifyRun) -> int:
    """Compare, print the table, and return the exit code: 0 if all are equal, else 1."""
    asked, config = run.verify, _without_verify(run)
    precision = _precision(config)
    if asked.fixed_order and precision != "fp64":
        raise UserError(
            f"--fixed-order: makes sums of fp64 exact, not of --precision {precision} "
            "(leave one of them out)"
        )
    if asked.json and not Path(asked.json).absolute().parent.is_dir():
        raise UserError(f"--json {asked.json}: no such directory {Path(asked.json).parent}")
    check_own_code(config)  # its mistakes are told here, and not by each rank
    drawn: list[Drawn] = []
    coverage: Coverage | None = None
    if asked.random is None:
        rows = [given_row(config, most=max(MOST_RANKS, asked.max_ranks))]
    else:
        base = replace(config, optim=_optim(config))
        drawn, coverage = draw_rows(Space(base, asked.max_ranks), asked.random, config.train.seed)
        rows = [Row(d.name, d.config, d.world, d.row["lengths_vary"]) for d in drawn]
    print("\n".join(head(precision, asked.steps, asked.fixed_order, config.train.device)))
    print(f"\n{HEADER}", flush=True)
    results = []
    scratch = tempfile.TemporaryDirectory(prefix="megalite-verify-")
    with Ranks(config.train.device, keep=True) as ranks, scratch as folder:
        for row in rows:
            numbers = numbers_of(row, precision, asked.fixed_order)
            results.append(compare_row(row, ranks, Path(folder), numbers, asked.steps))
            if asked.json:  # after each row: a run that is killed leaves those that were done
                tree = tree_of(run, precision, results, coverage, rows_asked=len(rows))
                write_json(asked.json, tree)
            print("\n".join(table_lines(results[-1])), flush=True)
    failed = sum(not result.ok for result in results)
    if coverage is not None:
        print("\n" + "\n".join(coverage_lines(coverage, drawn)))
    if len(results) > 1:
        print(f"\n{len(results)} layouts, {failed} differ from one process{in_bits(results)}")
    return 1 if failed else 0


def _without_verify(run: VerifyRun) -> Config:
    config = Config(**{f.name: getattr(run, f.name) for f in dataclasses.fields(Config)})
    device = _device(config, run.verify.fixed_order)
    return replace(config, train=replace(config.train, device=device))


def _device(config: Config, fixed_order: bool) -> Any:
    if config.train.dry_run:
        raise UserError("--dry-run: verify is about numbers, so it must run (leave it out)")
    if config.train.device == "cuda" and fixed_order:
        raise UserError("--device cuda: sums of --fixed-order are exact on CPU only (leave it out)")
    if fixed_order:
        return "cpu"
    return pick_device(config, World()).type


def _precision(config: Config) -> str:
    asked = config.train.precision
    return "fp64" if asked == "auto" else asked


# -- the layout of the flags -------------------------------------------------------------------


def given_row(config: Config, *, most: int) -> Row:
    """The layout that the config describes, with a small model. Raises UserError if it cannot run.

    `most` is how many ranks this command starts at most.
    """
    lay = config.layout
    world = lay.tp * lay.pp * lay.cp * (lay.dp or 1)
    if world > most:
        raise UserError(
            f"--max-ranks {most}: the layout needs {world} ranks on this machine "
            f"(use --max-ranks {world}, or a smaller layout of the same kind)"
        )
    config.check(world)
    small = small_config(config, world)
    small.check(world)
    plain = LayoutConfig(zero=-1)  # a stage is always worth naming
    changed = {
        f.name: getattr(lay, f.name)
        for f in dataclasses.fields(lay)
        if getattr(lay, f.name) != getattr(plain, f.name) and f.name != "pp_layers"
    }
    if config.data.reset_attention_mask:
        changed["reset_attention_mask"] = True
    if config.data.prefers:
        changed["dpo_beta"] = config.data.dpo_beta
    name = name_of(changed) + (" uneven" if lay.pp_layers else "")
    return Row(name, small, world)


def small_config(config: Config, world: int) -> Config:
    """The same layout with a small model and a batch of as many microbatches as fill its pipe."""
    lay, train = config.layout, config.train
    microbatches = min(config.num_microbatches(world), 2 * lay.pp * lay.vpp + 1)
    micro = min(train.micro_batch_size, 2)
    unit = micro * config.data_ranks(world)
    grows = train.rampup_batch_size is not None and microbatches > 1
    return replace(
        config,
        model=small_model(config),
        layout=replace(
            lay,
            pp_layers=_small_layers(lay.pp_layers) if lay.pp_layers else None,
            # Several buckets even of a small model.
            bucket_mb=0.01 if lay.bucket_mb is None else lay.bucket_mb,
        ),
        optim=_optim(config),
        train=replace(
            train,
            micro_batch_size=micro,
            global_batch_size=microbatches * unit,
            rampup_batch_size=small_ramp(unit, microbatches) if grows else None,
        ),
    )


def small_model(config: Config) -> ModelConfig:
    """A model of the same form, as small as the layout allows.

    Two heads a rank where there are so many, the same ratio of query to kv heads or 2 (more where
    cp cuts heads), a layer a stage (and one more where stages were uneven), and a sequence that tp
    and cp cut in quarters.
    """
    model, lay = config.model, config.layout
    tp, kv = lay.tp, model.kv_heads
    ratio = model.num_heads // kv
    if kv >= tp:
        small_kv = 2 * tp if kv % (2 * tp) == 0 else tp
        group = 1 if ratio == 1 else 2
    else:
        small_kv, least = kv, tp // kv
        group = 2 * least if ratio % (2 * least) == 0 else least
    if lay.cp_form == "ulysses" and small_kv * group // tp % lay.cp:
        group *= lay.cp  # this form cuts the heads of a tp rank
    heads, stages = small_kv * group, lay.pp * lay.vpp
    layers = min(model.num_layers, max(2, stages) + (model.num_layers % stages > 0))
    cut = (4 * tp if lay.sequence_parallel else 4) * (2 * lay.cp if lay.cp > 1 else 1)
    seq_len = min(model.seq_len, cut * math.ceil(8 / cut))
    return replace(
        model,
        num_heads=heads,
        num_kv_heads=small_kv,
        hidden_size=heads * SMALL_HEAD,
        ffn_hidden_size=2 * heads * SMALL_HEAD,
        num_layers=sum(_small_layers(lay.pp_layers)) if lay.pp_layers else layers,
        vocab_size=min(model.vocab_size, SMALL_VOCAB),
        seq_len=seq_len,
        sliding_window=model.sliding_window and min(model.sliding_window, max(1, seq_len // 2)),
        init_std=0.1,
    )


def _small_layers(layers: Sequence[int]) -> tuple[int, ...]:
    """Stages as uneven as these, the smallest of one layer, none of more than three."""
    return tuple(min(3, n - min(layers) + 1) for n in layers)


def _optim(config: Config) -> Any:
    optim = config.optim
    # A mean over so few tokens has gradients near 1; a step that is skipped is not one process's.
    scale = max(SMALL_SCALE, optim.min_loss_scale)
    # eps keeps a gradient that is zero but for rounding from becoming a whole step.
    small = replace(optim, lr=1e-2, eps=1e-4, clip_grad=0.5, warmup_steps=0)
    return replace(small, initial_loss_scale=scale)


# -- one row -----------------------------------------------------------------------------------


def numbers_of(row: Row, precision: str, fixed_order: bool) -> Numbers:
    """How a layout is compared: bit by bit in fixed order, if what it rounds allows that."""
    if row.config.layout.grad_reduce_dtype == "bf16":
        return Numbers(precision, bounds=TOL["bf16"], note="gradients are summed as bf16")
    if not fixed_order:
        return Numbers(precision)
    other = other_rounding(row.config)
    return Numbers(precision, bounds=CLOSE, note=other) if other else IN_BITS


def compare_row(row: Row, ranks: Ranks, folder: Path, numbers: Numbers, steps: int) -> Result:
    """Train the layout on `ranks` and compare it; `folder` keeps the references of its like."""
    start = time.monotonic()
    ref = str(reference_of(row, ranks, folder, steps, numbers))
    common = {"precision": numbers.precision, "varying": row.lengths_vary, "steps": steps}
    common["device"] = ranks.device

    def run(config: Config, world: int, **later: Any) -> list[dict]:
        asked = {**common, "ref": ref, "bounds": numbers.bounds, "config": config.to_dict()}
        job = f"{JOBS}:compare{numbers.job_suffix}"
        return ranks.run(job, world, kwargs={**asked, **later}, timeout=ROW_SECONDS).results

    later = CLOSE_LATER if numbers.bounds is CLOSE else {}
    try:
        if numbers.precision != "fp64":
            # How far rounding alone takes one process away from float64, step by step.
            rounding = result_of(row, run(_one_process(row.config), 1), 0.0, numbers).worst
            later = {kind: ROUNDING * gap.error for kind, gap in rounding.items()}
        found = run(row.config, row.world, later=later)
    except RunError as error:
        spent = time.monotonic() - start
        return Result(row, numbers, spent, trouble=last_words(str(error)))
    return result_of(row, found, time.monotonic() - start, numbers)


def result_of(row: Row, found: list[dict], seconds: float, numbers: Numbers = PLAIN) -> Result:
    """The worst of what the ranks found."""
    worst: dict[str, Gap] = {}
    for gap in (gap_from(tree) for each in found for tree in each["worst"].values()):
        if gap.kind not in worst or gap.error > worst[gap.kind].error:
            worst[gap.kind] = gap
    firsts = [gap_from(each["first"]) for each in found if each["first"]]
    counted, size = sum(each["owned"] for each in found), found[0]["size"]
    trouble = ""
    if counted != size:
        trouble = f"the ranks count {counted} gradients of {size}: some twice, or never"
    first, differing = most_urgent(firsts) if firsts else None, sum(e["differing"] for e in found)
    return Result(row, numbers, seconds, worst, first, trouble, differing)


def reference_of(
    row: Row, ranks: Ranks, folder: Path, steps: int, numbers: Numbers = PLAIN
) -> Path:
    """The file of the one-process run of a row's model and batch; made once for all that share it.

    Raises RunError if one process cannot run it either.
    """
    asked: dict[str, Any] = {
        "config": _one_process(row.config).to_dict(),
        "varying": row.lengths_vary,
        "steps": steps,
    }
    rounding = rounding_of(row.config) if numbers is IN_BITS else {}
    if rounding:
        asked["rounding"] = rounding
    if rounding.get("ring"):  # where its blocks end depends on a microbatch's longest sample
        size = row.config.train.micro_batch_size
        asked["config"]["train"]["micro_batch_size"] = size
    job = f"{JOBS}:reference{numbers.job_suffix}"
    path = folder / f"{hashlib.sha256(json.dumps([job, asked]).encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        try:
            kwargs = {**asked, "out": str(path)}
            ranks.run(job, 1, kwargs=kwargs, timeout=ROW_SECONDS, device="cpu")
        except RunError as error:
            raise RunError(f"verify: one process cannot run: {last_words(str(error))}") from None
    return path


def _one_process(config: Config) -> Config:
    """One sample at a time: a layout's micro-batch size is one more thing that changes nothing."""
    train = replace(config.train, micro_batch_size=1)
    return replace(config, layout=LayoutConfig(zero=0), train=train)
