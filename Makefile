# The list of commands. Everything happens in .venv, which `make install` makes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := data/synthetic
RUN := runs/tiny
# Any options of pip, such as --extra-index-url for another build of torch.
PIP_OPTIONS ?=
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_OPTIONS)

.PHONY: help install pretrain bench test fuzz check-triton check-cuda check-abi gpu lint clean

help:
	@echo "make install    make .venv, install the project in it and build the extension"
	@echo "make pretrain   from nothing to a pretrained, evaluated model on synthetic data"
	@echo "make bench      measure the operators beside PyTorch's own, about five minutes"
	@echo "make test       run all tests"
	@echo "make fuzz       10,000 random calls of every compiled operator, a quarter of an hour"
	@echo "make check-triton  compile every Triton kernel for every GPU, half an hour; no GPU needed"
	@echo "make check-cuda  compile every CUDA kernel for every GPU and compare the table of registers; needs nvcc, no GPU"
	@echo "make check-abi  run the CPU operators of one wheel under another torch (TORCH=2.12.1); downloads several GB"
	@echo "make gpu        on a machine with a GPU: test the kernels on it, then measure them, ten minutes"
	@echo "make lint       check style and formatting"
	@echo "make clean      remove the environments and what was built; data and runs stay"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	@echo "== environment and dependencies (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch numpy setuptools wheel ninja
	@# A CUDA build of torch has just brought its own Triton; beside a CPU build, add one.
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP_INSTALL) triton==3.6.0
	@echo "== the project and its extension"
	$(PIP_INSTALL) --no-build-isolation --editable ".[dev]"
	$(BIN)/python -m mpma_ext
	touch $@

pretrain: install
	@echo "== data"
	$(BIN)/mpma prepare synthetic --out $(DATA) --seed 0 --side 128
	@echo "== pretraining"
	$(BIN)/mpma pretrain mpma_train/configs/tiny.yaml --data $(DATA) --output_dir $(RUN) \
		--overwrite_output_dir true
	@echo "== evaluation on held-out pairs"
	$(BIN)/mpma evaluate retrieval --model $(RUN) --data $(DATA) > /dev/null
	$(BIN)/mpma evaluate linear --model $(RUN) --data $(DATA) > /dev/null
	$(BIN)/mpma evaluate reconstruct --model $(RUN) --data $(DATA) > /dev/null
	$(BIN)/python -m mpma_train.evaluate.summary $(RUN)

bench: install
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

# Two workers of one thread each: the tests are many and small.
test: install .venv-timm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# timm needs torchvision, which does not load beside a CPU build of torch without help.
.venv-timm: tests/timm_env/make_env.py $(VENV)/.installed
	$(BIN)/python tests/timm_env/make_env.py $@
	touch $@

fuzz: install
	$(BIN)/python -m pytest tests/ext/test_random_operands.py --hypothesis-profile=long $(PYTEST_ARGS)

# CHECK_ARGS=--write compiles what changed and writes the tables.
check-triton: install
	$(BIN)/python -m mpma_ext.kernels.check --tables docs/kernels $(CHECK_ARGS)

check-cuda: install
	$(BIN)/python tests/cuda/compile_check.py $(CHECK_ARGS)

check-abi: install
	$(BIN)/python tests/abi/check_abi.py $(if $(TORCH),--torch $(TORCH))

# GPU_ARGS="--stage correctness sanitizer" runs some stages only.
gpu: install
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-timm .venv-abi build *.egg-info mpma_ext/*.so
