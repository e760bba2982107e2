"""Which fields of a Config can run together. What one field may hold: core/check_values.py.

Functions of the record and the world size alone (`check_paths` looks at this host's disk, and a
user's own schedule is read from it), so every rank raises the same text before any collective.
Not here: what needs a device (train/build.py).
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.core.check_values import (
    LARGEST_INT,
    choices,
    divisors,
    flag,
    multiples_near,
    nearest,
    unknown,
)
from megalite.core.errors import DataError, UserError
from megalite.core.shard import CONTEXT_ORDER, sequence_multiple
from megalite.schedule.check import check
from megalite.schedule.custom import is_file, load_schedule
from megalite.schedule.generators import CHUNKED, SCHEDULES

if TYPE_CHECKING:
    from megalite.core.config import Config, ModelConfig

PARTS = ("core-attention", "norm", "activation")
"""The parts of a layer that --recompute-modules may name: from the fused queries, keys and values
to attention's output (the rotation, the normalisation of heads and all of context parallelism
included), the norms in front of attention and MLP, and the MLP's nonlinearity."""


def check_model(model: ModelConfig) -> None:
    """Raise UserError unless the shape fits itself, before any cut."""
    heads, kv_heads, hidden = model.num_heads, model.kv_heads, model.hidden_size
    if hidden % heads:
        allowed = choices(nearest(divisors(hidden), to=heads))
        raise UserError(
            f"--num-heads {heads}: --hidden-size {hidden} is not divisible by {heads} "
            f"(allowed: {allowed})"
        )
    if heads % kv_heads:
        allowed = choices(divisors(heads))
        raise UserError(
            f"--num-kv-heads {kv_heads}: does not divide --num-heads {heads} (allowed: {allowed})"
        )
    if model.position == "rope" and model.head_dim % 2:
        raise UserError(
            f"--position rope: needs an even head size, but --hidden-size {hidden} / --num-heads "
            f"{heads} = {model.head_dim} (change one of them, or use --position learned)"
        )


def check_layout(config: Config, world_size: int) -> None:
    """Raise UserError unless the layout fits the world, the model and the batch."""
    _check_world(config, world_size)
    _check_tp(config)
    _check_cp(config)
    _check_stages(config)
    _check_recompute(config)
    lay, train = config.layout, config.train
    if lay.zero > 3:
        raise UserError(f"--zero {lay.zero}: there are stages 0 to 3 (use one of them)")
    step = train.micro_batch_size * config.data_ranks(world_size)
    product = f"--micro-batch-size {train.micro_batch_size} * dp {config.data_ranks(world_size)}"
    batch = train.global_batch_size
    if batch % step:
        raise UserError(
            f"--global-batch-size {batch}: not a multiple of {product} = {step} "
            f"(nearest: {choices(multiples_near(batch, step))})"
        )
    for size in config.batch_sizes()[:2]:  # where two follow each other, so do all
        if size % step:
            raise UserError(
                f"{_ramp_in_words(config)}: a batch of {size} is no multiple of {product} = {step} "
                "(START and INCREMENT must be)"
            )
    _check_schedule(config, world_size)


def _check_world(config: Config, world_size: int) -> None:
    lay = config.layout
    model_ranks = lay.tp * lay.pp * lay.cp
    product = f"{lay.tp}*{lay.pp}*{lay.cp}"
    if world_size % model_ranks:
        worlds = " or ".join(str(w) for w in multiples_near(world_size, model_ranks))
        raise UserError(
            f"layout: world size {world_size} is not divisible by tp*pp*cp = {product} = "
            f"{model_ranks} (use --nproc-per-node {worlds}, or change --tp or --pp)"
        )
    if lay.dp is not None and model_ranks * lay.dp != world_size:
        raise UserError(
            f"--dp {lay.dp}: tp*pp*cp*dp = {product}*{lay.dp} = {model_ranks * lay.dp}, but the "
            f"world has {world_size} ranks (use --dp {world_size // model_ranks}, or leave it out)"
        )


def _check_tp(config: Config) -> None:
    model, lay = config.model, config.layout
    tp, kv_heads = lay.tp, model.kv_heads
    fits = [
        t
        for t in divisors(math.gcd(model.num_heads, model.ffn))
        if kv_heads % t == 0 or t % kv_heads == 0
    ]
    allowed = f"(allowed: {choices(fits)})"
    if model.num_heads % tp:
        raise UserError(
            f"--tp {tp}: --num-heads {model.num_heads} is not divisible by {tp} {allowed}"
        )
    if kv_heads % tp and tp % kv_heads:
        raise UserError(
            f"--tp {tp}: no divisor and no multiple of --num-kv-heads {kv_heads} {allowed}"
        )
    if model.ffn % tp:
        raise UserError(
            f"--tp {tp}: --ffn-hidden-size {model.ffn} is not divisible by {tp} {allowed}"
        )
    if lay.sequence_parallel and lay.cp == 1 and model.seq_len % tp:
        raise UserError(
            f"--seq-len {model.seq_len}: sequence parallelism cuts it over --tp {tp} "
            f"(nearest: {choices(multiples_near(model.seq_len, tp))}; or --no-sequence-parallel)"
        )


def _check_cp(config: Config) -> None:
    model, lay = config.model, config.layout
    if lay.cp == 1:
        return
    rows = lay.tp if lay.sequence_parallel else 1
    multiple = sequence_multiple(lay.cp, CONTEXT_ORDER[lay.cp_form], rows=rows)
    if model.seq_len % multiple:
        also = f" and sequence parallelism over --tp {rows}" if rows > 1 else ""
        raise UserError(
            f"--seq-len {model.seq_len}: --cp {lay.cp} --cp-form {lay.cp_form}{also} cut it "
            f"{multiple} ways (nearest: {choices(multiples_near(model.seq_len, multiple))})"
        )
    heads = model.num_heads // lay.tp
    if lay.cp_form == "ulysses" and heads % lay.cp:
        raise UserError(
            f"--cp-form ulysses: the {heads} heads of a tp rank are not divisible by --cp {lay.cp} "
            f"(allowed: {choices(divisors(heads))}; or --cp-form ring)"
        )


def _check_stages(config: Config) -> None:
    lay, layers = config.layout, config.model.num_layers
    own = is_file(lay.schedule)
    if not own and lay.schedule not in SCHEDULES:
        raise UserError(unknown("--schedule", lay.schedule, SCHEDULES))
    if lay.vpp > 1 and not own and lay.schedule not in CHUNKED:
        names = " or ".join(CHUNKED)
        raise UserError(f"--vpp {lay.vpp}: needs --schedule {names} (got {lay.schedule})")
    if lay.vpp > 1 and lay.pp == 1:
        raise UserError(f"--vpp {lay.vpp}: needs --pp above 1 (got 1)")
    if lay.post_validation and lay.pp == 1:
        raise UserError("--post-validation: needs --pp above 1 (got 1: no rank waits for another)")
    stages = lay.pp * lay.vpp
    if stages > layers:
        # Only a vpp that fits some pp above 1 leaves a pp to name.
        largest = layers // lay.vpp
        way = (
            f"the largest --pp is {largest}"
            if largest > 1 or lay.vpp == 1
            else "use a smaller --vpp"
        )
        raise UserError(
            f"--pp {lay.pp}: {lay.pp} * vpp {lay.vpp} = {stages} stages, but the model has "
            f"{layers} layers ({way})"
        )
    if lay.pp_layers is None:
        return
    shown = "--pp-layers " + ",".join(str(n) for n in lay.pp_layers)
    if any(not 1 <= n <= LARGEST_INT for n in lay.pp_layers):
        raise UserError(f"{shown}: each stage needs at least 1 layer")
    if len(lay.pp_layers) != stages:
        raise UserError(
            f"{shown}: names {len(lay.pp_layers)} stages, but --pp {lay.pp} * --vpp {lay.vpp} "
            f"makes {stages}"
        )
    if sum(lay.pp_layers) != layers:
        raise UserError(f"{shown}: sums to {sum(lay.pp_layers)}, the model has {layers} layers")


def _check_recompute(config: Config) -> None:
    lay = config.layout
    if lay.recompute_modules is not None:
        if lay.recompute != "selective":
            shown = ",".join(lay.recompute_modules)
            raise UserError(
                f"--recompute-modules {shown}: needs --recompute selective (got {lay.recompute})"
            )
        for name in lay.recompute_modules:
            if name not in PARTS:
                raise UserError(unknown("--recompute-modules", name, PARTS))
    if lay.recompute_layers is not None and lay.recompute == "none":
        raise UserError(
            f"--recompute-layers {lay.recompute_layers}: needs --recompute selective or full "
            "(got none)"
        )


def _check_schedule(config: Config, world_size: int) -> None:
    """Raise UserError unless the schedule can have these sizes; a user's own is proven whole.

    Tests have proven ours at all sizes, so one microbatch shows what they have to say.
    """
    lay = config.layout
    try:
        make = load_schedule(lay.schedule)
        make(lay.pp, 1, lay.vpp)
        for batch in config.batch_sizes() if is_file(lay.schedule) else ():
            made = make(lay.pp, config.num_microbatches(world_size, batch), lay.vpp)
            check(made, tied=(0, made.num_stages - 1) if config.model.tie_embeddings else None)
    except ValueError as e:
        raise UserError(f"--schedule {e}") from None


def check_train(config: Config) -> None:
    """Raise UserError unless the run's own settings agree."""
    optim, train = config.optim, config.train
    if optim.warmup_steps > train.train_steps:
        raise UserError(
            f"--warmup-steps {optim.warmup_steps}: more than --train-steps {train.train_steps}"
        )
    if config.data.valid_data == "synthetic":
        raise UserError(
            "--valid-data synthetic: has no end, and is what --data synthetic trains on (use a "
            "prefix of megalite preprocess)"
        )
    data = config.data
    if data.valid_data and data.talks != data.is_conversations(data.valid_data):
        raise UserError(
            f"--valid-data {data.valid_data}: is not of the kind of --data {data.data} (two .jsonl "
            "files of conversations, or two prefixes of megalite preprocess)"
        )
    _check_ramp(config)
    if config.model.mup_base_width is not None and optim.optimizer in ("sgd", "muon"):
        raise UserError(
            f"--mup-base-width {config.model.mup_base_width}: its learning rates are those of "
            f"Adam, not of --optimizer {optim.optimizer} (use adamw)"
        )
    if train.world is not None and not train.dry_run:
        raise UserError(
            f"--world {train.world}: only --dry-run uses it (torchrun says how many ranks run)"
        )
    for name in ("label_smoothing", "z_loss"):
        if data.prefers and getattr(config.model, name):
            raise UserError(
                f"{flag(name)} {getattr(config.model, name):g}: is of the cross entropy, and "
                f"--dpo-beta {data.dpo_beta:g} learns preferences (use {flag(name)} 0)"
            )
    _check_traced(train.trace_steps, train.train_steps)
    _check_loss_scale(config)


def _check_traced(text: str, train_steps: int) -> None:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text, re.ASCII)
    if text and found is None:
        raise UserError(f"--trace-steps {text}: expected FIRST:LAST as 3:5")
    if found and not 1 <= int(found[1]) <= int(found[2]) <= train_steps:
        raise UserError(
            f"--trace-steps {text}: the steps of this run are 1 to {train_steps}, the first named "
            "first"
        )


def _check_ramp(config: Config) -> None:
    """Raise UserError unless the batch grows from a smaller one to its size in whole increments."""
    ramp, last = config.train.rampup_batch_size, config.train.global_batch_size
    if ramp is None:
        return
    shown = _ramp_in_words(config)
    if len(ramp) != 3 or any(not 1 <= n <= LARGEST_INT for n in ramp):
        raise UserError(f"{shown}: expected START,INCREMENT,SAMPLES, each at least 1")
    start, increment, _ = ramp
    if start >= last or (last - start) % increment:
        raise UserError(
            f"{shown}: from {start} by {increment} does not come to --global-batch-size {last} "
            "(choose START below it, at a distance that INCREMENT divides)"
        )


def _ramp_in_words(config: Config) -> str:
    return "--rampup-batch-size " + ",".join(map(str, config.train.rampup_batch_size or ()))


def _check_loss_scale(config: Config) -> None:
    optim, precision = config.optim, config.train.precision
    if precision == "fp16" and config.layout.post_validation:
        raise UserError(
            "--post-validation: not with --precision fp16, whose loss scale waits for the norm of "
            "the step before (leave it out, or use bf16)"
        )
    if precision != "fp16" and optim.loss_scale:
        raise UserError(
            f"--loss-scale {optim.loss_scale:g}: needs --precision fp16 (got {precision})"
        )
    if optim.min_loss_scale > optim.initial_loss_scale:
        raise UserError(
            f"--min-loss-scale {optim.min_loss_scale:g}: more than --initial-loss-scale "
            f"{optim.initial_loss_scale:g}"
        )


def check_paths(config: Config) -> None:
    """Raise UserError unless what the run reads is on this host's disk and --out can be written."""
    data, train = config.data, config.train
    out = Path(train.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, a run needs a directory")
    parent = next(p for p in (out, *out.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot write in {parent}")
    for name, prefix in (("data", data.data), ("valid_data", data.valid_data)):
        if prefix in ("", "synthetic"):
            continue
        if data.is_conversations(prefix):
            if not Path(prefix).is_file():
                raise DataError(f"{flag(name)} {prefix}: no such file")
            continue
        for end in (".bin", ".idx"):
            if not Path(prefix + end).is_file():
                raise DataError(
                    f"{flag(name)} {prefix}: no file {prefix}{end} "
                    "(make it with megalite preprocess)"
                )
    if data.tokenizer and not Path(data.tokenizer).is_file():
        raise DataError(
            f"--tokenizer {data.tokenizer}: no such file (make it with megalite tokenizer train)"
        )
    if (
        train.init_from
        and not train.init_from.startswith("hf:")
        and not Path(train.init_from).is_dir()
    ):
        raise UserError(f"--init-from {train.init_from}: no such run or checkpoint directory")
