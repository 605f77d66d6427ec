"""Penalties on the entries of one layer's update, in row blocks: the forward pass takes the closed-form gradient."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .blocked import free_block, gate_block, gate_block_backward, row_blocks, update_block, workspace
from .sparse import compressed, to_csr


class _RowPenalty(torch.autograd.Function):
    """Sum over row blocks of term(E, start, stop, grad_E), which returns the value and writes dvalue/dE to `grad_E`."""

    @staticmethod
    def forward(ctx, A, B, log_tau, mix, free, term):
        out_features, in_features = B.shape[0], A.shape[1]
        f = 0.0 if log_tau is None else float(mix)
        tau = 0.0 if log_tau is None else log_tau.to(A.dtype).exp().item()
        total = A.new_zeros(())
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
        with torch.autocast(A.device.type, enabled=False):
            for start, stop in row_blocks(out_features, in_features):
                D, free_rows = update_block(A, B, start, stop), free_block(free, start, stop, in_features)
                grad_E = workspace("G", D.shape, D)
                total += term(gate_block(D, tau, f, free_rows), start, stop, grad_E)
                grad_D, _ = gate_block_backward(D, grad_E, tau, f, 0.0, free_rows)
                grad_A.addmm_(B[start:stop].T, grad_D)
                torch.mm(grad_D, A.T, out=grad_B[start:stop])
        ctx.save_for_backward(grad_A, grad_B)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(g * grad for g in ctx.saved_tensors), None, None, None, None


class SparsePast(NamedTuple):
    """The non-zero entries of a matrix [out, in] in row order, and the order that makes them those of its transpose."""

    crow: torch.Tensor
    col: torch.Tensor
    values: torch.Tensor
    crow_T: torch.Tensor
    col_T: torch.Tensor
    order: torch.Tensor

    def to(self, device: torch.device) -> "SparsePast":
        """As a tensor's."""
        return SparsePast(*(t.to(device) for t in self))


def sparse_past(dense: torch.Tensor) -> SparsePast:
    """The non-zero entries of a matrix [out, in] for [`overlap_penalty`]: 16 bytes each (28 from 2^31 entries on)."""
    crow, col, values = to_csr(dense)
    rows = torch.repeat_interleave(torch.arange(dense.shape[0], device=col.device), crow.diff())
    order = col.argsort(stable=True)
    crow_T = F.pad(torch.bincount(col, minlength=dense.shape[1]).cumsum(0), (1, 0))
    dtype = torch.int32 if dense.numel() < 2**31 else torch.int64
    return SparsePast(*(t.to(dtype) if t is not values else t for t in (crow, col, values, crow_T, rows[order], order)))


def _csr(crow, col, values, shape):
    return compressed(torch.sparse_csr_tensor, crow, col, values, shape)


class _SparseOverlap(torch.autograd.Function):
    """|| scaling * E * W_past ||_F^2 over the non-zero entries of W_past, with its closed-form gradient."""

    @staticmethod
    def forward(ctx, A, B, log_tau, mix, past, scaling):
        shape, f = (B.shape[0], A.shape[1]), 0.0 if log_tau is None else float(mix)
        tau = 0.0 if log_tau is None else log_tau.to(A.dtype).exp().item()
        with torch.autocast(A.device.type, enabled=False):
            pattern = _csr(past.crow, past.col, torch.zeros_like(past.values), shape)
            D = torch.sparse.sampled_addmm(pattern, B, A).values()
            factor = torch.where(D.abs() > tau, 1.0, 1.0 - f).to(D.dtype)
            grad_E = D * factor * past.values.square()
            total = torch.dot(grad_E, D * factor) * scaling**2
            grad_E *= 2 * scaling**2
            grad_D = grad_E * factor
            grad_B = _csr(past.crow, past.col, grad_D, shape) @ A.T
            grad_A = (_csr(past.crow_T, past.col_T, grad_D[past.order], shape[::-1]) @ B).T
        ctx.save_for_backward(grad_A.contiguous(), grad_B)
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(g * grad for g in ctx.saved_tensors), None, None, None, None


def overlap_penalty(A, B, log_tau, past, *, scaling, mix=0.0) -> torch.Tensor:
    """|| scaling * E * W_past ||_F^2 (ELLA, arXiv 2601.02232; E as in [`gated_linear`]), a scalar.

    Differentiable in A [r, in] and B [out, r], not in log_tau [1]; `log_tau=None`: an update without a gate (E = B A).
    past: [out, in], the sum of the earlier tasks' scaled updates, or its non-zeros ([`sparse_past`]: faster below
    about 13 % of them). Nothing of size [out, in] is kept for the backward.
    """
    if isinstance(past, SparsePast):
        return _SparseOverlap.apply(A, B, log_tau, mix, past, scaling)

    def term(E, start, stop, grad_E):
        E.mul_(past[start:stop])
        torch.mul(E, past[start:stop], out=grad_E).mul_(2 * scaling**2)
        return torch.dot(E.view(-1), E.view(-1)) * scaling**2

    return _RowPenalty.apply(A, B, log_tau, mix, None, term)


def l1_penalty(A, B, log_tau, *, mix=0.0, free=None) -> torch.Tensor:
    """sum |E|, E as in [`gated_linear`]: a scalar; the subgradient at zero is zero.

    Differentiable in A [r, in] and B [out, r], not in log_tau [1]; `log_tau=None`: an update without a gate (E = B A).
    free: packed bits of the entries the update may use, or None. Nothing of size [out, in] is kept for the backward.
    """

    def term(E, start, stop, grad_E):
        torch.sign(E, out=grad_E)
        return torch.dot(grad_E.view(-1), E.view(-1))

    return _RowPenalty.apply(A, B, log_tau, mix, free, term)
