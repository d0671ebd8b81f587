# `make demo` and `make test` set everything up by themselves: .venv, torch for this machine, the project.
.PHONY: demo test results costs train clean

demo:
	@.ci/setup .venv
	.venv/bin/vtr run --sample 2 --policy fastv:keep=0.02,layer=2 --compare --show demo.png

test:
	@.ci/setup .venv dev
	.venv/bin/python -m pytest -m "not slow" -n auto

# the committed figures again: what policies keep on the pocket model, and (on a machine that does nothing else) what they cost
results:
	@.ci/setup .venv
	eval/measure.sh accuracy

costs:
	@.ci/setup .venv
	eval/measure.sh cost

# train the pocket model again, from nothing (hours)
train:
	@.ci/setup .venv
	.venv/bin/python -m vtr.pocket.train --out runs/pocket

clean:
	rm -rf .venv build dist demo.png *.egg-info
