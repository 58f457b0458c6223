# The front door. Every target installs what it needs and works a second time in seconds.
BUILD := build/release
VENV := .venv
VENV_HF := .venv-hf
VENV_DEPLOY := .venv-deploy
VENV_EVIDENCE := .venv-evidence
JOBS := $(shell nproc)
# The numpy models' matrices are small: BLAS threads would only wait for each other.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1

.PHONY: demo demo-table test test-hf evidence evidence-heads evidence-registry gpu-bundle package test-package test-deploy build configure python setup check clean

demo: configure python
	ninja -C $(BUILD) keepsetd keepset
	$(VENV)/bin/python -m keepset.demo --keepsetd $(BUILD)/service/keepsetd

# Compiles the demo's table anew from rollouts on the shipped small model, in a few minutes.
demo-table: configure python
	ninja -C $(BUILD) keepset keepset_shared
	$(VENV)/bin/python -m keepset.calibrate --model small --build $(BUILD) --out $(BUILD)/demo-table/records.jsonl \
	  --table clients/python/src/keepset/eval/data/small_model_table.safetensors --name small-model --version 1 \
	  --param pool_kernel=3 --budgets 32 64 128 256 --protect-window 16 --prompts 24 --pool 60 --action-step 4 \
	  --rounds 6 --entropy-bins 4 --ppl-bins 2
	rm -r $(BUILD)/demo-table

test: build python
	ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS) $(CTEST_FLAGS)
	KEEPSET_BUILD=$(CURDIR)/$(BUILD) $(VENV)/bin/python -m pytest -q tests/python tests/package

# The optional extras `hf` and `ray`. torch, transformers and ray take 6 GB in an environment of their own.
test-hf: configure
	ninja -C $(BUILD) keepset keepset_shared keepsetd
	@tools/venv $(VENV_HF) test,hf,ray,plots tools/hf-constraints.txt
	KEEPSET_BUILD=$(CURDIR)/$(BUILD) $(VENV_HF)/bin/python -m pytest -q tests/python_hf

# Compiles tables from rollouts and measures whether they help: docs/results. An interrupted run goes
# on where it was.
evidence: configure
	ninja -C $(BUILD) keepsetd keepset keepset_shared
	@tools/venv $(VENV_EVIDENCE) plots
	$(VENV_EVIDENCE)/bin/python -m keepset.evidence --build $(BUILD) --out docs/results --work $(BUILD)/evidence
	rm -r $(BUILD)/evidence

# The same for observation_heads tables alone; raw outcomes stay in the build folder, an interrupted run goes
# on there. With HF_MODEL=DIRECTORY a Hugging Face model too, for HF_MINUTES at a time (docs/observation-heads.md);
# without, what the report says of one stays, with the command that measured it.
HF_MINUTES ?= 60
HF_FLAGS ?= --hf-lengths 1400 2048 4096 8192 --hf-prompts 12 6 3 2 --hf-fit-lengths 1400 --hf-compilerkv-prompts 1 \
  --hf-budgets 64 128 192 256 384 512 --hf-calibration-prompts 8 --hf-risk-prompts 6 \
  --hf-tasks number code quotation multi tracking few_shot summary later_number later_code later_quotation
evidence-heads: configure
	ninja -C $(BUILD) keepset keepset_shared
ifdef HF_MODEL
	@tools/venv $(VENV_HF) test,hf,ray,plots tools/hf-constraints.txt
	$(VENV_HF)/bin/python -m keepset.evidence.observation_heads --build $(BUILD) --out docs/results \
	  --work $(BUILD)/evidence-heads --hf-model $(HF_MODEL) $(HF_FLAGS) --hf-minutes $(HF_MINUTES)
else
	@tools/venv $(VENV_EVIDENCE) plots
	$(VENV_EVIDENCE)/bin/python -m keepset.evidence.observation_heads --build $(BUILD) --out docs/results \
	  --work $(BUILD)/evidence-heads
endif

# The table registry under load and at its start: docs/results/registry.md. A few minutes; nothing else may run beside it.
evidence-registry: configure
	ninja -C $(BUILD) keepsetd registry_bench registry_swap_bench
	/usr/bin/python3 tests/bench/registry_report.py --build $(BUILD) --out docs/results/registry.md

# Debian packages in build/release/packages.
package: configure
	ninja -C $(BUILD) keepsetd keepset keepset_shared man
	cpack --config $(BUILD)/CPackConfig.cmake

# Installs, runs and purges the packages in a clean Debian 12, runs the unit under a booted systemd, and the container image.
# Root, some 250 MB of archive the first time.
test-package: package
	@tools/setup package
	lintian --allow-root --fail-on error $(BUILD)/packages/*.deb
	tests/package/install_test $(BUILD)/packages $(BUILD)/package-test
	tests/package/unit_test $(BUILD)/packages $(BUILD)/package-test
	tests/package/image_test $(BUILD)/packages $(BUILD)/package-test

# Manifests, chart and container file without a cluster: rendered, held against schemas and against each other.
test-deploy: configure
	ninja -C $(BUILD) keepsetd keepset
	@tools/venv $(VENV_DEPLOY) test,deploy
	@tools/kube_tools $(VENV_DEPLOY)/kube
	KEEPSET_BUILD=$(CURDIR)/$(BUILD) $(VENV_DEPLOY)/bin/python -m pytest -q tests/deploy

# A directory for another machine with an NVIDIA driver: docs/gpu.md. Needs nvcc here, no device.
gpu-bundle: setup
	cmake --preset release -DKEEPSET_CUDA=ON >/dev/null
	ninja -C $(BUILD) cuda_device_test gpu_bench gpu_ipc_test keepsetd keepset
	tools/gpu-bundle $(BUILD) out/gpu-bundle

setup:
	@tools/setup build test

configure: setup
	@test -f $(BUILD)/build.ninja || cmake --preset release

build: configure
	ninja -C $(BUILD)

python: setup
	@tools/venv $(VENV)

# Format, clang-tidy, lints, sanitizers and a short fuzz run: what CI does beside the tests.
check:
	@tools/setup build test check
	tools/check

clean:
	rm -rf build $(VENV) $(VENV_HF) $(VENV_DEPLOY) $(VENV_EVIDENCE)
