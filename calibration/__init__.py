"""Requests to measure a model with. Level 2: imports hstu_compile.model only."""
