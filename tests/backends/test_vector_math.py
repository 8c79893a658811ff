"""The one-register functions of csrc/common, in every CPU tier this processor can run, through a small program built here."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
TIERS = {"default": ([], 0), "avx2": (AVX2, 1), "avx512": (AVX512, 2)}
LANES = {"default": 4, "avx2": 8, "avx512": 16}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

Floats = np.ndarray
Run = Callable[[str, Floats], Floats]


@pytest.fixture(scope="module", params=list(TIERS))
def tier(request: pytest.FixtureRequest) -> str:
    capability = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    name: str = request.param
    if TIERS[name][1] > capability:
        pytest.skip(f"this processor does not run {name}")
    return name


@pytest.fixture(scope="module")
def run(tier: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    program = tmp_path_factory.mktemp("vector_math") / tier
    source = Path(__file__).with_name("vector_math.cpp")
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    if platform.machine() not in ("x86_64", "AMD64") and tier != "default":
        pytest.skip(f"{tier} is a tier of x86")
    subprocess.run([str(COMPILER), *flags, *TIERS[tier][0], str(source), "-o", str(program)], check=True)

    def call(function: str, x: Floats) -> Floats:
        answer = subprocess.run(
            [str(program), function],
            input=np.ascontiguousarray(x, dtype=np.float32).tobytes(),
            capture_output=True,
            check=True,
        )
        return np.frombuffer(answer.stdout, dtype=np.float32)

    return call


def every_kind_of_float() -> Floats:
    """A million floats over all bit patterns (NaNs, infinities, denormals included), and the neighbours of the hard places."""
    spread = np.arange(0, 2**32, 4093, dtype=np.uint64).astype(np.uint32).view(np.float32)
    centres = np.array(
        [0, 1e-40, 0.25, 0.5, 1, 2, 9, 10, 17, 20, 87.3, 88.0, 88.72284, 89, 103.97, 104, 3e38], dtype=np.float32
    )
    bits = centres.view(np.uint32)[:, None].astype(np.int64) + np.arange(-300, 300)
    near = np.clip(bits, 0, 0x7F800000).astype(np.uint32).view(np.float32).ravel()
    return np.concatenate([spread, near, -near, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], dtype=np.float32)])


def units_in_the_last_place(got: Floats, true: np.ndarray) -> np.ndarray:
    exponent = np.frexp(np.abs(true))[1].clip(min=-125)
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(got), (got - true) / np.ldexp(1.0, exponent - 24), 0.0)


def stable_sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


TRUE: dict[str, Callable[[np.ndarray], np.ndarray]] = {"exp": np.exp, "sigmoid": stable_sigmoid, "tanh": np.tanh}


@pytest.mark.parametrize("function", list(TRUE))
def test_at_most_two_units_in_the_last_place(run: Run, function: str) -> None:
    x = every_kind_of_float()
    with np.errstate(over="ignore", invalid="ignore"):
        true = TRUE[function](x.astype(np.float64))
        rounded = true.astype(np.float32)
    got = run(function, x)
    assert got.shape == x.shape
    assert np.array_equal(np.isnan(got), np.isnan(rounded))
    assert np.array_equal(np.isinf(got), np.isinf(rounded))
    finite = np.isfinite(rounded)
    error = units_in_the_last_place(got[finite], true[finite])
    worst = np.abs(error).argmax()
    assert abs(error[worst]) <= 2.0, f"{function}({x[finite][worst]!r}) is {error[worst]:.2f} units off"
    assert abs(error.mean()) < 0.01  # no bias


def test_ranges(run: Run) -> None:
    x = every_kind_of_float()
    x = x[~np.isnan(x)]
    assert np.abs(run("tanh", x)).max() == 1.0
    sigmoid = run("sigmoid", x)
    assert sigmoid.min() == 0.0
    assert sigmoid.max() == 1.0
    assert run("exp", x).min() == 0.0


def test_odd_function_and_exact_zeros(run: Run) -> None:
    x = np.abs(every_kind_of_float())
    x = x[~np.isnan(x)]
    assert np.array_equal(run("tanh", -x).view(np.uint32), (-run("tanh", x)).view(np.uint32))
    zeros = np.array([0.0, -0.0], dtype=np.float32)
    assert run("tanh", zeros).tobytes() == zeros.tobytes()
    assert run("exp", zeros).tolist() == [1.0, 1.0]
    assert run("sigmoid", zeros).tolist() == [0.5, 0.5]


def test_denormal_results_are_not_flushed(run: Run) -> None:
    x = np.linspace(-103.2, -87.4, 1000, dtype=np.float32)
    for function in ("exp", "sigmoid"):
        got = run(function, x)
        assert (got > 0).all()
        assert (got < np.finfo(np.float32).tiny).all()
    tiny = np.array([1e-45, 1e-41, 1.1e-38], dtype=np.float32)
    assert np.array_equal(run("tanh", tiny), tiny)


@pytest.mark.parametrize(("function", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bit_formats_round_as_torch_does(run: Run, function: str, dtype: torch.dtype) -> None:
    exact = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(exact.view(np.int16)).view(dtype).float().numpy()  # every value of the format
    middle = values[~np.isnan(values)].astype(np.float64)
    middle = np.sort(middle)
    ties = np.nan_to_num((middle[1:] + middle[:-1]) / 2, posinf=0, neginf=0).astype(np.float32)
    x = np.concatenate(
        [
            values,
            ties,
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, -np.float32(np.inf)),
            every_kind_of_float(),
        ]
    )
    want = torch.from_numpy(x).to(dtype).float().numpy()
    got = run(function, x)
    number = ~np.isnan(x)
    assert np.array_equal(np.isnan(got), ~number)
    assert np.array_equal(got[number].view(np.uint32), want[number].view(np.uint32))


@pytest.mark.parametrize(
    ("function", "dtype"), [("parts", torch.float32), ("bf16_parts", torch.bfloat16), ("fp16_parts", torch.float16)]
)
def test_part_loads_and_stores_touch_the_first_lanes_only(
    run: Run, tier: str, function: str, dtype: torch.dtype
) -> None:
    lanes = LANES[tier]
    x = torch.randn(lanes).to(dtype).float()
    want = torch.stack([torch.where(torch.arange(lanes) < n, x, 0.0) for n in range(lanes + 1)])
    assert torch.equal(torch.from_numpy(run(function, x.numpy()).copy()).view(lanes + 1, lanes), want)


def test_lane_count_sum_and_mask(run: Run, tier: str) -> None:
    lanes = LANES[tier]
    x = np.array([2.0**i for i in range(lanes)], dtype=np.float32)  # every subset has its own sum
    assert run("lanes", x).tolist() == [lanes]
    assert run("reduce_add", x).tolist() == [2.0**lanes - 1]
    for i in range(lanes):
        signs = np.ones(lanes, dtype=np.float32)
        signs[i] = -1
        assert run("negative_bits", signs).tolist() == [2.0**i]
