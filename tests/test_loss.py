"""Losses: the shared statistics against slow definitions, torch and the authors' code; composition; memory; resume."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import plait.math.logits as logits_module
from plait.batch import IGNORE, Batch
from plait.errors import BadInput
from plait.gradient.sharpness import SAM
from plait.loss.base import cross_entropy
from plait.loss.chunked import call_with_chunked_logits
from plait.loss.own_targets import ELR, PSKD
from plait.loss.smoothing import LabelSmoothing, MaxSup, ZLoss, tsla
from plait.math.logit_statistics import KERNEL_FROM, kernel_fits, logit_statistics
from plait.math.logits import Logits, dense, statistics
from plait.method import Now
from plait.parametrize.low_rank import LoRA
from plait.schedule import Linear
from plait.step.gauss_newton import EGN
from plait.step.momentum import SGD
from plait.train import train

CLASSES = 5003  # more than one block of the kernel, and no multiple of anything


def slow_statistics(z: Tensor, target: Tensor) -> list[list[float]]:
    """The definitions, one number at a time, in Python's floats."""
    rows = []
    for row, aim in zip(z.double().tolist(), target.tolist(), strict=True):
        if aim == IGNORE:
            rows.append([0.0] * 4)
            continue
        top = max(row)
        rows.append([math.log(math.fsum(math.exp(v - top) for v in row)), row[aim], math.fsum(row) / len(row), top])
    return rows


def case(rows: int = 40, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = (torch.randn(rows, classes, generator=generator) * 4).to(dtype)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[3] = IGNORE
    target[5] = z[5].argmax()
    return z, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics_are_their_definitions(dtype):
    z, target = case(dtype=dtype)
    assert kernel_fits(z) == (dtype != torch.float64)
    found = torch.stack(logit_statistics(z, target), -1)
    torch.testing.assert_close(found.double(), torch.tensor(slow_statistics(z, target)).double(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_gradient_is_that_of_the_composition_in_float64(dtype):
    z, target = case(dtype=dtype)
    weights = torch.randn(4, len(z), generator=torch.Generator().manual_seed(1))
    ours = z.clone().requires_grad_()
    sum((w * s).sum() for w, s in zip(weights, logit_statistics(ours, target), strict=True)).backward()
    slow = z.double().requires_grad_()
    kept = target != IGNORE
    top = slow.max(-1).values
    parts = [torch.logsumexp(slow, -1) - top, slow[range(len(z)), target.clamp_min(0)], slow.mean(-1), top]
    sum((w * s)[kept].sum() for w, s in zip(weights, parts, strict=True)).backward()
    coarse = {torch.float32: (1e-6, 2e-5), torch.bfloat16: (1e-6, 2**-8)}[dtype]
    torch.testing.assert_close(ours.grad.double(), slow.grad, atol=coarse[0], rtol=coarse[1])
    assert not ours.grad[3].any()


def test_gradcheck_twice_and_for_chunked_heads(monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK", 14)  # two tokens of seven classes at a time
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([0, 3, IGNORE, 6, 1])
    z = torch.randn(5, 7, dtype=torch.double, generator=generator, requires_grad=True)
    hidden, weight = (torch.randn(n, 4, dtype=torch.double, generator=generator, requires_grad=True) for n in (5, 7))
    bias = torch.randn(7, dtype=torch.double, generator=generator, requires_grad=True)
    cases = [
        (lambda z: torch.cat(logit_statistics(z, target)), (z,)),
        (lambda h: torch.cat(Logits(h, weight.detach(), bias.detach()).statistics(target)), (hidden,)),
        (lambda h, w, b: torch.cat(Logits(h, w, b).statistics(target)), (hidden, weight, bias)),
    ]
    for function, inputs in cases:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_logits_are_the_dense_ones(monkeypatch, trained, dtype):
    monkeypatch.setattr(logits_module, "CHUNK", CLASSES * 30)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, 16, generator=generator).to(dtype) for s in ((3, 29), (CLASSES,)))
    target = torch.randint(0, CLASSES, (3, 29), generator=generator)
    target[1, :7] = IGNORE
    weights = torch.randn(4, 3, 29, generator=generator)

    def gradients(made, *inputs):
        objective = sum((w * s).sum() for w, s in zip(weights, statistics(made, target), strict=True))
        return torch.autograd.grad(objective, inputs)

    h, w = hidden.requires_grad_(), weight.requires_grad_(trained)
    ours = gradients(Logits(h, w), *((h, w) if trained else (h,)))
    h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(trained)
    slow = gradients(F.linear(h64, w64), *((h64, w64) if trained else (h64,)))
    for a, b in zip(ours, slow, strict=True):
        assert float((a - b).norm() / b.norm()) < {torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]


def test_masked_extreme_and_broken_logits():
    z = torch.zeros(7, 40_000)
    z[0, :9000] = -torch.inf  # two whole blocks of masked classes
    z[1, 5], z[2, 7] = torch.nan, torch.inf
    z[3], z[4], z[5] = 1e6, -1e30, 1e30
    z[6, 1] = 3e4
    assert kernel_fits(z)
    target = torch.full((7,), 39_999)
    expected = F.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(cross_entropy(z, target, Now()), expected, equal_nan=True)
    z = z[[0, 3, 4, 5, 6]].clone().requires_grad_()
    cross_entropy(z, target[:5], Now()).sum().backward()
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("classes", [5, 700])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_label_smoothing_is_torchs(classes, smoothing):
    z, target = case(30, classes)
    ours = LabelSmoothing(smoothing=smoothing)(z, target)
    expected = F.cross_entropy(z, target, label_smoothing=smoothing, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    soft = F.one_hot(target.clamp_min(0), classes).float() * 0.5 + 0.5 / classes
    ours, expected = (
        LabelSmoothing(smoothing=smoothing)(z, soft),
        F.cross_entropy(z, soft, label_smoothing=smoothing, reduction="none"),
    )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_two_stage_smoothing_switches():
    (method,) = tsla(0.2, until=0.5)
    z, target = case(10, 6)
    early, late = (method(z, target, Now(step=step, steps=10)) for step in (4, 5))
    torch.testing.assert_close(early, LabelSmoothing(smoothing=0.2)(z, target))
    torch.testing.assert_close(late, LabelSmoothing(smoothing=0.0)(z, target))
    with pytest.raises(BadInput, match=r"tsla's until must be in \(0, 1\), not 2"):
        tsla(until=2)


def author_case() -> tuple[list[Tensor], Tensor]:
    r = np.random.default_rng(0)
    z = [torch.tensor(r.standard_normal((6, 5)) * 2, dtype=torch.float32) for _ in range(3)]
    return z, torch.tensor(r.integers(0, 5, 6))


def test_maxsup_definition_and_authors_value():
    """Authors: Conv/ffcv/losses.py MaxSuppression(0.1, 0.2, 10) at epoch 5 on author_case()[0][0], seed 0."""
    (z, *_), target = author_case()
    method = MaxSup(strength=Linear(start=0.1, end=0.2))
    found = method(z, target, Now(step=5, steps=10))
    slow = [
        -math.log(math.exp(row[aim]) / sum(math.exp(v) for v in row)) + 0.15 * (max(row) - sum(row) / len(row))
        for row, aim in zip(z.tolist(), target.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(slow))
    assert float(found.mean()) == pytest.approx(2.279003620147705, abs=1e-6)


def test_maxsup_pushes_down_the_wrong_logit_where_smoothing_pushes_down_the_right_one():
    z = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    target = torch.tensor([1])  # the model is wrong: it predicts class 0
    plain = torch.autograd.grad(cross_entropy(z, target, Now()).sum(), z)[0]
    smooth, ours = (
        torch.autograd.grad(m(z, target).sum(), z)[0] - plain
        for m in (LabelSmoothing(smoothing=0.3), MaxSup(strength=0.3))
    )
    torch.testing.assert_close(smooth, torch.tensor([[-0.1, 0.2, -0.1]]))
    torch.testing.assert_close(ours, torch.tensor([[0.2, -0.1, -0.1]]))


def test_z_loss_definition():
    z, target = case(10, 6)
    slow = torch.tensor([0.01 * math.log(sum(math.exp(v) for v in row)) ** 2 for row in z.tolist()])
    slow[3] = 0
    torch.testing.assert_close(ZLoss(strength=0.01)(z, target) - cross_entropy(z, target, Now()), slow)


def test_losses_compose_in_one_pass_and_permute_with_the_batch(monkeypatch):
    import plait.math.logit_statistics as module

    passes = []
    real = module.forward
    monkeypatch.setattr(module, "forward", lambda *given: passes.append(1) or real(*given))
    methods = [LabelSmoothing(smoothing=0.1), ZLoss(strength=1e-3), MaxSup(strength=0.2)]
    misfit = cross_entropy
    for m in methods:
        misfit = m.loss(misfit)
    z, target = case()
    leaf = z.clone().requires_grad_()
    output = leaf * 1
    together = misfit(output, target, Now())
    assert len(passes) == 1
    together.sum().backward(retain_graph=True)
    again = misfit(output, target, Now())  # the first graph of the statistics is spent
    again.sum().backward()
    assert len(passes) == 2
    torch.testing.assert_close(again, together, rtol=0, atol=0)
    fixed = z.clone()
    before = misfit(fixed, target, Now())
    fixed[0, 7] += 50  # written to: no stale answer
    assert misfit(fixed, target, Now())[0] > before[0] + 10
    apart = cross_entropy(z, target, Now()) + sum(m(z, target) - cross_entropy(z, target, Now()) for m in methods)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(misfit(z[order], target[order], Now()), together[order], atol=1e-6, rtol=1e-6)


def test_every_loss_passes_gradcheck_in_float64():
    z, target = case(6, 5, torch.float64)
    for method in (LabelSmoothing(smoothing=0.2), ZLoss(strength=0.1), MaxSup(strength=0.2)):
        assert torch.autograd.gradcheck(lambda z, m=method: m(z, target), (z.clone().requires_grad_(),))
    now = Now(batch=Batch.of(z, target))
    for method in (ELR(), PSKD(alpha=0.5)):  # the memory of this step is fixed by the first call
        method(z, target, now)
        assert torch.autograd.gradcheck(lambda z, m=method: m(z, target, now), (z.clone().requires_grad_(),))


def test_soft_targets_and_bad_targets():
    z, target = case(8, 9)
    soft = F.one_hot(target.clamp_min(0), 9).float()
    kept = target != IGNORE
    for method in (MaxSup(strength=0.2), ZLoss(strength=0.1)):
        torch.testing.assert_close(method(z, soft)[kept], method(z, target)[kept])
    with pytest.raises(BadInput, match="a target is 9, but the model has 9 outputs: targets must be 0 to 8"):
        MaxSup()(z, torch.full_like(target, 9))
    with pytest.raises(BadInput, match="need targets of shape"):
        MaxSup()(z, target[:3])
    with pytest.raises(BadInput, match=r"MaxSup.strength must be in \[0, 1\], not 2"):
        MaxSup(strength=2)


# -- own targets ------------------------------------------------------------------------------------------------------
def step(now: Now, index: list[int], target: Tensor) -> Now:
    now.batch = Batch.of(torch.zeros(len(index), 1), target, torch.tensor(index))
    return now


def test_elr_definition_and_authors_values():
    """Authors: ELR/model/loss.py elr_loss(6, 5, beta=0.7) with lambda 3, three calls on author_case(), seed 0."""
    z, target = author_case()
    method, now = ELR(strength=3.0, decay=0.7), Now()
    average = torch.zeros(6, 5)
    index = [4, 0, 9, 2, 7, 1]
    for number, (logits, authors) in enumerate(
        zip(z, [1.612781286239624, 2.3826723098754883, 1.130384087562561], strict=True)
    ):
        now.step = number
        leaf = logits.clone().requires_grad_()
        found = method(leaf, target, step(now, index, target))
        p = torch.softmax(logits, -1)
        average = 0.7 * average + 0.3 * p
        slow = -p.log()[range(6), target] + 3 * torch.log(1 - (p * average).sum(-1))
        torch.testing.assert_close(found, slow)
        assert float(found.detach().mean()) == pytest.approx(authors, abs=2e-4)  # theirs clamps p to [1e-4, 1 - 1e-4]
    found.mean().backward()
    authors_gradient = [0.00486628, 0.00111179, 0.13646942, 0.00353359, -0.14598112]
    torch.testing.assert_close(leaf.grad[0], torch.tensor(authors_gradient), atol=2e-5, rtol=1e-3)
    asked_again = method(leaf, target, now)  # in the same step: averaged in once
    torch.testing.assert_close(asked_again, found)


def test_ps_kd_definition_and_authors_values():
    """Authors: soft targets as in main.py's train() with alpha 0.8 (epoch + 1) / 3, loss/pskd_loss.py, seed 0."""
    z, target = author_case()
    onehot = F.one_hot(target, 5).float()
    previous = onehot
    now, index = Now(steps=3), [4, 0, 9, 2, 7, 1]
    for epoch, authors in enumerate([2.0118117332458496, 2.827040910720825, 3.0832901000976562]):
        alpha = 0.8 * (epoch + 1) / 3
        now.epoch, now.step = epoch, epoch
        method = PSKD(alpha=alpha)
        now.memory = {repr(method): held for held in now.memory.values()}  # the paper's alpha_t, given by hand
        found = method(z[epoch], target, step(now, index, target))
        soft = (1 - alpha) * onehot + alpha * previous
        torch.testing.assert_close(found, -(soft * F.log_softmax(z[epoch], -1)).sum(-1))
        assert float(found.mean()) == pytest.approx(authors, abs=1e-6)
        torch.testing.assert_close(method(z[epoch], target, now), found)  # asked twice: still the epoch before
        previous = torch.softmax(z[epoch], -1)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("method", [ELR(), PSKD(), LabelSmoothing(), *tsla(), MaxSup(), ZLoss()])
def test_losses_of_classes_are_refused_at_the_first_step_of_a_regression(method, outputs):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    steps = []
    for target in (x[:, :outputs], x[:, 0] if outputs == 1 else x[:, :outputs]):
        with pytest.raises(BadInput) as caught:
            train(nn.Linear(4, outputs), (x, target), methods=[method], steps=2, on_step=steps.append)
        assert str(caught.value) == (
            f"{type(method).__name__} needs logits of classes, [n, classes] or [n, tokens, classes]: drop it for this "
            "task."
        )
    with pytest.raises(BadInput, match="needs logits of classes"):  # outputs [n] in one's own loop
        method(x[:, 0], x[:, 1], Now(batch=Batch.of(x, x[:, 1])))
    assert steps == []


def test_memories_need_to_know_the_examples():
    z, target = author_case()
    for method in (ELR(), PSKD()):
        with pytest.raises(BadInput, match=r"remembers each example: set now\.batch"):
            method(z[0], target)
        tokens = torch.zeros(2, 3, 5)
        with pytest.raises(BadInput, match="one label an example, not for outputs of shape"):
            method(tokens, torch.zeros(2, 3, dtype=torch.long), Now(batch=Batch.of(tokens, torch.zeros(2, 3))))
    now = step(Now(), list(range(6)), target)
    ignored = target.clone()
    ignored[0] = IGNORE
    assert float(ELR()(z[0], ignored, now)[0]) == 0
    assert float(PSKD(alpha=0.5)(z[0], ignored, now)[0]) == 0


@pytest.mark.parametrize("method", [ELR(), PSKD(), MaxSup(), LabelSmoothing(), ZLoss()])
def test_resume_is_bitwise(tmp_path, method):
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)

    def run(folder, steps_seen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def stop(now):
            if now.step == steps_seen:
                raise KeyboardInterrupt

        try:
            return train(
                model,
                data,
                methods=[method],
                steps=20,
                batch_size=8,
                folder=folder,
                save_every=3,
                on_step=stop,
                device="cpu",
            )
        except KeyboardInterrupt:
            return None

    whole = run(tmp_path / "whole", -1)
    assert run(tmp_path / "broken", 11) is None
    resumed = run(tmp_path / "broken", -1)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# -- language models --------------------------------------------------------------------------------------------------
def tiny_llama(tied: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=640, tie_word_embeddings=tied, **shape))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapted", ["", "q_proj", "lm_head|q_proj"])
def test_chunked_language_model_has_the_gradients_of_the_dense_one(monkeypatch, tied, adapted):
    monkeypatch.setattr(logits_module, "CHUNK", 640 * 3)
    tokens = torch.randint(0, 640, (2, 9), generator=torch.Generator().manual_seed(0))
    target = tokens.roll(-1, 1)
    target[:, -1] = IGNORE
    gradients = []
    for call in (call_with_chunked_logits, lambda model, inputs: model(**inputs).logits):
        model = tiny_llama(tied)
        if adapted:
            torch.manual_seed(1)
            LoRA(rank=2, where=adapted).parametrize(model)
            for name, p in model.named_parameters():
                if name.endswith(".B"):
                    nn.init.normal_(p)
        output = call(model, {"input_ids": tokens})
        assert isinstance(output, Logits) == (call is call_with_chunked_logits)
        MaxSup(strength=0.1)(output, target).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert model(input_ids=tokens).logits.shape == (2, 9, 640)  # the head is back
    assert gradients[0]
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


def test_chunked_logits_serve_losses_that_need_all_and_refuse_models_without_a_head():
    model = tiny_llama(True)
    tokens = torch.randint(0, 640, (2, 5))
    output = call_with_chunked_logits(model, tokens)
    assert (output.shape, output.dim(), output.dtype) == ((2, 5, 640), 3, torch.float32)
    assert output._dense is None  # asking so little forms nothing
    expected = model(input_ids=tokens).logits
    torch.testing.assert_close(dense(output), expected)
    torch.testing.assert_close(F.softmax(output, -1), F.softmax(expected, -1))
    assert torch.equal(output.argmax(-1), expected.argmax(-1))
    soft = F.softmax(expected.detach(), -1)
    torch.testing.assert_close(cross_entropy(output, soft, Now()), cross_entropy(expected, soft, Now()))
    with pytest.raises(BadInput, match=r"Sequential has no linear language model head: leave out call=\."):
        call_with_chunked_logits(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))


def test_a_language_model_trains_the_same_chunked_and_dense():
    tokens = torch.randint(0, 640, (12, 8), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": tokens}, tokens.roll(-1, 1)
    settings = {"methods": [MaxSup(), ZLoss()], "steps": 6, "batch_size": 4, "accumulate": 2, "device": "cpu"}
    curves = []
    for call in (call_with_chunked_logits, None):
        run = train(tiny_llama(True), data, call=call, **settings)
        curves.append([h["objective"] for h in run.history])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


def test_chunked_logits_follow_autocast():
    tokens = torch.randint(0, 640, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for call in (call_with_chunked_logits, lambda model, inputs: model(inputs).logits):
        model = tiny_llama(True)
        with torch.autocast("cpu", torch.bfloat16):
            output = call(model, tokens)
            loss = MaxSup()(output, tokens).mean()
        assert output.dtype == torch.bfloat16
        assert loss.dtype == torch.float32
        loss.backward()
        found.append((loss.detach(), model.lm_head.weight.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 0.02


def test_threads_do_not_change_the_result():
    z, target = case(300, CLASSES)
    assert z.numel() > KERNEL_FROM
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        leaf = z.clone().requires_grad_()
        MaxSup()(leaf, target).sum().backward()
        found.append(leaf.grad)
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("loss", [ELR(), PSKD()])
def test_what_remembers_trains_under_a_rule_that_computes_in_float64(loss: ELR | PSKD) -> None:
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    run = train(nn.Linear(4, 3), (x, y), methods=[loss, EGN()], steps=3, batch_size=8)
    assert all(math.isfinite(h["objective"]) for h in run.history)


def test_predictions_at_perturbed_weights_are_not_remembered() -> None:
    """SAM asks a second time, away from the model: PS-KD's teacher is the model itself."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(0, 3, (8,))
    before = F.softmax(model(x), -1).detach()
    seen: list[Tensor] = []

    def look(now: Now) -> bool:
        seen.append(next(m["latest"] for m in now.memory.values() if "latest" in m)[:8].clone())
        return False

    train(model, (x, y), methods=[PSKD(), SAM(radius=2.0), SGD(lr=0.1)], steps=1, batch_size=8, on_step=look)
    torch.testing.assert_close(seen[0], before)
