workers = -n auto --maxprocesses 8 --dist loadfile # a test file is one worker's: its fixtures are made once

.PHONY: check slow lint

lint: # what pre-commit checks, over all files
	ruff check .
	ruff format --check .
	lint-imports

check: lint # what the gate runs, but for the fresh environment
	mypy
	pytest $(workers)

slow:
	pytest -m slow $(workers)
