# The commands of a contributor; `make ci` is all that .ci/run does.
PYTHON := .venv/bin/python
FAST := tests/objective tests/rollout/test_packing.py tests/rollout/test_token_sampling.py tests/test_layers.py tests/test_identities.py

PROMISES := tests/test_launch.py tests/test_processes.py tests/test_storage.py tests/sweeps/test_hosts.py \
  tests/runs/test_measurement.py tests/runs/test_attainable.py tests/tasks/test_workers.py tests/data/test_hostile_tokenizers.py

.PHONY: help install fast test lint format docs serve ci audit attacks
help:
	@grep -E '^[a-z]+:.*#' Makefile | sed 's/:.*#/\t/'
install: # everything into .venv
	python3 -m venv .venv && .venv/bin/pip install -q -r tests/requirements.txt
fast: # the tests of the method, without the slow ones
	$(PYTHON) -m pytest -m "not slow" $(FAST)
test: # all tests
	$(PYTHON) -m pytest
attacks: # every attack of docs/reliability.md, one after the other; some hours
	$(PYTHON) -m pytest $(PROMISES)
	$(PYTHON) -m tests.fuzz
	$(PYTHON) -m tests.endurance
	$(PYTHON) -m tests.attacks
	$(PYTHON) -m experiments.pod
lint: # what .ci/run checks beside the tests
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
format: # mend what can be mended
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .
docs: .venv/docs # the site, into site/
	.venv/docs/bin/mkdocs build --strict
serve: .venv/docs # the site on this machine, made anew as pages change
	.venv/docs/bin/mkdocs serve
ci: # all that decides whether main is green; makes .venv anew
	bash .ci/run
.venv/docs: docs/requirements.txt
	python3 -m venv .venv/docs && .venv/docs/bin/pip install -q -r docs/requirements.txt && touch .venv/docs
audit: # known vulnerabilities of what is pinned, and sbom.json: every package with its licence
	python3 -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit cyclonedx-bom
	.venv/audit/bin/pip-audit -r requirements.txt --disable-pip --require-hashes
	.venv/audit/bin/cyclonedx-py environment .venv/bin/python -o sbom.json
