# `make demo` and `make test` are all a fresh machine needs; both go through `make env`.
PYTHON ?= python3.11
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
TWEETS := $(addprefix examples/tweets/, full.yaml lora-elr.yaml lora.yaml pissa.yaml)

.PHONY: env demo demo-small test lint types docs lock browser ci clean

env: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: env
	$(BIN)/plait compare $(TWEETS) --seeds 2 --out runs/tweets
	$(BIN)/plait compare examples/smollm2/*.yaml --seeds 1 --out runs/smollm2
	@echo "Open the reports:"
	@ls $(CURDIR)/runs/tweets/report.html $(CURDIR)/runs/smollm2/report.html

demo-small: env
	$(BIN)/plait compare $(TWEETS) --seeds 2 --out runs/tweets-small \
		--set train.steps=4 --set data.rows=400

test: env browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The report is looked at in a real browser.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } || \
		{ echo "The test of the report needs Chromium: install it (Debian: apt-get install chromium)."; exit 1; }

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: env
	$(BIN)/mypy

docs: env
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

# Write down what is installed, so that everybody installs the same.
lock:
	$(BIN)/python -m pip list --format=freeze \
		| grep --invert-match --extended-regexp '^(plait|pip|setuptools|wheel)==' \
		| sed 's/^torch==\(.*\)+cpu$$/torch==\1/' > requirements.lock

ci: lint types test docs demo-small

clean:
	rm -rf .venv runs site
