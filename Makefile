# `make demo` and `make test` set everything up by themselves: .venv, torch for this machine, the project.
.PHONY: demo test results train clean

demo:
	@.ci/setup .venv
	.venv/bin/vtr run --sample 2 --policy fastv:keep=0.02,layer=2 --compare --show demo.png

test:
	@.ci/setup .venv dev
	.venv/bin/python -m pytest -m "not slow" -n auto

# the table of the README (docs/results/budgets.md): accuracy, latency and FLOPs of policies at equal budgets
results:
	@.ci/setup .venv
	.venv/bin/python -m vtr.eval.budgets --out docs/results

# train the pocket model again, from nothing (hours)
train:
	@.ci/setup .venv
	.venv/bin/python -m vtr.pocket.train --out runs/pocket

clean:
	rm -rf .venv build dist demo.png *.egg-info
