"""ELLA's penalty on one layer in row blocks: the closed-form gradient is taken in the forward pass."""

import torch

from .blocked import gate_block, gate_block_backward, log_tau_grad, row_blocks, update_block, workspace


class _OverlapPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A, B, log_tau, mix, past, scaling, bandwidth, mean):
        f = 0.0 if log_tau is None else float(mix)
        tau = 0.0 if log_tau is None else log_tau.to(A.dtype).exp().item()
        total, tau_sum = A.new_zeros(()), A.new_zeros(())
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
        with torch.autocast(A.device.type, enabled=False):
            for start, stop in row_blocks(*past.shape):
                D = update_block(A, B, start, stop)
                weighted = gate_block(D, tau, f, None).mul_(past[start:stop]).mul_(scaling)  # s E * W_past
                total += torch.dot(weighted.view(-1), weighted.view(-1))
                grad_E = workspace("G", D.shape, D)
                torch.mul(weighted, past[start:stop], out=grad_E).mul_(2 * scaling)
                grad_D, block_sum = gate_block_backward(D, grad_E, tau, f, bandwidth, None)
                tau_sum += block_sum
                grad_A.addmm_(B[start:stop].T, grad_D)
                torch.mm(grad_D, A.T, out=grad_B[start:stop])
        grad_log_tau = None
        if log_tau is not None:
            grad_log_tau = log_tau_grad(tau_sum, tau, bandwidth, past.numel(), mean, log_tau)
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
    return _OverlapPenalty.apply(A, B, log_tau, mix, past, scaling, bandwidth, threshold_grad == "mean")
