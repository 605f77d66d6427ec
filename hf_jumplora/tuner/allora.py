"""ALLoRA (arXiv 2410.09692): gradients of a row's factors shrink with the row's update."""

import torch


class RowScaledUpdate(torch.autograd.Function):
    """s x A^T B^T of x [.., in], A [r, in], B [out, r]. In the gradients of A and B that of output i is multiplied by

        c_i = 1 / sqrt(||s (B A)_i|| + 1 / eta^2),

    in the gradient of x it is not. So c acts inside B^T diag(c) G, where no factor on the gradient of A could put it.
    """

    @staticmethod
    def forward(ctx, x, A, B, scaling, eta):
        """The update's output [.., out]."""
        ctx.save_for_backward(x, A, B)
        ctx.scaling, ctx.eta = scaling, eta
        return torch.nn.functional.linear(torch.nn.functional.linear(x, A), B) * scaling

    @staticmethod
    def backward(ctx, grad):
        """Gradients of x, A and B."""
        x, A, B = ctx.saved_tensors
        norms = ctx.scaling * ((B @ (A @ A.T)) * B).sum(1).clamp_min(0).sqrt()  # of the rows of B A, never built
        G, x_rows = ctx.scaling * grad.flatten(0, -2), x.flatten(0, -2)
        scaled = G * (norms + ctx.eta**-2).rsqrt()
        return (G @ B @ A).view_as(x), (scaled @ B).T @ x_rows, scaled.T @ (x_rows @ A.T), None, None
