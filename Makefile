# For developers, in an environment with `pip install -c constraints.txt -e ".[test,dev]"`.
.PHONY: check format lint types imports test

check: lint types imports test

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

imports:
	lint-imports

test:
	bash tests/run.sh
