.PHONY: setup test lint docs bench

setup: ## install into the active environment
	pip install -e '.[dev,parity]'

test: ## the whole suite, two workers
	pytest -n 2

lint: ## linter and type checker
	ruff check .
	pyright src

docs: ## render the pages that are made from the code
	python scripts/render_docs.py

bench: ## time ours beside its peers and write benchmarks/records
	inkstream bench --record speed-cpu
