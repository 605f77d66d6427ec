"""Penalties on the entries of one layer's update, in row blocks: the forward pass takes the closed-form gradient."""

import torch

from .blocked import free_block, gate_block, gate_block_backward, log_tau_grad, row_blocks, update_block, workspace


class _RowPenalty(torch.autograd.Function):
    """Sum over row blocks of term(E, start, stop, grad_E), which returns the value and writes dvalue/dE to `grad_E`."""

    @staticmethod
    def forward(ctx, A, B, log_tau, mix, free, bandwidth, mean, term):
        out_features, in_features = B.shape[0], A.shape[1]
        f = 0.0 if log_tau is None else float(mix)
        tau = 0.0 if log_tau is None else log_tau.to(A.dtype).exp().item()
        total, tau_sum = A.new_zeros(()), A.new_zeros(())
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
        with torch.autocast(A.device.type, enabled=False):
            for start, stop in row_blocks(out_features, in_features):
                D, free_rows = update_block(A, B, start, stop), free_block(free, start, stop, in_features)
                grad_E = workspace("G", D.shape, D)
                total += term(gate_block(D, tau, f, free_rows), start, stop, grad_E)
                grad_D, block_sum = gate_block_backward(D, grad_E, tau, f, bandwidth, free_rows)
                tau_sum += block_sum
                grad_A.addmm_(B[start:stop].T, grad_D)
                torch.mm(grad_D, A.T, out=grad_B[start:stop])
        grad_log_tau = None
        if log_tau is not None:
            grad_log_tau = log_tau_grad(tau_sum, tau, bandwidth, out_features * in_features, mean, log_tau)
        ctx.save_for_backward(grad_A, grad_B, grad_log_tau)
        return total

    @staticmethod
    def backward(ctx, grad):
        grads = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def overlap_penalty(A, B, log_tau, past, *, scaling, mix=0.0, bandwidth=1e-3, threshold_grad="mean") -> torch.Tensor:
    """|| scaling * E * W_past ||_F^2 (ELLA, arXiv 2601.02232; E as in [`gated_linear`]), a scalar.

    Differentiable in A [r, in], B [out, r] and log_tau [1]; `log_tau=None` means an update without a gate (E = B A).
    past: [out, in], the sum of the earlier tasks' scaled updates. Nothing of size [out, in] is kept for the backward.
    """

    def term(E, start, stop, grad_E):
        E.mul_(past[start:stop])
        torch.mul(E, past[start:stop], out=grad_E).mul_(2 * scaling**2)
        return torch.dot(E.view(-1), E.view(-1)) * scaling**2

    return _RowPenalty.apply(A, B, log_tau, mix, None, bandwidth, threshold_grad == "mean", term)


def l1_penalty(A, B, log_tau, *, scaling, mix=0.0, bandwidth=1e-3, threshold_grad="mean", free=None) -> torch.Tensor:
    """sum |scaling * E|, E as in [`gated_linear`]: a scalar; the subgradient at zero is zero.

    Differentiable in A [r, in], B [out, r] and log_tau [1]; `log_tau=None` means an update without a gate (E = B A).
    free: packed bits of the entries the update may use, or None. Nothing of size [out, in] is kept for the backward.
    """

    def term(E, start, stop, grad_E):
        torch.sign(E, out=grad_E).mul_(abs(scaling))
        return torch.dot(grad_E.view(-1), E.view(-1))

    return _RowPenalty.apply(A, B, log_tau, mix, free, bandwidth, threshold_grad == "mean", term)
