PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := hf_mars tests benchmarks examples tools docs run_clm.py setup.py
PACKAGE := setup.py setup.cfg pyproject.toml MANIFEST.in constraints.txt $(shell find hf_mars -name '*.c')
# A worker per core; the tests of a file, which share its fixtures, stay together.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-engines chaos quality style docs pictures matrix factories package clean
.NOTPARALLEL:

# One environment; each target adds the extra of setup.cfg that it needs, and no more.
$(VENV)/.with-%: $(PACKAGE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[$*]"
	touch $@

# Anew each time: --overwrite_output_dir removes only what an earlier demo wrote.
demo: $(VENV)/.with-plot
	$(BIN)/python run_clm.py --output_dir demo --overwrite_output_dir --optim mars_m \
		--learning_rate 6e-3 --weight_decay 0.1 \
		--lr_scheduler_type cosine --warmup_steps 40 --max_steps 400 --per_device_train_batch_size 16 \
		--config_overrides resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0 \
		--logging_steps 10 --eval_on_start --eval_strategy steps --eval_steps 100 --save_strategy no \
		--report_to none --sample_prompt "It is a truth universally acknowledged"
	$(BIN)/python -m hf_mars.plot demo --output demo/loss.png

test: $(VENV)/.with-test
	$(PYTEST) -m "not exhaustive"

# Every engine with every setting of it: before a release, and when hf_mars/optim/sharding changes.
test-engines: $(VENV)/.with-test
	$(PYTEST) tests/engines
	$(PYTEST) -m exhaustive --ignore tests/engines

# For the loop of everyday work: without the tests that train for long or start processes.
test-fast: $(VENV)/.with-test
	$(PYTEST) -m "not slow"

# Runs that are killed, stopped, torn and starved of disk space for that long, compared with undisturbed ones; fuzzing.
MINUTES ?= 30
chaos: $(VENV)/.with-test
	HYPOTHESIS_PROFILE=chaos $(BIN)/python -m pytest tests/chaos/test_fuzz.py
	$(BIN)/python tests/chaos/chaos.py --minutes $(MINUTES)

# Format and lint, types, and the laws of imports (CONTRIBUTING.md).
quality: $(VENV)/.with-quality
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

style: $(VENV)/.with-quality
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# --strict: a broken link fails. The pages need no network, neither here nor in the browser.
docs: $(VENV)/.with-docs
	$(BIN)/mkdocs build --strict

# Pictures in docs/images that are drawn from benchmarks/results alone.
pictures: $(VENV)/.with-plot
	$(BIN)/python tools/draw.py

# The integration's tests with the oldest, a middle and the newest transformers, and with every other Python that is
# there; writes docs/compatibility.md.
matrix:
	$(PYTHON) tools/matrix.py

# axolotl, LLaMA-Factory and ms-swift with MARS, each in an environment of its own.
factories:
	$(PYTHON) tools/factories.py

# The sdist and the wheel in dist/, checked in environments of their own; see tools/package.py.
package: $(VENV)/.with-package
	$(BIN)/python tools/package.py

clean:
	rm -rf $(VENV) .matrix demo site build dist *.egg-info
