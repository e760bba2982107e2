"""`megalite verify`: right layouts pass, wrong ones fail and name their tensor."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite import __main__ as front
from megalite.core.config import Config, DataConfig, LayoutConfig, ModelConfig, TrainConfig
from megalite.core.errors import UserError
from megalite.train import verify_command
from megalite.train.covering import (
    ALL_AXES,
    FACTORS,
    FORMS,
    TRIPLES,
    Coverage,
    Drawn,
    Space,
    combos_of,
    draw_rows,
)
from megalite.train.verify import TOL, other_rounding
from megalite.train.verify_command import (
    compare_row,
    given_row,
    numbers_of,
    reference_of,
    result_of,
    small_model,
)
from megalite.train.verify_table import IN_BITS, PLAIN, Numbers, Result, Row, table_lines

JOBS = "tests.ranks.verify_jobs"
DRAWN = 60
"""Enough for nearly all legal combinations; the command's own default goes to 16 ranks."""
MODEL = ModelConfig(norm="rmsnorm", qk_norm=True, bias=False)


@pytest.fixture
def outside_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def verify(line: str) -> int:
    return front.main(["verify", *line.split()])


# -- the command -------------------------------------------------------------------------------


def test_drawn_layouts_equal_one_process(outside_torchrun, tmp_path, capsys):
    out = tmp_path / "table.json"
    assert verify(f"--random {DRAWN} --seed 1 --steps 2 --max-ranks 8 --json {out}") == 0
    shown = capsys.readouterr().out
    assert f"{DRAWN} layouts, 0 differ from one process" in shown
    assert sum(line.startswith("ok ") for line in shown.splitlines()) == DRAWN
    made = json.loads(out.read_text())
    assert (made["precision"], made["steps"], made["seed"]) == ("fp64", 2, 1)
    assert made["combinations"]["covered"] > 0.98 * made["combinations"]["legal"] > 2000
    for row in made["rows"]:
        assert row["ok"] and row["first"] is None and row["trouble"] == "" and row["ranks"] <= 8
        for kind, bound in TOL["fp64"].items():
            gap = row["worst"][kind]
            assert gap["error"] <= bound and gap["kind"] == kind and gap["allowed"] == bound
        assert Config.from_dict(row["config"]).model.num_heads == 12
        assert row["worst"]["grad"]["shard"].startswith("[")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_narrow_numbers_stay_within_rounding(outside_torchrun, precision, capsys):
    assert verify(f"--tp 2 --pp 2 --precision {precision}") == 0
    assert f"{precision} against one process in fp64" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["--dp 3 --zero 0", "--pp 2 --dp 2 --zero 2 --cp 2"])
def test_gradients_sent_as_bf16_stay_within_its_rounding(outside_torchrun, layout, capsys):
    assert verify(f"{layout} --global-batch-size 12 --micro-batch-size 1"
                  " --grad-reduce-dtype bf16") == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert f"within {TOL['bf16']['grad']:g}: gradients are summed as bf16" in shown
    worst = float(re.search(r"^ok +\d+ +\S+ +(\S+)", shown, re.MULTILINE)[1])
    assert worst > 1e-4


MISTAKES = [
    ("--random -1", "--random -1: must be an integer >= 1"),
    ("--random 0", "--random 0: must be an integer >= 1"),
    ("--random many", "--random many: expected an integer"),
    ("--steps 0", "--steps 0: must be an integer >= 1"),
    ("--max-ranks 0", "--max-ranks 0: must be an integer >= 1"),
    ("--device cuda", "--device cuda: no GPU is visible to torch (use --device cpu)"),
    ("--device cuda --fixed-order",
     "--device cuda: sums of --fixed-order are exact on CPU only (leave it out)"),
    ("--dry-run", "--dry-run: verify is about numbers, so it must run (leave it out)"),
    ("--loss-scale 128", "--loss-scale 128: needs --precision fp16 (got auto)"),
    ("--precision fp8", "--precision fp8: expected one of auto, fp64, fp32, bf16, fp16"),
    ("--fixed-order --precision bf16", "--fixed-order: makes sums of fp64 exact, not of "
     "--precision bf16 (leave one of them out)"),
    ("--json absent/t.json", "--json absent/t.json: no such directory absent"),
    ("--tp 3", "--tp 3: --num-heads 4 is not divisible by 3 (allowed: 1, 2, 4)"),
    ("--vpp 2", "--vpp 2: needs --schedule interleaved or zb-v (got 1f1b)"),
    ("--tp 4 --dp 8", "--max-ranks 16: the layout needs 32 ranks on this machine "
     "(use --max-ranks 32, or a smaller layout of the same kind)"),
    ("--random 3 --vpp 2 --schedule gpipe",
     "--random 3: no legal layout is left to draw: --vpp 2: needs --schedule interleaved or zb-v "
     "(got gpipe)"),
    ("--attention softmx",
     "unknown --attention 'softmx' (did you mean softmax? known: softmax, FILE.py:NAME)"),
    ("--attention absent.py:Mine",
     "--attention absent.py: cannot be read (No such file or directory)"),
    ("--randm 3", "unknown option --randm (did you mean --random?)"),
    ("12", "unexpected argument '12' (see megalite verify --help)"),
]  # fmt: skip


@pytest.mark.parametrize("line, text", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistake_is_one_line(line, text, outside_torchrun, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert verify(line) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"megalite: error: {text}\n")


# -- row after row -----------------------------------------------------------------------------

NOTED = """
import os
from pathlib import Path
from megalite.layers.attention import Attention

class Noted(Attention):
    def __init__(self, cfg, mesh, **kwargs):
        super().__init__(cfg, mesh, **kwargs)
        (Path(__file__).parent / f"{os.getpid()}.pid").touch()
        if mesh.axis("tp").size > 1:
            raise KeyError("the number 17 is missing")
"""


@pytest.fixture
def three_rows(monkeypatch):
    """`--random 3` draws these: dp 2, tp 2, pp 2."""

    def draw(space: Space, count: int, seed: int) -> tuple[list[Drawn], Coverage]:
        return [space.draw({**space.begin, axis: 2}) for axis in ("dp", "tp", "pp")], Coverage()

    monkeypatch.setattr(verify_command, "draw_rows", draw)


def test_ranks_live_on_and_a_row_that_raises_does_not_spoil_the_next(
    outside_torchrun, three_rows, tmp_path, capsys
):
    (tmp_path / "noted.py").write_text(NOTED)
    own, out = f"{tmp_path}/noted.py:Noted", tmp_path / "table.json"
    line = f"--random 3 --steps 1 --precision fp32 --attention {own} --json {out}"
    assert verify(line) == 1
    shown = capsys.readouterr().out
    assert re.findall(r"^(ok|FAIL) +(\d)", shown, re.MULTILINE) == [
        ("ok", "2"), ("FAIL", "2"), ("ok", "2"),
    ]  # fmt: skip
    assert re.search(r"^        rank [01]: KeyError: 'the number 17 is missing'$", shown, re.M)
    assert "3 layouts, 1 differ from one process" in shown
    assert [row["ok"] for row in json.loads(out.read_text())["rows"]] == [True, False, True]
    # Two ranks until the second row, and two from the third: each row has two runs of one process
    # and one of two.
    assert len(list(tmp_path.glob("*.pid"))) == 4


def test_table_of_an_interrupted_run_has_the_rows_that_were_done(
    outside_torchrun, three_rows, tmp_path, monkeypatch
):
    out = tmp_path / "table.json"
    found = []

    def compare(row: Row, ranks: object, folder: Path, numbers: Numbers, steps: int) -> Result:
        found.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        if len(found) == 3:
            raise KeyboardInterrupt
        return Result(row, numbers, 0.1)

    monkeypatch.setattr(verify_command, "compare_row", compare)
    assert verify(f"--random 3 --json {out}") == front.INTERRUPTED
    assert found == [0, 1, 2]
    table = json.loads(out.read_text())
    assert (table["rows_asked"], len(table["rows"])) == (3, 2)
    assert "combinations" not in table and list(tmp_path.iterdir()) == [out]


def test_reference_of_ranks_on_a_gpu_needs_none(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "device", "cuda")  # of which there need not be any
    row = given_row(Config(), most=1)
    assert reference_of(row, ranks, tmp_path, 1).exists()


# -- a user's own attention --------------------------------------------------------------------

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "my_attention.py"


def test_own_attention_equals_one_process(outside_torchrun, capsys):
    assert verify(f"--tp 2 --pp 2 --attention {EXAMPLE}:MyAttention") == 0
    assert "\nok " in capsys.readouterr().out


def test_own_attention_keeps_documents_apart_and_says_so(outside_torchrun, tmp_path, capsys):
    packed = f"--tp 2 --reset-attention-mask --attention {EXAMPLE}:MyAttention"
    assert verify(packed) == 0
    assert "tp2 zero1 reset-attention-mask" in capsys.readouterr().out
    silent = EXAMPLE.read_text().replace("    keeps_documents_apart = True\n", "")
    (tmp_path / "silent.py").write_text(silent)
    spec = f"{tmp_path}/silent.py:MyAttention"
    line = (
        f"megalite: error: --reset-attention-mask: --attention {spec} does not say that it minds "
        "documents (mask by call.starts, then set keeps_documents_apart = True in the class)\n"
    )
    for command in ("verify", "pretrain --device cpu"):
        words = f"{command} --reset-attention-mask --attention {spec} --out {tmp_path}/run"
        assert front.main(words.split()) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == ("", line)
    assert not (tmp_path / "run").exists()
    space = Space(Config(model=ModelConfig(attention=spec)), max_ranks=1)
    assert space.factors["reset_attention_mask"] == (False,), "random layouts leave it out"


def test_own_attention_with_a_wrong_shard_names_its_tensor(outside_torchrun, tmp_path, capsys):
    # The temperatures are held whole and each rank uses its own heads': the Shard does not say
    # that their gradient is then partial.
    text = EXAMPLE.read_text()
    for right, wrong in (
        ('Block(heads, ("tp",))', "Block(heads, (None,))"),
        ("self.temperature[:, None, None]", "self.temperature[self.mine][:, None, None]"),
        ("        self.slopes =", "        self.mine = mine\n        self.slopes ="),
    ):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (tmp_path / "wrong.py").write_text(text)
    assert verify(f"--tp 2 --attention {tmp_path}/wrong.py:MyAttention") == 1
    shown = capsys.readouterr().out
    assert "\nFAIL " in shown and "attention.temperature at [" in shown
    assert "its Shard: [4] rows 0:4 whole on every rank\n" in shown


# -- what it must catch ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(ranks, tmp_path_factory):
    """The Result of a layout whose ranks run a job of ours in place of the library's."""
    folder = tmp_path_factory.mktemp("verify")

    def result(job: str, layout: dict, numbers: Numbers = PLAIN, documents: bool = False, **kwargs):
        data = DataConfig(reset_attention_mask=documents)
        config = Config(model=MODEL, layout=LayoutConfig(**layout), data=data)
        row = given_row(config, most=16)
        asked = {"config": row.config.to_dict(), "precision": "fp64", "steps": 2, "varying": False}
        ref = str(reference_of(row, ranks, folder, 2, numbers))
        asked |= {"ref": ref, "bounds": numbers.bounds}
        found = ranks.results(f"{JOBS}:{job}", row.world, kwargs={**asked, **kwargs}, timeout=60)
        return result_of(row, found, 0.0, numbers)

    return result


def test_the_harness_passes_what_is_right(compared):
    assert compared("compare", {"tp": 2, "dp": 2}, attention="Attention").ok


def test_gradient_sum_left_out_of_a_shard_names_its_tensor(compared):
    result = compared("compare", {"tp": 2}, attention="NoGradSum")
    gap = result.first
    assert not result.ok and (gap.kind, gap.step) == ("grad", 0)
    assert gap.name.endswith("attention.q_norm.weight") and len(gap.index) == 1
    assert gap.error > 0.01 and gap.ours != gap.reference
    assert gap.shard == "[4] rows 0:4 whole on every rank"


def test_shard_that_forgets_its_blocks_names_its_tensor(compared):
    # Initial weights and gradients are those of other rows: two ranks are then another model.
    result = compared("compare", {"tp": 2}, attention="CutAsOneBlock")
    assert not result.ok and result.first.name.endswith("attention.qkv.weight")
    assert result.first.kind == "grad" and "cut over (tp, -)" in result.first.shard


@pytest.mark.parametrize("attention", ["Attention", "SeesAcrossDocuments"])
def test_documents_forgotten_over_context_ranks_are_found(compared, attention):
    result = compared("compare", {"cp": 2}, documents=True, attention=attention)
    assert result.ok == (attention == "Attention")
    if result.first is not None:
        assert (result.first.kind, result.first.step) == ("grad", 0) and result.first.error > 0.01


def test_shard_cut_along_another_dimension_fails(compared):
    with pytest.raises(AssertionError, match="shape"):
        compared("compare", {"tp": 2}, attention="CutTheOtherWay")


@pytest.mark.parametrize(
    "job, layout",
    [
        ("without_partial_sums", {"tp": 2}),
        ("without_data_sums", {"dp": 2, "zero": 0}),
    ],
)
def test_sum_left_out_is_found_in_the_first_gradients(compared, job, layout):
    result = compared(job, layout)
    assert not result.ok and (result.first.kind, result.first.step) == ("grad", 0)
    assert result.first.error > 0.01


# -- bit by bit --------------------------------------------------------------------------------

IN_BITS_ROWS = {
    "tp2 pp2 zb-h1": {"tp": 2, "pp": 2, "schedule": "zb-h1"},
    "tp3 zero0": {"tp": 3, "zero": 0},
    "dp2 zero2": {"dp": 2, "zero": 2},
    "tp2 cp2 gather kv2 zero3": {"tp": 2, "cp": 2, "cp_form": "gather", "zero": 3},
    "tp4 kv2 llama": {"tp": 4},
    "tp2 cp2 ring kv1 packed": {"tp": 2, "cp": 2},
    "cp3 ring llama": {"cp": 3, "pp": 2, "recompute": "selective"},
    "tp2 pp2 kv1 zb-h2": {"tp": 2, "pp": 2, "schedule": "zb-h2", "sequence_parallel": False},
    "cp3 ulysses recompute": {"cp": 3, "cp_form": "ulysses", "recompute": "full", "zero": 1},
    "tp4 kv1 adapters": {"tp": 4},
    "cp3 ring adapters": {"cp": 3},
}


@pytest.mark.parametrize("name", IN_BITS_ROWS)
def test_no_bit_differs_from_one_process(name, ranks, tmp_path):
    kv = 2 if "kv2" in name else 1 if "kv1" in name else None
    form = {**FORMS["all"], "sliding_window": None} if "llama" in name else {}
    form["lora_rank"] = 3 if "adapters" in name else 0
    model = ModelConfig(
        hidden_size=48, num_heads=12, num_kv_heads=kv, seq_len=24, dropout=0.1, **form
    )
    config = Config(
        model=model,
        layout=LayoutConfig(**IN_BITS_ROWS[name]),
        data=DataConfig(reset_attention_mask="packed" in name),
        train=TrainConfig(micro_batch_size=2, global_batch_size=8),
    )
    row = replace(given_row(config, most=6), lengths_vary="packed" in name)
    result = compare_row(row, ranks, tmp_path, numbers_of(row, "fp64", True), 2)
    assert result.numbers is IN_BITS and result.trouble == ""
    assert (result.differing, result.first) == (0, None)
    assert {gap.error for gap in result.worst.values()} == {0.0}


def test_plain_float64_differs_in_many_bits(ranks, tmp_path):
    row = given_row(Config(layout=LayoutConfig(tp=2, dp=2)), most=4)
    result = compare_row(row, ranks, tmp_path, PLAIN, 2)
    assert result.ok and result.differing > 1000


def test_gradient_that_is_nearly_right_is_caught_bit_by_bit_alone(compared):
    for numbers in (PLAIN, IN_BITS):
        in_bits = numbers is IN_BITS
        result = compared("with_nearly_right_gradient", {"dp": 2}, numbers, in_bits=in_bits)
        assert result.ok is not in_bits
    gap = result.first
    assert (gap.kind, gap.name, gap.step) == ("grad", "layers.1.mlp.up.weight", 0)
    assert 0 < gap.error < 1e-12 and gap.ours != gap.reference
    text = "\n".join(table_lines(result))
    assert f"{gap.ours.hex()} and {gap.reference.hex()}; {result.differing} numbers" in text
    assert "grad of layers.1.mlp.up.weight at [" in text and "its Shard: " in text


def test_own_attention_whose_roundings_nobody_knows_is_held_to_a_bound(ranks, tmp_path):
    mine = ModelConfig(attention=f"{EXAMPLE}:MyAttention")
    row = given_row(Config(model=mine, layout=LayoutConfig(cp=2)), most=4)
    result = compare_row(row, ranks, tmp_path, numbers_of(row, "fp64", True), 2)
    assert result.ok and 0 < result.worst["grad"].allowed <= 1e-12
    assert "within 1e-13: with --cp-form ring, or " in "\n".join(table_lines(result))
    gathered = replace(row.config, layout=LayoutConfig(cp=2, cp_form="gather"))
    assert other_rounding(gathered) == other_rounding(Config(layout=LayoutConfig(cp=2))) == ""


# -- the draw ----------------------------------------------------------------------------------


def test_draw_follows_from_the_seed_and_every_row_is_legal():
    space = Space(Config(), max_ranks=8)
    rows, coverage = draw_rows(space, 20, seed=3)
    again, _ = draw_rows(Space(Config(), max_ranks=8), 20, seed=3)
    other, _ = draw_rows(space, 20, seed=4)
    assert [r.row for r in rows] == [r.row for r in again] != [r.row for r in other]
    for drawn in rows:
        drawn.config.check(drawn.world)
        assert drawn.world <= 8
    seen = {combo for drawn in rows for combo in combos_of(drawn.row)}
    assert seen & coverage.legal.keys() == coverage.covered
    assert not seen & coverage.refused.keys()


def test_enough_rows_cover_every_legal_pair():
    space = Space(Config(), max_ranks=8)
    rows, coverage = draw_rows(space, 80, seed=1)
    assert coverage.covered == coverage.legal.keys()
    pairs = sum(
        len(xs) * len(ys)
        for a, xs in enumerate(FACTORS.values())
        for ys in list(FACTORS.values())[a + 1 :]
    )
    triples = sum(prod(len(FACTORS[name]) for name in names) for names in TRIPLES)
    assert len(coverage.legal) + len(coverage.refused) == pairs + triples


def test_rows_with_all_axes_are_drawn_and_none_has_what_counts_as_illegal():
    rows, coverage = draw_rows(Space(Config(), max_ranks=16), 60, seed=2)
    seen = {combo for drawn in rows for combo in combos_of(drawn.row)}
    assert not seen & coverage.refused.keys()
    assert sum(ALL_AXES.items() <= drawn.row.items() for drawn in rows) >= 4
    assert all(3 in {drawn.row[axis] for drawn in rows} for axis in ("tp", "pp", "dp"))


@given(data=st.data())
def test_combinations_of_one_factor_are_those_of_the_row_that_have_it(data):
    row = {name: data.draw(st.sampled_from(values)) for name, values in FACTORS.items()}
    name = data.draw(st.sampled_from(list(FACTORS)))
    with_it = [combo for combo in combos_of(row) if name in dict(combo)]
    assert sorted(map(str, combos_of(row, name))) == sorted(map(str, with_it))


def test_settings_that_are_given_stay():
    base = Config(
        model=ModelConfig(num_kv_heads=2, activation="swiglu"), layout=LayoutConfig(tp=2, pp=2)
    )
    rows, _ = draw_rows(Space(base, max_ranks=8), 10, seed=1)
    for drawn in rows:
        model, layout = drawn.config.model, drawn.config.layout
        assert (layout.tp, layout.pp, model.kv_heads, model.activation) == (2, 2, 2, "swiglu")
    assert len({drawn.config.layout.schedule for drawn in rows}) > 2


# -- the small model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, layout, small",
    [  # (heads, kv heads, layers, seq_len) of the small model
        ({}, {}, (2, 2, 2, 8)),
        ({"num_heads": 32, "num_kv_heads": 8, "hidden_size": 256}, {"tp": 4}, (16, 8, 2, 16)),
        ({"num_heads": 32, "num_kv_heads": 2, "hidden_size": 256}, {"tp": 4}, (8, 2, 2, 16)),
        ({}, {"tp": 2, "cp": 2}, (4, 4, 2, 32)),
        ({"num_heads": 6, "hidden_size": 48}, {"cp": 3, "cp_form": "ulysses"}, (6, 2, 2, 24)),
        ({"num_layers": 32}, {"pp": 4}, (2, 2, 4, 8)),
        ({"num_layers": 30}, {"pp": 4}, (2, 2, 5, 8)),
        ({"num_layers": 12}, {"pp": 2, "pp_layers": (7, 5)}, (2, 2, 4, 8)),
    ],
)
def test_small_model_is_as_large_as_the_layout_needs(model, layout, small):
    config = Config(model=ModelConfig(**model), layout=LayoutConfig(**layout))
    made = small_model(config)
    assert (made.num_heads, made.kv_heads, made.num_layers, made.seq_len) == small
    assert made.vocab_size == 61
    same = ("norm", "activation", "position", "tie_embeddings", "bias", "qk_norm", "dropout")
    assert all(getattr(made, name) == getattr(config.model, name) for name in same)


def test_small_layout_keeps_unevenness_and_the_kind_of_batch():
    train = TrainConfig(micro_batch_size=8, global_batch_size=8 * 3 * 2)
    layout = LayoutConfig(pp=2, dp=2, pp_layers=(9, 3))
    config = Config(model=ModelConfig(num_layers=12), layout=layout, train=train)
    row = given_row(config, most=16)
    assert isinstance(row, Row) and row.world == 4 and row.name == "pp2 dp2 zero1 uneven"
    assert row.config.layout.pp_layers == (3, 1)
    assert (row.config.train.micro_batch_size, row.config.num_microbatches(4)) == (2, 3)
    with pytest.raises(UserError, match="sums to 12, the model has 11 layers"):
        given_row(replace(config, model=replace(config.model, num_layers=11)), most=16)
