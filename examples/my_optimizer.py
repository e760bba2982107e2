"""An optimizer of your own: one class in a file of yours, nothing of megalite touched.

See that it computes at any layout what it computes in one process, then train with it:

    megalite verify --random 20 --optimizer examples/my_optimizer.py:Lion
    examples/launch.sh 2 pretrain --dp 2 --lr 1e-4 --optimizer examples/my_optimizer.py:Lion

What a rank is given are flat tensors of numbers: the range of a bucket that this rank looks after.
Which numbers they are, and of how many parameters, differs with the layout, so a rule may only do
to each number what depends on that number alone. The rest follows: master copies of bfloat16
weights, ZeRO 0 to 3, checkpoints (which keep `state_names` by name, and load in any layout), and
the memory that `pretrain --dry-run` shows.

Two things more can be asked for, each by a line in the class:

    layout = "matrix"
        Only the 2-d matrices of layers come here; tables, head, norms and biases are AdamW's. And
        `update` has one more keyword, `each_matrix`: each_matrix(flat, function) gives the numbers
        of `flat` with `function` done to each whole matrix [rows, cols], wherever its pieces are.
        megalite/optim/muon.py is a rule of this kind.

    takes = staticmethod(lambda name, shape: "mlp" in name)
        Only these parameters come here, by their name and whole shape; the others are AdamW's.
"""

from torch import Tensor

from megalite.core.config import OptimConfig


class Lion:
    """The sign of a running mean: Chen et al. 2023 (arXiv 2302.06675), algorithm 2.

    Smoothed by --eps, so that a gradient which is zero but for rounding (that of a key's bias) does
    not become a whole step: what differs in the last bit must not make different models.
    """

    state_names = ("exp_avg",)  # a tensor each, zero at first; in checkpoints by this name

    def __init__(self, cfg: OptimConfig):
        # Every flag of OptimConfig is here; --beta1 and --beta2 mean to Lion what they do to Adam.
        self.beta1, self.beta2, self.eps = cfg.beta1, cfg.beta2, cfg.eps

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        *,
        step: int,
        lr: float,
        decay: float,
    ) -> None:
        """Change `param` and `state` in place.

        `grad` is reduced, normalised and clipped, and may be overwritten; `step` counts from 1;
        `decay` is --weight-decay for matrices and 0 for norms and biases.
        """
        mean = state["exp_avg"]
        ahead = mean.lerp(grad, 1 - self.beta1)
        direction = ahead.div_(ahead.abs() + self.eps)
        param.mul_(1 - lr * decay).sub_(direction, alpha=lr)
        mean.lerp_(grad, 1 - self.beta2)
