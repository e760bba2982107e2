"""Every layout equals one process. A feature adds a row here, not a test file.

Each row trains three steps on gloo ranks and compares loss, gradient norm, every gradient and every
updated weight with the one-process float64 run of the same model and batch. Then it saves, loads
what the row before it of the same model saved in its own layout, and compares one step more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megalite.core.config import (
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from megalite.core.mesh import Axis
from megalite.core.shard import sequence_positions
from megalite.train import verify

STEPS = 3
TOL = {"float64": verify.TOL["fp64"], "float32": verify.TOL["fp32"]}

GPT = ModelConfig(
    num_layers=4, hidden_size=48, num_heads=12, vocab_size=61, seq_len=12, init_std=0.1
)
LLAMA = replace(
    GPT,
    norm="rmsnorm",
    activation="swiglu",
    position="rope",
    bias=False,
    tie_embeddings=False,
    ffn_hidden_size=96,
)
UNTIED = replace(GPT, tie_embeddings=False)
EVERYTHING = replace(
    LLAMA, qk_norm=True, sliding_window=5, logit_soft_cap=4.0, attention_soft_cap=3.0
)
WINDOW = replace(GPT, sliding_window=3)
LONG = replace(GPT, seq_len=16)
DROPOUT = replace(GPT, dropout=0.2, attention_dropout=0.1)
MUP = replace(GPT, mup_base_width=16)
MUON = {"optimizer": "muon"}
LION = {
    "optimizer": f"{Path(__file__).resolve().parents[2]}/examples/my_optimizer.py:Lion",
    "lr": 1e-3,
}
SMALL = replace(GPT, num_layers=1, hidden_size=12, num_heads=3)
MY_SCHEDULE = f"{Path(__file__).resolve().parents[2]}/examples/my_schedule.py:my_schedule"


def held_by(idx: int) -> tuple[int, ...]:
    """Positions of a sequence of GPT's that context rank `idx` of 2 holds."""
    spans = sequence_positions(GPT.seq_len, Axis("cp", 2, idx), order="zigzag")
    return tuple(position for span in spans for position in span)


@dataclass(frozen=True)
class Row:
    """One layout of one model."""

    name: str
    model: ModelConfig
    layout: dict[str, Any] = field(default_factory=dict)
    micro: int = 2
    batch: int = 16
    varying: bool = False
    documents: bool = False
    dtype: str = "float64"
    blank: tuple[int, ...] = ()
    """Positions whose labels take no part."""
    optim: dict[str, Any] = field(default_factory=dict)
    ramp: tuple[int, ...] | None = None

    @property
    def world(self) -> int:
        lay = self.config.layout
        return lay.tp * lay.pp * lay.cp * (lay.dp or 1)

    @property
    def config(self) -> Config:
        return self._with(LayoutConfig(**self.layout), self.micro)

    @property
    def one_process(self) -> Config:
        return self._with(LayoutConfig(zero=0), 1)

    def _with(self, layout: LayoutConfig, micro: int) -> Config:
        # eps keeps a gradient that is zero but for rounding from becoming a whole step
        optim = OptimConfig(**{"lr": 1e-2, "eps": 1e-4, "clip_grad": 0.5, **self.optim})
        train = TrainConfig(
            micro_batch_size=micro,
            global_batch_size=self.batch,
            rampup_batch_size=self.ramp,
        )
        data = DataConfig(reset_attention_mask=self.documents)
        return Config(model=self.model, layout=layout, data=data, optim=optim, train=train)


ROWS = [
    Row("one process", GPT, {"zero": 1}),
    Row("tp2", GPT, {"tp": 2}),
    Row("tp2 no-sp", GPT, {"tp": 2, "sequence_parallel": False}),
    Row("tp4", GPT, {"tp": 4}),
    Row("tp4 no-sp", GPT, {"tp": 4, "sequence_parallel": False}),
    Row("tp3 vocab 50257", replace(SMALL, vocab_size=50257), {"tp": 3}, batch=4),
    Row("tp6", GPT, {"tp": 6}),
    Row("pp2 1f1b", GPT, {"pp": 2}),
    Row("pp2 gpipe", GPT, {"pp": 2, "schedule": "gpipe"}),
    Row("pp2 interleaved", GPT, {"pp": 2, "vpp": 2, "schedule": "interleaved"}),
    Row("pp3 1f1b", GPT, {"pp": 3}, batch=10),
    Row("pp4 1f1b", GPT, {"pp": 4}),
    Row("pp4 gpipe fewer microbatches", GPT, {"pp": 4, "schedule": "gpipe"}, batch=4),
    Row("pp4 1f1b fewer microbatches", GPT, {"pp": 4}, batch=4),
    Row("pp2 uneven 3,1", GPT, {"pp": 2, "pp_layers": (3, 1)}),
    Row("pp2 interleaved uneven", replace(GPT, num_layers=7),
        {"pp": 2, "vpp": 2, "schedule": "interleaved", "pp_layers": (1, 3, 2, 1)}),
    Row("pp2 interleaved odd microbatches", UNTIED,
        {"pp": 2, "vpp": 2, "schedule": "interleaved"}, batch=6),
    Row("dp2 zero0", GPT, {"dp": 2, "zero": 0}),
    Row("dp2 zero1", GPT, {"dp": 2}),
    Row("dp2 zero2", GPT, {"dp": 2, "zero": 2}),
    Row("dp3 zero2 small buckets", GPT, {"dp": 3, "zero": 2, "bucket_mb": 0.02}, batch=12),
    Row("pp2 dp2 zero2", GPT, {"pp": 2, "dp": 2, "zero": 2}),
    Row("tp2 pp2 dp2 zero2", GPT, {"tp": 2, "pp": 2, "dp": 2, "zero": 2}),
    Row("zero2 pp2 dp2 interleaved", GPT,
        {"pp": 2, "dp": 2, "zero": 2, "vpp": 2, "schedule": "interleaved"}),
    Row("zero2 pp2 dp2 zb-h2", GPT, {"pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h2"}),
    Row("zero2 tp2 pp2 dp2 zb-v", GPT,
        {"tp": 2, "pp": 2, "dp": 2, "zero": 2, "vpp": 2, "schedule": "zb-v"}),
    Row("zero2 llama kv1 tp2 dp2", replace(LLAMA, num_kv_heads=1), {"tp": 2, "dp": 2, "zero": 2}),
    Row("dp2 zero3", GPT, {"dp": 2, "zero": 3}),
    Row("dp3 zero3", UNTIED, {"dp": 3, "zero": 3}, batch=12),
    Row("pp2 dp2 zero3", GPT, {"pp": 2, "dp": 2, "zero": 3}),
    Row("tp2 pp2 dp2 zero3", GPT, {"tp": 2, "pp": 2, "dp": 2, "zero": 3}),
    Row("zero3 tp2 dp2 no-sp", GPT, {"tp": 2, "dp": 2, "zero": 3, "sequence_parallel": False}),
    Row("zero3 pp2 dp2 interleaved", GPT,
        {"pp": 2, "dp": 2, "zero": 3, "vpp": 2, "schedule": "interleaved"}),
    Row("zero3 pp2 dp2 zb-h2", GPT, {"pp": 2, "dp": 2, "zero": 3, "schedule": "zb-h2"}),
    Row("zero3 tp2 pp2 dp2 zb-v", GPT,
        {"tp": 2, "pp": 2, "dp": 2, "zero": 3, "vpp": 2, "schedule": "zb-v"}),
    Row("zero3 everything kv2 tp4 dp2", replace(EVERYTHING, num_kv_heads=2),
        {"tp": 4, "dp": 2, "zero": 3}),
    Row("padded vocabulary tp2 pp2 zero3 dp2", replace(UNTIED, vocab_size=1003),
        {"tp": 2, "pp": 2, "dp": 2, "zero": 3}),
    Row("smoothing z-loss tp2 no-sp pp2",
        replace(GPT, vocab_size=61, label_smoothing=0.1, z_loss=1e-2),
        {"tp": 2, "pp": 2, "sequence_parallel": False}),
    Row("zero3 dropout pp2 dp2", DROPOUT, {"pp": 2, "dp": 2, "zero": 3}),
    Row("recompute tp2 pp2", GPT, {"tp": 2, "pp": 2, "recompute": "full"}),
    Row("recompute tp2 no-sp", EVERYTHING,
        {"tp": 2, "sequence_parallel": False, "recompute": "full"}),
    Row("recompute zb-h1 pp2 dp2 zero3", GPT,
        {"pp": 2, "dp": 2, "zero": 3, "schedule": "zb-h1", "recompute": "full"}),
    Row("recompute dropout tp2 pp2 dp2 zero3", DROPOUT,
        {"tp": 2, "pp": 2, "dp": 2, "zero": 3, "recompute": "full"}),
    Row("selective", GPT, {"recompute": "selective"}),
    Row("selective zero3 tp2 pp2 dp2 zb-h1", replace(EVERYTHING, dropout=0.2, tie_embeddings=True),
        {"tp": 2, "pp": 2, "dp": 2, "zero": 3, "schedule": "zb-h1", "recompute": "selective"}),
    Row("selective dropout tp2 no-sp zero2 dp2", DROPOUT,
        {"tp": 2, "dp": 2, "zero": 2, "sequence_parallel": False, "recompute": "selective"}),
    Row("selective cp2 ring pp2 zb-v, 1 layer a stage", replace(GPT, num_layers=8),
        {"cp": 2, "pp": 2, "vpp": 2, "schedule": "zb-v", "recompute": "selective",
         "recompute_layers": 1}),
    Row("selective cp2 ulysses qk-norm", EVERYTHING,
        {"cp": 2, "cp_form": "ulysses", "recompute": "selective"}),
    Row("selective norm tp2 cp2 gather", LLAMA,
        {"tp": 2, "cp": 2, "cp_form": "gather", "recompute": "selective",
         "recompute_modules": ("norm",)}),
    Row("recompute 1 layer a stage pp2 zero3 dp2", GPT,
        {"pp": 2, "dp": 2, "zero": 3, "recompute": "full", "recompute_layers": 1}),
    Row("zero3 recompute tp2 cp2 dp2", GPT,
        {"tp": 2, "cp": 2, "dp": 2, "zero": 3, "recompute": "full"}),
    Row("zero2 cp2 pp2 dp2 zb-h1", LLAMA,
        {"cp": 2, "pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h1"}),
    Row("dp3 zero1", GPT, {"dp": 3}, batch=12),
    Row("dp4 zero1 small buckets", GPT, {"dp": 4, "bucket_mb": 0.02}),
    Row("dp2 zero1 one microbatch", GPT, {"dp": 2}, batch=4),
    Row("tp2 pp2", GPT, {"tp": 2, "pp": 2}),
    Row("tp2 pp2 interleaved", GPT, {"tp": 2, "pp": 2, "vpp": 2, "schedule": "interleaved"}),
    Row("tp2 dp2 zero0", GPT, {"tp": 2, "dp": 2, "zero": 0}),
    Row("tp2 dp2 zero1 no-sp", GPT, {"tp": 2, "dp": 2, "sequence_parallel": False}),
    Row("pp2 dp2 zero1", GPT, {"pp": 2, "dp": 2}),
    Row("pp2 dp2 zero0 interleaved", GPT,
        {"pp": 2, "dp": 2, "zero": 0, "vpp": 2, "schedule": "interleaved"}),
    Row("tp2 pp2 dp2 zero1", GPT, {"tp": 2, "pp": 2, "dp": 2}),
    Row("tp2 pp2 dp2 zero0 gpipe", GPT,
        {"tp": 2, "pp": 2, "dp": 2, "zero": 0, "schedule": "gpipe"}),
    Row("tp2 pp2 dp2 untied interleaved", UNTIED,
        {"tp": 2, "pp": 2, "dp": 2, "vpp": 2, "schedule": "interleaved"}),
    Row("untied pp2", UNTIED, {"pp": 2}),
    Row("untied tp2 pp2 zero0", UNTIED, {"tp": 2, "pp": 2, "zero": 0}),
    Row("lengths vary pp2", GPT, {"pp": 2}, varying=True),
    Row("lengths vary tp3 pp2", GPT, {"tp": 3, "pp": 2}, varying=True),
    Row("lengths vary pp2 dp2 interleaved", GPT,
        {"pp": 2, "dp": 2, "vpp": 2, "schedule": "interleaved"}, varying=True),
    Row("llama tp2", LLAMA, {"tp": 2}),
    Row("llama tp2 kv1", replace(LLAMA, num_kv_heads=1), {"tp": 2}),
    Row("llama tp4 kv1", replace(LLAMA, num_kv_heads=1), {"tp": 4}),
    Row("llama tp4 kv2", replace(LLAMA, num_kv_heads=2), {"tp": 4}),
    Row("llama tp4 kv2 no-sp dp2", replace(LLAMA, num_kv_heads=2),
        {"tp": 4, "dp": 2, "sequence_parallel": False}),
    Row("llama tp2 pp2 dp2 kv1", replace(LLAMA, num_kv_heads=1), {"tp": 2, "pp": 2, "dp": 2}),
    Row("llama kv4 tied tp2 pp2", replace(LLAMA, num_kv_heads=4, tie_embeddings=True),
        {"tp": 2, "pp": 2}),
    Row("biased kv2 tp4", replace(GPT, num_kv_heads=2), {"tp": 4}),
    Row("everything tp2 pp2", EVERYTHING, {"tp": 2, "pp": 2}),
    Row("everything tp2 no-sp", EVERYTHING, {"tp": 2, "sequence_parallel": False}),
    Row("everything kv2 tp4 dp2", replace(EVERYTHING, num_kv_heads=2), {"tp": 4, "dp": 2}),
    Row("gelu-tanh tp2", replace(GPT, activation="gelu-tanh"), {"tp": 2}),
    Row("dropout tp2", DROPOUT, {"tp": 2}),
    Row("dropout pp2 dp2", DROPOUT, {"pp": 2, "dp": 2}),
    Row("dropout tp2 pp2 dp2", DROPOUT, {"tp": 2, "pp": 2, "dp": 2}),
    Row("float32 one process", GPT, {"zero": 1}, dtype="float32"),
    Row("float32 tp2", GPT, {"tp": 2}, dtype="float32"),
    Row("float32 pp2 dp2", GPT, {"pp": 2, "dp": 2}, dtype="float32"),
    Row("float32 tp2 pp2 dp2", GPT, {"tp": 2, "pp": 2, "dp": 2}, dtype="float32"),
    Row("float32 llama tp4 kv2", replace(LLAMA, num_kv_heads=2), {"tp": 4}, dtype="float32"),
    Row("zb-h1 pp2", GPT, {"pp": 2, "schedule": "zb-h1"}),
    Row("zb-h1 pp4", GPT, {"pp": 4, "schedule": "zb-h1"}),
    Row("zb-h2 pp2 dp2", GPT, {"pp": 2, "dp": 2, "schedule": "zb-h2"}),
    Row("zb-h2 tp2 pp2", GPT, {"tp": 2, "pp": 2, "schedule": "zb-h2"}),
    Row("zb-v pp2", GPT, {"pp": 2, "vpp": 2, "schedule": "zb-v"}),
    Row("zb-v tp2 pp2 dp2 untied", UNTIED,
        {"tp": 2, "pp": 2, "dp": 2, "vpp": 2, "schedule": "zb-v"}),
    Row("zb-v pp3 uneven", replace(GPT, num_layers=9),
        {"pp": 3, "vpp": 2, "schedule": "zb-v", "pp_layers": (1, 2, 1, 3, 1, 1)}),
    Row("cp2 ring", GPT, {"cp": 2}),
    Row("cp2 gather", GPT, {"cp": 2, "cp_form": "gather"}),
    Row("cp2 ulysses", GPT, {"cp": 2, "cp_form": "ulysses"}),
    Row("cp3 ring", GPT, {"cp": 3}),
    Row("cp4 ring", LONG, {"cp": 4}),
    Row("cp4 ulysses kv2", replace(LONG, num_kv_heads=2), {"cp": 4, "cp_form": "ulysses"}),
    Row("llama cp2 ring", LLAMA, {"cp": 2}),
    Row("llama cp2 gather", LLAMA, {"cp": 2, "cp_form": "gather"}),
    Row("llama cp2 ulysses", LLAMA, {"cp": 2, "cp_form": "ulysses"}),
    Row("llama tp2 cp2 kv1 ring", replace(LLAMA, num_kv_heads=1), {"tp": 2, "cp": 2}),
    Row("llama tp2 cp2 kv1 ulysses no-sp", replace(LLAMA, num_kv_heads=1),
        {"tp": 2, "cp": 2, "cp_form": "ulysses", "sequence_parallel": False}),
    Row("llama tp2 cp2 kv2 gather", replace(LLAMA, num_kv_heads=2),
        {"tp": 2, "cp": 2, "cp_form": "gather"}),
    Row("tp2 cp2 ring", GPT, {"tp": 2, "cp": 2}),
    Row("tp2 cp2 ulysses", GPT, {"tp": 2, "cp": 2, "cp_form": "ulysses"}),
    Row("cp2 dp2 zero0", GPT, {"cp": 2, "dp": 2, "zero": 0}),
    Row("cp2 dp2 zero1", GPT, {"cp": 2, "dp": 2}),
    Row("cp2 pp2", GPT, {"cp": 2, "pp": 2}),
    Row("cp2 pp2 zb-h1 gather", GPT,
        {"cp": 2, "pp": 2, "schedule": "zb-h1", "cp_form": "gather"}),
    Row("tp2 cp2 pp2", GPT, {"tp": 2, "cp": 2, "pp": 2}),
    Row("tp2 cp2 pp2 dp2 untied zb-v", UNTIED,
        {"tp": 2, "cp": 2, "pp": 2, "dp": 2, "vpp": 2, "schedule": "zb-v"}, batch=8),
    Row("window cp2 ring", WINDOW, {"cp": 2}),
    Row("window cp3 gather", WINDOW, {"cp": 3, "cp_form": "gather"}),
    Row("window cp2 ulysses", WINDOW, {"cp": 2, "cp_form": "ulysses"}),
    Row("everything cp2 ring", EVERYTHING, {"cp": 2}),
    Row("everything tp2 cp2 gather", EVERYTHING, {"tp": 2, "cp": 2, "cp_form": "gather"}),
    Row("everything tp2 cp2 pp2 ulysses", EVERYTHING,
        {"tp": 2, "cp": 2, "pp": 2, "cp_form": "ulysses"}),
    Row("dropout cp2 ring", DROPOUT, {"cp": 2}),
    Row("dropout cp2 gather", DROPOUT, {"cp": 2, "cp_form": "gather"}),
    Row("dropout tp2 cp2 ulysses", DROPOUT, {"tp": 2, "cp": 2, "cp_form": "ulysses"}),
    Row("dropout tp2 cp2 ring", DROPOUT, {"tp": 2, "cp": 2}),
    Row("lengths vary cp2", GPT, {"cp": 2}, varying=True),
    Row("lengths vary tp2 cp2 pp2 gather", GPT,
        {"tp": 2, "cp": 2, "pp": 2, "cp_form": "gather"}, varying=True),
    Row("lengths vary cp2 dp2 ulysses", GPT,
        {"cp": 2, "dp": 2, "cp_form": "ulysses"}, varying=True),
    Row("cp2 ring, all of one rank masked", LLAMA, {"cp": 2}, blank=held_by(1)),
    Row("cp2 dp2 gather, all of one rank masked", GPT, {"cp": 2, "dp": 2, "cp_form": "gather"},
        blank=held_by(0)),
    Row("float32 tp2 cp2", GPT, {"tp": 2, "cp": 2}, dtype="float32"),
    Row("muon tp2 dp2 zero0", GPT, {"tp": 2, "dp": 2, "zero": 0}, optim=MUON),
    Row("muon tp2 dp2 zero1", LLAMA, {"tp": 2, "dp": 2}, optim=MUON),
    Row("muon tp2 dp2 zero2", GPT, {"tp": 2, "dp": 2, "zero": 2}, optim=MUON),
    Row("muon tp2 pp2 dp2 zero3", GPT, {"tp": 2, "pp": 2, "dp": 2, "zero": 3}, optim=MUON),
    Row("muon tp2 dp2 zero3 no-sp", LLAMA,
        {"tp": 2, "dp": 2, "zero": 3, "sequence_parallel": False}, optim=MUON),
    Row("muon tp3", GPT, {"tp": 3}, optim=MUON),
    Row("muon kv2 tp4 dp2 zero2", replace(LLAMA, num_kv_heads=2), {"tp": 4, "dp": 2, "zero": 2},
        optim=MUON),
    Row("muon pp2 cp2 zb-h1", GPT, {"pp": 2, "cp": 2, "schedule": "zb-h1"}, optim=MUON),
    Row("muon dp3 small buckets", LLAMA, {"dp": 3, "bucket_mb": 0.02}, batch=12, optim=MUON),
    Row("muon dp8, more ranks than matrices", replace(GPT, num_layers=1), {"dp": 8, "zero": 3},
        optim=MUON),
    Row("float32 muon tp2", GPT, {"tp": 2}, dtype="float32", optim=MUON),
    Row("sgd tp2 dp2 zero2", GPT, {"tp": 2, "dp": 2, "zero": 2}, optim={"optimizer": "sgd"}),
    Row("custom optimizer tp2 dp2 zero3", GPT, {"tp": 2, "dp": 2, "zero": 3}, optim=LION),
    Row("muP tp2 pp2", MUP, {"tp": 2, "pp": 2}),
    Row("muP untied tp2 cp2 dp2 zero3", replace(MUP, tie_embeddings=False),
        {"tp": 2, "cp": 2, "dp": 2, "zero": 3}),
    Row("ramp pp2 dp2", GPT, {"pp": 2, "dp": 2}, ramp=(4, 4, 12)),
    Row("ramp dp2 zero3 lengths vary", GPT, {"dp": 2, "zero": 3}, varying=True, ramp=(8, 8, 8)),
    Row("custom schedule pp3 dp2", GPT, {"pp": 3, "dp": 2, "schedule": MY_SCHEDULE}, batch=20),
    Row("documents tp2 cp2 pp2 ring", EVERYTHING, {"tp": 2, "cp": 2, "pp": 2}, documents=True,
        varying=True),
    Row("documents cp2 gather", GPT, {"cp": 2, "cp_form": "gather"}, documents=True),
    # Sequences of 9 are padded to 12, and those of 6 to 8: the last rank's tokens are padding.
    Row("documents cp4 ulysses, one rank's tokens all padding", LLAMA,
        {"cp": 4, "cp_form": "ulysses"}, micro=1, batch=6, documents=True, varying=True),
    Row("documents cp2 ring, all of one rank masked", LLAMA, {"cp": 2}, documents=True,
        blank=held_by(1)),
    Row("documents dropout pp2 dp2 zero3", DROPOUT, {"pp": 2, "dp": 2, "zero": 3}, documents=True),
    Row("documents dropout cp2 ring", DROPOUT, {"cp": 2}, documents=True, varying=True),
    Row("documents dropout tp2 cp2 ulysses", DROPOUT, {"tp": 2, "cp": 2, "cp_form": "ulysses"},
        documents=True),
    Row("documents window cp3 gather", WINDOW, {"cp": 3, "cp_form": "gather"}, documents=True),
]  # fmt: skip


def split(micro: int, dp: int, documents: bool) -> Row:
    """One way to cut a batch of samples of different lengths and masks into microbatches."""
    name = f"lengths vary micro{micro} dp{dp}{' documents' * documents}"
    model = replace(LLAMA, num_layers=1)
    return Row(name, model, {"dp": dp}, micro=micro, varying=True, documents=documents)


SIZES = (1, 2, 4)
SPLITS = [split(*each) for each in product(SIZES, SIZES, (False, True))]
EVERYDAY_SPLITS = [
    split(1, 4, True), split(2, 2, True), split(4, 1, True), split(4, 4, False), split(2, 1, False)
]  # fmt: skip
ROWS += SPLITS


class References:
    """What one process did, and what the last layout saved, for each model and batch."""

    def __init__(self, folder: Path, run_ranks: Callable[..., list]):
        self.folder, self.run_ranks = folder, run_ranks
        self.saved: dict[str, list[Path]] = {}

    def files_of(self, row: Row) -> tuple[Path, Path, Path]:
        """A row's one-process numbers, the checkpoint that it goes on from, and where it saves."""
        asked = {"config": row.one_process.to_dict(), "varying": row.varying, "blank": row.blank}
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        path, mine = self.folder / f"{key}.npz", self.folder / f"{key}-{row.dtype}-{row.name}"
        if not path.exists():
            alone = self.folder / f"{key}-alone"
            self.run_ranks(
                "tests.ranks.jobs:reference",
                1,
                steps=STEPS + 1,
                out=str(path),
                save_to=str(alone),
                **asked,
            )
            self.saved[key] = [alone]
        before = [saved for saved in self.saved[key] if saved.exists()][-1]
        if row.dtype == "float64":  # the bounds are of no use after a checkpoint in float32
            self.saved[key].append(mine)
        return path, before, mine


@pytest.fixture(scope="session")
def references(run_ranks, tmp_path_factory):
    return References(tmp_path_factory.mktemp("oracle"), run_ranks)


EXTRA = {
    "tp6", "pp2 interleaved uneven", "pp4 gpipe fewer microbatches",
    "dp3 zero2 small buckets", "pp2 dp2 zero2", "zero2 pp2 dp2 interleaved",
    "zero2 llama kv1 tp2 dp2", "dp3 zero3", "pp2 dp2 zero3", "zero3 tp2 dp2 no-sp",
    "zero3 pp2 dp2 interleaved", "zero3 everything kv2 tp4 dp2", "zero3 dropout pp2 dp2",
    "selective cp2 ulysses qk-norm", "selective norm tp2 cp2 gather",
    "selective dropout tp2 no-sp zero2 dp2", "recompute 1 layer a stage pp2 zero3 dp2",
    "recompute tp2 no-sp", "recompute zb-h1 pp2 dp2 zero3", "dp2 zero1 one microbatch",
    "tp2 dp2 zero1 no-sp", "pp2 dp2 zero0 interleaved", "untied tp2 pp2 zero0",
    "lengths vary tp3 pp2", "llama kv4 tied tp2 pp2", "llama tp4 kv2 no-sp dp2",
    "everything kv2 tp4 dp2", "gelu-tanh tp2", "dropout pp2 dp2", "float32 pp2 dp2", "zb-h1 pp4",
    "zb-h2 tp2 pp2", "zb-v pp3 uneven", "cp3 ring", "cp4 ring", "cp4 ulysses kv2",
    "llama cp2 gather", "llama cp2 ulysses", "llama tp2 cp2 kv1 ulysses no-sp",
    "llama tp2 cp2 kv2 gather", "tp2 cp2 ulysses", "cp2 dp2 zero0", "cp2 pp2", "window cp3 gather",
    "window cp2 ulysses", "everything cp2 ring", "everything tp2 cp2 gather", "dropout cp2 gather",
    "dropout cp2 ring", "dropout tp2 cp2 ulysses", "lengths vary cp2 dp2 ulysses", "tp2 cp2 ring",
    "cp2 dp2 gather, all of one rank masked",
    "documents dropout cp2 ring", "documents dropout tp2 cp2 ulysses",
    "documents window cp3 gather",
    *(row.name for row in SPLITS if row not in EVERYDAY_SPLITS),
    "muon tp2 dp2 zero0", "muon tp2 dp2 zero2", "muon tp2 dp2 zero3 no-sp", "muon tp3",
    "muon dp3 small buckets", "float32 muon tp2", "muP untied tp2 cp2 dp2 zero3",
    "ramp dp2 zero3 lengths vary",
    "zero2 tp2 pp2 dp2 zb-v", "zero2 pp2 dp2 zb-h2", "zero3 pp2 dp2 zb-h2",
    "recompute dropout tp2 pp2 dp2 zero3", "tp2 pp2 dp2 zero0 gpipe",
    "tp2 pp2 dp2 untied interleaved", "llama tp4 kv1", "lengths vary pp2 dp2 interleaved",
    "everything tp2 no-sp", "float32 llama tp4 kv2", "lengths vary tp2 cp2 pp2 gather",
    "cp2 pp2 zb-h1 gather", "muon dp8, more ranks than matrices", "zb-v tp2 pp2 dp2 untied",
    "zero2 cp2 pp2 dp2 zb-h1", "dp4 zero1 small buckets", "tp2 pp2 interleaved", "tp4 no-sp",
    "pp2 interleaved odd microbatches", "zero3 recompute tp2 cp2 dp2", "muP tp2 pp2",
    "llama tp2 pp2 dp2 kv1", "everything tp2 cp2 pp2 ulysses", "window cp2 ring",
}  # fmt: skip
"""Rows whose features other rows have, in other company: run with --every-row."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every row, or those that `make test` has the time for; test_verify.py draws others."""
    if "row" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_row")
        rows = [row for row in ROWS if every or row.name not in EXTRA]
        metafunc.parametrize("row", rows, ids=[row.name for row in rows])


def test_rows_left_to_the_full_form_exist():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names) and set(names) >= EXTRA


def test_layout_equals_one_process(row: Row, references, run_ranks):
    row.config.check(row.world)
    reference, before, mine = references.files_of(row)
    results = run_ranks(
        "tests.ranks.jobs:compare",
        row.world,
        config=row.config.to_dict(),
        dtype=row.dtype,
        steps=STEPS,
        varying=row.varying,
        blank=row.blank,
        ref=str(reference),
        go_on_from=str(before),
        save_to=str(mine),
    )
    for kind, bound in TOL[row.dtype].items():
        error, where = max(r["worst"][kind] for r in results)
        assert error <= bound, (
            f"{row.name}: {kind} of {where} is off by {error:.1e} (bound {bound:.0e})"
        )
    assert sum(r["owned"] for r in results) == _model_size(row.model), (
        "a number was counted twice or never"
    )


def _model_size(model: ModelConfig) -> int:
    from megalite.models.presets import num_parameters

    return num_parameters(model)
