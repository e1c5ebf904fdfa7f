"""The bag losses, and the numerical traps of other implementations."""

import math

import paper
import pytest
import torch
import torch.nn.functional as F
from freeanchor.layers import losses, ops
from freeanchor.layers.matching import BoxCoding, Objects
from layer_inputs import EMULATED


def naive_mean_max(prob):
    """Mean-max as the other implementations write it."""
    weight = 1 / (1 - prob).clamp(min=1e-12)
    weight = weight / weight.sum(dim=1, keepdim=True)
    return (weight * prob).sum(dim=1)


def naive_negative(logits, prob, gamma=2.0):
    """The negative loss with sigmoid and binary cross entropy on the dense P{a in A+}."""
    q = logits.sigmoid() * (1 - prob)
    return (q**gamma * F.binary_cross_entropy(q, torch.zeros_like(q), reduction="none")).sum()


def negative_bag_loss(logits, prob, classes=None, gamma=2.0):
    """The negative loss alone, of logits (..., C) of one image with known P{a in A+}.

    `prob` (R,) is that of each anchor for its class, 0 where it is not given. With threshold 0, an
    anchor of height P in a unit box has it, if one more anchor, whose logits say nothing, fills the
    box: there is one such object for each class.
    """
    num_classes = logits.shape[-1] or 1
    logits = logits.reshape(-1, num_classes)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    of_objects = torch.arange(num_classes if len(prob) else 0)
    classes = torch.zeros(len(prob), dtype=torch.int64) if classes is None else classes
    missing = len(logits) - len(prob)
    x = F.pad(torch.cat((classes, of_objects)).to(dtype) * 10, (0, missing), value=-10)
    height = F.pad(torch.cat((prob.to(dtype), torch.ones(len(of_objects)))), (0, missing), value=1)
    anchors = torch.stack((x - 0.5, -height / 2, x + 0.5, height / 2), dim=1).to(dtype)
    nothing = logits.new_full((len(of_objects), num_classes), -1000.0)
    levels = [torch.cat((logits[: len(prob)], nothing, logits[len(prob) :]))[None]]
    objects = Objects(anchors[len(prob) :][: len(of_objects)], of_objects, of_objects * 0)
    deltas = [torch.zeros_like(levels[0][..., :1]).expand(1, len(anchors), 4).detach()]
    coding = BoxCoding((1.0, 1.0, 1.0, 1.0), 4.0)
    loss, *_ = ops.negative_bag_loss(
        levels, deltas, [anchors], objects, of_objects[:0], coding, 0.0, gamma
    )
    return loss


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


def sparse_case(dtype=torch.float64):
    """Logits in a wide range, with P{a in A+} from small to 1 of some class at two thirds of them.

    Returns:
        Tuple of (R, C) logits, (S,) P and classes of the first anchors, and dense P (R, C).
    """
    logits = (torch.randn(51, 5, dtype=dtype) * 4).requires_grad_()
    prob = torch.linspace(1e-6, 1, 34, dtype=dtype)
    classes = torch.randint(0, 5, (34,))
    dense = torch.zeros(51, 5, dtype=dtype)
    dense[torch.arange(34), classes] = prob
    return logits, prob, classes, dense


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_negative_bag_loss_is_the_papers(gamma):
    """Value and gradient equal those of the dense formula under autograd."""
    logits, prob, classes, dense = sparse_case()
    expected = naive_negative(logits, dense, gamma)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    loss = negative_bag_loss(logits, prob, classes, gamma)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-13)


def test_negative_bag_loss_where_matched_cells_are_nearly_all_of_it():
    """What the matched cells would cost as background does not spoil the small rest."""
    logits = torch.randn(30_000 if EMULATED else 300_000, 1) - 12
    logits[:2000] = torch.rand(2000, 1) * 6 + 2
    loss = negative_bag_loss(logits, torch.ones(2000))
    rest = negative_bag_loss(logits[2000:].double(), torch.zeros(0))
    assert rest > 0
    torch.testing.assert_close(loss.double(), rest, rtol=0, atol=1e-5)
    assert loss > -1e-5


@pytest.mark.parametrize("prob", [1e-6, 1e-3, 0.5])
def test_negative_bag_loss_of_saturated_matched_cells(prob):
    """In float32, 1 - q is exact to rounding also where 1 - sigmoid is not."""
    logits = torch.linspace(16, 40, 25)[:, None].requires_grad_()
    exact = logits.detach().double().requires_grad_()
    negative_bag_loss(logits, torch.full((25,), prob)).backward()
    q = exact.sigmoid() * (1 - prob)
    not_q = (-exact).sigmoid() + exact.sigmoid() * prob
    (q.square() * -not_q.log()).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-12)


def test_negative_bag_loss_gradient():
    """Analytic and numerical gradient agree."""
    logits, prob, classes, _ = sparse_case()
    assert torch.autograd.gradcheck(
        lambda x: negative_bag_loss(x, prob, classes), logits, fast_mode=EMULATED
    )


def test_negative_bag_loss_scales_its_gradient():
    """An outer factor, as the AMP scaler's, reaches the gradient, twice if asked twice."""
    logits, prob, classes, _ = sparse_case()
    loss = negative_bag_loss(logits, prob, classes)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 1024, logits)
    torch.testing.assert_close(scaled, once * 1024)


def test_negative_bag_loss_chunks(monkeypatch):
    """Where the chunks of the reference end must not matter."""
    logits, prob, classes, _ = sparse_case()
    logits = logits.detach()[None]
    cells = torch.arange(len(prob)) * 5 + classes
    arguments = [logits], cells, prob, 2.0, torch.tensor(1.0)
    whole_grad, parts_grad = torch.empty_like(logits), torch.empty_like(logits)
    whole = losses.background_loss(*arguments, [whole_grad])
    monkeypatch.setattr(losses, "_CHUNK_CPU", 7)
    parts = losses.background_loss(*arguments, [parts_grad])
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts_grad, whole_grad, rtol=1e-13, atol=1e-15)


def test_negative_bag_loss_of_a_saturated_false_positive():
    """Trap 10: at logit 20 the gradient is 1 in float32, where the naive code has 0."""
    logits = torch.tensor([[20.0], [80.0]], requires_grad=True)
    loss = negative_bag_loss(logits, torch.zeros(0))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(100.0))
    torch.testing.assert_close(logits.grad, torch.ones(2, 1))
    naive = torch.tensor([20.0, 80.0], requires_grad=True)
    naive_negative(naive, 0).backward()
    assert naive.grad.tolist() == [0, 0]


@pytest.mark.parametrize("prob", [1e-30, 0.5, 1.0])
@pytest.mark.parametrize("logit", [-200.0, -20.0, 0.0, 20.0, 200.0])
def test_negative_bag_loss_is_finite_everywhere(logit, prob):
    """No corner of logits and P{a in A+} gives inf or NaN in float32."""
    logits = torch.tensor([[logit]], requires_grad=True)
    loss = negative_bag_loss(logits, torch.tensor([prob]))
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert logits.grad.isfinite().all()
    if prob == 1.0:
        assert loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_negative_bag_loss_of_half_precision_logits(dtype):
    """Trap 3: half precision logits are summed in float32, and get gradients of their dtype."""
    logits, prob, classes, dense = sparse_case(torch.float32)
    half = logits.detach().to(dtype).requires_grad_()
    loss = negative_bag_loss(half, prob, classes)
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
    x = torch.linspace(-10, 5, 200)[:, None]
    half = x.half().requires_grad_()
    (negative_bag_loss(half, torch.zeros(0)) * 1024).backward()
    exact = half.detach().double().requires_grad_()
    (negative_bag_loss(exact, torch.zeros(0)) * 1024).backward()
    assert (exact.grad / 1024).min() < 6e-8
    torch.testing.assert_close(half.grad.double(), exact.grad, rtol=2e-3, atol=6e-8)


def test_negative_bag_loss_of_nothing():
    """An empty tensor of logits, as an image smaller than a stride would give."""
    logits = torch.zeros(2, 0, 80, requires_grad=True)
    loss = negative_bag_loss(logits, torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == logits.shape
