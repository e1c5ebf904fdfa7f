"""The bag losses of FreeAnchor: pure tensor functions, letters as in `matching.py`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements per step of the dense sum: temporaries that stay in a CPU's cache, and few launches on
# a GPU.
_CHUNK_CPU = 1 << 17
_CHUNK_GPU = 1 << 24


def bag_logit(log_prob: Tensor) -> Tensor:
    """Log odds of each matched probability: log(P / (1 - P)) from log P.

    Args:
        log_prob: log P, at most 0.

    Returns:
        Finite log odds, also for P = 1 and for P that underflows.
    """
    # P == 1 has infinite odds. The bound is far below what moves the loss.
    log_prob = log_prob.clamp(max=-(torch.finfo(log_prob.dtype).eps ** 2))
    return log_prob - torch.log(-torch.expm1(log_prob))


def positive_bag_loss(log_prob: Tensor) -> Tensor:
    """-log Mean-max of each bag: the recall likelihood of an object (paper, eq. 5 and 6).

    Mean-max(P) = sum_j w_j P_j with w_j = (1 / (1 - P_j)) / sum_k 1 / (1 - P_k). With the odds
    o_j = P_j / (1 - P_j) and 1 / (1 - P_j) = 1 + o_j this is sum(o) / (K + sum(o)): Mean-max is
    the probability whose odds are the *mean odds* of the bag. Written so, the loss is a softplus.
    It can neither exceed the range of a probability by rounding, nor divide by 1 - P = 0, nor
    lose its gradient when every P underflows.

    Args:
        log_prob: (M, K) log matched probabilities, K >= 1.

    Returns:
        (M,) losses, finite and not negative.
    """
    log_sum_odds = bag_logit(log_prob).logsumexp(dim=1)
    return F.softplus(math.log(max(1, log_prob.shape[1])) - log_sum_odds)


def negative_bag_loss(logits: Tensor, cells: Tensor, prob: Tensor, gamma: float = 2.0) -> Tensor:
    """Precision loss: the focal loss of every anchor and class, as far as it is background.

    sum over all cells of q^gamma * -log(1 - q) with q = P^cls * (1 - P{a in A+}) (paper, eq. 7).
    Value and gradient are computed in one chunked pass and in logit space, so a false positive
    with a saturated sigmoid still gets its gradient. Arithmetic is float32 for half precision
    logits.

    Args:
        logits: class logits of any shape.
        cells: (S,) int64 distinct indices into the flattened logits where P{a in A+} is not 0.
        prob: (S,) P{a in A+} there, see :func:`freeanchor.matching.box_prob`. No gradient.
        gamma: focusing parameter, at least 1.

    Returns:
        Scalar sum.
    """
    loss: Tensor = _NegativeBagLoss.apply(logits, cells, prob, gamma)
    return loss


class _NegativeBagLoss(torch.autograd.Function):
    """Keeps the gradient from the forward pass instead of the temporaries that lead to it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cells: Tensor, prob: Tensor, gamma: float) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        flat = logits.detach().reshape(-1)
        grad = torch.empty_like(flat)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        chunk = _CHUNK_GPU if logits.is_cuda else _CHUNK_CPU
        for x, out in zip(flat.split(chunk), grad.split(chunk)):
            value, derivative = _background_focal_loss(x.to(dtype), None, gamma)
            total += value.sum()
            out.copy_(derivative)
        # The few cells with P{a in A+} > 0 were counted as plain background: put them right.
        x = flat[cells].to(dtype)
        value, derivative = _background_focal_loss(x, prob.to(dtype), gamma)
        total += (value - _background_focal_loss(x, None, gamma)[0]).sum()
        grad[cells] = derivative.to(grad.dtype)
        ctx.save_for_backward(grad.view(logits.shape))
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output.to(grad.dtype), None, None, None


def _background_focal_loss(x: Tensor, prob: Tensor | None, gamma: float) -> tuple[Tensor, Tensor]:
    """q^gamma * -log(1 - q) and its derivative by x, for q = sigmoid(x) * (1 - prob)."""
    p = x.sigmoid()
    not_p = (-x).sigmoid()  # 1 - p would round to 0 from x = 17 on
    if prob is None:
        nll = F.softplus(x)
        focus = p.pow(gamma)
        return focus * nll, focus * (gamma * not_p * nll + p)
    q = p * (1 - prob)
    not_q = not_p + p * prob
    nll = -torch.log(not_q)
    focus = q.pow(gamma)
    return focus * nll, focus * not_p * (gamma * nll + q / not_q)
