"""Rewards: built from configs, right against independent formulas, and in threads."""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ModuleSpec
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.reward_calls import PATIENCE_S, built, call, noise
from PIL import Image
from torch import Tensor

from fastguard.config import RewardConfig, ScoringConfig
from fastguard.prompts import Prompt
from fastguard.rewards import BUILT_IN, RewardError, RewardFailure, RewardPool
from fastguard.rewards.images import decode_png, encode_png, to_pil
from fastguard.rewards.ocr import edit_distance
from fastguard.rewards.settings import SETTINGS

# ------------------------------------------------------------------------------------------------ building


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes `mine.py` into a working directory that is not on sys.path, as for the fastguard script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", os.getcwd(), str(tmp_path))])

    def write(code: str) -> None:
        (tmp_path / "mine.py").write_text(code)

    yield write
    for name in ("mine", "mine_broken"):
        sys.modules.pop(name, None)


def test_a_function_of_the_working_directory_gets_its_options(user_module: Callable[[str], None]) -> None:
    user_module("def bright(images, prompts, metadata, scale=1.0):\n    return images.double().mean((1, 2, 3)) * scale")
    images = noise()
    means = images.double().mean((1, 2, 3))
    torch.testing.assert_close(call(built("mine:bright"), images), means)
    torch.testing.assert_close(call(built("mine:bright", scale=3.0), images), 3 * means)


def test_a_class_is_built_with_its_options(user_module: Callable[[str], None]) -> None:
    user_module(
        "class Constant:\n    def __init__(self, value, *, sign=1): self.value = value * sign\n"
        "    def __call__(self, images, prompts, metadata): return [self.value] * len(images)\n"
        "class Mute:\n    pass\n"
        "import functools\npartly = functools.partial(lambda images, prompts, metadata, x, y: [x + y], y=2)\n"
        "number = 3"
    )
    assert call(built("mine:Constant", value=2, sign=-1), noise(2)) == [-2, -2]
    assert call(built("mine:partly", x=1), noise(1)) == [3]
    with pytest.raises(
        ValueError, match=r"rewards.options.*missing a required argument: 'value'.*value \(required\), sign"
    ):
        built("mine:Constant")
    with pytest.raises(ValueError, match="cannot be called; add __call__"):
        built("mine:Mute")
    with pytest.raises(ValueError, match="is int, expected a function or a class"):
        built("mine:number")


def test_what_a_user_mistypes_is_named(user_module: Callable[[str], None], tmp_path: Path) -> None:
    user_module("def one(images, prompts, metadata, *, scale=1.0): return [1.0]\ndef few(images): return [1.0]")
    (tmp_path / "mine_broken.py").write_text("import not_there_at_all")
    for use, options, message in [
        ("picscore", {}, f"rewards.use = 'picscore' is no reward; expected one of {', '.join(BUILT_IN)}, or module:f"),
        ("", {}, "rewards.use = '' is no reward"),
        ("nowhere:one", {}, r"rewards.use = 'nowhere:one': there is no module 'nowhere' in .*; change rewards.use"),
        ("mine.deeper:one", {}, "there is no module 'mine.deeper'|mine.deeper.*not a package"),
        ("mine_broken:one", {}, "its module needs 'not_there_at_all', which is not installed"),
        ("mine:two", {}, "module mine .*mine.py.* has no 'two'"),
        (
            "mine:one",
            {"scal": 2.0},
            r"unexpected keyword argument 'scal'; its options are scale, after images, prompts",
        ),
        ("mine:few", {}, "too many positional arguments; its options are none, after images"),
        ("pickscore", {"pth": "x"}, "unexpected.*'pth'; its options are path, processor, device, dtype, batch_size$"),
        ("hpsv2", {}, r"missing a required argument: 'path'; its options are path \(required\)"),
        (
            "jpeg_compressibility",
            {"quality": 0},
            r'reward "jpeg_.*rewards.options.quality: input should be greater than or equal to 1, got 0$',
        ),
        ("http://", {}, r"rewards.use = 'http://': .*No host supplied; expected http://host:port"),
        ("http://h:99999", {}, r"rewards.use = 'http://h:99999': .*; expected http://host:port"),
        ("http://[::1", {}, r"rewards.use = 'http://\[::1': .*; expected http://host:port"),
        ("http://h:1", {"timeouts": 2}, "unexpected.*'timeouts'; its options are timeout_s, retries, backoff_s$"),
        ("http://h:1", {"address": "http://g:1"}, "rewards.options.*"),
        ("http://h:1", {"timeout_s": 0.0}, "rewards.options.timeout_s: input should be greater than 0, got 0.0$"),
        ("http://h:1", {"retries": -1}, "rewards.options.retries: input should be greater than or equal to 0, got -1$"),
    ]:
        with pytest.raises(ValueError, match=message):
            built(use, **options)


ABSURD = [
    *(("http://h:1", "timeout_s", value) for value in (0, -1.0, 1e7, 1e30, math.inf, math.nan, "60", True)),
    *(("http://h:1", "retries", value) for value in (-1, 1001, 10**30, 2.0, math.nan, "3", True)),
    *(("http://h:1", "backoff_s", value) for value in (-0.1, 61, 1e30, math.inf, math.nan, "1", False)),
    *(("jpeg_compressibility", "quality", value) for value in (0, 96, 50.0, math.nan, "50", True)),
    *(("clipscore", "batch_size", value) for value in (0, -1, 10**30, 2.5, math.nan, "8", True)),
    *(("pickscore", "device", value) for value in ("gpu", "cuda:-1", "cuda:1234", "meta", "", 0)),
    *(("hpsv2", "dtype", value) for value in ("int8", "float64", 32)),
    *(("aesthetic", name, 3) for name in ("path", "processor", "head")),
    *(("ocr", name, value) for name in ("gpu", "allow_extra") for value in ("yes", 1, 0.0)),
    *(("ocr", name, 3) for name in ("key", "language", "engine")),
    ("ocr", "engine", "tesseract"),
]


@pytest.mark.parametrize(("use", "name", "value"), ABSURD, ids=lambda value: repr(value)[:20])
def test_absurd_options_are_refused_at_once_by_name(use: str, name: str, value: Any) -> None:
    needed = {"hpsv2": {"path": "x"}, "aesthetic": {"head": "x"}}.get(use, {})
    with pytest.raises(ValueError, match=rf'reward "{use}": rewards.options.{name}: [^\n]*, got [^\n]{{1,100}}$'):
        built(use, **{**needed, name: value})


def test_every_built_in_is_there_and_lists_its_options() -> None:
    import inspect
    from importlib import import_module

    for name, where in BUILT_IN.items():
        module, _, attribute = where.partition(":")
        made = getattr(import_module(module), attribute)
        text = f"{import_module(module).__doc__} {made.__doc__}"
        for option in inspect.signature(made).parameters:
            assert f"    {option}: " in text, f"{name}: {option}"


@pytest.mark.long
def test_nothing_heavy_is_imported_before_a_reward_is_built() -> None:
    code = (
        "import sys, fastguard.rewards as r; from fastguard.config import RewardConfig; "
        "print({'transformers', 'requests', 'PIL', 'safetensors'} & set(sys.modules)); "
        "r.build_reward(RewardConfig('jpeg_compressibility')); print({'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


# ------------------------------------------------------------------------------------------------ safety of the source


def test_no_pickle_and_no_unsafe_load_in_the_package() -> None:
    files = sorted((ROOT / "fastguard" / "rewards").glob("*.py"))
    assert len(files) >= 8
    loads = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {
                "pickle",
                "dill",
                "cloudpickle",
                "joblib",
                "marshal",
                "shelve",
            }
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec"), path
                assert not called.endswith(".load") or called == "torch.load", (path, called)
                if called == "torch.load":
                    loads += 1
                    assert {k.arg: ast.unparse(k.value) for k in node.keywords}["weights_only"] == "True", path
    assert loads == 1


# ------------------------------------------------------------------------------------------------ built-ins: JPEG, OCR


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_jpeg_rewards_are_file_sizes_in_kB(channels: int) -> None:
    images = noise(3, channels)
    images[0] = 128
    for quality in (95, 40):
        expected = []
        for image in images:
            array = image[0].numpy() if channels == 1 else image.permute(1, 2, 0).contiguous().numpy()
            buffer = BytesIO()
            Image.fromarray(array).save(buffer, "JPEG", quality=quality)
            expected.append(len(buffer.getvalue()) / 1000)
        assert call(built("jpeg_incompressibility", quality=quality), images) == expected
        assert call(built("jpeg_compressibility", quality=quality), images) == [-size for size in expected]
    assert call(built("jpeg_compressibility"), images)[0] > call(built("jpeg_compressibility"), images)[1]


def test_edit_distance_is_levenshteins() -> None:
    @cache
    def plain(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("abcd", "bcde") == 2  # where counting equal places would say 4
    generator = np.random.default_rng(0)
    for _ in range(200):
        a, b = ("".join(generator.choice(list("abc"), generator.integers(0, 7))) for _ in range(2))
        assert edit_distance(a, b) == plain(a, b), (a, b)


@pytest.fixture
def fake_easyocr(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An easyocr whose next readings are in the list that is returned."""
    readings: list[list[str]] = []

    class FakeReader:
        def __init__(self, languages: list[str], gpu: bool, verbose: bool) -> None:
            assert (languages, gpu) == (["en"], False)

        def readtext(self, image: np.ndarray, detail: int) -> list[str]:
            assert image.shape == (17, 23, 3)
            assert (image.dtype, detail) == (np.uint8, 0)
            return readings.pop(0)

    module = types.ModuleType("easyocr")
    module.__spec__ = ModuleSpec("easyocr", None)
    module.Reader = FakeReader  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "easyocr", module)
    return readings


def test_ocr_scores_the_distance_to_the_wanted_text(fake_easyocr: list[list[str]]) -> None:
    fake_easyocr += [
        ["Hello", "World"],
        ["helloworlt"],
        [],
        ["something very long and very different"],
        ["xhello worldx"],
    ]
    prompts = ['a sign that says "Hello World"'] * 5
    scores = call(built("ocr"), noise(5), prompts)
    assert scores == pytest.approx([1.0, 0.9, 0.0, 0.0, 0.8])
    fake_easyocr += [["xhello worldx"], ["hello"]]
    assert call(built("ocr", allow_extra=True), noise(2), prompts[:2]) == pytest.approx([1.0, 0.5])


def test_ocr_takes_the_wanted_text_from_metadata_first(fake_easyocr: list[list[str]]) -> None:
    reward = built("ocr", key="sign")
    fake_easyocr += [["STOP"], ["stop"], ["stop"]]
    prompts = ["a sign", 'says "go"', "says “stop”"]
    assert reward(noise(3, 1), prompts, [{"sign": "stop"}, {"sign": "Stop"}, {}]) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r'prompt "a sign" says nothing to read: give it "sign"'):
        reward(noise(1), ["a sign"], [{"text": "stop"}])


def test_ocr_without_an_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyocr", None)
    monkeypatch.setitem(sys.modules, "pytesseract", None)
    with pytest.raises(
        ValueError, match="easyocr or pytesseract, which are not installed: pip install easyocr, or pip"
    ):
        built("ocr")
    with pytest.raises(ValueError, match="reads images with pytesseract, which is not installed"):
        built("ocr", engine="pytesseract")
    with pytest.raises(ValueError, match="options.engine: input should be 'auto', 'easyocr' or 'pytesseract', got 'x'"):
        built("ocr", engine="x")


def test_ocr_with_pytesseract(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pytesseract")
    module.__spec__ = ModuleSpec("pytesseract", None)
    module.get_tesseract_version = lambda: "5"  # type: ignore[attr-defined]
    module.image_to_string = lambda image, lang: f" St op\n\f{'' if lang == 'eng' else 'x'}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "easyocr", None)
    monkeypatch.setitem(sys.modules, "pytesseract", module)
    assert call(built("ocr"), noise(1), ['"stop"']) == [1.0]

    def missing() -> str:
        raise FileNotFoundError("tesseract is not in your path")

    module.get_tesseract_version = missing  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="does not find the tesseract program"):
        built("ocr")


# ------------------------------------------------------------------------------------------------ built-ins: CLIP


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP with 16 dimensions, a byte tokenizer of 12 tokens per text, and its image processor."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    path = str(tmp_path_factory.mktemp("clip"))
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12).save_pretrained(path)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**size, **text}, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    model = CLIPModel(config)
    torch.manual_seed(3)  # cosines of both signs
    with torch.no_grad():  # fresh weights are so small that all images look alike
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        model.logit_scale.fill_(4.6)
    model.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(path)
    return path


PROMPTS = ["a cat", "dog", "two red hats", "x"]


def stock_logits(path: str, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, float]:
    """logit_scale * cosine of each pair from CLIPModel's own forward, one pair at a time, and the scale."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(path).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(path), CLIPImageProcessor.from_pretrained(path)
    logits = []
    for image, prompt in zip(images, prompts, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        inputs = {**tokenizer([prompt], return_tensors="pt"), **processor(images=[picture], return_tensors="pt")}
        with torch.no_grad():
            logits.append(model(**inputs).logits_per_image[0, 0])
    return torch.stack(logits), model.logit_scale.exp().item()


def test_clip_rewards_follow_their_formulas(tiny_clip: str) -> None:
    images = noise(height=20, width=20)
    logits, scale = stock_logits(tiny_clip, images, PROMPTS)
    assert logits.min() < -0.1  # so that CLIPScore's max with 0 is seen to act
    assert logits.max() > 0.1
    expected = {
        "pickscore": logits,
        "clipscore": 2.5 * (logits / scale).clamp(min=0),
        "hpsv2": 100 * logits / scale,
    }
    for name, want in expected.items():
        for batch_size in (1, 3, 16):
            reward = built(name, path=tiny_clip, processor=tiny_clip, batch_size=batch_size, device="cpu")
            got = call(reward, images, PROMPTS)
            assert got.dtype == torch.float32
            assert not got.requires_grad
            # Padding and batching change the order of float32 sums in two layers: some ulps of logits up to 100.
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-4)


def test_clip_rewards_take_grey_images_and_cut_long_texts(tiny_clip: str) -> None:
    reward = built("pickscore", path=tiny_clip, processor=tiny_clip)
    grey = noise(2, 1, 16, 16)
    torch.testing.assert_close(call(reward, grey), call(reward, grey.expand(2, 3, 16, 16)))
    long = ["a cat on a hat " * 9, "a cat on a hat " * 9 + "and so on"]
    scores = call(reward, grey[:1].expand(2, 1, 16, 16), long)
    torch.testing.assert_close(scores[0], scores[1])
    assert abs(scores[0] - call(reward, grey[:1], ["a cat"])[0]) > 0.1


def test_hpsv2_pads_where_the_others_crop(tiny_clip: str) -> None:
    wide = noise(2, 3, 16, 28)
    padded = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    padded[:, :, 6:22] = wide
    hps = built("hpsv2", path=tiny_clip, processor=tiny_clip)
    torch.testing.assert_close(call(hps, wide), call(hps, padded))
    torch.testing.assert_close(call(hps, wide.mT), call(hps, padded.mT))
    clip = built("pickscore", path=tiny_clip, processor=tiny_clip)
    assert not torch.allclose(call(clip, wide), call(clip, padded))


def test_clip_dtype_device_and_scale(tiny_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastguard.rewards.clip import resolve_device

    exact = built("pickscore", path=tiny_clip, processor=tiny_clip)
    rough = built("pickscore", path=tiny_clip, processor=tiny_clip, dtype="bfloat16")
    assert rough.clip.model.dtype == torch.bfloat16
    assert rough.clip.scale == exact.clip.scale  # the weight in bfloat16 would change every score by a percent
    assert call(rough, noise()).dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [str(resolve_device(d)) for d in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match="rewards.options.device = 'cuda:4', but this process sees 4 GPUs"):
        resolve_device("cuda:4")


def test_clip_rewards_say_what_is_wrong_with_their_files(tiny_clip: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(tiny_clip).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="lacks 1 weights of transformers' CLIP model, visual_projection.weight for one"
    ):
        built("clipscore", path=str(tmp_path))
    with pytest.raises(ValueError, match=r'reward "clipscore": rewards.options.path = .*nowhere. gives no CLIP model'):
        built("clipscore", path=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"rewards.options.processor = .*empty. gives no tokenizer"):
        built("clipscore", path=tiny_clip, processor=str(tmp_path / "empty"))
    with pytest.raises(
        ValueError, match=r"options.dtype: input should be 'float32', 'bfloat16' or 'float16', got 'int8'"
    ):
        built("clipscore", path=tiny_clip, dtype="int8")
    with pytest.raises(ValueError, match="rewards.options.batch_size: input should be .* equal to 1, got 0"):
        built("clipscore", path=tiny_clip, batch_size=0)


def test_clip_rewards_may_be_called_from_several_threads(tiny_clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = built("pickscore", path=tiny_clip, processor=tiny_clip, batch_size=1)
    texts = [[f"cat {i}" * (i + 1), "dog"] for i in range(8)]
    want = [call(reward, noise(2), text) for text in texts]
    clip, locked = reward.clip, []
    # Tokenizers collide too rarely for a test to count on it; that the lock is held is certain.
    for owner, name in [(clip, "tokenizer"), (clip.model, "get_text_features"), (clip.model, "get_image_features")]:
        original = getattr(owner, name)

        def watched(*args: Any, original: Any = original, **options: Any) -> Any:
            locked.append(clip._lock.locked())
            return original(*args, **options)

        monkeypatch.setattr(owner, name, watched)
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda text: call(reward, noise(2), text), texts))
    assert len(locked) == 8 * 2 * 3
    assert all(locked)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_the_aesthetic_head_is_a_chain_of_linear_layers(tiny_clip: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    class Head(torch.nn.Module):  # the layout of LAION's file: dropout between linear layers; 10 sorts after 2
        def __init__(self) -> None:
            super().__init__()
            sizes = [16, 12, 8, 6, 5, 4, 1]
            parts: list[torch.nn.Module] = []
            for width, after in pairwise(sizes):
                parts += [torch.nn.Linear(width, after), torch.nn.Dropout(0.2)]
            self.layers = torch.nn.Sequential(*parts[:-1])

    torch.manual_seed(1)
    head = Head().eval()
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    images = noise(height=16, width=16)
    config = CLIPVisionConfig.from_pretrained(tiny_clip, projection_dim=16)
    vision = CLIPVisionModelWithProjection.from_pretrained(tiny_clip, config=config).eval()
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)(images=to_pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeds = vision(pixels).image_embeds
        want = head.layers(embeds / embeds.norm(dim=-1, keepdim=True))[:, 0]
    for name in ("head.safetensors", "head.pth"):
        got = call(built("aesthetic", head=str(tmp_path / name), path=tiny_clip), images)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # a different batching of float32 sums
        assert not got.requires_grad


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path(self.target), "exploded")


def test_an_aesthetic_head_that_is_not_weights_is_refused(tiny_clip: str, tmp_path: Path) -> None:
    torch.save({"layers.0.weight": Bomb(str(tmp_path / "exploded"))}, tmp_path / "bomb.pth")
    torch.save({"weight": torch.ones(2, 16), "bias": torch.ones(2)}, tmp_path / "two.pth")
    torch.save({"weight": torch.ones(1, 8), "bias": torch.ones(1)}, tmp_path / "narrow.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, message in [
        ("bomb.pth", "rewards.options.head = .*bomb.pth' cannot be read as weights and nothing else"),
        ("broken.safetensors", "cannot be read as weights and nothing else"),
        ("none.pth", "there is no such file"),
        ("two.pth", r"a chain of linear layers that ends in one number, got weights \[\(2, 16\)\]"),
        ("narrow.pth", "rewards.options.head reads 8 features, but .* gives 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            built("aesthetic", head=str(tmp_path / name), path=tiny_clip)
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_png_is_exact(channels: int) -> None:
    for height, width in [(1, 1), (17, 23), (64, 64)]:
        images = noise(2, channels, height, width)
        for image, picture in zip(images, to_pil(images), strict=True):
            assert torch.equal(decode_png(encode_png(picture), max_pixels=height * width), image)
    assert torch.equal(decode_png(encode_png(to_pil(noise().mT)[1]), 10**6), noise()[1].mT)  # strided


def png(mode: str, size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new(mode, size).save(buffer, kind)
    return buffer.getvalue()


def test_what_is_not_such_a_png_is_refused() -> None:
    for data, message in [
        (b"", "not a PNG image"),
        (png("RGB", kind="JPEG"), "not a PNG image"),
        (png("RGB")[:-24], "not a PNG image"),
        (png("RGBA"), "expected 8-bit grey or RGB, got PIL's mode RGBA"),
        (png("I;16"), "mode I;16"),
        (png("P"), "mode P"),
        (png("RGB", (9, 9)), "9 x 9 pixels are more than the 80 left"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_png(data, max_pixels=80)
    for wrong in (noise().float(), noise()[0], noise(1, 2)):
        with pytest.raises(ValueError, match="expected uint8 images of shape"):
            to_pil(wrong)


# ------------------------------------------------------------------------------------------------ pool

POOL_PROMPTS = [Prompt(f"prompt number {i}", {"index": i}) for i in range(8)]


def pool_of(*rewards: Any, timeout_s: float = PATIENCE_S, drop: bool = False, threads: int = 2) -> RewardPool:
    named = [(RewardConfig("x:y", name=f"reward_{i}"), reward) for i, reward in enumerate(rewards)]
    scoring = ScoringConfig(threads=threads, timeout_s=timeout_s, on_failure="drop_group" if drop else "stop")
    return RewardPool(named, scoring, POOL_PROMPTS)


def by_index(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    return [float(data["index"]) for data in metadata]


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_scores_come_in_the_order_of_submission() -> None:
    second_done = threading.Event()

    def first_waits_for_second(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Any:
        if prompts[0] == "prompt number 5":
            assert second_done.wait(PATIENCE_S)
        else:
            second_done.set()
        return np.array([data["index"] for data in metadata], dtype=np.float16)

    def means(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return images.float().mean((1, 2, 3))

    with pool_of(first_waits_for_second, means, threads=3) as pool:
        for _ in range(2):  # a pool serves one epoch after another
            second_done.clear()
            a, b = noise(3, seed=1), noise(2, 1, seed=2)
            pool.submit(a, indices(5, 5, 2))
            pool.submit(b, indices(1, 0))
            scores = pool.collect()
            assert scores.failures == ()
            assert scores.values.dtype == torch.float64
            assert scores.values[0].tolist() == [5, 5, 2, 1, 0]
            want = torch.cat([a.float().mean((1, 2, 3)), b.float().mean((1, 2, 3))]).double()
            assert torch.equal(scores.values[1], want)
        assert pool.collect().values.shape == (2, 0)


def test_submit_returns_while_the_reward_runs() -> None:
    started, release, seen = threading.Event(), threading.Event(), []

    def slow(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        started.set()
        assert release.wait(PATIENCE_S)
        seen.append(torch.is_grad_enabled())
        return by_index(images, prompts, metadata)

    with pool_of(slow) as pool:
        pool.submit(noise(2), indices(3, 4))
        assert started.wait(PATIENCE_S)  # it runs before anybody collects
        assert seen == []  # and submit did not wait for it
        release.set()
        assert pool.collect().values.tolist() == [[3, 4]]
    assert seen == [False]


def test_metadata_is_a_copy_and_lists_are_read_in_float64() -> None:
    def greedy(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        for data in metadata:
            data.clear()
        return [1 / 3] * len(images)

    with pool_of(greedy, by_index) as pool:
        pool.submit(noise(2), indices(6, 6))
        assert pool.collect().values.tolist() == [[1 / 3, 1 / 3], [6, 6]]


def giving(result: Any) -> Any:
    return lambda images, prompts, metadata: result


def raising(error: BaseException) -> Any:
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        raise error

    return reward


WRONG = [
    (giving([1.0, 2.0]), r"ValueError: expected 3 scores of shape \(3,\), got shape \(2,\)", ValueError),
    (giving(torch.ones(3, 1)), r"ValueError: expected 3 scores of shape \(3,\), got shape \(3, 1\)", ValueError),
    (giving(1.0), r"got shape \(\)", ValueError),
    (giving(None), r"TypeError: expected 3 numbers \(a tensor, an array or a list\), got NoneType", TypeError),
    (giving(([1.0, 1.0, 1.0], {})), "TypeError: expected 3 numbers .*, got tuple", TypeError),
    (giving(["a", "b", "c"]), "TypeError: expected 3 numbers", TypeError),
    (giving(torch.tensor([1 + 2j, 3, 4])), "TypeError: expected 3 numbers .*, got Tensor: complex scores", TypeError),
    (giving(np.array([1 + 2j, 3, 4])), "got ndarray: complex scores have no order", TypeError),
    (giving([np.complex64(1 + 2j), 3.0, 4.0]), "got list: complex scores have no order", TypeError),
    (giving([1e308, 1e308, -1e39]), r"scores that are not finite in float32: \['-1e\+39', '1e\+308'\]", type(None)),
    (raising(RuntimeError("out of luck")), "RuntimeError: out of luck", RuntimeError),
    (raising(TimeoutError("its own")), "TimeoutError: its own", TimeoutError),
    (raising(SystemExit(3)), "SystemExit: 3", SystemExit),
]
WRONG_IDS = [
    "few",
    "column",
    "scalar",
    "none",
    "tuple",
    "text",
    "complex tensor",
    "complex array",
    "complex list",
    "huge",
    "raises",
    "raises TimeoutError",
    "exits",
]


@pytest.mark.parametrize(("reward", "reason", "cause"), WRONG, ids=WRONG_IDS)
def test_a_failure_stops_with_label_prompts_and_cause(reward: Any, reason: str, cause: type) -> None:
    with pool_of(by_index, reward) as pool:
        pool.submit(noise(3), indices(2, 2, 7))
        message = f'reward "reward_1" failed for prompts 2 "prompt number 2", 7 "prompt number 7": .*{reason}'
        with pytest.raises(RewardError, match=message) as failure:
            pool.collect()
        assert 'Set scoring.on_failure = "drop_group"' in str(failure.value)
        assert isinstance(failure.value.__cause__, cause)


@pytest.mark.parametrize(("reward", "reason", "cause"), WRONG, ids=WRONG_IDS)
def test_a_failure_drops_the_batch(reward: Any, reason: str, cause: type) -> None:
    with pool_of(by_index, reward, drop=True) as pool:
        pool.submit(noise(3), indices(2, 2, 7))
        scores = pool.collect()
    assert scores.values[0].tolist() == [2, 2, 7]
    assert scores.values[1].isnan().all()
    assert [(f.label, f.prompt_index, f.prompt) for f in scores.failures] == [
        ("reward_1", 2, "prompt number 2"),
        ("reward_1", 7, "prompt number 7"),
    ]
    assert all(re.search(reason, f.reason) for f in scores.failures)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ([True, False], [1.0, 0.0]),
        ([10**30, 1], [1e30, 1.0]),
        (np.array([2, 1], dtype=np.longdouble), [2.0, 1.0]),
        (np.arange(2.0)[::-1], [1.0, 0.0]),
        (torch.ones(2, requires_grad=True) * 2, [2.0, 2.0]),
        ([torch.ones((), requires_grad=True), 2.0], [1.0, 2.0]),
        (torch.tensor([0.0, 3.0]).to_sparse(), [0.0, 3.0]),
    ],
    ids=["bools", "huge integer", "longdouble", "reversed", "graph", "list on a graph", "sparse"],
)
def test_numbers_come_in_many_kinds(result: Any, expected: list[float]) -> None:
    with pool_of(giving(result)) as pool:
        pool.submit(noise(2), indices(0, 1))
        assert pool.collect().values.tolist() == [expected]


def test_scores_do_not_change_with_the_rewards_own_buffer() -> None:
    buffer, both = torch.zeros(2, dtype=torch.float64), threading.Event()

    def reused(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        buffer.fill_(images.float().mean())
        if buffer[0] == 2:
            both.set()
        return buffer

    with pool_of(reused, threads=1) as pool:
        for value in (1, 2):
            pool.submit(torch.full((2, 3, 4, 4), value, dtype=torch.uint8), indices(0, 1))
        assert both.wait(PATIENCE_S)
        assert pool.collect().values.tolist() == [[1.0, 1.0, 2.0, 2.0]]


DISTURBANCES = {
    "dtype": "torch.set_default_dtype(torch.float64)",
    "device": "torch.set_default_device('meta')",
    "grad": "torch.set_grad_enabled(False)",
    "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "matmul": "torch.set_float32_matmul_precision('medium')",
    "cudnn": "torch.backends.cudnn.benchmark = True",
    "attention": "torch.backends.cuda.enable_math_sdp(False)",
    "numpy": "numpy.seterr(all='raise')",
    "signals": "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "folder": "os.chdir('/')",
    "deleted folder": "d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)",
}


def seen() -> list[Any]:
    return [get() for get, _ in SETTINGS]


@pytest.mark.parametrize("line", DISTURBANCES.values(), ids=DISTURBANCES)
def test_what_a_reward_sets_while_it_is_built_is_put_back(line: str, user_module: Callable[[str], None]) -> None:
    user_module(
        f"import os, tempfile, numpy, torch\n{line}\n"
        f"class Scorer:\n    def __init__(self):\n        {line}\n    def __call__(self, *batch):\n        return []\n"
    )
    before = seen()
    built("mine:Scorer")
    assert seen() == before


OF_A_THREAD = ("device", "grad", "numpy", "signals")  # of the scoring one, whose own they stay


@pytest.mark.parametrize("name", [name for name in DISTURBANCES if name not in OF_A_THREAD])
def test_what_a_reward_sets_while_it_scores_is_put_back(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    changed = []

    def reward(images: Tensor, *rest: Any) -> list[float]:
        before = seen()
        exec(DISTURBANCES[name], {"os": os, "tempfile": tempfile, "torch": torch})
        changed.append(seen() != before)
        return [1.0] * len(images)

    before = seen()
    with pool_of(reward) as pool:
        pool.submit(noise(2), indices(0, 1))
        pool.collect()
    assert changed == [True]
    assert seen() == before


def test_what_a_reward_or_a_prompt_says_is_one_printable_line() -> None:
    hostile = "a \x1b[2Jcat\n\x9b \u202e" + "x" * 9000
    with pool_of(raising(ValueError(hostile + "\ud800")), drop=True) as pool:
        pool._prompts = [Prompt(hostile)]
        pool.submit(noise(1), indices(0))
        (failure,) = pool.collect().failures
    assert failure.reason.startswith(r"ValueError: a \x1b[2Jcat \x9b \u202exxx")
    with pool_of(raising(ValueError(hostile + "\ud800"))) as pool:
        pool._prompts = [Prompt(hostile)]
        pool.submit(noise(1), indices(0))
        with pytest.raises(RewardError) as error:
            pool.collect()
    for said in (failure.reason, str(error.value)):
        assert said.isprintable()
        assert len(said) < 1500


def test_many_prompts_are_shortened_for_an_exception_and_exact_for_wrong_scores() -> None:
    with pool_of(raising(ValueError("no"))) as pool:
        pool.submit(noise(8), torch.arange(8))
        with pytest.raises(
            RewardError, match=r'prompts 0 ".*", 1 ".*", 2 "prompt number 2" and 5 more: ValueError: no'
        ):
            pool.collect()
    nan, inf = float("nan"), float("inf")
    with pool_of(giving([0.0, nan, inf, 1.0, -inf, nan, nan, 2.0])) as pool:
        pool.submit(noise(8), indices(0, 1, 2, 3, 4, 4, 5, 5))
        named = ", ".join(f'{i} "prompt number {i}"' for i in (1, 2, 4, 5))
        with pytest.raises(
            RewardError, match=rf"for prompts {named}: scores that are not finite in float32: \['-inf', 'inf', 'nan'\]"
        ):
            pool.collect()


def test_a_score_that_is_not_finite_drops_its_image_only() -> None:
    nan, inf = float("nan"), float("inf")
    with pool_of(giving(torch.tensor([1.0, inf, 3.0, nan])), by_index, drop=True) as pool:
        pool.submit(noise(4), indices(0, 0, 1, 2))
        scores = pool.collect()
    assert str(scores.values.tolist()) == str([[1.0, nan, 3.0, nan], [0.0, 0.0, 1.0, 2.0]])
    reason = "scores that are not finite in float32: ['inf', 'nan']"
    assert scores.failures == (
        RewardFailure("reward_0", 0, "prompt number 0", reason),
        RewardFailure("reward_0", 2, "prompt number 2", reason),
    )


@pytest.fixture
def hung() -> Iterator[Any]:
    """A reward that does not come back for prompt 0 before the test is over."""
    over = threading.Event()

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        if metadata[0]["index"] == 0:
            over.wait(PATIENCE_S)
        return by_index(images, prompts, metadata)

    yield reward
    over.set()


def test_a_hung_reward_times_out_and_stops(hung: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguard.rewards.pool.GRACE_S", 0.01)
    with pool_of(hung, timeout_s=0.05) as pool:
        pool.submit(noise(1), indices(0))
        with pytest.raises(
            RewardError, match=r'reward "reward_0".*0 "prompt number 0": no scores within scoring.timeout_s'
        ) as e:
            pool.collect()
    assert isinstance(e.value.__cause__, TimeoutError)


def test_a_hung_reward_costs_its_batch_and_not_its_thread(hung: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguard.rewards.pool.GRACE_S", 0.01)
    with pool_of(hung, by_index, timeout_s=1.5, drop=True, threads=1) as pool:
        for _ in range(2):
            pool.submit(noise(2), indices(0, 3))
            pool.submit(noise(2), indices(4, 5))
            scores = pool.collect()
            assert str(scores.values.tolist()) == str([[float("nan")] * 2 + [4.0, 5.0], [0.0, 3.0, 4.0, 5.0]])
            assert [(f.prompt_index, f.reason) for f in scores.failures] == [
                (0, "no scores within scoring.timeout_s = 1.5 seconds"),
                (3, "no scores within scoring.timeout_s = 1.5 seconds"),
            ]


def test_a_failure_cancels_what_waits_and_leaves_a_pool_that_works() -> None:
    calls: list[int] = []
    collected = threading.Event()

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        index = metadata[0]["index"]
        calls.append(index)
        if index == 0:
            raise ValueError("the first one")
        if index == 1:  # it may have begun before the failure was seen; the one thread then stays with it
            assert collected.wait(PATIENCE_S)
        return by_index(images, prompts, metadata)

    with pool_of(reward, threads=1) as pool:
        for index in range(3):
            pool.submit(noise(1), indices(index))
        with pytest.raises(RewardError, match="the first one"):
            pool.collect()
        collected.set()
        pool.submit(noise(1), indices(7))
        assert pool.collect().values.tolist() == [[7]]
    assert 2 not in calls
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(noise(1), indices(0))
    pool.close()


def test_leaving_the_pool_cancels_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguard.rewards.pool.GRACE_S", PATIENCE_S)
    started, release, calls = threading.Event(), threading.Event(), []

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        calls.append(metadata[0]["index"])
        started.set()
        assert release.wait(PATIENCE_S)
        return by_index(images, prompts, metadata)

    class Stop(Exception):
        pass

    pool = pool_of(reward, threads=1)
    original = pool._cancel

    def cancel_then_release() -> None:
        original()
        release.set()

    monkeypatch.setattr(pool, "_cancel", cancel_then_release)

    def epoch() -> None:
        with pool:
            for index in range(3):
                pool.submit(noise(1), indices(index))
            assert started.wait(PATIENCE_S)
            raise Stop

    with pytest.raises(Stop):
        epoch()
    assert calls == [0]
    assert not any(thread.is_alive() for thread in pool._threads._threads)


def test_bad_batches_are_refused_at_the_door() -> None:
    with pool_of(by_index) as pool:
        for images, index, message in [
            (noise(2).float(), indices(0, 1), "images must be uint8 of shape"),
            (noise(2)[0], indices(0, 1), "images must be uint8 of shape"),
            (noise(2, 2), indices(0, 1), "images must be uint8 of shape"),
            (noise(2).to("meta"), indices(0, 1), "in host memory, got .* on meta"),
            (noise(2), indices(0, 1).int(), r"prompt_indices must be int64 of shape \(2,\), got torch.int32"),
            (noise(2), indices(0), r"prompt_indices must be int64 of shape \(2,\)"),
            (noise(2), indices(0, 8), r"prompt_indices must lie in \[0, 8\), got \[0, 8\]"),
            (noise(2), indices(-1, 0), "prompt_indices must lie in"),
        ]:
            with pytest.raises(ValueError, match=message):
                pool.submit(images, index)
        assert pool.collect().values.shape == (1, 0)


HUNG = """
import sys, threading, torch
from fastguard.config import RewardConfig, ScoringConfig
from fastguard.prompts import Prompt
from fastguard.rewards import RewardPool
started = threading.Event()
def hung(images, prompts, metadata):
    started.set()
    threading.Event().wait()
def make():
    scoring = ScoringConfig(threads=1, timeout_s=0.1)
    return RewardPool([(RewardConfig("a:hung"), hung)], scoring, [Prompt("a cat")])
def submit(pool):
    for _ in range(2):
        pool.submit(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    started.wait()
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("with make() as pool: submit(pool); pool.collect()", 1),
        ("with make() as pool: submit(pool); sys.exit(7)", 7),
        ("pool = make(); submit(pool)", 0),
    ],
    ids=["stopped by the timeout", "left with work pending", "never closed"],
)
def test_a_hung_reward_does_not_keep_the_process_from_ending(code: str, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNG + code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == status, done.stderr
    assert ('RewardError: reward "a:hung" failed for prompt 0 "a cat"' in done.stderr) == (status == 1), done.stderr
