.PHONY: check slow lint

lint: # what pre-commit checks, over all files
	ruff check .
	ruff format --check .
	lint-imports

check: lint # what the gate runs, but for the fresh environment
	mypy
	pytest

slow:
	pytest -m slow
