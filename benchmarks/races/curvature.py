"""The Hessian of a trained network: products, its largest eigenvalue, the density of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Heat, Run, race
from benchmarks.races.optimizers import built
from sfumato.data import digits
from sfumato.nn.flat import flatten_params, unflatten_params
from sfumato.probes import HessianOperator, eigs, spectral_density

Batches = list[tuple[Tensor, Tensor]]
LOSS = nn.CrossEntropyLoss()


def digits_net(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def digits_convnet(width: int) -> nn.Module:
    """Without normalisation, which has no forward-mode derivative of its gradient, and curvlinops no other way."""
    layers = [m for cin in (1, width, width) for m in (nn.Conv2d(cin, width, 3, padding=1), nn.Tanh())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def problem(make: Callable[[], nn.Module], batches: int, size: int) -> tuple[nn.Module, Batches]:
    """A network after 60 steps of Adam on digits, and what its Hessian is averaged over."""
    data, _ = digits(seed=0)
    assert data.label is not None
    x, y = data.x, data.label
    net = built(make)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        index = torch.arange(64 * step, 64 * (step + 1)) % len(x)
        optimizer.zero_grad()
        LOSS(net(x[index]), y[index]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval(), [(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(batches)]


def curvlinops_operator(net: nn.Module, data: Batches) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(net, LOSS, list(net.parameters()), data, check_deterministic=False)


def pyhessian_operator(net: nn.Module, data: Batches) -> Any:
    """Over batches it differentiates anew for every product; for one batch it keeps the graph of the gradient."""
    from pyhessian import hessian

    net.zero_grad()
    settings = {"data": data[0]} if len(data) == 1 else {"dataloader": data}
    if len(data) > 1:  # it looks for parameters that have gradients
        LOSS(net(data[0][0]), data[0][1]).backward()
    operator = hessian(net, LOSS, cuda=False, **settings)
    net.zero_grad()
    return operator


# ---- products


def our_product(net: nn.Module, data: Batches, v: Tensor) -> Run:
    """As within `eigs` and `spectral_density`: weights and data stay."""
    operator, stack = HessianOperator(net, LOSS, data), ExitStack()
    stack.enter_context(operator.held())

    def run(_open: ExitStack = stack) -> Tensor:
        return operator @ v

    return run


def curvlinops_product(net: nn.Module, data: Batches, v: Tensor) -> Run:
    operator = curvlinops_operator(net, data)
    return lambda: operator @ v


def pyhessian_product(net: nn.Module, data: Batches, v: Tensor) -> Run:
    from pyhessian.utils import hessian_vector_product

    operator = pyhessian_operator(net, data)
    parts = list(unflatten_params(v, list(net.parameters())))
    if operator.full_dataset:
        return lambda: flatten_params(operator.dataloader_hv_product(parts)[1])
    return lambda: flatten_params(hessian_vector_product(operator.gradsH, operator.params, parts))


# ---- the largest eigenvalue


def our_eigenvalue(net: nn.Module, data: Batches, tol: float) -> Run:
    operator = HessianOperator(net, LOSS, data)
    return lambda: eigs(operator, 1, which="LM", tol=tol, generator=torch.Generator().manual_seed(0)).values


def curvlinops_eigenvalue(net: nn.Module, data: Batches, tol: float) -> Run:
    """ARPACK through scipy, as its documentation does."""
    from scipy.sparse.linalg import eigsh

    operator = curvlinops_operator(net, data).to_scipy()
    start = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0)).numpy()
    return lambda: torch.as_tensor(eigsh(operator, 1, which="LM", tol=tol, v0=start, return_eigenvectors=False).copy())


def pyhessian_eigenvalue(net: nn.Module, data: Batches, tol: float) -> Run:
    """The power iteration; it stops when a step, which says little of what is left, changes the value by a tenth of `tol`."""
    operator = pyhessian_operator(net, data)

    def run() -> Tensor:
        torch.manual_seed(0)
        return torch.tensor(operator.eigenvalues(maxIter=1000, tol=tol / 10)[0])

    return run


# ---- the density of all eigenvalues


def starts(net: nn.Module) -> Tensor:
    """The signs that pyhessian draws after `manual_seed(0)`, `[1, d]`."""
    torch.manual_seed(0)
    return flatten_params([torch.randint_like(p, 2) for p in net.parameters()])[None] * 2 - 1


def our_density(net: nn.Module, data: Batches, steps: int) -> Run:
    operator, noise = HessianOperator(net, LOSS, data), starts(net)

    def run() -> list[float]:
        nodes = spectral_density(operator, steps=steps, noise=noise).nodes
        return [float(nodes.min()), float(nodes.max())]

    return run


def curvlinops_density(net: nn.Module, data: Batches, steps: int) -> Run:
    """Lanczos without re-orthogonalisation; the ends of the spectrum, which it would look for first, are handed to it."""
    from curvlinops import lanczos_approximate_spectrum

    operator = curvlinops_operator(net, data)
    low, high = our_density(net, data, steps)()
    return lambda: lanczos_approximate_spectrum(operator, steps, num_points=10_000, boundaries=(low, high))


def curvlinops_nodes(net: nn.Module, data: Batches, steps: int) -> Run:
    """What is inside of `curvlinops_density`; it starts from a Gaussian vector of its own."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    operator = curvlinops_operator(net, data)

    def run() -> list[float]:
        torch.manual_seed(0)
        nodes = fast_lanczos(operator, steps)[0]
        return [float(nodes.min()), float(nodes.max())]

    return run


def pyhessian_density(net: nn.Module, data: Batches, steps: int) -> Run:
    """It calls `torch.eig`, which torch no longer has: given back here, for symmetric matrices."""
    operator = pyhessian_operator(net, data)

    def eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return values[:, None], vectors

    def run() -> list[float]:
        torch.manual_seed(0)
        torch.eig = eig  # type: ignore[attr-defined]
        nodes = operator.density(iter=steps, n_v=1)[0][0]
        return [float(min(nodes)), float(max(nodes))]

    return run


@race(
    "Curvature: Hessian-vector products, the largest eigenvalue, the spectral density",
    "For one vector ours differentiates reverse over reverse, curvlinops forward over reverse. pyhessian does as ours; both keep "
    "the graph of the gradient of a single batch from one product to the next, which saves a forward and a backward pass. It "
    "leaves out what ours sees to (eval mode, exact arithmetic, the module as it was), which a small "
    "network feels. The eigenvalue depends on how many products are needed: Lanczos looked at after every fifth (ours), "
    "ARPACK (curvlinops, through scipy), the power iteration (pyhessian), which watches the change of a step and is therefore "
    "given a tenth of the tolerance. For the density ours re-orthogonalises twice, "
    "pyhessian once, curvlinops never.",
)
def curvature(quick: bool) -> Iterator[Heat]:
    """The same products to 1e-4, eigenvalues to 1e-2; pyhessian's density starts from our signs."""
    width, thin, size, steps = (16, 8, 32, 10) if quick else (192, 16, 128, 30)
    cases = {
        "fully connected, four batches": (partial(digits_net, width), 4),
        "convolutional, one batch": (partial(digits_convnet, thin), 1),
    }
    for name, (make, batches) in cases.items():
        net, data = problem(make, batches, size)
        count = sum(p.numel() for p in net.parameters())
        name = f"{name} of {size}, {count / 1e3:.2g} k weights"
        v = torch.randn(count, generator=torch.Generator().manual_seed(1))
        products = {"sfumato": our_product, "curvlinops": curvlinops_product, "pyhessian": pyhessian_product}
        lanes = {k: partial(make_run, net, data, v) for k, make_run in products.items()}
        yield Heat(f"product: {name}", lanes, tolerance=1e-4)
        values = {"sfumato": our_eigenvalue, "curvlinops": curvlinops_eigenvalue, "pyhessian": pyhessian_eigenvalue}
        lanes = {k: partial(make_run, net, data, 1e-3) for k, make_run in values.items()}
        yield Heat(f"largest eigenvalue: {name}", lanes, tolerance=1e-2, memory=False)
        densities = {"sfumato": our_density, "curvlinops": curvlinops_density, "pyhessian": pyhessian_density}
        yield Heat(
            f"density, {steps} Lanczos steps: {name}",
            {k: partial(make_run, net, data, steps) for k, make_run in densities.items()},
            checks={
                k: partial(curvlinops_nodes if k == "curvlinops" else make_run, net, data, steps)
                for k, make_run in densities.items()
            },
            tolerance=1e-2,
            memory=False,
        )
