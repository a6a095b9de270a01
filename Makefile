# The programs of the environment come first, so that `horovodrun` and `mpirun` are its own.
IN_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"

# Open MPI refuses to start ranks for root unless told twice, which containers need. More ranks
# than cores must yield when they wait, and each rank computes with one thread.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export OMPI_MCA_mpi_yield_when_idle = 1
export OMP_NUM_THREADS = 1

# TensorFlow otherwise prints several lines whenever it is imported, horovodrun included; the
# second variable only spells out its default, about which it prints one more.
export TF_CPP_MIN_LOG_LEVEL = 3
export TF_ENABLE_ONEDNN_OPTS = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-keras test test-links soak lint clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## make .venv: MPI, frameworks, Horovod; FRAMEWORKS=torch|tensorflow PYTHON=python3.12
	@python3 tools/setup_env.py --python "$(PYTHON)" --frameworks "$(FRAMEWORKS)"

demo: setup  ## train on a few ranks of this machine and watch the nodes gossip
	@$(IN_VENV) .venv/bin/python examples/demo.py

demo-keras: setup  ## the same with Keras on TensorFlow
	@$(IN_VENV) .venv/bin/python examples/demo.py keras_digits.py

test: setup  ## run the tests
	$(IN_VENV) .venv/bin/python -m pytest $(ARGS)

test-links: setup  ## the faults of links too, on hosts of their own; needs root
	$(IN_VENV) GOSSIP_TESTS=links .venv/bin/python -m pytest -s tests/adapters/test_torch_links.py $(ARGS)

soak: setup  ## a thousand seeded runs with faults of every method, and 10,000 steps of real ranks
	$(IN_VENV) .venv/bin/python tests/soak.py $(ARGS)
	$(IN_VENV) .venv/bin/python tests/adapters/steady.py

lint: setup  ## check style and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

clean:  ## remove .venv and everything that was built or cached
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
