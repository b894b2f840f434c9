PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := hf_mars tests benchmarks run_clm.py setup.py

.PHONY: demo test quality style docs clean

$(VENV)/.installed: setup.py setup.cfg pyproject.toml constraints.txt hf_mars/optim/kernels/_cpu.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[plot,test,quality,docs]"
	touch $@

# Anew each time: --overwrite_output_dir removes only what an earlier demo wrote.
demo: $(VENV)/.installed
	$(BIN)/python run_clm.py --output_dir demo --overwrite_output_dir --optim mars_adamw \
		--learning_rate 6e-3 --adam_beta1 0.9 --adam_beta2 0.95 --weight_decay 0.1 \
		--lr_scheduler_type cosine --warmup_steps 40 --max_steps 400 --per_device_train_batch_size 16 \
		--config_overrides resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0 \
		--logging_steps 10 --eval_on_start --eval_strategy steps --eval_steps 100 --save_strategy no \
		--report_to none --sample_prompt "It is a truth universally acknowledged"
	$(BIN)/python -m hf_mars.plot demo --output demo/loss.png

test: $(VENV)/.installed
	$(BIN)/python -m pytest

quality: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# --strict: a broken link fails. The pages need no network, neither here nor in the browser.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) demo site build dist *.egg-info
