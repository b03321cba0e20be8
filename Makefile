# For developers. Everything runs in .venv, which is made at first use (tools/environment.sh).
.PHONY: check full format test

check:
	bash tests/check.sh

full:
	bash tests/check.sh --full

format:
	bash -c 'export EXTRAS=test,dev; source tools/environment.sh && ruff format . && ruff check --fix .'

test:
	bash tests/run.sh
