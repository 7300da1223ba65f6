# Included by the Makefile at the top level.
#
#   make kernels   compiles every variant for every architecture; needs nvcc, no GPU; fails on any spill
#   make kernel-counts   instructions per element of the decode kernel by the widths of artifacts; needs nvcc,
#                  no GPU; writes benchmarks/results/kernel_instructions.json
#   make gpu       on a machine with a GPU: builds pycuda if it is missing, checks, times, and writes
#                  benchmarks/results/gpu-*.json
PYTHON ?= python3
NVCC ?= nvcc
ARCHS ?= sm_80 sm_90 sm_100
NVDISASM ?= nvdisasm
COUNTED ?= $(patsubst %,benchmarks/artifacts/smollm2-135m-wikitext2/%.kvq.safetensors,nuq3-1p kvq2 kvq3 kvq4)
KERNEL_JOBS ?= $(shell nproc)
# What pip installs where pycuda is missing; a file or folder where there is no network.
PYCUDA ?= pycuda>=2025.1.2

.PHONY: kernels kernel-counts gpu

kernels:
	$(PYTHON) kernels/compile_all.py --nvcc $(NVCC) --jobs $(KERNEL_JOBS) $(ARCHS)

kernel-counts: install
	command -v $(NVDISASM) >/dev/null || $(BIN)/python -m pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python kernels/count_instructions.py --nvcc $(NVCC) --nvdisasm $(NVDISASM) $(COUNTED) \
	  --json benchmarks/results/kernel_instructions.json

gpu:
	$(PYTHON) -c "import pycuda" 2>/dev/null || $(PYTHON) -m pip install "$(PYCUDA)"
	$(PYTHON) -m pytest tests -m gpu -q
	if command -v compute-sanitizer >/dev/null; then \
	  compute-sanitizer --error-exitcode 1 $(PYTHON) benchmarks/kernels_gpu.py --check-only; \
	fi
	$(PYTHON) benchmarks/kernels_gpu.py --json benchmarks/results/gpu-kernels.json
	$(PYTHON) benchmarks/generate_gpu.py --json benchmarks/results/gpu-generate.json
