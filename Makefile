.PHONY: check test bench

check:
	uv run --extra dev ruff format --check .
	uv run --extra dev ruff check .
	uv run --extra dev pyright
	uv run --extra dev lint-imports

test:
	uv run --extra test pytest

bench:
	uv run python scripts/benchmarks/run_all.py
