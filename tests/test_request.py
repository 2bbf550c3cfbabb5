"""A request: what is refused without a bundle, and that another process gets the same one."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from fluxrt.errors import RequestError
from fluxrt.request import Request, decode_request


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["a", "b"], "seed": [1]}, "2 prompts but 1 seeds; give one seed, or one a prompt"),
        ({"prompt": []}, "there is no prompt; give at least one"),
        ({"prompt": ["a", 3]}, "prompt must be made of str, got int"),
        ({"prompt": "a", "seed": 1.5}, "seed must be made of int, got float"),
        ({"prompt": "a", "size": ("64", "64")}, "size must be made of int, got str"),
        ({"prompt": "a", "latents": [[0.0]]}, "latents must be made of ndarray, got list"),
        ({"prompt": "a", "steps": 0}, "steps must be at least 1, got 0"),
        ({"prompt": "a", "threshold": -0.1}, "threshold must be at least 0, got -0.1"),
        ({"prompt": "a", "threshold": math.nan}, "threshold must be at least 0, got nan"),
        ({"prompt": "a", "threshold": 0.1, "step_cache": False}, "--threshold goes with the step cache"),
    ],
)
def test_what_no_bundle_could_serve_is_refused_when_the_request_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request(**fields)


def test_one_seed_is_counted_up_and_several_are_taken_as_they_are() -> None:
    assert Request("a", seed=7).seeds == [7]
    assert Request(["a", "b", "c"], seed=7).seeds == [7, 8, 9]
    assert Request(["a", "b"], seed=[9, 6]).seeds == [9, 6]


def test_another_process_gets_the_same_request() -> None:
    request = Request(["a", "b"], seed=[9, 6], steps=4, guidance=1.5, size=(64, 48), threshold=0.1)
    assert decode_request(request.encode()) == request
    latents = np.random.default_rng(0).standard_normal((1, 6, 4)).astype(np.float32)
    received = decode_request(Request("a", latents=latents, step_cache=False).encode())
    assert received.step_cache is False
    assert received.latents is not None
    np.testing.assert_array_equal(received.latents, latents)


def test_a_request_of_unknown_fields_or_other_types_is_not_decoded() -> None:
    for fields in ({"prompt": "a", "width": 64}, {"prompt": 3}, {"prompt": "a", "size": [64]}):
        with pytest.raises(msgspec.ValidationError):
            decode_request(msgspec.msgpack.encode(fields))
