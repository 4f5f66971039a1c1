"""Measures the peak memory of a search for the largest eigenvalue, beside the peers."""

from __future__ import annotations

import gc
import itertools

import torch
from spectrum_cost import Action, hessian_of, part, vector_of
from spectrum_nets import Net
from spectrum_tools import Counted, KeepGraph, PyHessian, installed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from lightning_curvature.linalg import eigenpairs

# Vectors that ARPACK keeps for one eigenvalue (SciPy's default), in NumPy, where PyTorch does not count them.
_ARPACK_VECTORS = 20
# Products after which memory has reached its peak: of ours the basis goes on growing, so that one runs to its end.
_PEER_PRODUCTS = 2
_SHORT_BASIS = 6
MEMORY_LEGEND = f"""\
Most bytes alive at any moment of a search for λ_max to 1e-3, above those alive before (parameters, data): every
allocation of PyTorch, on the CPU through its profiler. Ours runs from start to end; the peers run {_PEER_PRODUCTS}
products, after which they do not grow, and eigsh adds the {_ARPACK_VECTORS} vectors that it keeps in NumPy.
"""


def peak(action: Action, device: torch.device) -> int:
    """Most bytes alive while something runs, above those alive before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def memory(net: Net) -> list[str]:
    """Table of peak memory."""

    def search(keep_graph: KeepGraph, max_basis: int = 64) -> None:
        operator = hessian_of(net, keep_graph)
        eigenpairs(operator, operator.space, largest=1, tolerance=1e-3, max_basis=max_basis)
        operator.close()

    def peer() -> None:
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.MATH):
            PyHessian(net).tool.eigenvalues(maxIter=_PEER_PRODUCTS)
        net.rows.zero_grad()

    def other() -> None:
        operator, vector = Counted(net), vector_of(net)
        for _ in range(_PEER_PRODUCTS):
            vector = operator @ vector

    actions: dict[str, Action] = {
        "ours": lambda: search("auto"),
        "ours, no graph kept": lambda: search(False),
        f"ours, no graph kept, max_basis={_SHORT_BASIS}": lambda: search(False, _SHORT_BASIS),
    }
    if installed("pyhessian"):
        actions["PyHessian"] = peer
    if installed("curvlinops"):
        actions["curvlinops + eigsh"] = other
    lines = ["| tool | MiB | in sizes of the parameters |", "|---|---|---|"]
    for name, action in actions.items():
        found = peak(action, net.device) + (_ARPACK_VECTORS * net.bytes if "eigsh" in name else 0)
        lines.append(f"| {name} | {found / 2**20:.0f} | {found / net.bytes:.1f} |")
    # What every tool needs at least, whatever it keeps. Of two, since a single graph is kept in any case.
    few = part(net)
    floor = peak(lambda: hessian_of(few, False)(vector_of(few)), net.device)
    return [
        *lines,
        f"| limit: one product, one micro-batch after the other | {floor / 2**20:.0f} | {floor / net.bytes:.1f} |",
    ]
