# Only a door to make.py, which does the work on every system: python make.py TARGET
PYTHON ?= python3
TARGETS := help book test read lab notebooks check bench scores real setup pins clean

export CHAPTER
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: $(TARGETS)

$(TARGETS):
	@$(PYTHON) make.py $@
