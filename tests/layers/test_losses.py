"""The bag losses, and the numerical traps of other implementations."""

import math

import paper
import pytest
import torch
import torch.nn.functional as F
from freeanchor.layers import losses, ops


def naive_mean_max(prob):
    """Mean-max as the other implementations write it."""
    weight = 1 / (1 - prob).clamp(min=1e-12)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return (weight * prob).sum(dim=1)


def naive_negative(logits, prob, gamma=2.0):
    """The negative loss with sigmoid and binary cross entropy on the dense P{a in A+}."""
    q = logits.sigmoid() * (1 - prob)
    return (q**gamma * F.binary_cross_entropy(q, torch.zeros_like(q), reduction="none")).sum()


def negative_bag_loss(logits, cells, prob, gamma=2.0):
    """The negative loss alone, of logits of any shape."""
    levels = [logits.reshape(1, -1, logits.shape[-1] or 1)]
    return ops.negative_bag_loss(levels, cells, prob, cells[:0], gamma)[0]


# Positive bag loss


def test_positive_bag_loss_is_the_papers():
    """-log Mean-max in float64 equals the formula, for small and large P."""
    prob = torch.rand(200, 7, dtype=torch.float64).pow(torch.linspace(0.05, 12, 200)[:, None])
    loss = losses.positive_bag_loss(prob.log())
    expected = [-math.log(paper.mean_max(p)) for p in prob.tolist()]
    torch.testing.assert_close(
        loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-13
    )


def test_positive_bag_loss_gradient():
    """Analytic and numerical gradient agree, also next to P = 1."""
    log_prob = -(10.0 ** torch.linspace(-2, 1.5, 24, dtype=torch.float64)).view(4, 6)
    assert torch.autograd.gradcheck(losses.positive_bag_loss, log_prob.requires_grad_())


def test_positive_bag_loss_of_a_bag_that_rounds_above_one():
    """Trap 2: where naive Mean-max exceeds 1 and its logarithm fails, the loss is small."""
    prob = 1 - 10 ** -torch.empty(4000, 50).uniform_(6.5, 7.3)
    above = naive_mean_max(prob) > 1
    assert above.any(), "the case does not break the naive formula"
    loss = losses.positive_bag_loss(prob[above].log())
    assert (loss >= 0).all()
    assert (loss < 1e-2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_prob", [0.0, -1e-45, -1e-12, -90.0, -200.0, -1e4])
def test_positive_bag_loss_is_finite_everywhere(log_prob, dtype):
    """Trap 2: P = 1 and P that underflows give finite losses and gradients."""
    x = torch.tensor([[log_prob, -3.0], [log_prob, log_prob]], dtype=dtype, requires_grad=True)
    loss = losses.positive_bag_loss(x)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert x.grad.isfinite().all()
    if log_prob <= -90:
        torch.testing.assert_close(loss[1], -x.detach()[1, 0], rtol=1e-6, atol=0)
        torch.testing.assert_close(x.grad[1], torch.full_like(x.grad[1], -0.5), rtol=1e-3, atol=0)


def test_positive_bag_loss_without_objects():
    """No bags, no losses, and still a graph."""
    log_prob = torch.zeros(0, 50, requires_grad=True)
    losses.positive_bag_loss(log_prob).sum().backward()
    assert log_prob.grad.shape == (0, 50)


# Negative bag loss


def sparse_case(dtype=torch.float64, gamma=2.0):
    """Logits in a wide range, with P{a in A+} from small to 1 at a third of the cells."""
    logits = (torch.randn(3, 17, 5, dtype=dtype) * 4).requires_grad_()
    cells = torch.randperm(logits.numel())[: logits.numel() // 3]
    prob = torch.linspace(1e-6, 1, len(cells), dtype=dtype)
    dense = torch.zeros(logits.numel(), dtype=dtype)
    dense[cells] = prob
    return logits, cells, prob, dense.view_as(logits)


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_negative_bag_loss_is_the_papers(gamma):
    """Value and gradient equal those of the dense formula under autograd."""
    logits, cells, prob, dense = sparse_case()
    expected = naive_negative(logits, dense, gamma)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss = negative_bag_loss(logits, cells, prob, gamma)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-13)


def test_negative_bag_loss_where_matched_cells_are_nearly_all_of_it():
    """What the matched cells would cost as background does not spoil the small rest."""
    logits = torch.randn(300_000) - 12
    cells, prob = torch.randperm(300_000)[:2000], torch.ones(2000)
    logits[cells] = torch.rand(2000) * 6 + 2
    background = torch.ones(300_000, dtype=torch.bool)
    background[cells] = False
    loss = negative_bag_loss(logits, cells, prob)
    rest = negative_bag_loss(logits[background].double(), cells[:0], prob[:0].double())
    assert rest > 0
    torch.testing.assert_close(loss.double(), rest, rtol=0, atol=1e-5)
    assert loss > -1e-5


@pytest.mark.parametrize("prob", [1e-6, 1e-3, 0.5])
def test_negative_bag_loss_of_saturated_matched_cells(prob):
    """In float32, 1 - q is exact to rounding also where 1 - sigmoid is not."""
    logits = torch.linspace(16, 40, 25, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    cells = torch.arange(25)
    negative_bag_loss(logits, cells, torch.full((25,), prob)).backward()
    q = exact.sigmoid() * (1 - prob)
    not_q = (-exact).sigmoid() + exact.sigmoid() * prob
    (q.square() * -not_q.log()).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-12)


def test_negative_bag_loss_gradient():
    """Analytic and numerical gradient agree."""
    logits, cells, prob, _ = sparse_case()
    assert torch.autograd.gradcheck(lambda x: negative_bag_loss(x, cells, prob, 2.0), logits)


def test_negative_bag_loss_scales_its_gradient():
    """An outer factor, as the AMP scaler's, reaches the gradient, twice if asked twice."""
    logits, cells, prob, _ = sparse_case()
    loss = negative_bag_loss(logits, cells, prob)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 1024, logits)
    torch.testing.assert_close(scaled, once * 1024)


def test_negative_bag_loss_chunks(monkeypatch):
    """Where the chunks of the reference end must not matter."""
    logits, cells, prob, _ = sparse_case()
    arguments = [logits.detach()], cells, prob, cells[:0], 2.0, 1.0, 1.0
    whole_grad, parts_grad = torch.empty_like(logits), torch.empty_like(logits)
    whole, _ = losses.negative_bag_loss(*arguments, [whole_grad.detach()])
    monkeypatch.setattr(losses, "_CHUNK_CPU", 7)
    parts, _ = losses.negative_bag_loss(*arguments, [parts_grad.detach()])
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts_grad, whole_grad, rtol=1e-13, atol=1e-15)


def test_negative_bag_loss_of_a_saturated_false_positive():
    """Trap 10: at logit 20 the gradient is 1 in float32, where the naive code has 0."""
    logits = torch.tensor([20.0, 80.0], requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    loss = negative_bag_loss(logits, *none)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(100.0))
    torch.testing.assert_close(logits.grad, torch.ones(2))
    naive = torch.tensor([20.0, 80.0], requires_grad=True)
    naive_negative(naive, 0).backward()
    assert naive.grad.tolist() == [0, 0]


@pytest.mark.parametrize("prob", [1e-30, 0.5, 1.0])
@pytest.mark.parametrize("logit", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_negative_bag_loss_is_finite_everywhere(logit, prob):
    """No corner of logits and P{a in A+} gives inf or NaN in float32."""
    logits = torch.tensor([logit], requires_grad=True)
    loss = negative_bag_loss(logits, torch.tensor([0]), torch.tensor([prob]))
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert logits.grad.isfinite().all()
    if prob == 1.0:
        assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_negative_bag_loss_of_half_precision_logits(dtype):
    """Trap 3: half precision logits are summed in float32, and get gradients of their dtype."""
    logits, cells, prob, dense = sparse_case(torch.float32)
    half = logits.detach().to(dtype).requires_grad_()
    loss = negative_bag_loss(half, cells, prob)
    loss.backward()
    exact = half.detach().double().requires_grad_()
    expected = naive_negative(exact, dense.double())
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(half.grad, exact.grad.to(dtype), rtol=1e-2, atol=1e-7)


def test_negative_bag_loss_keeps_small_gradients_in_float16():
    """Trap 3: with AMP's loss scale, gradients below float16's range survive, and large ones too.

    A gradient that is stored before it is scaled loses all below 6e-8.
    """
    x = torch.linspace(-10, 5, 200)
    half = x.half().requires_grad_()
    none, no_prob = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    (negative_bag_loss(half, none, no_prob) * 1024).backward()
    exact = half.detach().double().requires_grad_()
    (negative_bag_loss(exact, none, no_prob.double()) * 1024).backward()
    assert (exact.grad / 1024).min() < 6e-8
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2e-3, atol=6e-8)


def test_negative_bag_loss_of_nothing():
    """An empty tensor of logits, as an image smaller than a stride would give."""
    logits = torch.zeros(2, 0, 80, requires_grad=True)
    loss = negative_bag_loss(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == logits.shape
