"""Client of a reward server: images go out as PNG in JSON, numbers come back. The format is in `server`'s docstring."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3 import Retry

from fastguard.rewards.base import RewardError
from fastguard.rewards.images import encode_png, to_pil


class RemoteReward:
    """Scores of a reward server, for `use = "http://host:port"`; images arrive there exactly.

    A lost connection, no answer in time, and the statuses 429 and 5xx are tried again: at once, then after 2, 4, 8, ...
    times backoff_s, or when the server's Retry-After says. All tries together, (retries + 1) * timeout_s and the waits
    between, should stay below scoring.timeout_s.

    Options:
        timeout_s: seconds to wait for a connection (at most 10), and then for an answer
        retries: tries after the first
        backoff_s: half the seconds before the second retry; each later wait is twice as long, up to two minutes
    """

    def __init__(self, address: str, timeout_s: float = 60.0, retries: int = 3, backoff_s: float = 0.5) -> None:
        if not urlsplit(address).hostname:
            raise ValueError(f"rewards.use = {address!r} names no host; expected http://host:port")
        if timeout_s <= 0:
            raise ValueError(f"rewards.options.timeout_s must be positive, got {timeout_s}")
        for name, value in (("retries", retries), ("backoff_s", backoff_s)):
            if value < 0:
                raise ValueError(f"rewards.options.{name} must be at least 0, got {value}")
        self.url = f"{address.rstrip('/')}/score"
        self.timeout_s = timeout_s
        self.retry = Retry(
            total=int(retries),
            backoff_factor=backoff_s,
            status_forcelist=[429, *range(500, 600)],
            allowed_methods=None,  # POST too: scoring twice does no harm
            raise_on_status=False,  # the last answer comes back, with the server's own words
        )

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        """(B, C, H, W) uint8 images to B scores, NaN where the server says null.

        Raises RewardError, with the server's own message if it sent one.
        """
        body: dict[str, Any] = {
            "images": [base64.b64encode(encode_png(image)).decode("ascii") for image in to_pil(images)],
            "prompts": list(prompts),
            "metadata": list(metadata),
        }
        with requests.Session() as session:  # one per call: sessions are not made for several threads
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=self.retry))
            try:
                response = session.post(
                    self.url, json=body, timeout=(min(self.timeout_s, 10.0), self.timeout_s), allow_redirects=False
                )
            except requests.RequestException as error:
                raise RewardError(
                    f"{self.url} gave no answer in {self.retry.total} retries of {self.timeout_s:g} s: {error}"
                ) from error
        return _scores(self.url, response, len(images))


def _scores(url: str, response: requests.Response, count: int) -> list[float]:
    try:
        answer = response.json()
    except ValueError:  # not ours, perhaps a proxy's page
        answer = None
    if response.status_code != 200:
        said = answer.get("error") if isinstance(answer, dict) else None
        raise RewardError(f"{url} answered {response.status_code} {response.reason}: {said or response.text[:200]}")
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise RewardError(f'{url}: expected a JSON object with "scores", a list, got {response.text[:200]}')
    if len(scores) != count:
        raise RewardError(f"{url}: expected {count} scores, got {len(scores)}")
    wrong = [s for s in scores if s is not None and (isinstance(s, bool) or not isinstance(s, int | float))]
    if wrong:
        raise RewardError(f"{url}: expected numbers or null as scores, got {str(wrong[0])[:80]!r}")
    return [math.nan if score is None else float(score) for score in scores]
