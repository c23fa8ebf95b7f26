.PHONY: check test bench

check:
	uv run --extra dev ruff format --check .
	uv run --extra dev ruff check .
	uv run --extra dev pyright
	uv run --extra dev lint-imports

test:
	uv run --extra test pytest

bench:
	for script in scripts/benchmarks/bench_*.py; do uv run python $$script || exit 1; done
