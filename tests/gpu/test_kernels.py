"""The emulator's tests of each op, word for word, on a GPU."""

from tests.kernels import (
    test_adamw_kernel,
    test_cross_entropy_kernels,
    test_elementwise_kernels,
    test_norm_kernels,
    test_softmax_kernels,
)

# Two files may have a test of one name.
for file in (
    test_adamw_kernel,
    test_cross_entropy_kernels,
    test_elementwise_kernels,
    test_norm_kernels,
    test_softmax_kernels,
):
    op = file.__name__.rpartition(".test_")[2].partition("_kernel")[0]
    for name, test in list(vars(file).items()):
        if name.startswith("test_"):
            globals()[f"test_{op}_{name.removeprefix('test_')}"] = test
