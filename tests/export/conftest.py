"""A workdir that looks trained, shared with the tests of sampling."""

from tests.sampling.conftest import original

__all__ = ["original"]
