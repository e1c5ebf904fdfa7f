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
    """-log Mean-max of each bag: the recall likelihood of an object (paper, section 3.3).

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

    The sum over all cells of q^gamma * -log(1 - q) with q = P^cls * (1 - P{a in A+}) (paper,
    section 3.3). Arithmetic is in logit space, so a false positive with a saturated sigmoid still
    gets its gradient, and in float32 for half precision logits.

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
    """Goes through the logits in chunks, and keeps nothing but the logits for the gradient.

    The gradient is computed in the backward pass, where its scale is known: that of the AMP
    scaler keeps it from underflowing in float16.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, cells: Tensor, prob: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(logits, cells, prob)
        ctx.gamma = gamma
        dtype = torch.promote_types(logits.dtype, torch.float32)
        flat = logits.reshape(-1)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        for x in flat.split(_chunk(logits)):
            p, _, nll = _background(x.to(dtype))
            total += p.pow_(gamma).mul_(nll).sum(dtype=torch.float64)
        # The few cells with P{a in A+} > 0 were counted as plain background: put them right. They
        # may be nearly all of the sum, hence float64.
        x = flat[cells].to(dtype)
        p, _, nll = _background(x)
        q, _, nll_q = _background(x, prob.to(dtype))
        total += (q.pow(gamma) * nll_q).sum(dtype=torch.float64)
        total -= (p.pow(gamma) * nll).sum(dtype=torch.float64)
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        logits, cells, prob = ctx.saved_tensors
        flat = logits.reshape(-1)
        grad = torch.empty_like(flat)
        chunk = _chunk(logits)
        for x, out in zip(flat.split(chunk), grad.split(chunk)):
            x = x.to(grad_output.dtype)
            p, not_p, nll = _background(x)
            # d/dx of p^gamma * nll, where dp/dx = p (1 - p) and dnll/dx = p
            slope = not_p.mul_(nll).mul_(ctx.gamma).add_(p)
            out.copy_(p.pow_(ctx.gamma).mul_(slope).mul_(grad_output))
        x = flat[cells].to(grad_output.dtype)
        q, not_q, nll = _background(x, prob.to(grad_output.dtype))
        # The same with dq/dx = q (1 - p) and dnll/dq = 1 / (1 - q)
        slope = (-x).sigmoid() * (ctx.gamma * nll + q / not_q)
        grad[cells] = (q.pow(ctx.gamma) * slope * grad_output).to(grad.dtype)
        return grad.view(logits.shape), None, None, None


def _chunk(logits: Tensor) -> int:
    return _CHUNK_GPU if logits.is_cuda else _CHUNK_CPU


def _background(x: Tensor, prob: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Give q = sigmoid(x) * (1 - prob), 1 - q and -log(1 - q) without cancellation."""
    p = x.sigmoid()
    not_p = (-x).sigmoid()  # 1 - p would round to 0 from x = 17 on
    if prob is None:
        return p, not_p, F.softplus(x)
    not_q = not_p + p * prob
    return p * (1 - prob), not_q, -torch.log(not_q)
