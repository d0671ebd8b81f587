# `make demo` and `make test` set everything up by themselves: .venv, torch for this machine, the project.
.PHONY: demo lint types test docs wheel results costs train clean

demo:
	@.ci/setup .venv
	.venv/bin/vtr run --sample 2 --policy fastv:keep=0.02,layer=2 --compare --show demo.png

lint:
	@.ci/setup .venv dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types:
	@.ci/setup .venv dev
	.venv/bin/python -m mypy vtr integrations eval tests/public_api.py

test:
	@.ci/setup .venv dev
	.venv/bin/python -m pytest -m "not slow" -n auto

# the site, into site/; sdist and wheel, into dist/, and a trial of the wheel
docs:
	.ci/docs site

wheel:
	.ci/wheel

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
	rm -rf .venv build dist site demo.png *.egg-info
