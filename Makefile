# The front door. Every target installs what it needs and works a second time in seconds.
BUILD := build/release
VENV := .venv
JOBS := $(shell nproc)

.PHONY: demo test build configure python setup check clean

demo: configure python
	ninja -C $(BUILD) keepsetd keepset
	$(VENV)/bin/python -m keepset.demo --keepsetd $(BUILD)/service/keepsetd

test: build python
	ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)
	KEEPSET_BUILD=$(CURDIR)/$(BUILD) $(VENV)/bin/python -m pytest -q tests/python

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
	rm -rf build $(VENV)
