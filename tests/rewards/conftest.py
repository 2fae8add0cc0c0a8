"""One Ray instance for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def ray_for_rewards() -> Iterator[None]:
    """Ray, unless another test's instance is there already."""
    import ray

    from rlhf_t2i.cluster.connect import start_local_ray, stop

    started = not ray.is_initialized()
    if started:
        start_local_ray(2)  # not some other Ray of this machine
    yield
    if started:
        stop()
