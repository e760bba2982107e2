"""Update rules: Muon against torch's, a user's own file, and which parameters are whose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalite.core.config import OptimConfig
from megalite.core.errors import UserError
from megalite.core.mesh import Mesh
from megalite.core.shard import Block, Shard, column
from megalite.optim.matrices import WholeMatrices
from megalite.optim.muon import Muon, orthogonalized
from megalite.optim.rules import OPTIMIZERS, Rules, load_rule
from megalite.parallel.buckets import FlatLayout, Key, Slot
from tests.twin import newton_schulz

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "my_optimizer.py"
BF16_STEPS = 0.03
"""torch's Muon runs Newton-Schulz in bfloat16: relative difference of the updates."""

GOOD = """
class Mine:
    state_names = ("seen",)
    def __init__(self, cfg):
        pass
    def update(self, param, grad, state, *, step, lr, decay):
        pass
"""


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (5, 12)])
def test_newton_schulz_is_that_of_the_plain_twin(shape):
    torch.testing.assert_close(
        orthogonalized(drawn(*shape)), newton_schulz(drawn(*shape)), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("shape", [(32, 32), (48, 16)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(shape):
    u, _, v = torch.linalg.svd(drawn(*shape, seed=1), full_matrices=False)
    # Five steps bring those to 1 that are a hundredth of the norm or more.
    x = u @ torch.diag(torch.linspace(0.1, 1, min(shape), dtype=torch.float64)) @ v
    values = torch.diagonal(u.T @ orthogonalized(x) @ v.T)
    assert values.min() > 0.6 and values.max() < 1.3


def test_newton_schulz_of_nothing_is_nothing():
    assert orthogonalized(torch.zeros(3, 4)).tolist() == torch.zeros(3, 4).tolist()


@pytest.mark.parametrize("shape", [(16, 16), (24, 8)])
def test_muon_is_that_of_torch(shape):
    ours = drawn(*shape).to(torch.float32)
    theirs = ours.clone().requires_grad_()
    wanted = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    rule = Muon(OptimConfig(momentum=0.9))
    state = {"momentum": torch.zeros(ours.numel())}
    for step in range(1, 5):
        grad = drawn(*shape, seed=step).to(torch.float32)
        before = theirs.detach().clone()
        theirs.grad = grad.clone()
        wanted.step()

        def alone(flat, function):
            return function(flat.view(shape)).flatten()

        flat = before.flatten().clone()
        rule.update(flat, grad.flatten(), state, step=step, lr=0.02, decay=0.3, each_matrix=alone)
        ours, moved = flat.view(shape), theirs.detach() - before
        error = (ours - theirs.detach()).norm() / moved.norm()
        assert error < BF16_STEPS, f"step {step}: {error:.3f}"


def test_fused_parts_are_matrices_of_their_own():
    blocks = (Block(4, ("tp", None)), Block(2, ("tp", None)))
    slots = (
        Slot("a", (6, 3), 64, Shard((6, 3), blocks), ()),
        Slot("b", (2, 5), 128, column(2, 5), ()),
    )
    layout = FlatLayout(Key(0, torch.float64, True, 1.0, False, matrix=True), slots, 256, 1)
    each = WholeMatrices(layout, (64, 192), Mesh({}).axis("tp"))
    flat, shapes = drawn(128), []

    def tenfold(x):
        shapes.append(tuple(x.shape))
        return 10 * x

    made = each(flat, tenfold)
    assert shapes == [(4, 3), (2, 3), (2, 5)]
    assert torch.equal(made[:18], 10 * flat[:18]) and torch.equal(made[64:74], 10 * flat[64:74])
    assert not made[18:64].any() and not made[74:].any()


def test_muon_takes_the_matrices_of_layers_and_leaves_the_rest_to_adamw():
    rules = Rules(OptimConfig(optimizer="muon"))
    whose = {
        "layers.0.attention.qkv.weight": ("muon", True),
        "layers.11.mlp.down.weight": ("muon", True),
        "embedding.weight": ("adamw", False),
        "position.weight": ("adamw", False),
        "head": ("adamw", False),
    }
    assert {name: rules.of(name, column(4, 4)) for name in whose} == whose
    bias = Shard((4,), (Block(4, ("tp",)),))
    assert rules.of("layers.0.mlp.up.bias", bias) == ("adamw", False)
    assert set(rules.named) == {"muon", "adamw"}


@pytest.fixture
def write(tmp_path):
    """Write a file with this text; gives the spec of its class Mine."""

    def write_file(text: str) -> str:
        (tmp_path / "mine.py").write_text(text)
        return f"{tmp_path}/mine.py:Mine"

    return write_file


def test_own_rule_is_loaded_and_may_choose_its_parameters(write):
    spec = write(GOOD)
    assert load_rule(spec).state_names == ("seen",)
    assert Rules(OptimConfig(optimizer=spec)).of("head", column(4, 4)) == (spec, False)
    spec = write(GOOD + '    takes = staticmethod(lambda name, shape: "mlp" in name)\n')
    rules = Rules(OptimConfig(optimizer=spec))
    assert rules.of("layers.0.mlp.up.weight", column(4, 4)) == (spec, False)
    assert rules.of("layers.0.attention.qkv.weight", column(4, 4)) == ("adamw", False)
    assert load_rule(f"{EXAMPLE}:Lion").state_names == ("exp_avg",)


MISTAKES = [
    (GOOD.replace('("seen",)', '["seen"]'),
     'has no state_names (a tuple as ("momentum",); empty for no state)'),
    (GOOD.replace("    state_names = ", "    names = "),
     'has no state_names (a tuple as ("momentum",); empty for no state)'),
    (GOOD.replace('"seen"', '"weights"'),
     "state_names ('weights',): not different words (weights is the parameters' own)"),
    (GOOD.replace('"seen"', '"a", "a"'),
     "state_names ('a', 'a'): not different words (weights is the parameters' own)"),
    (GOOD.replace('"seen"', '"a/b"'),
     "state_names ('a/b',): not different words (weights is the parameters' own)"),
    (GOOD.replace("def update", "def updated"), "has no method update"),
    (GOOD.replace(", decay", ""),
     "update cannot be called as update(self, param, grad, state, *, step, lr, decay): got an "
     "unexpected keyword argument 'decay'"),
    (GOOD.replace("lr, decay", "lr, decay, extra"),
     "update cannot be called as update(self, param, grad, state, *, step, lr, decay): missing a "
     "required argument: 'extra'"),
    (GOOD.replace("(self, cfg)", "(self)"),
     "__init__ cannot be called as __init__(cfg): too many positional arguments"),
    (GOOD + '    layout = "rows"\n',
     "layout 'rows': there are \"flat\" and \"matrix\" (leave it out for flat)"),
    (GOOD + '    layout = "matrix"\n',
     "update cannot be called as update(self, param, grad, state, *, step, lr, decay, "
     "each_matrix): got an unexpected keyword argument 'each_matrix'"),
    ("def Mine(cfg):\n    pass\n", "is no class but function (see examples/my_optimizer.py)"),
]  # fmt: skip


@pytest.mark.parametrize("text, said", MISTAKES, ids=[said[:40] for _, said in MISTAKES])
def test_mistake_in_a_file_is_one_line(text, said, write):
    spec = write(text)
    with pytest.raises(UserError) as caught:
        load_rule(spec)
    # Python 3.10 and 3.11 word it alike but for a keyword that is missing.
    found = str(caught.value).replace("required keyword-only", "required")
    assert found == f"--optimizer {spec}: {said}"


def test_error_in_the_users_own_code_names_the_line(write):
    spec = write(GOOD.replace("        pass\n    def", "        cfg.absent\n    def"))
    with pytest.raises(UserError) as caught:
        Rules(OptimConfig(optimizer=spec))
    assert str(caught.value) == (
        f"--optimizer {spec.rpartition(':')[0]}:5: AttributeError: 'OptimConfig' object has no "
        "attribute 'absent'"
    )


def test_table_has_every_rule_under_its_name():
    assert [load_rule(name) for name in OPTIMIZERS] == list(OPTIMIZERS.values())
    with pytest.raises(UserError, match="unknown --optimizer 'muo' .did you mean muon"):
        load_rule("muo")
