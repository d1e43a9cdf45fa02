"""Golden vectors of one denoising step and its policy losses, and the rule by which results are compared with them.

`data/transition_cases.npz` holds 270 cases in float64, from formulas written independently of this package; gradients
are float64 autograd of the textbook (subtraction) form. Inputs of the big groups are rebuilt from a seed with exact
integer arithmetic and verified by checksum; of their arrays the file keeps selected entries and the norm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from helpers import TESTS

PATH = TESTS / "data" / "transition_cases.npz"
INPUTS = ("x", "v_old", "v_new", "v_ref", "eps")
PER_CASE = ("kind", "t", "t_next", "sigma_max", "noise_level", "clip", "adv_max", "kl_thr", "adv")
SCALARS = (
    "A", "B", "s", "logp_old_gauss", "logp_new_gauss", "rn_logratio", "rn_logratio_sub", "guard_ratio", "guard_surr",
    "w_flow", "w_dance", "guard_loss_flow", "guard_loss_dance", "fgrpo_logratio_gauss", "fgrpo_logratio_peer",
    "fgrpo_loss_gauss", "fgrpo_loss_peer", "kl_old", "dppo_loss_gauss", "dppo_loss_peer", "kl_ref", "kl_loss",
)  # fmt: skip
ARRAYS = (
    "mu_old", "mu_new", "x_next", "guard_grad_flow", "guard_grad_dance", "fgrpo_grad_gauss", "fgrpo_grad_peer",
    "dppo_grad_gauss", "dppo_grad_peer", "kl_grad",
)  # fmt: skip
TOLERANCE = {"float64": 1e-9, "float32": 5e-5}
# float32 skips clipped outputs whose ratio lies this close to the clip boundary: rounding decides there.
MARGIN = {"float64": 0.0, "float32": 2e-7}

Case = dict[str, Any]


def _normal_like(rng: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Irwin-Hall(12): integer sums, the same on every platform."""
    n = int(np.prod(shape))
    total = np.zeros(n, np.int64)
    for _ in range(12):
        total += rng.randint(0, 65536, size=n)
    return ((total * 2 - 12 * 65535) / 131072.0).reshape(shape)


def _bf16(value: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even; returned as float32."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    return bits.astype(np.uint32).view(np.float32).reshape(np.shape(value))


def _make_inputs(
    seed: int, shape: tuple[int, ...], t: np.ndarray, pert: float, rho: np.ndarray, vnew_bf16: bool
) -> Case:
    """pert: relative velocity change; rho (N,): correlation of the change with eps."""
    rng = np.random.RandomState(seed)
    x0, n, e, g, m, q = (_normal_like(rng, shape) for _ in range(6))
    t, rho = (np.asarray(c, np.float64).reshape((-1,) + (1,) * (len(shape) - 1)) for c in (t, rho))
    eps = _bf16(e)
    x = _bf16((1.0 - t) * x0 + t * n)
    v_old = _bf16((n - x0) + 0.25 * m)
    change = (pert * 1.4375) * (np.sqrt(1.0 - rho * rho) * g + rho * eps.astype(np.float64))
    v_new = (v_old.astype(np.float64) + change).astype(np.float32)
    if vnew_bf16:
        v_new = _bf16(v_new)
    v_ref = _bf16(v_old.astype(np.float64) + 0.125 * q)
    return {"x": x, "v_old": v_old, "v_new": v_new, "v_ref": v_ref, "eps": eps}


def _checksum(inputs: Case) -> str:
    digest = hashlib.sha256()
    for key in INPUTS:
        digest.update(np.ascontiguousarray(inputs[key], np.float32).tobytes())
    return digest.hexdigest()


def iter_cases() -> Iterator[tuple[str, Case, Case]]:
    """Yield (name, inputs, golden outputs). Arrays of big groups come as (indices, entries, norm)."""
    file = np.load(PATH, allow_pickle=False)
    for group in [str(name) for name in file["groups"]]:
        data = {key[len(group) + 1 :]: file[key] for key in file.files if key.startswith(group + "/")}
        shape, big = tuple(int(i) for i in data["shape"]), bool(data["big"])
        for i in range(len(data["kind"])):
            case = {key: data[key][i] for key in PER_CASE}
            case["kind"] = str(case["kind"])
            for key in ("sigma_max", "noise_level", "clip", "adv_max", "kl_thr"):
                case[key] = float(case[key])
            if big:
                inputs = _make_inputs(
                    int(data["seed"][i]), shape, case["t"], float(data["pert"][i]), data["rho"][i],
                    bool(data["vnew_bf16"][i]),
                )  # fmt: skip
                assert _checksum(inputs) == str(data["sha256"][i]), f"{group}[{i}]: rebuilt inputs differ"
            else:
                inputs = {key: data[key][i] for key in INPUTS}
            want = {key: data[key][i] for key in SCALARS}
            for key in ARRAYS:
                stored = (data["sel"][i], data[f"{key}/sel"][i], data[f"{key}/norm"][i]) if big else data[key][i]
                want[key] = stored
            for key in ("rn_absmean", "margin", "dppo_margin"):
                want[f"_{key}"] = data[key][i]
            yield f"{group}[{i}]:{case['kind']}", {**case, **inputs}, want


def _error(key: str, got: Any, want: Any, golden: Case) -> float | None:
    """Relative error on a scale that suits the quantity; None where the golden value is not finite."""
    got = np.asarray(got, np.float64)
    if isinstance(want, tuple):
        index, entries, norm = want
        if not np.all(np.isfinite(entries)):
            return None
        got = got.reshape(-1)
        worst = np.max(np.abs(got[index] - entries)) / (np.max(np.abs(entries)) or 1.0)
        return float(max(worst, abs(np.linalg.norm(got) - norm) / (norm or 1.0)))
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{key}: shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    if not finite.any():
        return None
    difference = np.abs(got - want)[finite]
    if key.startswith("rn_logratio"):
        return float(np.max(difference / (golden["_rn_absmean"] + 1e-300)[finite]))
    largest = np.max(np.abs(want[finite]))
    if "ratio" in key or "_loss" in key or "surr" in key or key.startswith("logp"):
        largest = max(1.0, largest)
    return float(np.max(difference) / (largest or 1.0))


def _margin(key: str, golden: Case) -> float:
    if "logratio" in key:
        return np.inf
    peer = key.endswith("peer")
    if key.startswith("guard"):
        return float(golden["_margin"][0])
    if key.startswith("fgrpo"):
        return float(golden["_margin"][2 if peer else 1])
    if key.startswith("dppo"):
        return float(golden["_dppo_margin"][1 if peer else 0])
    return np.inf


def check(function: Callable[[Case], Case], dtype: str, only: Callable[[Case], bool] = lambda case: True) -> int:
    """Compare `function(case) -> outputs` with every golden case; returns how many values were compared."""
    failures, checked = [], 0
    for name, case, golden in iter_cases():
        if not only(case):
            continue
        for key in INPUTS:
            case[key] = case[key].astype(dtype)
        for key, got in function(case).items():
            if not _margin(key, golden) > MARGIN[dtype]:
                continue
            error = _error(key, got, golden[key], golden)
            if error is None:
                continue
            checked += 1
            if not error <= TOLERANCE[dtype]:
                failures.append(f"{name} {key}: {error:.2e}")
    assert not failures, f"{len(failures)} of {checked} beyond {TOLERANCE[dtype]:g}: " + "; ".join(failures[:20])
    return checked
