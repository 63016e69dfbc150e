#!/usr/bin/env bash
# Hydra 1.3.8 with OmegaConf 2.3.1: a field that is typed `str` gets another text than was written, and nothing says so.
# Short commit hashes that consist of digits and one `e` are floats (12e4567 is infinity), a tag 1.10 becomes 1.1, and in a YAML
# file 0123456 is octal and 4:00:00 a number of seconds. `revision` of a Hugging Face model is such a field.
# Seen on 2026-11-28:
#   command line 12e4567 -> 'inf'       command line 1.10 -> '1.1'
#   YAML 12e4567 -> 'inf'   YAML 1.10 -> '1.1'   YAML 0123456 -> '42798'   YAML 4:00:00 -> '14400'
# Exits non-zero where that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8 omegaconf==2.3.1
cat >"$folder/app.py" <<'PY'
import sys
from dataclasses import dataclass

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


@dataclass
class Model:
    revision: str = "main"


ConfigStore.instance().store(name="model", node=Model)
found = {}
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    for written in ("12e4567", "1.10"):
        found["command line", written] = compose("model", [f"revision={written}"]).revision
for written in ("12e4567", "1.10", "0123456", "4:00:00"):
    read = OmegaConf.create(f"revision: {written}")  # as a YAML file
    found["YAML", written] = OmegaConf.merge(OmegaConf.structured(Model), read).revision
for (where, written), text in found.items():
    print(f"{where} {written} -> {text!r}")
assert list(found.values()) == ["inf", "1.1", "inf", "1.1", "42798", "14400"], "this has changed"
PY
mkdir "$folder/conf"
"$folder/venv/bin/python" "$folder/app.py" "$folder/conf"
