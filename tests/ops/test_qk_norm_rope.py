"""RMSNorm and rotary embedding of query and key: kernels against the float64 reference and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastguard.ops import qk_norm_rope as formulas

EPS = 1e-6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the activations and the norms' weights.
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, BF16)]
# B, S, T, H, D with T = None for no text stream. A tile has 1,024 elements: 64 tokens of 2 heads of 6 (8) channels, 32
# of 1 head of 32, 16 of 2 heads of 32, 4 of 2 heads of 128; a program takes 1, 2, 4 or 8 heads.
SHAPES = [
    (1, 1, 1, 1, 6), (2, 9, None, 1, 2), (2, 9, 5, 3, 6), (1, 65, 64, 2, 6), (1, 31, 33, 3, 32), (1, 32, None, 1, 32),
    (2, 7, None, 24, 16), (1, 17, 16, 24, 32), (1, 4, 5, 24, 128), (1, 5, 3, 4, 128), (1, 2, 3, 10, 256),
]  # fmt: skip
PARTS = ("query", "key", "value", "text_query", "text_key", "text_value")


def make_case(
    shape: tuple[int, int, int | None, int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32),
    device: str = "cpu",
    rope: bool = True,
) -> dict[str, Any]:
    """Projections, weights between 0.5 and 2, angles (None without a rope), and random gradients of the outputs."""
    n_samples, n_image, n_text, n_heads, size = shape
    generator = torch.Generator().manual_seed(n_samples + n_image + n_heads + size)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtypes[0]).to(device)

    case: dict[str, Any] = {name: draw(n_samples, n_image, n_heads * size) for name in PARTS[:3]}
    case |= {name: None if n_text is None else draw(n_samples, n_text, n_heads * size) for name in PARTS[3:]}
    weights = 0.5 * 4 ** torch.rand(2 if n_text is None else 4, size, generator=generator)
    case["norms"] = list(weights.to(dtypes[1]).to(device))
    angles = 6.3 * torch.rand(n_image + (n_text or 0), size // 2, generator=generator).repeat_interleave(2, dim=1)
    case["cos"], case["sin"] = (angles.cos().to(device), angles.sin().to(device)) if rope else (None, None)
    case["grads"] = [draw(n_samples, len(angles), n_heads, size) for _ in range(3)]
    return case


def run_forward(case: dict[str, Any]) -> tuple[Tensor, ...]:
    from fastguard.kernels.qk_norm_rope import qk_norm_rope_fwd

    return qk_norm_rope_fwd(*(case[name] for name in PARTS), case["norms"], case["cos"], case["sin"], EPS)


def run_backward(case: dict[str, Any], forward: tuple[Tensor, ...], rotated: bool) -> dict[str, Tensor]:
    """Every gradient that there is, from the forward's results or from its inputs."""
    from fastguard.kernels.qk_norm_rope import qk_norm_rope_bwd

    has_text, size = case["text_query"] is not None, len(case["norms"][0])
    n_text = case["text_query"].shape[1] if has_text else 0
    if rotated:
        sources = [part[:, n_text:] for part in forward[:2]]
        sources += [part[:, :n_text] if has_text else None for part in forward[:2]]
    else:
        names = ("query", "key", "text_query", "text_key")
        sources = [None if case[name] is None else case[name].unflatten(-1, (-1, size)) for name in names]
    grad_q, grad_k, grad_v = case["grads"]
    *grads, grad_norms = qk_norm_rope_bwd(
        grad_q, grad_k, grad_v if has_text else None, *sources, forward[3],
        case["norms"], case["cos"], case["sin"], rotated, not rotated,
    )  # fmt: skip
    there = PARTS if has_text else PARTS[:2]
    results = {f"grad_{name}": grad for name, grad in zip(PARTS, grads, strict=True)}
    assert all(grad.shape == (0,) for name, grad in results.items() if name[5:] not in there)
    results = {name: grad for name, grad in results.items() if name[5:] in there}
    if rotated:
        assert grad_norms.shape == (0,)
        return results
    assert grad_norms.shape == (len(case["norms"]), size)
    return {**results, "grad_norms": grad_norms}


def eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As it is commonly run: in float32, and rounded."""
    return formulas.rope(x.float(), cos, sin).to(x.dtype)


def run_formula(case: dict[str, Any], double: bool) -> dict[str, Tensor]:
    """The reference in float64, or the eager formula in the dtypes of the case; gradients by autograd."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.detach()
        return (tensor.cpu().double() if double else tensor.clone()).requires_grad_()

    parts, norms = [leaf(case[name]) for name in PARTS], [leaf(norm) for norm in case["norms"]]
    dtype, size = parts[0].dtype, len(norms[0])
    cos, sin = (case[key].cpu().double() if double and case[key] is not None else case[key] for key in ("cos", "sin"))
    has_text = parts[3] is not None
    if double:
        q, k, v = formulas.qk_norm_rope(*parts[:3], tuple(parts[3:]) if has_text else None, norms, cos, sin, EPS)
    else:
        heads = [None if part is None else part.unflatten(-1, (-1, size)) for part in parts]
        for i, place in enumerate((0, 1, 3, 4)[: len(norms)]):
            heads[place] = (F.rms_norm(heads[place], (size,), None, EPS) * norms[i]).to(dtype)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(heads[3:], heads[:3], strict=True)) if has_text else heads[:3]
        if cos is not None:
            q, k = eager_rope(q, cos, sin), eager_rope(k, cos, sin)
    outputs, names = ((q, k, v), PARTS) if has_text else ((q, k), PARTS[:2])
    upstream = [grad.to(output) for grad, output in zip(case["grads"], outputs, strict=False)]
    leaves = [part for part, name in zip(parts, PARTS, strict=True) if name in names]
    grads = torch.autograd.grad(outputs, leaves + norms, upstream)
    results = {name: output.detach() for name, output in zip("qkv", outputs, strict=False)}
    results |= {f"grad_{name}": grad for name, grad in zip(names, grads, strict=False)}
    return {**results, "grad_norms": torch.stack([grad.double() for grad in grads[len(leaves) :]])}


def assert_matches_reference(case: dict[str, Any]) -> None:
    forward = run_forward(case)
    truth, eager = run_formula(case, True), run_formula(case, False)
    outputs = {name: output for name, output in zip("qkv", forward, strict=False) if name in truth}
    for got in (outputs, run_backward(case, forward, False), run_backward(case, forward, True)):
        for key, result in got.items():
            want = truth[key]
            assert result.shape == want.shape
            assert result.dtype == (FP32 if key == "grad_norms" else case["query"].dtype), key
            assert result.is_contiguous()
            error = (result.cpu().double() - want).abs().max()
            eager_error = (eager[key].cpu().double() - want).abs().max()
            # Two units in the last place of the largest value: one for the interpreter, which truncates where a GPU
            # rounds, one for float32 arithmetic before it.
            unit = torch.finfo(result.dtype).eps * want.abs().max()
            assert error <= 2 * eager_error + 2 * unit, (key, float(error), float(eager_error), float(unit))
    if "v" not in truth:
        assert forward[2].shape == (0,)
    else:
        assert torch.equal(forward[2].cpu().double(), truth["v"])
    for i, rstd in enumerate(forward[3]):
        joined = [part for part in (case[PARTS[3 + i]], case[PARTS[i]]) if part is not None]
        heads = torch.cat(joined, dim=1).cpu().double().unflatten(-1, (-1, len(case["norms"][0])))
        # float32 sums of D squares.
        torch.testing.assert_close(rstd.cpu().double(), (heads.square().mean(-1) + EPS).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, device=kernel_device))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 7, 8, 32), (1, 12, None, 3, 34)], ids=str)
def test_every_dtype(dtypes, shape, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, dtypes, kernel_device))


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16)], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 9, 5, 3, 6), (1, 65, 64, 2, 6), (2, 7, None, 24, 16), (1, 2, 3, 38, 64)], ids=str
)
def test_without_a_rotary_embedding(shape, dtypes, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, dtypes, kernel_device, rope=False))


def test_angles_of_zero_turn_nothing(kernel_device) -> None:
    """They give the bits of a call without a rotary embedding."""
    case = make_case((1, 9, 7, 4, 16), (BF16, BF16), kernel_device)
    turned = {**case, "cos": torch.ones_like(case["cos"]), "sin": torch.zeros_like(case["sin"])}
    still = {**case, "cos": None, "sin": None}
    for got, want in zip(run_forward(still), run_forward(turned), strict=True):
        assert torch.equal(got, want)
    for rotated in (False, True):
        got, want = (run_backward(each, run_forward(each), rotated) for each in (still, turned))
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_zero_rows(kernel_device, poisoned) -> None:
    """A token, and a head, of nothing but zeros: normalized by 1 / sqrt(eps), and their gradient likewise."""
    case = make_case((2, 6, 5, 2, 16), device=kernel_device)
    case["query"][1, 3] = 0
    case["text_key"][0, 2, :16] = 0
    assert_matches_reference(case)
    assert run_forward(case)[0][1, 8].abs().max() == 0


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_large_values(dtype, kernel_device, poisoned) -> None:
    """Squares beyond the range of float16, and an angle that leaves one channel of a pair alone."""
    case = make_case((1, 6, 5, 2, 16), (dtype, dtype), kernel_device)
    case["query"] *= 1000
    case["text_query"] *= 1000
    case["cos"][3], case["sin"][3] = 1, 0
    case["cos"][4], case["sin"][4] = 0, -1
    assert_matches_reference(case)


def test_strided_inputs(kernel_device, poisoned) -> None:
    """Parts of one projection, streams of one sequence, gradients laid out by head as attention leaves them."""
    n_image, n_text, n_heads, size = 11, 6, 4, 16
    width = n_heads * size
    case = make_case((2, n_image, n_text, n_heads, size), device=kernel_device)
    joined = torch.randn(2, n_text + n_image, 3 * width, device=kernel_device)
    by_head = torch.randn(3, 2, n_heads, n_text + n_image, size, device=kernel_device)
    together = {name: part for name, part in zip(PARTS, joined[:, n_text:].chunk(3, dim=-1), strict=False)}
    together |= {name: part for name, part in zip(PARTS[3:], joined[:, :n_text].chunk(3, dim=-1), strict=False)}
    changes = [
        {**together, "grads": list(by_head.transpose(2, 3))},
        {"query": case["query"][:1].expand(2, -1, -1), "text_key": case["text_key"][:, :1].expand(-1, n_text, -1)},
        {"value": torch.randn(n_image, 2, width, device=kernel_device).transpose(0, 1)},
        {"query": torch.randn(2, width, n_image, device=kernel_device).mT},
        {"grads": [torch.randn(2, 1, 1, size, device=kernel_device).expand_as(grad) for grad in case["grads"]]},
        {"grads": [torch.randn(*grad.shape[:3], 2 * size, device=kernel_device)[..., ::2] for grad in case["grads"]]},
        {"cos": case["cos"].mT.contiguous().mT, "sin": case["sin"].mT.contiguous().mT},
        {"norms": list(torch.rand(4, 2 * size, device=kernel_device)[:, ::2] + 0.5)},
    ]  # fmt: skip
    for change in changes:
        assert_matches_reference({**case, **change})


@pytest.mark.parametrize("offset", [1, 4])
def test_slices_that_are_not_aligned(offset, kernel_device) -> None:
    case = make_case((2, 5, 4, 3, 16), (BF16, BF16), kernel_device)
    for name in PARTS:
        case[name] = torch.randn(*case[name].shape[:2], 48 + 16).to(BF16).to(kernel_device)[..., offset : offset + 48]
    assert_matches_reference(case)


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 8), (0, 3, None, 2, 8), (2, 0, 0, 2, 8), (2, 0, None, 2, 8)], ids=str)
def test_empty(shape, kernel_device, poisoned) -> None:
    case = make_case(shape, (BF16, BF16), kernel_device)
    forward = run_forward(case)
    tokens = shape[1] + (shape[2] or 0)
    assert forward[0].shape == forward[1].shape == (shape[0], tokens, 2, 8)
    assert forward[2].shape == ((0,) if shape[2] is None else forward[0].shape)
    assert forward[3].shape == (2, shape[0], tokens, 2)
    for rotated in (False, True):
        grads = run_backward(case, forward, rotated)
        assert grads["grad_query"].shape == case["query"].shape
    grad_norms = run_backward(case, forward, False)["grad_norms"]
    assert torch.equal(grad_norms, torch.zeros_like(grad_norms))


@pytest.mark.parametrize("shape", [(2, 0, 5, 2, 8), (2, 5, 0, 2, 8)], ids=str)
def test_one_stream_is_empty(shape, kernel_device, poisoned) -> None:
    case = make_case(shape, device=kernel_device)
    forward, truth = run_forward(case), run_formula(case, True)
    for got in (
        dict(zip("qkv", forward, strict=False)),
        run_backward(case, forward, False),
        run_backward(case, forward, True),
    ):
        for key, result in got.items():
            # float32 arithmetic on values of size 1 to 10.
            torch.testing.assert_close(result.cpu().double(), truth[key], rtol=1e-5, atol=1e-5)


def test_the_weights_of_the_streams_are_not_mixed_up(kernel_device) -> None:
    """Weights of 1, 2, 3 and 4, one for each norm: the sizes of q and k tell which was used where."""
    case = make_case((1, 70, 40, 2, 8), device=kernel_device)
    case["norms"] = [torch.full((8,), float(value), device=kernel_device) for value in (1, 2, 3, 4)]
    q, k, *_ = run_forward(case)
    for joined, image, text in ((q, 1.0, 3.0), (k, 2.0, 4.0)):
        sizes = joined.square().mean(-1).sqrt()
        torch.testing.assert_close(sizes[:, 40:], torch.full_like(sizes[:, 40:], image), rtol=1e-5, atol=0)
        torch.testing.assert_close(sizes[:, :40], torch.full_like(sizes[:, :40], text), rtol=1e-5, atol=0)


def test_bitwise_repeatable_and_independent_of_the_batch(kernel_device) -> None:
    case = make_case((3, 40, 35, 8, 32), (BF16, BF16), kernel_device)
    alone = {name: value[1:2] for name, value in case.items() if name in PARTS}
    alone = {**case, **alone, "grads": [grad[1:2] for grad in case["grads"]]}
    forward, forward_alone = run_forward(case), run_forward(alone)
    for got, again, single in zip(forward, run_forward(case), forward_alone, strict=True):
        assert torch.equal(again, got)
        assert torch.equal(single, got[:, 1:2] if got.shape[0] == 2 else got[1:2])
    for rotated in (False, True):
        grads, single = run_backward(case, forward, rotated), run_backward(alone, forward_alone, rotated)
        for key, again in run_backward(case, forward, rotated).items():
            assert torch.equal(again, grads[key]), key
            if key != "grad_norms":  # a sum over the batch
                assert torch.equal(single[key], grads[key][1:2]), key


@pytest.mark.parametrize(("block", "per_program", "per_tile"), [(64, 8, 2), (256, 1, 1), (256, 4, 4), (4096, 8, 8)])
def test_any_tile(block, per_program, per_tile, kernel_device, poisoned, monkeypatch) -> None:
    """More and fewer tokens and heads per program: the sums change in their last places only."""
    from fastguard.kernels import qk_norm_rope

    monkeypatch.setattr(qk_norm_rope, "LAUNCH", qk_norm_rope.Launch(block, 4))
    monkeypatch.setattr(qk_norm_rope, "HEADS_PER_PROGRAM", per_program)
    monkeypatch.setattr(qk_norm_rope, "HEADS_PER_TILE", per_tile)
    assert_matches_reference(make_case((1, 7, 9, 8, 16), device=kernel_device))


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
def test_more_than_2_31_elements_in_total() -> None:
    """Offsets beyond 32 bits within a sample: the last tokens of 2^31 + 12,288 elements equal the same alone."""
    n_heads, size, n_image = 32, 128, 2**19 + 3
    few = make_case((1, 3, None, n_heads, size), (BF16, BF16), "cuda")
    many = dict(few)
    for name in PARTS[:3]:
        many[name] = torch.cat(
            [torch.zeros(1, n_image - 3, n_heads * size, dtype=BF16, device="cuda"), few[name]], dim=1
        )
    for name in ("cos", "sin"):
        many[name] = torch.cat([torch.zeros(n_image - 3, size, device="cuda"), few[name]])
    zeros = torch.zeros(1, 1, n_heads, size, dtype=BF16, device="cuda").expand(1, n_image - 3, n_heads, size)
    many["grads"] = [torch.cat([zeros, grad], dim=1) for grad in few["grads"][:1]] * 3
    few["grads"] = few["grads"][:1] * 3
    forward, want = run_forward(many), run_forward(few)
    assert torch.equal(forward[0][:, -3:], want[0])
    assert torch.equal(forward[1][:, -3:], want[1])
    assert torch.equal(forward[3][:, :, -3:], want[3])
    got = run_backward(many, forward, True)["grad_key"]
    assert torch.equal(got[:, -3:], run_backward(few, want, True)["grad_key"])
