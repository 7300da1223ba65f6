# Included by the Makefile at the top level. No target but `gpu` needs a GPU.
#
#   make kernels        compiles the kernels of the recipes for every architecture; fails on any spill
#   make kernel-counts  instructions per element of the decode kernel by the widths of artifacts; writes
#                       benchmarks/results/kernel_instructions.json
#   make ptx            runs the kernels' tests on what nvcc makes of them, PTX translated to C++
#   make cubins         compiles into .gpu/cubins what the tests and benchmarks load on a GPU
#   make gpu-bundle     that, and in .gpu/wheels the packages that a machine may lack: neither network nor nvcc is needed
#   make gpu-rehearsal  runs the stages of `make gpu` on a pretended GPU, and checks the files that they write
#   make gpu            on a machine with a GPU: checks and times in two stages, see benchmarks/gpu_stages.py; writes to
#                       benchmarks/results/gpu
PYTHON ?= python3
NVCC ?= nvcc
ARCHS ?= sm_80 sm_90 sm_100
# Of the GPU that the bundle is for.
GPU_ARCH ?= sm_90
GPU_PYTHON ?= 3.12
# With what they depend on; torch, transformers and numpy have to be there.
GPU_WHEELS ?= cuda-bindings pydantic rich hypothesis pytest-timeout
NVDISASM ?= nvdisasm
COUNTED ?= $(patsubst %,benchmarks/artifacts/smollm2-135m-wikitext2/%.kvq.safetensors,nuq4-1p nuq3-1p kvq2 kvq3 kvq4)
KERNEL_JOBS ?= $(shell nproc)
STAGES ?= 1 2

.PHONY: kernels kernel-counts ptx cubins gpu-bundle gpu-rehearsal gpu

kernels: install
	$(BIN)/python kernels/compile_all.py --nvcc $(NVCC) --jobs $(KERNEL_JOBS) $(ARCHS)

kernel-counts: install
	command -v $(NVDISASM) >/dev/null || $(BIN)/python -m pip install --quiet nvidia-cuda-nvdisasm
	$(BIN)/python kernels/count_instructions.py --nvcc $(NVCC) --nvdisasm $(NVDISASM) $(COUNTED) \
	  --json benchmarks/results/kernel_instructions.json

ptx: install
	PYTHONPATH=tests $(BIN)/python -m pytest -q -p ptx.plugin --timeout 1200 \
	  tests/test_kernels.py tests/test_kernels_steps.py tests/test_kernels_cache.py tests/test_ptx.py

cubins: install
	$(BIN)/python kernels/make_cubins.py .gpu/cubins --arch $(GPU_ARCH) --nvcc $(NVCC) --jobs $(KERNEL_JOBS)

gpu-bundle: cubins
	rm -rf .gpu/wheels
	$(BIN)/python -m pip download --quiet --only-binary :all: --python-version $(GPU_PYTHON) \
	  --dest .gpu/wheels $(GPU_WHEELS)

gpu-rehearsal: install
	KVQ_REHEARSAL=1 $(BIN)/python -m pytest -q tests/test_gpu_stages.py

gpu:
	$(PYTHON) benchmarks/gpu_stages.py $(STAGES)
