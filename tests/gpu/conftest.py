"""Bundles that several test files look at."""

from __future__ import annotations

from tests.e2e.conftest import build_ranking, build_small

__all__ = ["build_ranking", "build_small"]
