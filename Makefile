.PHONY: setup test test-slow lint docs bench

setup: ## install into the active environment
	pip install -e '.[dev,parity]'

test: ## the suite, two workers
	pytest -n 2

test-slow: ## the suite with its slow tests
	pytest -n 2 -m ''

lint: ## formatter, linter and type checker
	ruff format --check .
	ruff check .
	pyright src

docs: ## render the pages that are made from the code
	python scripts/render_docs.py

bench: ## time ours beside its peers and write benchmarks/records
	inkstream bench --record speed-cpu
