#!/usr/bin/env bash
# Ray 2.60.0: its local cluster for tests of autoscaling cannot be made from the package, as a file that it reads is not in it.
#
# ray.cluster_utils.AutoscalingCluster is how Ray's documentation and its users' tests run an autoscaler on one machine, with
# nodes that are processes. Its constructor opens autoscaler/_private/fake_multi_node/example.yaml, which the wheel does not
# have (the provider's Python is there): FileNotFoundError. The second autoscaler reads the same file for the defaults of a
# cluster whose provider is fake_multinode, so its monitor ends, and with it `ray start`, however complete the given
# configuration is. The first autoscaler starts with a configuration that names every key (file_mounts, setup_commands ...) and
# brings nodes only with the undocumented provider key use_node_id_as_ip: without it the head is no active node to it.
#
# Needs python3.11 and network for pip; takes half a minute. Exits 1 where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
from pathlib import Path

import ray
from ray.autoscaler._private import providers
from ray.cluster_utils import AutoscalingCluster

NAME = "autoscaler/_private/fake_multi_node/example.yaml"
provider = Path(ray.__file__).parent / NAME
seen = {}
try:
    AutoscalingCluster(head_resources={"CPU": 1}, worker_node_types={})
except FileNotFoundError as error:
    seen["AutoscalingCluster"] = str(error.filename).endswith(NAME)
try:
    providers._get_default_config({"type": "fake_multinode"})  # what the second autoscaler asks for
except FileNotFoundError as error:
    seen["defaults of fake_multinode"] = str(error.filename).endswith(NAME)
there = sorted(path.name for path in provider.parent.glob("*.*"))
print(f"ray {ray.__version__}: not found in", ", ".join(seen), "| the package has", ", ".join(there))
assert seen == {"AutoscalingCluster": True, "defaults of fake_multinode": True}
assert "node_provider.py" in there and "example.yaml" not in there
PYTHON
