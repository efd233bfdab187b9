#!/usr/bin/env bash
# Build the wheel, install it without the source tree beside it, and run it from another folder.
# usage: tests/wheel.sh PYTHON   (an interpreter whose environment has the dependencies)
set -euo pipefail
python=$(realpath -s "$1")
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m build --quiet --wheel --outdir "$work/dist" "$source"
"$python" -m pip install --quiet --no-deps --no-index --target "$work/site" "$work"/dist/polyref-*.whl
cd "$work"
# -P and -I would hide PYTHONPATH; the target folder comes first, so the editable source is not what runs.
export PYTHONPATH="$work/site"
"$python" - <<'PY'
import losses, models, orchestrator, polyref, preferences, tune_spaces
for package in (losses, models, orchestrator, polyref, preferences, tune_spaces):
    assert "/site/" in package.__file__, package.__file__
PY
"$python" -m orchestrator --version
"$python" -m orchestrator schema run > schema.json
"$python" -c "import json; assert 'loss' in json.load(open('schema.json'))['properties']"
"$python" -m orchestrator explain training.pairs_per_step > explained.txt
grep -q "default *64" explained.txt
# Every example is in the wheel, and one of each kind can be written and read.
diff <(cd "$source/configs" && ls *.yaml sweeps/*.yaml) <(cd site/orchestrator/examples && ls *.yaml sweeps/*.yaml)
"$python" -m orchestrator init --list > examples.txt
grep -q "^sweeps/which-loss" examples.txt
"$python" -m orchestrator init dpo
"$python" -m orchestrator init sweeps/which-loss
! "$python" -m orchestrator init dpo 2> refusal.txt
grep -q "dpo.yaml exists" refusal.txt
"$python" - <<'PY'
from orchestrator.config.run import load_run
from orchestrator.config.sweep import load_sweep
assert load_run("dpo.yaml").preset == "dpo"
assert load_sweep("which-loss.yaml").base.preset == "gdpo"
PY
echo "the wheel installs and runs"
