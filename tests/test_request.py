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
        ({"prompt": None}, "prompt must be text, or a list of texts, got NoneType"),
        ({"prompt": b"a"}, "prompt must be text, or a list of texts, got bytes"),
        ({"prompt": ["a", 3]}, "a prompt must be text, got int"),
        ({"prompt": "a\ud800b"}, r"the prompt 'a\\ud800b' is not valid Unicode at character 1"),
        ({"prompt": "a", "seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"prompt": "a", "seed": True}, "seed must be a whole number, got True"),
        ({"prompt": "a", "seed": None}, "seed must be a whole number, got NoneType"),
        ({"prompt": "a", "seed": [None]}, "seed must be a whole number, got NoneType"),
        ({"prompt": "a", "seed": -1}, r"seeds must be from 0 to 2\^64 - 1, got -1"),
        ({"prompt": "a", "seed": 2**64}, r"seeds must be from 0 to 2\^64 - 1, got 18446744073709551616"),
        ({"prompt": ["a", "b"], "seed": 2**64 - 1}, r"seeds must be from 0 to 2\^64 - 1, got 18446744073709551616"),
        ({"prompt": "a", "size": ("64", "64")}, "size must be a whole number, got str"),
        ({"prompt": "a", "size": (64.9, 64.2)}, "size must be a whole number, got 64.9"),
        ({"prompt": "a", "size": (64,)}, r"size must be \(height, width\) in pixels, got \(64,\)"),
        ({"prompt": "a", "size": 64}, r"size must be \(height, width\) in pixels, got 64"),
        ({"prompt": "a", "latents": [[0.0]]}, "latents must be an array of numpy's, got list"),
        ({"prompt": "a", "latents": np.zeros(3, np.int64)}, "latents must be floating-point numbers, got int64"),
        ({"prompt": "a", "latents": np.full(3, np.nan)}, "latents hold NaN or infinity"),
        ({"prompt": "a", "steps": 0}, "steps must be at least 1 and at most 100000, got 0"),
        ({"prompt": "a", "steps": 10**9}, "steps must be at least 1 and at most 100000, got 1000000000"),
        ({"prompt": "a", "steps": 4.0}, "steps must be a whole number, got 4.0"),
        ({"prompt": "a", "guidance": math.nan}, "guidance must be a number of at least 0 and at most 1000, got nan"),
        ({"prompt": "a", "guidance": math.inf}, "guidance must be a number of at least 0 and at most 1000, got inf"),
        ({"prompt": "a", "guidance": -1}, "guidance must be a number of at least 0 and at most 1000, got -1.0"),
        ({"prompt": "a", "guidance": "7"}, "guidance must be a number, got str"),
        ({"prompt": "a", "step_cache": 1}, "step_cache must be True, False or None, got int"),
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


def test_numbers_of_numpy_are_taken_as_pythons_own() -> None:
    numpys = Request(
        ("a", np.str_("b")),
        seed=np.int64(7),
        steps=np.int32(4),
        guidance=np.float32(1.5),
        size=(np.int64(64), np.uint16(48)),
        latents=np.zeros((2, 6, 4), np.float64),
        threshold=np.float64(0.25),
    )
    assert numpys.latents is not None
    assert numpys.latents.dtype == np.float32
    plain = Request(["a", "b"], seed=7, steps=4, guidance=1.5, size=(64, 48), threshold=0.25)
    assert msgspec.structs.replace(numpys, latents=None) == plain
    assert [type(seed) for seed in decode_request(numpys.encode()).seeds] == [int, int]


def test_the_request_of_some_images_generates_those() -> None:
    latents = np.arange(48, dtype=np.float32).reshape(2, 6, 4)
    second = Request(["a", "b"], seed=7, steps=4, latents=latents).of_images(range(1, 2))
    assert (second.prompts, second.seeds, second.steps) == (["b"], [8], 4)
    assert second.latents is not None
    np.testing.assert_array_equal(second.latents, latents[1:])


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
